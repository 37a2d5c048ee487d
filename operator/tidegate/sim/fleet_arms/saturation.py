"""Arms that hold batch back by what engines report: hard shedding, and llm-d's two softer ways.

llm-d's are rebuilt from its sources (llm-d/llm-d-router at ebab687, August 2026), under
pkg/epp/framework/plugins: requestcontrol/admitter/probabilisticadmitter,
flowcontrol/usagelimits/softreflectiveceiling, flowcontrol/saturationdetector/utilization.

It asks its engines every 50 ms, here they are asked once a second. So that this is not what is
compared, a report is brought up to date by what was sent and has ended since (`Site.waiting`,
`Site.kv_usage`).
"""

import random
from collections.abc import Iterable, Sequence
from typing import Final

from tidegate.core.flowtypes import Ask
from tidegate.sim.fleet_arms.central import Central
from tidegate.sim.fleet_arms.site import Site
from tidegate.sim.router import Arm

WAITING_MOST: Final = 5
"""llm-d's `queueDepthThreshold`: an engine with so many waiting is saturated."""
KV_MOST: Final = 0.8
"""llm-d's `kvCacheUtilThreshold`, likewise."""
_CYCLE_S: Final = 0.001
"""llm-d's dispatch cycle: one request at most is sent in each (pkg/epp/flowcontrol/controller)."""


def pressure(site: Site) -> float:
    """llm-d's score of an endpoint: 1 is saturated. One that has not reported counts as that."""
    if site.report is None:
        return 1.0
    return max(site.waiting / WAITING_MOST, site.kv_usage / KV_MOST)


def saturation(sites: Sequence[Site]) -> float:
    """llm-d's saturation of a pool: the mean of its endpoints' scores; 1 of an empty one."""
    return sum(map(pressure, sites)) / len(sites) if sites else 1.0


class Shed(Central):
    """Batch goes only where fewer than 5 wait in the engine and less than 80% of the KV is used."""

    def among(self, ask: Ask, sites: Sequence[Site], now: float) -> Iterable[Site]:  # noqa: ARG002
        """All for people, those that are not saturated for batch."""
        return [s for s in sites if pressure(s) < 1.0] if self.is_batch(ask.qos_class) else sites


class Probabilistic(Central):
    """llm-d's probabilistic admitter: an attempt of batch is refused with min(300 · sat⁵, 1).

    There a refused client comes back by itself. Here the head of the line tries again whenever
    something has happened, until it is refused. How often hardly matters: the curve is so steep
    that batch settles where attempts are nearly all refused, at a saturation of about 0.32.
    """

    def __init__(self, draw: random.Random, steepness: float = 300.0, power: float = 5.0) -> None:
        super().__init__()
        self._draw, self._steepness, self._power = draw, steepness, power

    def among(self, ask: Ask, sites: Sequence[Site], now: float) -> Iterable[Site]:  # noqa: ARG002
        """All replicas, or by chance none."""
        if not self.is_batch(ask.qos_class):
            return sites
        refused = min(1.0, self._steepness * saturation(sites) ** self._power)
        return () if self._draw.random() < refused else sites


class SoftReflective(Central):
    """llm-d's soft-reflective ceiling: class i of N is sent while sat < 1 − i · sat / (N − 1).

    From there on it is sent in one of round(sat / (1 − sat)) cycles, and from 1 on not at all;
    the first class, too, waits while the pool is saturated. N counts the classes that have asked.
    Where one class is held all below it are, as llm-d's cycle ends there.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cycle = 0
        self._last_s = 0.0

    def among(self, ask: Ask, sites: Sequence[Site], now: float) -> Iterable[Site]:
        """All replicas while the class's ceiling is open, else none."""
        at = saturation(sites)
        if at >= 1.0:
            return ()
        active = self.active()
        if at < 1.0 - active.index(ask.qos_class) * at / max(1, len(active) - 1):
            return sites
        # Cycles that have gone by since the last one here, and this one.
        before, went_by = self._cycle, max(1, round((now - self._last_s) / _CYCLE_S))
        self._cycle, self._last_s = before + went_by, now
        period = max(1, round(at / (1.0 - at + 1e-9)))
        if self._cycle // period > before // period:
            return sites
        self.look_again()
        return ()


def shed() -> Arm:
    """Hard shedding by waiting requests and KV use."""
    return Arm("shed", Shed)


def probabilistic(seed: int = 0) -> Arm:
    """llm-d's probabilistic admitter, with this seed of its chances."""
    # A simulation, not a secret.
    return Arm("probabilistic", lambda: Probabilistic(random.Random(seed)))  # noqa: S311


def soft_reflective() -> Arm:
    """llm-d's soft-reflective ceiling."""
    return Arm("soft-reflective", SoftReflective)
