"""Which tenant of a class that people wait for asks for more than its part, when all do not fit.

The order of a queue protects nobody from it: what people wait for is sent at once, and waits in the
engines if anywhere. So where the prompts of all tenants together would take more of the replicas'
time than keeps the promises, what a tenant sends beyond its part is told apart. It is served as work
that nobody waits for: behind the others, and where it is in nobody's way.
"""

import math
from collections import OrderedDict
from typing import Final

from tidegate.core.load import Rate

FULL: Final = 0.33
"""Of a replica's time, what prompts may take. Chat of the Azure trace, served by Llama-3-8B on A100s:
with 0.34 one in 500 is slower than 50 ms a token, with 0.43 one in 100, with 0.52 one in 4."""
_TAU_S: Final = 10.0
_REMEMBERED: Final = 1000
_LOOK_S: Final = 0.25
"""Parts are reckoned so often at most."""


class _Asked:
    __slots__ = ("asked", "granted", "last", "weight")

    def __init__(self) -> None:
        self.asked, self.granted = Rate(_TAU_S), Rate(_TAU_S)
        self.last, self.weight = 0.0, 1


class Crowd:
    """The tenants of one (model, class) that came lately. Amounts are seconds of prefill a second.

    Parts are max-min fair: who asks for less than its part gets it all, and what that leaves is the
    others', by their weights.
    """

    __slots__ = ("_all", "_level", "_looked", "_tenants")

    def __init__(self) -> None:
        self._all = Rate(_TAU_S)
        self._tenants: OrderedDict[str, _Asked] = OrderedDict()
        self._level, self._looked = math.inf, -math.inf

    def beyond(self, tenant: str, weight: int, prefill_s: float, replicas: int, now: float) -> bool:
        """Count a request in, and say whether it is beyond its tenant's part of what `replicas` can do."""
        one = self._tenants.get(tenant)
        if one is None:
            one = self._tenants[tenant] = _Asked()
        one.last, one.weight = now, weight
        one.asked.add(now, prefill_s)
        self._tenants.move_to_end(tenant)
        if len(self._tenants) > _REMEMBERED:
            self._tenants.popitem(last=False)
        self._all.add(now, prefill_s)
        if self._all.value(now) > FULL * replicas:
            if now - self._looked > _LOOK_S:
                self._look(FULL * replicas, now)
            if one.granted.value(now) > self._level * weight:
                return True
        one.granted.add(now, prefill_s)
        return False

    def _look(self, most: float, now: float) -> None:
        """Find what a tenant of weight 1 may have; no bound where there is but one tenant."""
        while self._tenants and now - next(iter(self._tenants.values())).last > _TAU_S:
            self._tenants.popitem(last=False)
        self._looked, self._level = now, math.inf
        asked = sorted((t.asked.value(now) / t.weight, t.weight) for t in self._tenants.values())
        weights = sum(weight for _, weight in asked)
        for each, weight in asked if len(asked) > 1 else ():
            if each * weights >= most:
                self._level = most / weights
                return
            most, weights = most - each * weight, weights - weight
