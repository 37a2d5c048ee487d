"""vLLM's command line, as far as the emulator acts on it."""

import argparse
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tidegate.local.engines.common import Knobs
from tidegate.sim.types import EngineConfig, Policy

logger = logging.getLogger("tidegate.engine")

# Of Llama-3-8B, the model that the step-time fit is for.
DEFAULT_MAX_MODEL_LEN = 8192
# Flags that change nothing here and whose effect nobody would miss.
_HARMLESS = frozenset(
    {
        "--disable-log-requests",
        "--disable-log-stats",
        "--disable-uvicorn-access-log",
        "--download-dir",
        "--dtype",
        "--enable-chunked-prefill",
        "--enforce-eager",
        "--gpu-memory-utilization",
        "--load-format",
        "--no-enable-log-requests",
        "--tokenizer",
        "--trust-remote-code",
        "--uvicorn-log-level",
    }
)
_SUFFIXES = {"k": 10**3, "m": 10**6, "K": 2**10, "M": 2**20}


@dataclass(frozen=True, slots=True)
class VllmArgs:
    """What the command line said. `names` are the served model names; the first labels metrics."""

    model: str
    names: tuple[str, ...]
    host: str
    port: int
    max_model_len: int
    shutdown_timeout_s: float
    engine: EngineConfig
    not_emulated: tuple[str, ...] = ()


def _length(text: str) -> int:
    """A length such as 8192, 8k (8,000) or 8K (8,192), as vLLM reads them."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmM]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a length such as 8192, 8k or 8K")
    return int(float(match[1]) * _SUFFIXES.get(match[2], 1))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm serve", allow_abbrev=False)
    parser.add_argument("--model", default=None)
    parser.add_argument("--served-model-name", nargs="+", default=None)
    parser.add_argument("--host", default=None)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-num-seqs", type=_positive, default=256)
    parser.add_argument("--max-num-batched-tokens", type=_length, default=None)
    parser.add_argument("--block-size", type=_positive, default=16)
    parser.add_argument("--num-gpu-blocks-override", type=_positive, default=None)
    parser.add_argument("--max-model-len", type=_length, default=None)
    parser.add_argument("--scheduling-policy", choices=[p.value for p in Policy], default="fcfs")
    parser.add_argument("--tensor-parallel-size", "-tp", type=_positive, default=1)
    parser.add_argument("--pipeline-parallel-size", "-pp", type=_positive, default=1)
    parser.add_argument("--data-parallel-size", "-dp", type=_positive, default=1)
    parser.add_argument("--shutdown-timeout", type=float, default=0.0)
    parser.add_argument("--async-scheduling", action=argparse.BooleanOptionalAction, default=True)
    # vLLM's default is on. Here it is asked for: most loads repeat the same few texts.
    parser.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--scheduler-reserve-full-isl", action=argparse.BooleanOptionalAction, default=True)
    return parser


def parse(argv: Sequence[str], knobs: Knobs) -> VllmArgs:
    """Read the arguments of `vllm serve`, with or without the words `vllm serve`.

    Flags may be written with underscores, as vLLM allows. Unknown flags are kept in `not_emulated`.

    Raises:
        SystemExit: code 2 and vLLM-like usage on stderr, for values that vLLM would refuse.
    """
    parser = _parser()
    words = [_dashed(w) for w in argv]
    words = words[1:] if words[:1] == ["serve"] else words
    positional = words.pop(0) if words and not words[0].startswith("-") else None
    known, rest = parser.parse_known_args(words)
    not_emulated = _unknown(parser, rest)
    if positional is not None and known.model is not None and known.model != positional:
        parser.error("the model is given twice: as the first argument and with --model")
    model = known.model or positional
    if not model:
        parser.error("the following arguments are required: --model")
    if not 1 <= known.port <= 65535:
        parser.error(f"argument --port: {known.port} is not a port")
    if known.shutdown_timeout < 0:
        parser.error("argument --shutdown-timeout: must not be negative")
    budget = known.max_num_batched_tokens or max(2048, known.max_num_seqs)
    if budget < known.max_num_seqs:
        parser.error(
            f"max_num_batched_tokens ({budget}) must be greater than or equal to"
            f" max_num_seqs ({known.max_num_seqs})."
        )
    try:
        engine = EngineConfig(
            max_num_seqs=known.max_num_seqs,
            max_num_batched_tokens=budget,
            block_size=known.block_size,
            num_blocks=known.num_gpu_blocks_override or knobs.kv_blocks,
            policy=Policy(known.scheduling_policy),
            scheduler_reserve_full_isl=known.scheduler_reserve_full_isl,
            async_scheduling=known.async_scheduling,
            enable_prefix_caching=known.enable_prefix_caching,
        )
    except ValueError as error:
        parser.error(str(error))
    length = min(DEFAULT_MAX_MODEL_LEN, engine.kv_tokens)
    if known.max_model_len is not None:
        length = known.max_model_len
        if not 1 <= length <= engine.kv_tokens:
            parser.error(
                f"max_model_len ({length}) must be between 1 and what the KV cache holds"
                f" ({engine.kv_tokens} tokens): lower --max-model-len or raise the number of blocks."
            )
    parsed = VllmArgs(
        model=model,
        names=tuple(known.served_model_name or [model]),
        host=knobs.address(known.host),
        port=known.port,
        max_model_len=length,
        shutdown_timeout_s=known.shutdown_timeout,
        engine=engine,
    )
    return replace(parsed, not_emulated=not_emulated)


def _dashed(word: str) -> str:
    """`--max_num_seqs=4` → `--max-num-seqs=4`."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _unknown(parser: argparse.ArgumentParser, rest: Sequence[str]) -> tuple[str, ...]:
    """Flags that nothing here acts on; a word that belongs to no flag is an error."""
    flags: list[str] = []
    seen_flag = False
    for word in rest:
        if word.startswith("-") and not re.fullmatch(r"-\d+(\.\d+)?", word):
            seen_flag = True
            flag = word.partition("=")[0]
            if flag not in _HARMLESS:
                flags.append(flag)
        elif not seen_flag:
            parser.error(f"unrecognized arguments: {word}")
    return tuple(flags)
