"""Whether a promise was kept, and how often over a time. Times are seconds."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tidegate.core import promises
from tidegate.core.types import Objectives

_SLOTS: Final = 60
"""A window moves on in so many steps."""


@dataclass(frozen=True, slots=True)
class Served:
    """What a client got, from when its request came. None is what nobody measured.

    `streamed`: its answer went out as it was made, so that its first token can be told from its last.
    """

    prompt_tokens: int
    output_tokens: int
    streamed: bool
    ttft_s: float | None = None
    completion_s: float | None = None

    @property
    def tpot_s(self) -> float | None:
        """Mean time between two output tokens; None where there are not two, or they came at once."""
        if not self.streamed or self.output_tokens < 2 or self.ttft_s is None or self.completion_s is None:
            return None
        return max(0.0, self.completion_s - self.ttft_s) / (self.output_tokens - 1)


def kept(promised: Objectives, got: Served) -> bool | None:
    """Whether all that was promised was kept; None where nothing was promised that can be told.

    A whole answer shows no first token. It is in time when its end comes before the last token of a
    stream that keeps its promises would; without a promised pace that cannot be told. An answer
    without output tokens, such as an embedding, is due when a first token would be.
    """
    late = unknown = told = False
    for most_s, found_s in _checks(promised, got):
        if most_s is None:
            continue
        if found_s is None:
            unknown = True
        else:
            told = True
            late = late or found_s > most_s
    return False if late else True if told and not unknown else None


def _checks(promised: Objectives, got: Served) -> Iterator[tuple[float | None, float | None]]:
    """What was promised at most, and what was found; None for what was not."""
    yield promised.completion_s, got.completion_s
    if got.streamed and got.output_tokens > 1:
        yield promised.tpot_s, got.tpot_s
    if promised.ttft_s is None:
        return
    due_s = promises.first_token_due(promised, got.prompt_tokens, 0.0)
    if got.streamed:
        yield due_s, got.ttft_s
    elif not got.output_tokens:
        yield due_s, got.completion_s
    elif promised.tpot_s is not None:
        yield due_s + promised.tpot_s * (got.output_tokens - 1), got.completion_s


class Window:
    """How many of how many promises were kept lately, over `width_s`, in steps of a sixtieth of it."""

    __slots__ = ("_slots", "width_s")

    def __init__(self, width_s: float) -> None:
        self.width_s = width_s
        self._slots: deque[tuple[int, int, int]] = deque()

    def add(self, now: float, *, kept: bool) -> None:
        """Count one."""
        slot = int(now * _SLOTS / self.width_s)
        self._forget(slot)
        if self._slots and self._slots[-1][0] >= slot:
            last, good, judged = self._slots.pop()
            self._slots.append((last, good + kept, judged + 1))
        else:
            self._slots.append((slot, int(kept), 1))

    def counts(self, now: float) -> tuple[int, int]:
        """Kept, and judged."""
        self._forget(int(now * _SLOTS / self.width_s))
        return sum(s[1] for s in self._slots), sum(s[2] for s in self._slots)

    def _forget(self, slot: int) -> None:
        while self._slots and self._slots[0][0] <= slot - _SLOTS:
            self._slots.popleft()
