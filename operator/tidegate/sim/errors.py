"""Errors in what the policy knows: the headline's setting, and engines that are not as it takes them to be.

The engine's steps are scaled and the policy's model of them is not; scrapes are late; lengths of outputs are
not known, as ever. Each is held against the same policy on the same engines without that error: one whose
model is scaled too, whose scrapes are in time, that is told the lengths. References run on the scaled
engines, and know it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from tidegate.core.flow import Flow
from tidegate.core.flowtypes import Policy
from tidegate.core.steptime import LLAMA3_8B_A100, Branch, StepFit
from tidegate.sim.fleet import Fleet
from tidegate.sim.fleet_arms.packing import Alone, Packing, first_lanes
from tidegate.sim.headline import ALONE, BATCH_ALONE, Point, Raw, harvest, summarise
from tidegate.sim.router import Arm

OURS: Final = "ours"
LATE_S: Final = 5.0
"""By how much scrapes are late."""


@dataclass(frozen=True, slots=True)
class Wrong:
    """One run. Without an error it is the headline's.

    Attributes:
        scale: Of the engine's step times.
        knows: Whether the policy's model is scaled as well.
        late_s: How much later than in the headline scrapes are heard.
        lengths: Whether the policy is told how long outputs will be.
    """

    arm: str
    load: float
    seed: int
    seconds: float
    warm_up_s: float
    scale: float = 1.0
    knows: bool = False
    late_s: float = 0.0
    lengths: bool = False
    replicas: int = 10

    @property
    def references(self) -> tuple["Wrong", "Wrong"]:
        """Interactive alone and batch alone on the same engines."""
        plain = replace(self, knows=True, late_s=0.0, lengths=False)
        return replace(plain, arm=ALONE), replace(plain, arm=BATCH_ALONE, load=0.0)


@dataclass(frozen=True, slots=True)
class Figures:
    """What a run came to beside its references: see `headline.Figures`."""

    ttft_ratio: float
    attainment: float
    h: float


def scaled(fit: StepFit, factor: float) -> StepFit:
    """A fit whose every step takes `factor` times as long."""

    def branch(one: Branch) -> Branch:
        names = Branch.__dataclass_fields__
        return Branch(**{name: factor * getattr(one, name) for name in names})

    return replace(
        fit,
        low=branch(fit.low),
        high=branch(fit.high),
        floor_s=factor * fit.floor_s,
        per_prefill_pair_s=factor * fit.per_prefill_pair_s,
    )


def run(wrong: Wrong) -> Raw:
    """Run it."""
    fit = scaled(LLAMA3_8B_A100, wrong.scale)
    point = Point(wrong.arm, wrong.load, wrong.seed, wrong.replicas, wrong.seconds, wrong.warm_up_s)
    began_s, setting = time.process_time(), point.setting()
    setting = replace(setting, step_time=fit.seconds, scrape_age_s=setting.scrape_age_s + wrong.late_s)
    arm = _arm(wrong, fit if wrong.knows else LLAMA3_8B_A100)
    raw = summarise(Fleet(setting, arm, wrong.seed).run())
    return replace(raw, cpu_s=round(time.process_time() - began_s, 2))


def _arm(wrong: Wrong, fit: StepFit) -> Arm:
    makers: dict[str, Callable[[], Arm]] = {
        OURS: lambda: Arm(OURS, partial(Flow, Policy(fit=fit)), clairvoyant=wrong.lengths),
        ALONE: lambda: Arm(ALONE, partial(Alone, fit)),
        BATCH_ALONE: lambda: Arm(BATCH_ALONE, partial(Packing, fit), lanes=partial(first_lanes, 0)),
    }
    return makers[wrong.arm]()


def compare(wrong: Wrong, found: dict[Wrong, Raw]) -> Figures:
    """A run beside its references."""
    alone, batch = (found[reference] for reference in wrong.references)
    raw, fit = found[wrong], scaled(LLAMA3_8B_A100, wrong.scale)
    ratio = raw.ttft_p99_s / alone.ttft_p99_s
    return Figures(ratio, raw.attainment, harvest(raw, batch, wrong.load, fit))
