"""The queue, run on an event loop: requests wait here as futures."""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable

from tidegate.core.flow import Ask, Dispatch, Flow, Refused
from tidegate.core.load import EngineReport
from tidegate.facts.endpoints import World
from tidegate.picker.measure.book import Attainment, Book
from tidegate.picker.measure.exports import Tenants
from tidegate.picker.metrics import Metrics

log = logging.getLogger(__name__)

_LEAST_S = 1e-3
"""A timer is not set for sooner than this."""
_TICK_S = 0.25
"""Headroom is lent and old reports distrusted as time passes, so the queue is looked at this often."""


class Desk:
    """Owns the Flow and the facts. All of it runs on one loop, so nothing needs a lock."""

    def __init__(self, flow: Flow, clock: Callable[[], float] = time.monotonic) -> None:
        self.flow = flow
        self.world = World()
        self.informed = asyncio.Event()
        """Set once there are facts."""
        self.metrics = Metrics(flow)
        self.clock = clock
        self.book = Book(self.metrics.measures, flow.policy.fit, flow.measured)
        for collector in (Attainment(self.book, clock), Tenants(self.book.tenants)):
            self.metrics.register(collector)
        self._numbers = itertools.count(1)
        self._futures: dict[int, asyncio.Future[Dispatch | Refused]] = {}
        self._recalls: dict[int, Callable[[], bool]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._pumping = False

    def number(self) -> int:
        """A number for a new request."""
        return next(self._numbers)

    def submit(self, ask: Ask) -> "asyncio.Future[Dispatch | Refused]":
        """Queue a request; the future has its endpoint or its refusal. End it with `end`, always."""
        future: asyncio.Future[Dispatch | Refused] = asyncio.get_running_loop().create_future()
        refused = self.flow.admit(ask, self.clock())
        if refused is not None:
            future.set_result(refused)
            return future
        self.metrics.arrived(ask)
        self._futures[ask.id] = future
        self.pump()
        return future

    def end(self, number: int, *, whole: bool) -> None:
        """A request is over, however it ended; harmless when it never was, or was ended before."""
        self._futures.pop(number, None)
        self.book.ended(number, self.clock(), whole=whole)
        self._recalls.pop(number, None)
        if self.flow.finish(number, self.clock(), whole=whole) is not None:
            self.pump()

    def served(self, number: int, address: str) -> None:
        """The gateway says which endpoint serves a request, where that is not the first it was given."""
        if self.flow.served(number, address, self.clock()):
            self.metrics.served_elsewhere.inc()
            self.pump()

    def may_recall(self, number: int, abort: Callable[[], bool]) -> None:
        """Say how a dispatched request is aborted; `abort` says whether that was still possible."""
        self._recalls[number] = abort

    def set_world(self, world: World) -> None:
        """Take new facts."""
        self.world = world
        self.flow.set_world(world.classes, world.flow_models, world.endpoints, self.clock())
        self.informed.set()
        self.pump()

    def report(self, address: str, report: EngineReport, own: tuple[int, int]) -> None:
        """Take an engine's report; `own` is what `flow.held` said before it was asked."""
        self.flow.report(address, report, *own)
        # Reports of a fleet come in crowds, and few of them make room: one look for all of them.
        if not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_later(_LEAST_S, self.pump)

    def pump(self) -> None:
        """Tell everybody whose turn it is, and everybody whose time is over."""
        now, self._pumping = self.clock(), False
        for ask, refused in self.flow.expire(now):
            self._settle(ask, refused)
        for ask, address in self.flow.recall(now):
            abort = self._recalls.get(ask.id)
            if abort is not None and abort():
                log.debug("request %d is taken back from %s", ask.id, address)
                self.metrics.recalled(ask)
        for dispatch in self.flow.dispatch(now):
            self.metrics.dispatched(dispatch.ask, dispatch.waited_s)
            self._settle(dispatch.ask, dispatch)
        self._set_timer()

    def _set_timer(self) -> None:
        """Look at the queue again when a replica is expected to have room."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        turn_s = self.flow.next_turn()
        if turn_s is not None:
            wait_s = max(_LEAST_S, turn_s - self.clock())
            self._timer = asyncio.get_running_loop().call_later(wait_s, self.pump)

    def _settle(self, ask: Ask, verdict: Dispatch | Refused) -> None:
        future = self._futures.pop(ask.id, None)
        if future is not None and not future.done():
            future.set_result(verdict)

    async def run(self) -> None:
        """Keep time until cancelled."""
        while True:
            await asyncio.sleep(_TICK_S)
            self.pump()
            self.book.sweep(self.clock())
