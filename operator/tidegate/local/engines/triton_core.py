"""What the emulated Triton does, whatever the protocol: models, requests, statistics."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from tidegate.local.engines.common import WORD, count_tokens, draw_output
from tidegate.local.engines.driver import EngineDriver, Generation, Signal
from tidegate.local.engines.triton_args import ModelSpec, TritonArgs
from tidegate.sim.types import Request

VERSION = "1"
SERVER_VERSION = "2.51.0"
EXTENSIONS = (
    "model_repository",
    "model_repository(unload_dependents)",
    "statistics",
    "binary_tensor_data",
    "generate",
)
# Sampling's default in the vLLM backend.
DEFAULT_MAX_TOKENS = 16
# `dynamic_batching{priority_levels, default_priority_level}`: 1 is first; 0 and what is beyond
# the levels take the default.
PRIORITY_LEVELS = 100
DEFAULT_PRIORITY = 50


class Code(StrEnum):
    """Triton's error codes, as far as they are met here."""

    INVALID = "INVALID_ARG"
    NOT_FOUND = "NOT_FOUND"
    UNAVAILABLE = "UNAVAILABLE"


class TritonError(Exception):
    """An error of Triton's own kinds; each protocol has its way to say it."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class Ask:
    """An inference request in plain values. `shape` is its tensors'; one prompt for each element."""

    prompts: tuple[str, ...]
    shape: tuple[int, ...] = (1,)
    id: str = ""
    priority: int = 0
    max_tokens: int = DEFAULT_MAX_TOKENS
    min_tokens: int = 0
    ignore_eos: bool = False
    stream: bool = False
    with_prompt: bool = True


@dataclass(slots=True)
class Tally:
    """Cumulative statistics of a model; durations in nanoseconds."""

    success: int = 0
    success_ns: int = 0
    queue_ns: int = 0
    infer_ns: int = 0
    inferences: int = 0
    failed: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("REJECTED", "CANCELED", "BACKEND", "OTHER"), 0)
    )
    failed_ns: int = 0
    last_ms: int = 0


class Model:
    """A model of the repository, loaded or not. Its engine lives as long as the server."""

    def __init__(self, spec: ModelSpec, speed: float, *, ready: bool) -> None:
        self.spec = spec
        self.driver = EngineDriver(spec.engine, speed)
        self.tally = Tally()
        self.ready = ready
        self.reason = "" if ready else "not loaded"

    @property
    def name(self) -> str:
        """Its name in the repository."""
        return self.spec.name


class Answer:
    """The answers in the making for one request; `tokens` may be awaited as they come."""

    def __init__(self, ask: Ask, generations: Sequence[Generation], signal: Signal) -> None:
        self._ask = ask
        self._generations = generations
        self._signal = signal

    async def whole(self) -> list[str]:
        """Wait for the end; the text for each prompt, after the prompt itself if that was asked for."""
        while not all(g.done for g in self._generations):
            await self._signal.wait()
        return [
            (prompt if self._ask.with_prompt else "") + WORD * (g.tokens - (g.finish_reason == "stop"))
            for prompt, g in zip(self._ask.prompts, self._generations, strict=True)
        ]

    async def pieces(self) -> AsyncIterator[list[str]]:
        """The text of each new token of a single prompt, in batches of those that came together."""
        generation = self._generations[0]
        sent = 0
        while sent < generation.request.output_tokens:
            await self._signal.wait()
            words = [WORD] * (generation.tokens - sent)
            sent = generation.tokens
            # The token that ends an answer by itself has no text.
            if generation.done and generation.finish_reason == "stop":
                words[-1] = ""
            yield words


