"""Minimum shares of a model's GPU time: what a class is owed while it waits and others are served."""

import math
from collections.abc import Iterator, Mapping
from typing import Final

from tidegate.core import promises
from tidegate.core.flowtypes import Ask
from tidegate.core.line import Line, LineKey
from tidegate.core.room import Room, Running

_TAU_S: Final = 60.0
"""What was had or missed is forgotten in so many seconds."""
PRESSING: Final = 4
"""Owed so many requests, a class goes where it has room at all, and nothing overtakes it."""
_CLAIMED: Final = 1000
"""Output tokens that count when a request is sent, at most: many ask for as much as a context holds, and
make a few hundred. What it made is known, and counted, when it ends."""


class Owed:
    """GPU seconds that a class is below its share, while it has something waiting.

    Of each second that goes to others it is owed its share; each of its own pays back what is not
    its share. So it gets no more than that while others press, and what it had before counts.
    """

    __slots__ = ("_at", "_seconds", "rests")

    def __init__(self) -> None:
        self._seconds, self._at = 0.0, 0.0
        self.rests = 0
        """How often nothing waited any more."""

    def seconds(self, now: float) -> float:
        """As of `now`; negative when it had more than its share lately."""
        return self._seconds * math.exp(min(0.0, self._at - now) / _TAU_S)

    def others(self, gpu_s: float, share: float, now: float) -> None:
        """Somebody else is served while it waits; negative seconds turned out not to be needed."""
        self._add(share * gpu_s, now)

    def own(self, gpu_s: float, share: float, now: float) -> None:
        """It is served itself; negative as above."""
        self._add((share - 1) * gpu_s, now)

    def rest(self) -> None:
        """It has nothing waiting any more, so that it is owed nothing."""
        self._seconds = min(0.0, self._seconds)
        self.rests += 1

    def _add(self, seconds: float, now: float) -> None:
        self._seconds, self._at = self.seconds(now) + seconds, now


class Floors:
    """The lines that have a minimum share of their model's GPU time, and what each is owed."""

    def __init__(self, room: Room, lines: Mapping[LineKey, Line]) -> None:
        self._room, self._lines = room, lines
        self._owed: dict[LineKey, Owed] = {}

    def __len__(self) -> int:
        return len(self._owed)

    def __iter__(self) -> Iterator[LineKey]:
        return iter(self._owed)

    def watch(self, key: LineKey) -> None:
        """Something waits in a line: from now on it may be owed."""
        if self._room.policy.qos and self._share(key):
            self._owed.setdefault(key, Owed())

    def rest(self, key: LineKey) -> None:
        """Nothing waits in a line any more."""
        if key in self._owed:
            self._owed[key].rest()

    def forget(self, key: LineKey) -> None:
        """The model is gone."""
        self._owed.pop(key, None)

    def seconds(self, key: LineKey, now: float) -> float | None:
        """GPU seconds that a line is owed; None where it has no share."""
        owed = self._owed.get(key)
        return owed.seconds(now) if owed else None

    def requests(self, key: LineKey, ask: Ask, now: float) -> float:
        """How many requests like this a line is owed."""
        return self._owed[key].seconds(now) / self._gpu_s(ask)

    def sent(self, key: LineKey, ask: Ask, now: float) -> dict[LineKey, int]:
        """Note GPU time that a line gets for all that have a minimum share of it; returns who was owed."""
        shared = {}
        for other, owed in self._owed.items():
            if other == key:
                owed.own(self._gpu_s(ask), self._share(key), now)
            elif other[0] == key[0] and self._lines[other]:
                owed.others(self._gpu_s(ask), self._share(other), now)
                shared[other] = owed.rests
        return shared

    def ended(self, key: LineKey, running: Running, made: int, now: float) -> None:
        """Note what a request took otherwise than when it was sent, for those that were owed of it then.

        `made` are the output tokens that it made.
        """
        if not self._owed:
            return
        gpu_s = promises.gpu_s(self._room.policy.fit, running.ask.prompt_tokens, made)
        gpu_s -= self._gpu_s(running.ask)
        for other, owed in self._owed.items():
            if other == key:
                owed.own(gpu_s, self._share(key), now)
            elif running.shared.get(other) == owed.rests:
                owed.others(gpu_s, self._share(other), now)

    def _share(self, key: LineKey) -> float:
        known = self._room.classes.get(key[1])
        return known.minimum_share if known else 0.0

    def _gpu_s(self, ask: Ask) -> float:
        return promises.gpu_s(self._room.policy.fit, ask.prompt_tokens, min(ask.output_tokens, _CLAIMED))
