"""Arms that limit batch in flight: an adaptive limit, hold-backs, release by utilisation, uniform caps."""

from collections.abc import Iterable, Sequence
from typing import Final

from tidegate.core.flowtypes import Ask
from tidegate.sim.fleet_arms.central import Central
from tidegate.sim.fleet_arms.saturation import WAITING_MOST
from tidegate.sim.fleet_arms.site import Site
from tidegate.sim.router import Arm

_WAIT_MS: Final = 20
"""By default about one step of decoding: with 100 ms, p99 TTFT grew by a third, not by a sixth."""
_PERIOD_S: Final = 1.0
"""An adaptive limit moves once in the time in which every engine has reported."""


class Aimd(Central):
    """As many batch requests in the fleet as `limit` says: additive increase, multiplicative decrease.

    Its signal is what interactive requests meet. In a period the limit is cut to `less` of what it
    was if one of them was sent to where more than `wait_s` of prefill was predicted before its own,
    or if a report told of 5 or more waiting in an engine where one was in flight. Else one
    more is allowed a replica, if the limit was reached: unused room says nothing.
    """

    def __init__(self, wait_s: float, less: float = 0.7) -> None:
        super().__init__()
        self.limit = 1.0
        self._wait_s, self._less = wait_s, less
        self._late = self._reached = False
        self._next_s = 0.0

    def among(self, ask: Ask, sites: Sequence[Site], now: float) -> Iterable[Site]:
        """All, while the limit allows."""
        if not self.is_batch(ask.qos_class):
            return sites
        if now >= self._next_s:
            self._move(now)
        if sum(s.batch for s in self.sites.values()) < int(self.limit):
            return sites
        self._reached = True
        return ()

    def on_send(self, ask: Ask, site: Site, now: float) -> None:
        """Predict what it waits."""
        if not self.is_batch(ask.qos_class):
            self._late |= site.wait_s(self.rank(ask.qos_class), now) > self._wait_s

    def on_report(self, site: Site) -> None:
        """Look at how many wait in the engine."""
        self._late |= site.requests > site.batch and site.waiting >= WAITING_MOST

    def _move(self, now: float) -> None:
        self._next_s = now + _PERIOD_S
        if self._late:
            self.limit = max(1.0, self.limit * self._less)
        elif self._reached:
            self.limit += len(self.sites)
        self._late = self._reached = False


class HoldBack(Central):
    """Batch fills every replica up to `share` of its slots and of its KV cache, people all of it.

    Without the KV the held slots would be worth nothing: it is full long before the slots are.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self._share = share

    def among(self, ask: Ask, sites: Sequence[Site], now: float) -> Iterable[Site]:  # noqa: ARG002
        """All for people; for batch those where it leaves enough free."""
        if not self.is_batch(ask.qos_class):
            return sites
        return [s for s in sites if s.requests < self._share * s.facts.slots and s.fits(ask, self._share)]


class Release(Central):
    """Batch is sent while the fleet's utilisation, of slots or of KV by reports, is below `share`."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self._share = share

    def among(self, ask: Ask, sites: Sequence[Site], now: float) -> Iterable[Site]:  # noqa: ARG002
        """All or none, for batch."""
        if not self.is_batch(ask.qos_class):
            return sites
        return sites if self.utilisation() < self._share else ()

    def utilisation(self) -> float:
        """The larger of the shares of slots and KV that are in use, 0 to 1; 1 without replicas."""
        sites = [s for s in self.sites.values() if s.takes_more]
        if not sites:
            return 1.0
        slots = sum(s.requests for s in sites) / max(1, sum(s.facts.slots for s in sites))
        return max(slots, sum(s.kv_usage for s in sites) / len(sites))


class Cap(Central):
    """At most so many batch requests on every replica."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def among(self, ask: Ask, sites: Sequence[Site], now: float) -> Iterable[Site]:  # noqa: ARG002
        """For batch those that are below the cap."""
        return [s for s in sites if s.batch < self._most] if self.is_batch(ask.qos_class) else sites


def aimd(wait_ms: int = _WAIT_MS) -> Arm:
    """An adaptive limit that is cut when so much prefill was predicted before an interactive prompt."""
    name = "aimd" if wait_ms == _WAIT_MS else f"aimd-{wait_ms}"
    return Arm(name, lambda: Aimd(wait_ms / 1000))


def holdback(percent: int) -> Arm:
    """So many percent of every replica are for people only."""
    return Arm(f"holdback-{percent}", lambda: HoldBack(1 - percent / 100))


def release(percent: int) -> Arm:
    """Batch is released below so many percent of utilisation."""
    return Arm(f"release-{percent}", lambda: Release(percent / 100))


def cap(most: int) -> Arm:
    """The same small number of batch requests everywhere."""
    return Arm(f"cap-{most}", lambda: Cap(most))
