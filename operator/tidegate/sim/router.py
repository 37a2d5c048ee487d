"""What decides in a simulated fleet: production's own queue, or an arm to compare it with."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tidegate.core.flowtypes import Ask, Dispatch, Ended, Endpoint, Model, ModelKey, Refused
from tidegate.core.load import EngineReport
from tidegate.core.types import QoSClass
from tidegate.sim.bulk import Bulk
from tidegate.sim.pipeline import Schedules
from tidegate.sim.types import Counters, EngineConfig, Request


class Router(Protocol):
    """The part of `core.flow.Flow` that a picker uses; see there. `Flow` itself is one."""

    def set_world(
        self,
        classes: Mapping[str, QoSClass],
        models: Mapping[ModelKey, Model],
        endpoints: Iterable[Endpoint],
        now: float,
    ) -> None:
        """Replace what exists."""
        ...

    def admit(self, ask: Ask, now: float) -> Refused | None:
        """Queue a request, or say why not."""
        ...

    def dispatch(self, now: float) -> list[Dispatch]:
        """Give endpoints to those whose turn it is."""
        ...

    def expire(self, now: float) -> list[tuple[Ask, Refused]]:
        """Refuse what has waited too long."""
        ...

    def recall(self, now: float) -> list[tuple[Ask, str]]:
        """Requests to abort, and where they run; they come again."""
        ...

    def finish(self, request: int, now: float, *, whole: bool = True) -> Ended | None:
        """A request is over."""
        ...

    def next_turn(self) -> float | None:
        """When to call `dispatch` though nothing else has happened; None when there is no such time."""
        ...

    def report(self, address: str, report: EngineReport, own_before: int, own_tokens_before: int) -> None:
        """Take an engine's own counts."""
        ...

    def held(self, address: str) -> tuple[int, int]:
        """Requests and KV tokens in flight at an endpoint."""
        ...

    def waiting(self) -> Iterator[Ask]:
        """Everything that is queued."""
        ...


class SiteEngine(Schedules[Any], Protocol):
    """An engine as a fleet runs it; see `Bulk`."""

    counters: Counters

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        ...

    @property
    def unfinished(self) -> int:
        """Requests that are running or waiting."""
        ...

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache in use, 0 to 1."""
        ...

    def add(self, request: Request, now: float) -> None:
        """Queue a request."""
        ...

    def abort(self, request_id: str) -> bool:
        """Drop a request; False when it is not known."""
        ...

    def progress(self) -> Iterator[tuple[str, int]]:
        """For every request the tokens that are computed."""
        ...


Build = Callable[[EngineConfig], SiteEngine]
"""Makes an engine with these settings."""


@dataclass(frozen=True, slots=True)
class Arm:
    """A named way to run a fleet: who routes, and what the engines are told.

    Attributes:
        name: As tables show it.
        router: Makes a new one.
        engine: The engine's settings by lane, given the fleet's own.
        build: Makes an engine; vLLM's by default.
        clairvoyant: Whether the router is told how long outputs will be.
        engine_priority: Whether requests carry their class's priority into the engine.
        lanes: By how many replicas there are, the lane (class) of each; None keeps the fleet's.
    """

    name: str
    router: Callable[[], Router]
    engine: Callable[[str, EngineConfig], EngineConfig] = lambda _lane, config: config
    engine_priority: bool = True
    build: Build = Bulk
    lanes: Callable[[int], list[str]] | None = None
    clairvoyant: bool = False