class Triton:
    """The server behind both protocols."""

    def __init__(self, args: TritonArgs, speed: float) -> None:
        self._args = args
        self._ids = itertools.count()
        self.closing = False
        self.models = {m.name: Model(m, speed, ready=m.name in args.load) for m in args.models}

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return not self.closing

    async def drain(self) -> None:
        """Refuse what is new and let what runs finish, as long as `--exit-timeout-secs` says."""
        self.closing = True
        idle = asyncio.gather(*(m.driver.idle() for m in self.models.values()))
        try:
            await asyncio.wait_for(idle, self._args.exit_timeout_s)
            # The last bytes are still to be written.
            await asyncio.sleep(0.05)
        except TimeoutError:
            pass
        for model in self.models.values():
            model.driver.close()

    def model(self, name: str, version: str = "") -> Model:
        """A loaded model.

        Raises:
            TritonError: it is unknown, not loaded, or has no such version.
        """
        model = self.models.get(name)
        if model is None:
            raise TritonError(Code.NOT_FOUND, f"Request for unknown model: '{name}' is not found")
        if version not in {"", VERSION}:
            raise TritonError(
                Code.NOT_FOUND, f"Request for unknown model: '{name}' version {version} is not found"
            )
        if not model.ready:
            raise TritonError(
                Code.NOT_FOUND, f"Request for unknown model: '{name}' has no available versions"
            )
        return model

    def load(self, name: str, *, ready: bool) -> None:
        """Load or unload a model; what runs on it finishes.

        Raises:
            TritonError: the server does not load on request, or does not know the model.
        """
        verb = "load" if ready else "unload"
        if not self._args.explicit:
            message = "explicit model load / unload is not allowed unless --model-control-mode=explicit"
            raise TritonError(Code.UNAVAILABLE, message)
        model = self.models.get(name)
        if model is None:
            message = f"failed to {verb} '{name}', failed to poll from model repository"
            raise TritonError(Code.INVALID, message)
        model.ready = ready
        model.reason = "" if ready else "unloaded"

    @asynccontextmanager
    async def infer(self, model: Model, ask: Ask) -> AsyncIterator[Answer]:
        """Run a request; leaving the context before its end cancels it and frees its room.

        Raises:
            TritonError: the server is closing, or the request cannot be served.
        """
        if self.closing:
            raise TritonError(Code.UNAVAILABLE, "Server is stopping, request is not accepted")
        signal = Signal()
        generations = [self._generation(model, ask, prompt, signal) for prompt in ask.prompts]
        start = time.monotonic_ns()
        try:
            for generation in generations:
                model.driver.submit(generation)
            yield Answer(ask, generations, signal)
        finally:
            for generation in generations:
                model.driver.abort(generation)
            _count(model.tally, generations, time.monotonic_ns() - start)

    def _generation(self, model: Model, ask: Ask, prompt: str, signal: Signal) -> Generation:
        tokens = count_tokens(prompt)
        if tokens + ask.max_tokens > model.spec.max_model_len:
            raise TritonError(
                Code.INVALID,
                f"the prompt's {tokens} tokens and max_tokens {ask.max_tokens} exceed the model's"
                f" {model.spec.max_model_len}; lower max_tokens or shorten text_input",
            )
        output, ends = ask.max_tokens, False
        if not ask.ignore_eos:
            output, ends = draw_output(prompt.encode(), ask.min_tokens, ask.max_tokens)
        priority = ask.priority if 1 <= ask.priority <= PRIORITY_LEVELS else DEFAULT_PRIORITY
        return Generation(
            Request(str(next(self._ids)), tokens, output, priority),
            signal,
            each_token=ask.stream,
            finish_reason="stop" if ends else "length",
        )


def _count(tally: Tally, generations: Sequence[Generation], took_ns: int) -> None:
    """Count a request, ended or cancelled, in its model's statistics."""
    tally.last_ms = time.time_ns() // 1_000_000
    if not all(g.done for g in generations):
        tally.failed["CANCELED"] += 1
        tally.failed_ns += took_ns
        return
    queued_ns = int(max(g.scheduled - g.arrival for g in generations) * 1e9)
    tally.success += 1
    tally.success_ns += took_ns
    tally.queue_ns += queued_ns
    tally.infer_ns += max(0, took_ns - queued_ns)
    tally.inferences += len(generations)
