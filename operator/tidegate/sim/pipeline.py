"""Steps of an engine laid out in time; the caller's clock may be virtual or real.

With async scheduling (vLLM's default) the next step is planned and launched while one runs, so an
arrival waits for the rest of the running step and for the one behind it.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from tidegate.sim.types import EngineConfig, TokenEvent

StepTime = Callable[[int, int, int, int, float], float]
"""Seconds of a step: what `StepFit.seconds` takes and gives."""


class Planned(Protocol):
    """A step of an engine: whether there is anything in it, and what its time is reckoned from."""

    work: Any
    preempted: list[str]
    prefill_tokens: int
    decodes: int
    decode_context: int
    prefill_context: int
    prefill_pairs: float


P = TypeVar("P", bound=Planned)


class Schedules(Protocol[P]):
    """An engine: `Engine`, `Bulk`, and these with a plugin."""

    config: EngineConfig

    def schedule(self, now: float) -> P:
        """Plan the step that begins at `now`, seconds, and count it as launched."""
        ...

    def complete(self, plan: P) -> list[TokenEvent]:
        """Take a launched step's results."""
        ...


class Launched(NamedTuple, Generic[P]):
    """A step that has been launched; times in seconds on the caller's clock."""

    plan: P
    start: float
    end: float


class Pipeline(Generic[P]):
    """Launches an engine's steps one behind the other, as deep as its config says.

    `speed` divides step times: 2.0 is an engine twice as fast.
    """

    def __init__(self, engine: Schedules[P], step_time: StepTime, speed: float = 1.0) -> None:
        if speed <= 0:
            raise ValueError(f"speed must be positive, got {speed}")
        self.engine = engine
        self._step_time = step_time
        self._speed = speed
        self._depth = 2 if engine.config.async_scheduling else 1
        self._launched: deque[Launched[P]] = deque()
        self._blocked = False

    @property
    def next_end(self) -> float | None:
        """When the running step ends; None when the engine is idle."""
        return self._launched[0].end if self._launched else None

    def launch(self, now: float) -> list[Launched[P]]:
        """Launch what can be launched at `now`; return the new steps.

        With a step under way and nothing more to launch, vLLM's core waits for that step's results: who
        arrives meanwhile is seen, with all others, when it has ended. A step starts when the one
        before it ends. A caller on a real clock, which is always a
        little late, passes the end of the step that it completed, so that lateness never adds up.
        """
        new: list[Launched[P]] = []
        if self._blocked:
            return new
        while len(self._launched) < self._depth:
            start = max(now, self._launched[-1].end) if self._launched else now
            plan = self.engine.schedule(start)
            if not plan.work:
                if plan.preempted and not self._launched:
                    # The requester was its own victim; those behind it can go on at once.
                    continue
                break
            seconds = self._step_time(
                plan.prefill_tokens,
                plan.decodes,
                plan.decode_context,
                plan.prefill_context,
                plan.prefill_pairs,
            )
            step = Launched(plan, start, start + seconds / self._speed)
            self._launched.append(step)
            new.append(step)
        self._blocked = bool(self._launched)
        return new

    def complete(self) -> tuple[Launched[P], list[TokenEvent]]:
        """End the running step; return it and its tokens.

        Raises:
            IndexError: nothing is running.
        """
        step = self._launched.popleft()
        self._blocked = False
        return step, self.engine.complete(step.plan)
