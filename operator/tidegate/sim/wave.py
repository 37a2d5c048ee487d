"""The gate's square wave raised beyond what EDF serves, and who of the important ones is late.

The gate's workload (`sim.gate`): one replica, one of three deadlines. Every fifth request is important,
whatever its class. The same arrivals go to one engine with Sarathi's scheduler, or to a fleet of one engine
of vLLM's behind production's queue, where every class is there twice, once for those that are important.
"""

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from tidegate.core.steptime import LLAMA3_8B_A100 as FIT
from tidegate.core.types import Objectives, QoSClass, Reclaim
from tidegate.sim.arms import Static, gate_arms
from tidegate.sim.drive import Outcome
from tidegate.sim.fleet import Fleet, Replica, Setting
from tidegate.sim.fleet_arms.registry import arm
from tidegate.sim.gate import PROMISES, code_lengths, square_wave, workload
from tidegate.sim.headline import CONFIG, MODEL
from tidegate.sim.promise import Promise
from tidegate.sim.relieved import Early, Relieved
from tidegate.sim.sarathi import Sarathi
from tidegate.sim.serve import Promised, serve
from tidegate.sim.workload import Length, Stream

EVERY: Final = 5
"""Every so many-th request is important: a fifth of each class."""
CHUNK: Final = 2552
"""The most that the step-time fit knows."""
_WIDE: Final = 1_000_000
_DAY_S: Final = 86_400.0


def relief() -> Sarathi:
    """By deadline, the fewest given up and the unimportant first."""
    return Relieved(Early(KEEP), Static(CHUNK), FIT, tokens=CHUNK, work=WORK)


KEEP: Final = (0.5, 0.9)
"""Of its deadline, when an important request counts as due, and another one."""
WORK: Final = 1.15
"""A prompt's time in a busy engine, by the fit: decodes are beside it."""
SARATHI: Final[dict[str, Callable[[], Sarathi]]] = {
    **{name: made.engine for name, made in gate_arms(FIT).items()},
    "relief": relief,
}
"""Engines of their own; every other name is an arm of a fleet."""


@dataclass(frozen=True, slots=True)
class Wave:
    """One run. `factor` raises the wave, `hours` is its length; 15 minutes low, 15 high, and so on."""

    arm: str
    seed: int
    factor: float = 1.115
    hours: float = 4.0


@dataclass(frozen=True, slots=True)
class Missed:
    """Shares of requests that were late, 0 to 1; of the important ones also by class."""

    requests: int
    important: int
    overall: float
    of_important: float
    by_class: dict[str, float]
    cpu_s: float = 0.0


def arrivals(wave: Wave) -> Iterator[Promised]:
    """The gate's arrivals on the raised wave; priority 0 is important, 1 is not."""
    phases = square_wave(2.0 * wave.factor, 5.0 * wave.factor, total_s=wave.hours * 3600)
    for number, one in enumerate(workload(phases, code_lengths(), wave.seed)):
        request = replace(one.request, priority=0 if number % EVERY == 0 else 1)
        yield Promised(one.time_s, request, one.promise)


def run(wave: Wave) -> Missed:
    """Serve everything to its end, and see who was late.

    Raises:
        ValueError: there is no such arm, or nothing arrives.
    """
    began_s = time.process_time()
    coming = list(arrivals(wave))
    if not coming:
        raise ValueError("nothing arrived: a longer or a higher wave is needed")
    make = SARATHI.get(wave.arm)
    outcomes = (
        [each.outcome for each in serve(make(), coming)]
        if make
        else through_fleet(wave.arm, coming, wave.seed)
    )
    late = [not one.promise.kept(outcome) for one, outcome in zip(coming, outcomes, strict=True)]
    by_class: dict[str, list[bool]] = {}
    for one, flag in zip(coming, late, strict=True):
        by_class.setdefault(named(one), []).append(flag)
    important = [flag for one, flag in zip(coming, late, strict=True) if one.request.priority == 0]
    return Missed(
        requests=len(late),
        important=len(important),
        overall=sum(late) / len(late),
        of_important=sum(important) / len(important),
        by_class={name: sum(flags) / len(flags) for name, flags in sorted(by_class.items())},
        cpu_s=round(time.process_time() - began_s, 2),
    )


# ── a fleet of one ──────────────────────────────────────────────────────────────────────────────


def named(one: Promised) -> str:
    """The class of a request: its promise, and whether it is important."""
    return f"{'important' if one.request.priority == 0 else 'other'}-{one.promise.name}"


def classes() -> dict[str, QoSClass]:
    """Every promise twice. Important ones come before all others, and then who is due soonest."""
    found: dict[str, QoSClass] = {}
    for rank, kind in enumerate(("important", "other")):
        for place, promise in enumerate(PROMISES):
            name = f"{kind}-{promise.name}"
            found[name] = QoSClass(
                name,
                1000 - 500 * rank - 100 * place,
                Reclaim.ALWAYS if place == len(PROMISES) - 1 else Reclaim.NEVER,
                objectives=_objectives(promise),
                queue_max_requests=_WIDE,
                queue_max_wait_s=_DAY_S,
            )
    return found


def _objectives(promise: Promise) -> Objectives:
    """As a class has them. The pace is nobody's promise here, as in the gate."""
    if promise.ttft_s < math.inf:
        return Objectives(ttft_s=promise.ttft_s)
    return Objectives(completion_s=promise.finish_s)


def through_fleet(name: str, coming: list[Promised], seed: int) -> list[Outcome]:
    """What one replica of vLLM's makes of the arrivals behind a router, in their order."""
    parted: dict[str, list[tuple[int, Promised]]] = {}
    for index, one in enumerate(coming):
        parted.setdefault(named(one), []).append((index, one))
    setting = Setting(
        classes=classes(),
        replicas=[Replica("10.0.0.1:8000", MODEL, "other-" + PROMISES[-1].name)],
        streams=[_stream(stream, [one for _, one in rows]) for stream, rows in parted.items()],
        # All deadlines pass in this time: who is not served by then is late.
        seconds=coming[-1].time_s + max(promise.due_s for promise in PROMISES) + 1.0,
        config=CONFIG,
    )
    done = Fleet(setting, arm(name), seed).run()
    places = {stream: iter(rows) for stream, rows in parted.items()}
    outcomes: dict[int, Outcome] = {}
    for record in done.records:
        index, _ = next(places[record.stream])
        outcomes[index] = Outcome(record.arrival_s, record.first_s, record.finish_s)
    return [outcomes[index] for index in range(len(coming))]


def _stream(name: str, rows: list[Promised]) -> Stream:
    def times(_rng: random.Random) -> Iterator[float]:
        return iter([one.time_s for one in rows])

    lengths = [Length(one.request.prompt_tokens, one.request.output_tokens) for one in rows]
    return Stream(name, MODEL, name, lengths, times=times, shuffled=False)
