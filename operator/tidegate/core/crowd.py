"""Which tenant of a class that people wait for asks for more than its part, when all do not fit.

The order of a queue protects nobody from it: what people wait for is sent at once, and waits in the
engines if anywhere. So where the prompts of all tenants together would take more of the replicas'
time than keeps the promises, what a tenant sends beyond its part is told apart. It is served as work
that nobody waits for: behind the others, and where it is in nobody's way.
"""

from collections import OrderedDict
from typing import Final

from tidegate.core.load import Rate

FULL: Final = 0.36
"""Of a replica's time, what prompts may take: with more, chat of the Azure trace is served slower than
50 ms a token by Llama-3-8B on an A100 (docs/reference/benchmarks.md)."""
_TAU_S: Final = 10.0
_REMEMBERED: Final = 1000
_LOOK_S: Final = 0.25
"""Weights of those who are there are summed up so often at most."""


class _Asked:
    __slots__ = ("granted", "last", "weight")

    def __init__(self) -> None:
        self.granted, self.last, self.weight = Rate(_TAU_S), 0.0, 1


class Crowd:
    """The tenants of one (model, class) that came lately. Amounts are seconds of prefill a second."""

    __slots__ = ("_all", "_looked", "_tenants", "_weights")

    def __init__(self) -> None:
        self._all = Rate(_TAU_S)
        self._tenants: OrderedDict[str, _Asked] = OrderedDict()
        self._weights, self._looked = 0, 0.0

    def beyond(self, tenant: str, weight: int, prefill_s: float, replicas: int, now: float) -> bool:
        """Count a request in, and say whether it is beyond its tenant's part of what `replicas` can do."""
        one = self._tenants.get(tenant)
        changed = one is None or one.weight != weight
        if one is None:
            one = self._tenants[tenant] = _Asked()
        one.last, one.weight = now, weight
        self._tenants.move_to_end(tenant)
        if len(self._tenants) > _REMEMBERED:
            self._tenants.popitem(last=False)
        self._all.add(now, prefill_s)
        most = FULL * replicas
        if self._all.value(now) > most:
            if changed or now - self._looked > _LOOK_S:
                self._look(now)
            if one.granted.value(now) > most * weight / self._weights and weight < self._weights:
                return True
        one.granted.add(now, prefill_s)
        return False

    def _look(self, now: float) -> None:
        while self._tenants and now - next(iter(self._tenants.values())).last > _TAU_S:
            self._tenants.popitem(last=False)
        self._weights, self._looked = sum(t.weight for t in self._tenants.values()), now
