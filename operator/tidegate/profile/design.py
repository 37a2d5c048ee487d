"""Which experiments tell an engine's step time. Pure.

Three kinds, since no one of them tells every term:
- prefill: one prompt at a time, its time to first token;
- decode: streams that all decode, their time between tokens, at short and at long contexts;
- mixed: prompts that arrive while streams decode: their chunks share steps with the decodes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Final

SHORT: Final = 64
"""Prompt tokens of streams whose context should not matter."""
WINDOW: Final = 16
"""Steps that are measured while all streams decode."""
TURNAROUND_S: Final = 0.05
"""How long a busy client may take between two requests."""
SEND_S: Final = 0.002
"""The same, for each of many that it sends at once."""
_LEAST: Final = 32
_LONG_TOKENS: Final = 16_384
"""Context that all streams of a long trial hold together: it must show, and it must be prefilled."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds the design: the engine's chunk and longest request, in tokens, and streams at once."""

    chunk: int
    max_model_len: int
    streams: int

    def __post_init__(self) -> None:
        """Refuse limits that leave nothing to measure."""
        if self.streams < 1:
            raise ValueError(f"streams must be at least 1, got {self.streams}")
        if self.chunk < 2 * max(self.streams, _LEAST):
            raise ValueError(
                f"chunk must be at least {2 * max(self.streams, _LEAST)} tokens (twice the streams, or 64),"
                f" got {self.chunk}"
            )
        if self.max_model_len < 4 * SHORT:
            raise ValueError(f"max_model_len must be at least {4 * SHORT}, got {self.max_model_len}")


@dataclass(frozen=True, slots=True)
class Prefill:
    """One prompt of so many tokens, alone."""

    tokens: int

    def __str__(self) -> str:
        return f"prefill {self.tokens}"


@dataclass(frozen=True, slots=True)
class Decode:
    """Streams that decode together, each after a prompt of `context` tokens."""

    streams: int
    context: int

    def __str__(self) -> str:
        return f"decode {self.streams} × {self.context}"


@dataclass(frozen=True, slots=True)
class Mixed:
    """Prompts, one after the other, that arrive while streams decode."""

    streams: int
    context: int
    prompts: tuple[int, ...]

    def __str__(self) -> str:
        return f"mixed {self.streams} × {self.context}, prompts up to {max(self.prompts)}"


Trial = Prefill | Decode | Mixed


def trials(limits: Limits) -> list[Trial]:
    """One round of experiments. The kinds take turns: a round that is cut short tells of each."""
    kinds = (list(_prefills(limits)), list(_decodes(limits)), list(_mixed(limits)))
    return [t for t in chain.from_iterable(zip_longest(*kinds)) if t is not None]


def decode_tokens(trial: Decode | Mixed, limits: Limits, step_s: float) -> int:
    """Output tokens that each stream of a trial needs to outlast what is measured.

    Args:
        trial: what is run.
        limits: of the engine.
        step_s: about what a step takes, seconds: how many pass while the client is busy.
    """
    room = limits.chunk - trial.streams
    # The first stream decodes while the last ones are sent and prefilled.
    tokens = WINDOW + 4 + math.ceil((TURNAROUND_S + SEND_S * trial.streams) / step_s)
    tokens += math.ceil(trial.streams * trial.context / room)
    if isinstance(trial, Mixed):
        between = 4 + math.ceil(TURNAROUND_S / step_s)
        tokens += sum(math.ceil(p / room) + between for p in trial.prompts)
    return min(tokens, limits.max_model_len - trial.context - 8)


def _prefills(limits: Limits) -> Iterator[Prefill]:
    """Prompts of one step, each longer than the one before by half its root; then of several."""
    longest = limits.max_model_len - 8
    one_step = min(int(0.95 * limits.chunk), longest)
    steps = max(1, math.ceil(2 * math.log2(one_step / _LEAST)))
    sizes = [round(_LEAST * (one_step / _LEAST) ** (i / steps)) for i in range(steps + 1)]
    # From the middle outwards, so that few of them span the range already.
    for size in sorted(set(sizes), key=lambda s: (sizes.index(s) % 3, s)):
        yield Prefill(size)
    # With little and with much behind whole chunks: else what is dear with a context, the step or each
    # of its tokens, could not be told.
    for chunks in (1.5, 2.4, 1.06, 4.06):
        if chunks * limits.chunk <= longest:
            yield Prefill(int(chunks * limits.chunk))


def _decodes(limits: Limits) -> Iterator[Decode]:
    counts = [2**i for i in range(limits.streams.bit_length())]
    if counts[-1] != limits.streams:
        counts.append(limits.streams)
    counts = [counts[0], counts[-1], *counts[1:-1]] if len(counts) > 1 else counts
    for count in counts:
        yield Decode(count, SHORT)
        context = _long_context(limits, count)
        if context >= 4 * SHORT and (count in counts[:2] or count == 8):
            yield Decode(count, context)


def _long_context(limits: Limits, streams: int) -> int:
    return min(_LONG_TOKENS // streams, 3 * limits.max_model_len // 4)


def _mixed(limits: Limits) -> Iterator[Mixed]:
    counts = sorted({min(n, limits.streams) for n in (2, 8, limits.streams)})
    for count in counts:
        yield Mixed(count, SHORT, tuple(_prompts(limits, count)))
    context = _long_context(limits, counts[-2] if len(counts) > 1 else counts[0])
    if context >= 4 * SHORT:
        count = counts[-2] if len(counts) > 1 else counts[0]
        yield Mixed(count, context, tuple(_prompts(limits, count)))


def _prompts(limits: Limits, streams: int) -> Iterator[int]:
    """Parts of a chunk; and two chunks and a rest, the only steps with earlier chunks behind them."""
    room, longest = limits.chunk - streams, limits.max_model_len - 8
    for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 0.9):
        if (size := int(share * room)) <= longest and size >= 1:
            yield size
    if (size := int(2.4 * room)) <= longest:
        yield size
