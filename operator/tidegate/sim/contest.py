"""What is kept of a run: figures by class and tenant, and points to plot."""

import bisect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from tidegate.core.types import Objectives
from tidegate.sim.cluster.usage import Usage
from tidegate.sim.fleet import Run, Setting
from tidegate.sim.records import Figures, Record, State, figures, judged

FIGURES: Final = (
    "requests",
    "answered",
    "refused",
    "lost",
    "judged",
    "attainment",
    "ttft_p50_s",
    "ttft_p99_s",
    "tpot_p50_s",
    "tpot_p99_s",
    "tokens_per_s",
)
"""What is told of every class and tenant."""
TOTALS: Final = ("preemptions", "recomputed_tokens", "replicas_used")
"""What is told of every arm."""
SAMPLES: Final = 300
"""Times at which requests in flight are counted for the plot."""


@dataclass(frozen=True, slots=True)
class Points:
    """A class's requests for plots. `ttft` are (arrival, time to first token), seconds, as answered.

    `judged_ttft_s` are those of the requests that are judged, infinite for who got no token.
    `turned_away_s` are arrivals of refused and lost ones; `in_flight` counts requests in engines
    at SAMPLES times from 0 to the end.
    """

    ttft: list[tuple[float, float]] = field(default_factory=list)
    judged_ttft_s: list[float] = field(default_factory=list)
    turned_away_s: list[float] = field(default_factory=list)
    in_flight: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is kept of one run. `rows` are by class and tenant, None standing for all tenants.

    `usage` is who had which GPUs, None where replicas were fixed.
    """

    arm: str
    seed: int
    wall_s: float
    totals: dict[str, float]
    rows: dict[tuple[str, str | None], dict[str, float]]
    points: dict[str, Points]
    usage: Usage | None = None


def outcome(run: Run, arm: str, wall_s: float, usage: Usage | None = None) -> Outcome:
    """What is kept of a run of the arm of this name that took `wall_s` of real time."""
    rows: dict[tuple[str, str | None], dict[str, float]] = {}
    points: dict[str, Points] = {}
    for name in run.setting.classes:
        mine = [r for r in run.records if r.qos_class == name]
        if not mine and all(s.qos_class != name for s in run.setting.streams):
            continue
        rows[name, None] = row(mine, name, run.setting)
        tenants = sorted({r.tenant for r in mine})
        if tenants not in ([], [""]):
            for tenant in tenants:
                rows[name, tenant] = row([r for r in mine if r.tenant == tenant], name, run.setting)
        points[name] = _points(mine, name, run.setting)
    totals: dict[str, float] = {
        "preemptions": run.preemptions,
        "recomputed_tokens": run.recomputed_tokens,
        "replicas_used": len({r.address for r in run.records if r.address}),
    }
    return Outcome(arm, run.seed, wall_s, totals, rows, points, usage)


def row(records: Sequence[Record], qos_class: str, setting: Setting) -> dict[str, float]:
    """FIGURES of some requests of a class.

    Counts are of what happened after the warm-up: who came, who had the last token, who was turned
    away on coming then, who lost an answer. Attainment and percentiles are of those who came then,
    and early enough to be judged (`records.judged`); NaN where there are none.
    """
    promised = setting.classes[qos_class].objectives
    found = figures(records, promised, setting.warm_up_s, setting.seconds)
    if promises_nothing(promised):
        found = Figures(0, 0, 0, 0, math.nan, tokens_per_s=found.tokens_per_s)
    begin_s = setting.warm_up_s
    came = [r for r in records if r.arrival_s >= begin_s]
    return {
        "requests": len(came),
        "answered": sum(r.finish_s is not None and r.finish_s >= begin_s for r in records),
        "refused": sum(r.state is State.REFUSED for r in came),
        "lost": sum(r.state is State.LOST and r.stays[-1][1] >= begin_s for r in records),
        "judged": found.requests,
        "attainment": found.attainment,
        "ttft_p50_s": found.ttft_s.get("p50", math.nan),
        "ttft_p99_s": found.ttft_s.get("p99", math.nan),
        "tpot_p50_s": found.tpot_s.get("p50", math.nan),
        "tpot_p99_s": found.tpot_s.get("p99", math.nan),
        "tokens_per_s": found.tokens_per_s,
    }


def promises_nothing(promised: Objectives) -> bool:
    """Whether there is no objective to judge a request by, nor a time by which it can be judged."""
    return promised.ttft_s is promised.tpot_s is promised.completion_s is None


def _points(records: Sequence[Record], qos_class: str, setting: Setting) -> Points:
    promised = setting.classes[qos_class].objectives
    away = (State.REFUSED, State.LOST)
    return Points(
        ttft=[(r.arrival_s, r.ttft_s) for r in records if math.isfinite(r.ttft_s)],
        judged_ttft_s=[
            r.ttft_s
            for r in judged(records, promised, setting.warm_up_s, setting.seconds)
            if not promises_nothing(promised)
        ],
        turned_away_s=[r.arrival_s for r in records if r.state in away],
        in_flight=_in_flight(records, setting.seconds),
    )


def sample_times(seconds: float) -> list[float]:
    """The times of `Points.in_flight`."""
    return [seconds * i / (SAMPLES - 1) for i in range(SAMPLES)]


def _in_flight(records: Iterable[Record], seconds: float) -> list[int]:
    sent: list[float] = []
    ended: list[float] = []
    for r in records:
        for begin, end in r.stays:
            sent.append(begin)
            ended.append(end)
        if r.sent_s is not None and r.address:
            sent.append(r.sent_s)
            if r.finish_s is not None:
                ended.append(r.finish_s)
    sent.sort()
    ended.sort()
    return [bisect.bisect_right(sent, t) - bisect.bisect_right(ended, t) for t in sample_times(seconds)]
