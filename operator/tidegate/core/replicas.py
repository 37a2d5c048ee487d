"""A model's endpoints, and what follows from who they are."""

import math
from collections.abc import Mapping, Sequence

from tidegate.core import front, pick
from tidegate.core.load import Load


class Replicas:
    """Made anew whenever an endpoint comes, goes or changes, so that nothing kept here can be out of date.

    Attributes:
        loads: All of them, those too that are gone and still run something.
        ready: Those that take requests.
        places: Where headroom is kept: where it can be used by all, since streamed requests keep off
            lent endpoints.
        slots: Of these places together.
        safe: Some that take requests are not lent.
        apart: And some are.
    """

    __slots__ = (
        "_at",
        "_fronts",
        "_keep",
        "_standing",
        "_wanted",
        "apart",
        "loads",
        "places",
        "ready",
        "safe",
        "slots",
    )

    def __init__(self, loads: Sequence[Load], ranks: Mapping[str, int]) -> None:
        self.loads = loads
        self.ready = [e for e in loads if e.ready and not e.draining]
        kept = [e for e in self.ready if not e.lent] or self.ready
        self.places = [pick.Place(e.address, e.lane, e.slots) for e in kept]
        self.slots = sum(p.slots for p in self.places)
        self.safe = not all(e.lent for e in self.ready)
        self.apart = self.safe and any(e.lent for e in self.ready)
        self._standing = [
            front.Standing(e.address, ranks.get(e.lane, len(ranks)), e.lent) for e in self.ready
        ]
        self._fronts: dict[int, frozenset[str]] = {}
        self._wanted: list[pick.Demand] = []
        self._keep: pick.Headroom = {}
        self._at = -math.inf

    def advance(self, now: float) -> None:
        """Let time pass at all of them; of one moment it passes once."""
        if self._at != now:
            for load in self.loads:
                load.forecast.advance(now)
            self._at = now

    def front(self, size: int) -> frozenset[str]:
        """Which of them are a front of this size."""
        if size not in self._fronts:
            self._fronts[size] = front.members(size, self._standing)
        return self._fronts[size]

    def headroom(self, wanted: list[pick.Demand]) -> pick.Headroom:
        """What is left free for these demands: what was found before, where they are the same."""
        if wanted != self._wanted:
            self._wanted, self._keep = wanted, pick.reserve(wanted, self.places)
        return self._keep
