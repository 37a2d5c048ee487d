"""Run promised requests through one Sarathi engine in virtual time."""

from collections.abc import Iterable
from dataclasses import dataclass

from tidegate.core.steptime import LLAMA3_8B_A100
from tidegate.sim.drive import Arrival, Outcome
from tidegate.sim.pipeline import StepTime
from tidegate.sim.promise import ANYTIME, Promise
from tidegate.sim.sarathi import Sarathi


@dataclass(frozen=True, slots=True)
class Promised(Arrival):
    """An arrival and what it was promised."""

    promise: Promise = ANYTIME


@dataclass(frozen=True, slots=True)
class Served:
    """What came of an arrival."""

    arrival: Promised
    outcome: Outcome


def serve(
    engine: Sarathi, arrivals: Iterable[Promised], step_time: StepTime = LLAMA3_8B_A100.seconds
) -> list[Served]:
    """Serve every arrival to its end, one step after the other; what came of each, as they arrived.

    Sarathi plans a step when the one before it has ended. Who comes while a step runs, or at the
    very moment it ends, is seen by the next one.

    Raises:
        ValueError: arrivals are not in order of time, or a request is refused by the engine.
    """
    todo = iter(arrivals)
    coming = next(todo, None)
    served: dict[str, Served] = {}
    now = last_s = 0.0
    while coming is not None or engine.unfinished:
        if not engine.unfinished and coming is not None:
            now = max(now, coming.time_s)
        while coming is not None and coming.time_s <= now:
            request = coming.request
            if coming.time_s < last_s:
                raise ValueError(f"request {request.id} arrives before the one ahead of it: sort by time_s")
            if request.id in served:
                raise ValueError(f"request {request.id} arrives twice")
            last_s = coming.time_s
            engine.add(request, last_s, coming.promise)
            served[request.id] = Served(coming, Outcome(last_s))
            coming = next(todo, None)
        plan = engine.schedule(now)
        now += step_time(
            plan.prefill_tokens,
            plan.decodes,
            plan.decode_context,
            plan.prefill_context,
            plan.prefill_pairs,
        )
        for event in engine.complete(plan):
            outcome = served[event.id].outcome
            outcome.tokens += 1
            if event.nth == 0:
                outcome.first_token_s = now
            if event.finished:
                outcome.finish_s = now
    return list(served.values())
