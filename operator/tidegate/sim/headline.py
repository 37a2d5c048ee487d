"""The headline setting: chat beside a backlog of summaries, and what an arm makes of it.

Llama-3-8B on A100s. Interactive load is given in requests/s a replica; batch is a closed loop that
never runs dry. Figures are ratios to two references of the same seed and length: oracle A
(`alone`), interactive without batch; and batch alone, the same fleet without interactive.
"""

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from statistics import fmean
from typing import Final

from tidegate.core.flowtypes import ModelKey
from tidegate.core.steptime import LLAMA3_8B_A100, StepFit
from tidegate.core.types import Objectives, QoSClass, Reclaim
from tidegate.sim.bound import NOTHING, bound, means
from tidegate.sim.fleet import Fleet, Replica, Run, Setting
from tidegate.sim.fleet_arms.registry import arm
from tidegate.sim.records import figures
from tidegate.sim.types import EngineConfig, Policy
from tidegate.sim.workload import Length, Stream, chat_lengths, poisson, summary_lengths

MODEL: Final[ModelKey] = ("headline", "llama-3-8b")
CONFIG: Final = EngineConfig(policy=Policy.PRIORITY, max_num_batched_tokens=2552)
"""Steps as large as the step-time fit knows, for every arm: what oracle A and batch alone do best with.

With vLLM's 2,048, chat alone has a p99 TTFT 4% higher, and batch alone computes 0.2% less.
"""
_DAY_S: Final = 86_400.0


def _class(name: str, priority: int, objectives: Objectives, reclaim: Reclaim = Reclaim.NEVER) -> QoSClass:
    """A class with queues so wide that nothing is refused.

    Arms are compared by what they do with their requests, not by whom they turn away.
    """
    return QoSClass(
        name,
        priority,
        reclaim,
        objectives=objectives,
        queue_max_requests=1_000_000,
        queue_max_wait_s=10 * _DAY_S,
    )


CLASSES: Final = {
    c.name: c
    for c in (
        _class("interactive", 1000, Objectives(ttft_s=1.0, tpot_s=0.05)),
        _class("standard", 500, Objectives(completion_s=60.0)),
        _class("batch", 0, Objectives(completion_s=_DAY_S), Reclaim.ALWAYS),
    )
}

ALONE: Final = "alone"
"""Oracle A's name."""
BATCH_ALONE: Final = "packing-0"
"""Batch alone: no replica is kept for people, and none come (load 0)."""


@dataclass(frozen=True, slots=True)
class Point:
    """One run. `load` is in interactive requests/s a replica; 0 is batch without interactive."""

    arm: str
    load: float
    seed: int
    replicas: int = 10
    seconds: float = 1200.0
    warm_up_s: float = 200.0

    @property
    def references(self) -> tuple["Point", ...]:
        """The runs that this one's figures are ratios to."""
        batch = replace(self, arm=BATCH_ALONE, load=0.0)
        return (replace(self, arm=ALONE), batch) if self.load else (batch,)

    @property
    def outstanding(self) -> int:
        """Batch requests that are always waiting or running.

        An arm with a central queue holds at most every slot, so that a quarter more is always
        waiting there. An arm that sends everything fills its engines' KV caches, which hold about
        140 summaries each and not 256; the rest waits in the engines, and how many do that makes
        no difference to what is computed.
        """
        return self.replicas * CONFIG.max_num_seqs * 5 // 4

    def setting(self) -> Setting:
        """What is simulated."""
        replicas = [Replica(f"10.0.0.{i + 1}:8000", MODEL, "batch") for i in range(self.replicas)]
        streams = [
            Stream(
                "summaries", MODEL, "batch", summary_lengths(), outstanding=self.outstanding, streamed=False
            )
        ]
        if self.load:
            arrivals = poisson(self.load * self.replicas)
            streams.append(Stream("chat", MODEL, "interactive", chat_lengths(), times=arrivals))
        return Setting(
            classes=CLASSES,
            replicas=replicas,
            streams=streams,
            seconds=self.seconds,
            warm_up_s=self.warm_up_s,
            config=CONFIG,
        )


