"""Static packing in two tiers, alone and with engines that cooperate (core/cooperate.py).

The 99th percentile of first tokens is of the longest prompts: the others may wait a while and still
come before it. So of people's replicas some are kept for those who cannot wait. Who is predicted to
have a first token soon enough on the others goes there; who is not goes where it comes soonest.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from tidegate.core.cooperate import Rules
from tidegate.core.flow import Flow
from tidegate.core.flowtypes import Ask
from tidegate.sim.bulk_cooperating import BulkCooperating
from tidegate.sim.fleet_arms.central import Central
from tidegate.sim.fleet_arms.packing import BATCH, PEOPLE, STANDARD
from tidegate.sim.fleet_arms.site import Site
from tidegate.sim.router import Arm
from tidegate.sim.types import EngineConfig

KEPT, SHARED = PEOPLE, STANDARD
"""Lanes of the two tiers: of those who cannot wait, and of all other people."""
RULES: Final = Rules()
_SOON: Final = 0.3
"""Of the objective: a first token that comes within is soon enough."""


class Tiers(Central):
    """People on the first two tiers, batch on the third, and so many requests on each replica of the others.

    Args:
        kept: Batch requests on each replica that is kept for who cannot wait.
        shared: Batch requests on each of people's others.
        cooperates: Whether the engines let people pass batch's prompts.
    """

    def __init__(self, kept: int, shared: int, *, cooperates: bool) -> None:
        super().__init__()
        self._most = {KEPT: kept, SHARED: shared}
        self._cooperates = cooperates

    def among(self, ask: Ask, sites: Sequence[Site], now: float) -> Iterable[Site]:  # noqa: ARG002
        """For people their replicas; for batch its own while they hold it, then people's below the cap."""
        if not self.is_batch(ask.qos_class):
            return [s for s in sites if s.facts.lane != BATCH]
        held = [s for s in sites if s.fits(ask)]
        own = [s for s in held if s.facts.lane == BATCH]
        return own or [s for s in held if s.batch < self._most[s.facts.lane]]

    def best(self, ask: Ask, firsts: Sequence[tuple[float, Site]]) -> Site | None:
        """The soonest on the shared ones, if that is soon enough; else the soonest of all."""
        waits_s = self.classes[ask.qos_class].objectives.ttft_s or 0.0
        soon = [f for f in firsts if f[1].facts.lane == SHARED and f[0] <= _SOON * waits_s]
        return super().best(ask, soon or firsts)

    def ahead_s(self, site: Site, rank: int, now: float) -> float:
        """Where engines cooperate, only what is of this rank and above."""
        return site.work_s(rank, now) if self._cooperates else super().ahead_s(site, rank, now)


def three_lanes(kept: int, shared: int, replicas: int) -> list[str]:
    """The lanes of the two tiers, and batch's for the others.

    Raises:
        ValueError: there are not so many replicas.
    """
    if kept < 0 or shared < 0 or kept + shared > replicas:
        raise ValueError(f"people on {kept} and {shared}: there are only {replicas} replicas")
    return [KEPT] * kept + [SHARED] * shared + [BATCH] * (replicas - kept - shared)


def tiers(kept: int, kept_batch: int, shared: int, shared_batch: int) -> Arm:
    """Replicas kept for who cannot wait, batch requests on each; replicas that are shared, and on each."""
    return Arm(
        f"tiers-{kept}-{kept_batch}-{shared}-{shared_batch}",
        lambda: Tiers(kept_batch, shared_batch, cooperates=False),
        lanes=partial(three_lanes, kept, shared),
    )


def cooperating(kept: int, kept_batch: int, shared: int, shared_batch: int) -> Arm:
    """The same in front of engines with the plugin."""
    return Arm(
        f"cooperating-{kept}-{kept_batch}-{shared}-{shared_batch}",
        lambda: Tiers(kept_batch, shared_batch, cooperates=True),
        plugin,
        build=BulkCooperating,
        lanes=partial(three_lanes, kept, shared),
    )


def ours_cooperating() -> Arm:
    """Production's queue in front of engines with the plugin."""
    return Arm("ours-cooperating", Flow, plugin, build=BulkCooperating)


def plugin(_lane: str, config: EngineConfig) -> EngineConfig:
    """The engine's settings with the plugin."""
    return replace(config, cooperation=RULES)
