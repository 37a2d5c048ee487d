"""Run a list of arrivals through one engine in virtual time."""

from bisect import insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tidegate.core.steptime import LLAMA3_8B_A100
from tidegate.sim.engine import Engine
from tidegate.sim.pipeline import Pipeline, StepTime
from tidegate.sim.types import Counters, EngineConfig, Request


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request and when it reaches the engine, seconds."""

    time_s: float
    request: Request


@dataclass(slots=True)
class Outcome:
    """When a request arrived, got its first token and its last; seconds. None: not yet."""

    arrival_s: float
    first_token_s: float | None = None
    finish_s: float | None = None
    tokens: int = 0

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s


@dataclass(frozen=True, slots=True)
class Run:
    """What came of a run: outcomes by request id, in the order in which the requests finished."""

    outcomes: dict[str, Outcome]
    finish_order: list[str] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)


def drive(
    config: EngineConfig,
    arrivals: Iterable[Arrival],
    step_time: StepTime = LLAMA3_8B_A100.seconds,
    speed: float = 1.0,
    following: Mapping[str, Request] | None = None,
    gap_s: float = 0.0,
) -> Run:
    """Serve every arrival to its end and say when each was served.

    An arrival at the very moment a step ends is seen by the plan made at that moment.

    Args:
        config: of the engine.
        arrivals: in any order.
        step_time: seconds of a step.
        speed: divides step times.
        following: closed loops: by id of a request the one that arrives `gap_s` after its end.
        gap_s: seconds.

    Raises:
        ValueError: two requests share an id, or one can never fit the engine.
    """
    following = following or {}
    engine = Engine(config)
    pipeline = Pipeline(engine, step_time, speed)
    todo = sorted(arrivals, key=lambda a: a.time_s)
    outcomes: dict[str, Outcome] = {}
    finish_order: list[str] = []
    position = 0
    while position < len(todo) or engine.unfinished:
        end = pipeline.next_end
        now = todo[position].time_s if end is None else end
        if end is not None:
            # Those who came while the step ran are queued before its results make room.
            position = _take(todo, position, end, engine, outcomes)
            for event in pipeline.complete()[1]:
                outcome = outcomes[event.id]
                outcome.tokens += 1
                if event.nth == 0:
                    outcome.first_token_s = now
                if event.finished:
                    outcome.finish_s = now
                    finish_order.append(event.id)
                    if then := following.get(event.id):
                        insort(todo, Arrival(now + gap_s, then), position, key=lambda a: a.time_s)
        else:
            position = _take(todo, position, now, engine, outcomes)
        pipeline.launch(now)
    return Run(outcomes, finish_order, engine.counters)


def _take(
    todo: list[Arrival], position: int, now: float, engine: Engine, outcomes: dict[str, Outcome]
) -> int:
    """Add the arrivals up to `now`; return the position of the next."""
    while position < len(todo) and todo[position].time_s <= now:
        arrival = todo[position]
        if arrival.request.id in outcomes:
            raise ValueError(f"request {arrival.request.id} arrives twice")
        engine.add(arrival.request, arrival.time_s)
        outcomes[arrival.request.id] = Outcome(arrival.time_s)
        position += 1
    return position