@dataclass(frozen=True, slots=True)
class Raw:
    """What one run came to by itself. Times are seconds; nan where nobody interactive came.

    Attributes:
        requests: Interactive requests that were judged.
        batch_per_s: Harvest in batch requests/s a replica: tokens computed, by a request's mean.
        cpu_s: What the run cost, in seconds of a core.
    """

    requests: int
    ttft_p50_s: float
    ttft_p99_s: float
    attainment: float
    tpot_p50_s: float
    tpot_p99_s: float
    batch_per_s: float
    preemptions: int
    recomputed_tokens: int
    cpu_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run came to beside its references.

    Attributes:
        ttft_ratio: p99 TTFT by oracle A's.
        h_lp: Harvest by bound B at this load.
        h: Harvest by the part of bound B that batch alone reaches: 1 is as good as no interactive.
    """

    point: Point
    raw: Raw
    ttft_ratio: float
    h_lp: float
    h: float


def mean_computed(lengths: Sequence[Length]) -> float:
    """Tokens that an engine computes for a request on average: its last output token is not."""
    return fmean(prompt + output - 1 for prompt, output in lengths)


@cache
def bound_per_s(load: float, fit: StepFit = LLAMA3_8B_A100) -> float:
    """Bound B: batch requests/s a replica beside this interactive load, on engines of this fit."""
    chat = means(chat_lengths()) if load else NOTHING
    return bound(means(summary_lengths()), fit, CONFIG, chat, load).requests_per_s


def harvest(raw: Raw, alone: Raw, load: float, fit: StepFit = LLAMA3_8B_A100) -> float:
    """H: what a run harvests, by the part of bound B that batch alone reaches."""
    reachable = bound_per_s(load, fit) * alone.batch_per_s / bound_per_s(0.0, fit)
    return raw.batch_per_s / reachable


def summarise(run: Run) -> Raw:
    """What a run of this setting came to."""
    setting = run.setting
    begin_s, end_s = setting.warm_up_s, setting.seconds
    by_class = {
        name: figures(
            (r for r in run.records if r.qos_class == name), CLASSES[name].objectives, begin_s, end_s
        )
        for name in ("interactive", "batch")
    }
    people, batch = by_class["interactive"], by_class["batch"]
    requests_per_s = batch.tokens_per_s / mean_computed(summary_lengths())
    return Raw(
        requests=people.requests,
        ttft_p50_s=people.ttft_s.get("p50", math.nan),
        ttft_p99_s=people.ttft_s.get("p99", math.nan),
        attainment=people.attainment,
        tpot_p50_s=people.tpot_s.get("p50", math.nan),
        tpot_p99_s=people.tpot_s.get("p99", math.nan),
        batch_per_s=requests_per_s / len(setting.replicas),
        preemptions=run.preemptions,
        recomputed_tokens=run.recomputed_tokens,
    )


def run_point(point: Point) -> Raw:
    """Run it."""
    began_s = time.process_time()
    # Nothing here is garbage before the run's end; looking for it takes a tenth of the time.
    gc.disable()
    try:
        raw = summarise(Fleet(point.setting(), arm(point.arm), point.seed).run())
    finally:
        gc.enable()
    return replace(raw, cpu_s=round(time.process_time() - began_s, 2))


def compare(point: Point, found: dict[Point, Raw]) -> Figures:
    """A run beside its references.

    Raises:
        KeyError: it or one of its references was not run.
    """
    raw = found[point]
    batch_alone = found[point.references[-1]]
    ratio = raw.ttft_p99_s / found[point.references[0]].ttft_p99_s if point.load else math.nan
    h_lp = raw.batch_per_s / bound_per_s(point.load)
    return Figures(point, raw, ratio, h_lp, harvest(raw, batch_alone, point.load))
