"""What a picker counts, as its metrics say it: around any router, which knows nothing of it."""

from collections.abc import Iterable, Iterator, Mapping

from tidegate.core.flowtypes import Ask, Dispatch, Ended, Endpoint, Model, ModelKey, Refused
from tidegate.core.load import EngineReport
from tidegate.core.plan.types import LaneKey
from tidegate.core.types import QoSClass
from tidegate.facts.demand import COUNTERS, GAUGES, Values
from tidegate.sim.router import Router


class Counted:
    """A router, and the counters and gauges that a controller reads of a picker."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._waiting: dict[int, Ask] = {}
        self._running: dict[int, LaneKey] = {}
        self.counters: Values = {}
        self.gauges: Values = {}

    def set_world(
        self,
        classes: Mapping[str, QoSClass],
        models: Mapping[ModelKey, Model],
        endpoints: Iterable[Endpoint],
        now: float,
    ) -> None:
        """Replace what exists."""
        self._router.set_world(classes, models, endpoints, now)

    def admit(self, ask: Ask, now: float) -> Refused | None:
        """Queue a request, or say why not."""
        refused = self._router.admit(ask, now)
        if refused is None:
            lane = _lane(ask)
            for name, more in zip(COUNTERS, (1, ask.prompt_tokens, ask.output_tokens), strict=True):
                self.counters[name, lane] = self.counters.get((name, lane), 0.0) + more
            self._wait(ask, 1)
            self._waiting[ask.id] = ask
        return refused

    def dispatch(self, now: float) -> list[Dispatch]:
        """Give endpoints to those whose turn it is."""
        sent = self._router.dispatch(now)
        for one in sent:
            del self._waiting[one.ask.id]
            self._wait(one.ask, -1)
            lane = self._running[one.ask.id] = _lane(one.ask)
            self._gauge(GAUGES[2], lane, 1)
        return sent

    def expire(self, now: float) -> list[tuple[Ask, Refused]]:
        """Refuse what has waited too long."""
        gone = self._router.expire(now)
        for ask, _ in gone:
            del self._waiting[ask.id]
            self._wait(ask, -1)
        return gone

    def recall(self, now: float) -> list[tuple[Ask, str]]:
        """Requests to abort."""
        return self._router.recall(now)

    def finish(self, request: int, now: float, *, whole: bool = True) -> Ended | None:
        """A request is over."""
        if (lane := self._running.pop(request, None)) is not None:
            self._gauge(GAUGES[2], lane, -1)
        elif (ask := self._waiting.pop(request, None)) is not None:
            self._wait(ask, -1)
        return self._router.finish(request, now, whole=whole)

    def next_turn(self) -> float | None:
        """When to call `dispatch` though nothing else has happened."""
        return self._router.next_turn()

    def report(self, address: str, report: EngineReport, own_before: int, own_tokens_before: int) -> None:
        """Take an engine's own counts."""
        self._router.report(address, report, own_before, own_tokens_before)

    def waiting(self) -> Iterator[Ask]:
        """Everything that is queued."""
        return self._router.waiting()

    def held(self, address: str) -> tuple[int, int]:
        """Requests and KV tokens in flight at an endpoint."""
        return self._router.held(address)

    def _wait(self, ask: Ask, step: int) -> None:
        lane = _lane(ask)
        self._gauge(GAUGES[0], lane, step)
        self._gauge(GAUGES[1], lane, step * ask.tokens)

    def _gauge(self, name: str, lane: LaneKey, change: float) -> None:
        self.gauges[name, lane] = self.gauges.get((name, lane), 0.0) + change


def _lane(ask: Ask) -> LaneKey:
    return LaneKey(*ask.model, ask.qos_class)
