"""Arms that serve by deadline: EDF and QoServe inside the engine, and a router that balances.

The engine is Sarathi's (sim/sarathi_fleet.py): it can leave a prompt for another between two chunks.
Chunks hold at most what the fleet's engines compute in a step.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from tidegate.core.flowtypes import Ask
from tidegate.core.steptime import LLAMA3_8B_A100 as FIT
from tidegate.sim.arms import DYNAMIC_SIZES, DeadlineAndWork, Dynamic, Edf, Hopeless, Static
from tidegate.sim.fleet_arms.central import Central
from tidegate.sim.fleet_arms.site import Site
from tidegate.sim.router import Arm
from tidegate.sim.sarathi import Chunk, Job, Order, Relegation
from tidegate.sim.sarathi_fleet import PATIENT_S, FleetSarathi
from tidegate.sim.types import EngineConfig

BATCH_SHARE: Final = 0.9
"""Of the KV cache, what batch may take: nothing is preempted, so people would wait for its end."""
_MARGIN: Final = 1.2
"""QoServe's margin over the predicted time."""


class LeastLoaded(Central):
    """People to where the least of their own is to be computed, batch to where the fewest tokens are held."""

    def among(self, ask: Ask, sites: Sequence[Site], now: float) -> Iterable[Site]:  # noqa: ARG002
        """All for people; for batch those whose cache has room."""
        return [s for s in sites if s.fits(ask, BATCH_SHARE)] if self.is_batch(ask.qos_class) else sites

    def ahead_s(self, site: Site, rank: int, now: float) -> float:
        """Only what is of this rank and above: the rest is due later."""
        return site.work_s(rank, now)


@dataclass(frozen=True, slots=True)
class LatestStart:
    """Clairvoyant EDF: who must begin first, to end when it is due, alone and by the fit.

    `decode_s` is a step of its own. Where a pace was promised the first token is what is due, and only the
    prompt comes before that.
    """

    decode_s: float

    def key(self, job: Job) -> float:
        """The latest start, seconds."""
        patient = job.token_s >= PATIENT_S
        return job.due_s - FIT.seconds(job.remaining, 0) - (self.decode_s * job.output if patient else 0.0)


def _arm(
    name: str,
    order: Order,
    chunk: Chunk,
    relegation: Relegation | None = None,
    *,
    clairvoyant: bool = False,
) -> Arm:
    def build(config: EngineConfig) -> FleetSarathi:
        return FleetSarathi(config, order, chunk, relegation)

    return Arm(
        name,
        LeastLoaded,
        lambda _lane, config: replace(config, async_scheduling=False),
        build=build,
        clairvoyant=clairvoyant,
    )


def _dynamic() -> Dynamic:
    most = EngineConfig().max_num_batched_tokens
    return Dynamic(FIT, _MARGIN, tuple(size for size in DYNAMIC_SIZES if size <= most))


def edf(chunk: int) -> Arm:
    """The earliest deadline first, in chunks of one size."""
    return _arm(f"edf-{chunk}", Edf(), Static(chunk))


def edf_dynamic() -> Arm:
    """The earliest deadline first, in the largest chunks that make no decode late."""
    return _arm("edf-dynamic", Edf(), _dynamic())


def qoserve() -> Arm:
    """QoServe: by deadline and remaining work, dynamic chunks, the hopeless last."""
    return _arm(
        "qoserve", DeadlineAndWork(), _dynamic(), Hopeless(FIT, EngineConfig().max_num_batched_tokens)
    )


def edf_clairvoyant() -> Arm:
    """By the latest start, for who knows how long outputs will be; dynamic chunks."""
    return _arm("edf-clairvoyant", LatestStart(FIT.seconds(0, 1)), _dynamic(), clairvoyant=True)
