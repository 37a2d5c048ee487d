"""Settings in which more is asked than there is: a tenant that floods its class, overload, a burst.

The headline's fleet (Llama-3-8B on A100s). In each, the requests that count as important are a load
that the fleet serves within its promises alone.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from tidegate.core.types import Objectives, QoSClass, Reclaim, TenantFrom, Tenants
from tidegate.sim.fleet import Fleet, Replica, Setting
from tidegate.sim.fleet_arms.registry import arm
from tidegate.sim.headline import CLASSES, CONFIG, MODEL
from tidegate.sim.records import Record, judged, quantile
from tidegate.sim.workload import Stream, chat_lengths, code_lengths, poisson, rates, summary_lengths

LARGE: Final = "large"
"""The tenant that floods."""
SMALL: Final = 9
"""Tenants beside it."""
CHAT_PER_S, CODE_PER_S, SUMMARIES_PER_S = 2.5, 4.1, 2.9
"""What a replica serves alone within the promises of each: docs/reference/benchmarks.md."""
BURST: Final = 8
_DUE_S: Final = 600.0
"""Batch is due in ten minutes here: of a day's deadline a run of minutes says nothing."""


@dataclass(frozen=True, slots=True)
class Case:
    """One run: a setting by its name, an arm and a seed; `alone` leaves all but the important away."""

    name: str
    arm: str
    seed: int
    alone: bool = False
    seconds: float = 1200.0
    warm_up_s: float = 250.0
    replicas: int = 10


@dataclass(frozen=True, slots=True)
class Found:
    """What came of it.

    Attributes:
        ttft_p99_s: Of the important requests.
        late: The share of these whose first token was not in time.
        missed: The share whose promises were not all kept, by class, and of the important ones
            under "important".
        important: The share of all requests that is important.
        judged: Important requests that were judged.
    """

    ttft_p99_s: float
    late: float
    missed: dict[str, float]
    important: float
    judged: int
    cpu_s: float


def tenants(case: Case) -> tuple[Setting, Callable[[Record], bool]]:
    """Ten tenants of one class: nine send 1.5/s each, one 20 times that; of it all a sixth is too much."""
    each = 1.5 * case.replicas / 10
    chat = replace(CLASSES["interactive"], tenants=Tenants(TenantFrom.HEADER, "x-tenant"))
    small = [_chat(f"small-{n}", each) for n in range(1, SMALL + 1)]
    large = [] if case.alone else [_chat(LARGE, 20 * each)]
    return _setting(case, {chat.name: chat}, small + large), lambda r: r.tenant != LARGE


def overload(case: Case) -> tuple[Setting, Callable[[Record], bool]]:
    """Half as much again as can be served: chat 0.3 of the fleet, code 0.6, summaries 0.6."""
    n = case.replicas
    streams = [
        Stream("chat", MODEL, "interactive", chat_lengths(), times=poisson(0.3 * CHAT_PER_S * n)),
        Stream("code", MODEL, "standard", code_lengths(), times=poisson(0.6 * CODE_PER_S * n)),
        Stream(
            "summaries",
            MODEL,
            "batch",
            summary_lengths(),
            times=poisson(0.6 * SUMMARIES_PER_S * n),
            streamed=False,
        ),
    ]
    return _setting(case, _classes(), streams[:1] if case.alone else streams), _interactive


def burst(case: Case) -> tuple[Setting, Callable[[Record], bool]]:
    """Chat at a tenth of the load, eight times that for 30 s of 5 minutes; code, and endless batch."""
    n = case.replicas
    calm = 0.1 * CHAT_PER_S * n
    phases = [(calm, 270.0), (BURST * calm, 30.0)]
    streams = [
        Stream("chat", MODEL, "interactive", chat_lengths(), times=rates(phases)),
        Stream("code", MODEL, "standard", code_lengths(), times=poisson(0.15 * CODE_PER_S * n)),
        Stream(
            "summaries",
            MODEL,
            "batch",
            summary_lengths(),
            outstanding=n * CONFIG.max_num_seqs * 5 // 4,
            streamed=False,
        ),
    ]
    return _setting(case, _classes(), streams[:1] if case.alone else streams), _interactive


CASES: Final = {"tenants": tenants, "overload": overload, "burst": burst}


def run(case: Case) -> Found:
    """Run it.

    Raises:
        KeyError: there is no such setting.
        ValueError: there is no such arm, or the run is too short for anything to be judged.
    """
    began_s = time.process_time()
    setting, important = CASES[case.name](case)
    done = Fleet(setting, arm(case.arm), case.seed).run()
    counted = {
        name: judged(
            (r for r in done.records if r.qos_class == name), c.objectives, case.warm_up_s, case.seconds
        )
        for name, c in setting.classes.items()
    }
    mine = [r for records in counted.values() for r in records if important(r)]
    if not mine:
        raise ValueError(f"{case.seconds:g} s are too short: no important request is judged")
    missed = {name: _missed(records, setting) for name, records in counted.items() if records}
    window = [r for r in done.records if r.arrival_s >= case.warm_up_s]
    promised_s = min(c.objectives.ttft_s or math.inf for c in setting.classes.values())
    return Found(
        ttft_p99_s=quantile(sorted(r.ttft_s for r in mine), 0.99),
        late=sum(r.ttft_s > promised_s for r in mine) / len(mine),
        missed={**missed, "important": _missed(mine, setting)},
        important=sum(important(r) for r in window) / len(window),
        judged=len(mine),
        cpu_s=round(time.process_time() - began_s, 2),
    )


def _missed(records: list[Record], setting: Setting) -> float:
    return sum(not r.kept(setting.classes[r.qos_class].objectives) for r in records) / len(records)


def _interactive(record: Record) -> bool:
    return record.qos_class == "interactive"


def _chat(tenant: str, per_s: float) -> Stream:
    return Stream(tenant, MODEL, "interactive", chat_lengths(), times=poisson(per_s), tenant=tenant)


def _classes() -> dict[str, QoSClass]:
    batch = replace(CLASSES["batch"], objectives=Objectives(completion_s=_DUE_S), reclaim=Reclaim.ALWAYS)
    return {**CLASSES, "batch": batch}


def _setting(case: Case, classes: dict[str, QoSClass], streams: list[Stream]) -> Setting:
    replicas = [Replica(f"10.0.0.{i + 1}:8000", MODEL, "batch") for i in range(case.replicas)]
    return Setting(classes, replicas, streams, case.seconds, case.warm_up_s, CONFIG)
