"""How long answers get, by what a model made lately: what is reserved for one whose end nobody knows."""

import math
from collections import OrderedDict
from typing import Final

from tidegate.core.flowtypes import ModelKey
from tidegate.core.load import Mean

_LEAST: Final = 20
"""Answers that must have been seen before their lengths are believed."""
_REMEMBERED: Final = 2000
_SPREADS: Final = 2.0
"""Mean absolute deviations above the mean: of exponential lengths that covers nine in ten, and room is
kept for all of them together."""
_ALPHA: Final = 0.05

Key = tuple[ModelKey, str, str | None]


class _Seen:
    __slots__ = ("count", "mean", "spread")

    def __init__(self) -> None:
        self.count, self.mean, self.spread = 0, Mean(_ALPHA), Mean(_ALPHA)

    def add(self, tokens: int) -> None:
        if self.count:
            self.spread.add(abs(tokens - self.mean.value(0.0)))
        self.mean.add(tokens)
        self.count += 1

    @property
    def likely(self) -> int:
        return math.ceil(self.mean.value(0.0) + _SPREADS * self.spread.value(0.0))


class Outputs:
    """Output tokens by (model, class, tenant), and by (model, class) for tenants that are new."""

    def __init__(self) -> None:
        self._seen: OrderedDict[Key, _Seen] = OrderedDict()

    def made(self, model: ModelKey, qos_class: str, tenant: str, tokens: int) -> None:
        """Take in an answer that ended by itself."""
        for whose in (tenant, None):
            key = (model, qos_class, whose)
            seen = self._seen.get(key)
            if seen is None:
                seen = self._seen[key] = _Seen()
            seen.add(tokens)
            self._seen.move_to_end(key)
        while len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)

    def expected(self, model: ModelKey, qos_class: str, tenant: str, most: int) -> int:
        """Output tokens to reckon with for a request that may make `most`; never more than those."""
        for whose in (tenant, None):
            seen = self._seen.get((model, qos_class, whose))
            if seen is not None and seen.count >= _LEAST:
                return min(most, max(1, seen.likely)) if most else 0
        return most
