"""Minimum shares of a model's GPU time: what a class is owed while it waits and others are served."""

import math
from typing import Final

_TAU_S: Final = 60.0
"""What was had or missed is forgotten in so many seconds."""
PRESSING: Final = 4
"""Owed so many requests, a class goes where it has room at all, and nothing overtakes it."""


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
