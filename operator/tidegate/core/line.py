"""Who waits: the requests of one class of one model, oldest first."""

import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tidegate.core.flowtypes import Ask
from tidegate.core.load import Rate

_LOOK: Final = 64
"""So many of the oldest are looked at for one with a short prompt."""


@dataclass(slots=True)
class Waiting:
    """A request that waits, `since` when, seconds."""

    ask: Ask
    since: float


class Line:
    """The requests of one (model, class) that wait, and how fast they leave.

    Two lines in fact, each oldest first: answers that are streamed, and whole ones.
    """

    __slots__ = ("drained", "sent_s", "streamed", "whole")

    def __init__(self) -> None:
        self.streamed: OrderedDict[int, Waiting] = OrderedDict()
        self.whole: OrderedDict[int, Waiting] = OrderedDict()
        self.drained = Rate(30.0)
        self.sent_s = -math.inf
        """When the last of them was sent."""

    def __len__(self) -> int:
        return len(self.streamed) + len(self.whole)

    def __iter__(self) -> Iterator[Waiting]:
        return itertools.chain(self.whole.values(), self.streamed.values())

    def add(self, ask: Ask, now: float) -> None:
        """Queue it, last."""
        (self.streamed if ask.streamed else self.whole)[ask.id] = Waiting(ask, now)

    def pop(self, request: int) -> Waiting:
        """Take it out."""
        return (self.streamed if request in self.streamed else self.whole).pop(request)

    def heads(self, *, whole_only: bool = False) -> Iterator[Waiting]:
        """The oldest of each line."""
        for line in self._lines(whole_only):
            yield from itertools.islice(line.values(), 1)

    def head(self) -> Waiting | None:
        """The oldest of all."""
        return min(self.heads(), key=lambda h: (h.since, h.ask.id), default=None)

    def shortest(self, *, whole_only: bool = False) -> Ask:
        """The one with the shortest prompt among the oldest; there must be one."""
        oldest = (
            one.ask for line in self._lines(whole_only) for one in itertools.islice(line.values(), _LOOK)
        )
        return min(oldest, key=lambda ask: (ask.prompt_tokens, ask.id))

    def _lines(self, whole_only: bool) -> tuple[OrderedDict[int, Waiting], ...]:
        return (self.whole,) if whole_only else (self.whole, self.streamed)
