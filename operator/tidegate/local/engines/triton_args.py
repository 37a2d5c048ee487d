"""tritonserver's command line, as far as the emulator acts on it, and the models that it finds."""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tidegate.local.engines.common import Knobs
from tidegate.sim.types import EngineConfig, Policy

logger = logging.getLogger("tidegate.engine")

# As in the vLLM emulator: the context of Llama-3-8B.
DEFAULT_MAX_MODEL_LEN = 8192
MODELS = "TIDEGATE_EMULATOR_MODELS"
# vLLM's engine arguments that a model's `1/model.json` (Triton's vLLM backend) may set.
_ENGINE_ARGS = {
    "max_num_seqs": "max_num_seqs",
    "max_num_batched_tokens": "max_num_batched_tokens",
    "block_size": "block_size",
    "num_gpu_blocks_override": "num_blocks",
}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model of the repository and the engine that runs it."""

    name: str
    engine: EngineConfig
    max_model_len: int


@dataclass(frozen=True, slots=True)
class TritonArgs:
    """What the command line and the repository said. `explicit`: models are loaded on request only."""

    models: tuple[ModelSpec, ...]
    load: frozenset[str]
    explicit: bool
    host: str
    http_port: int
    grpc_port: int | None
    metrics_port: int | None
    exit_timeout_s: float
    not_emulated: tuple[str, ...] = ()


class NoModelsError(Exception):
    """Nothing to serve; tritonserver too ends when its repository cannot be read."""


def _bool(text: str) -> bool:
    if text.lower() in {"true", "1", "on"}:
        return True
    if text.lower() in {"false", "0", "off"}:
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _port(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{value} is not a port")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tritonserver", allow_abbrev=False)
    parser.add_argument("--model-repository", "--model-store", action="append", default=[])
    parser.add_argument("--model-control-mode", choices=["none", "poll", "explicit"], default="none")
    parser.add_argument("--load-model", action="append", default=[])
    parser.add_argument("--http-address", default=None)
    parser.add_argument("--http-port", type=_port, default=8000)
    parser.add_argument("--grpc-port", type=_port, default=8001)
    parser.add_argument("--allow-grpc", type=_bool, default=True)
    parser.add_argument("--metrics-port", type=_port, default=8002)
    parser.add_argument("--allow-metrics", type=_bool, default=True)
    parser.add_argument("--exit-timeout-secs", type=float, default=30.0)
    return parser


def parse(argv: Sequence[str], knobs: Knobs, env: Mapping[str, str]) -> TritonArgs:
    """Read the arguments of `tritonserver`, with or without that word, and find the models.

    Models are the folders of `--model-repository`; where there is none, `--load-model` and the
    variable `TIDEGATE_EMULATOR_MODELS` (comma-separated) name them.

    Raises:
        SystemExit: code 2 and usage on stderr, for values that make no sense.
        NoModelsError: no model is named anywhere.
    """
    parser = _parser()
    words = list(argv[1:] if argv[:1] == ["tritonserver"] else argv)
    known, rest = parser.parse_known_args(words)
    if rest and not rest[0].startswith("-"):
        parser.error(f"unrecognized arguments: {rest[0]}")
    try:
        base = _engine_config(env, knobs)
        models = _repository(known.model_repository, base)
        if not models:
            names = [n for n in known.load_model if n != "*"]
            names += [n.strip() for n in env.get(MODELS, "").split(",") if n.strip()]
            models = {n: ModelSpec(n, base, min(DEFAULT_MAX_MODEL_LEN, base.kv_tokens)) for n in names}
    except ValueError as error:
        parser.error(str(error))
    if not models:
        where = ", ".join(known.model_repository) or "none given"
        raise NoModelsError(
            f"no model to serve: --model-repository ({where}) has no folder here;"
            f" name models with {MODELS}=NAME[,NAME] or --load-model=NAME"
        )
    explicit = known.model_control_mode == "explicit"
    load = frozenset(models) if not explicit or "*" in known.load_model else frozenset(known.load_model)
    if unknown := sorted(load - set(models)):
        raise NoModelsError(f"--load-model: {', '.join(unknown)} is not in the repository")
    return TritonArgs(
        models=tuple(models.values()),
        load=load,
        explicit=explicit,
        host=knobs.address(known.http_address),
        http_port=known.http_port,
        grpc_port=known.grpc_port if known.allow_grpc else None,
        metrics_port=known.metrics_port if known.allow_metrics else None,
        exit_timeout_s=known.exit_timeout_secs,
        not_emulated=tuple(w.partition("=")[0] for w in rest if w.startswith("-")),
    )


def _engine_config(env: Mapping[str, str], knobs: Knobs) -> EngineConfig:
    """The engine of a model that says nothing about it itself."""
    config = EngineConfig(num_blocks=knobs.kv_blocks, policy=Policy.PRIORITY)
    for name, variable in (
        ("max_num_seqs", "TIDEGATE_EMULATOR_MAX_NUM_SEQS"),
        ("max_num_batched_tokens", "TIDEGATE_EMULATOR_MAX_NUM_BATCHED_TOKENS"),
    ):
        text = env.get(variable)
        if text:
            if not text.isdecimal():
                raise ValueError(f"{variable} must be a whole number, got {text!r}")
            config = _with(config, name, int(text))
    return config


def _with(config: EngineConfig, name: str, value: int) -> EngineConfig:
    changes: dict[str, Any] = {name: value}
    return replace(config, **changes)


def _repository(folders: Sequence[str], base: EngineConfig) -> dict[str, ModelSpec]:
    """The models of the repository's folders: each sub-folder is one."""
    found = {}
    for folder in folders:
        path = Path(folder)
        if path.is_dir():
            for model in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")):
                found[model.name] = _read(model, base)
    return found


def _read(folder: Path, base: EngineConfig) -> ModelSpec:
    """A model's own engine arguments, where it is one of Triton's vLLM backend."""
    length = min(DEFAULT_MAX_MODEL_LEN, base.kv_tokens)
    file = folder / "1" / "model.json"
    if not file.is_file():
        return ModelSpec(folder.name, base, length)
    raw = json.loads(file.read_text())
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: must hold an object of engine arguments")  # noqa: TRY004 - all are told alike
    config = base
    for theirs, ours in _ENGINE_ARGS.items():
        if theirs in raw:
            config = _with(config, ours, int(raw[theirs]))
    length = min(int(raw.get("max_model_len", DEFAULT_MAX_MODEL_LEN)), config.kv_tokens)
    return ModelSpec(folder.name, config, length)
