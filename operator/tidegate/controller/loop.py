"""The controller: gather, plan, apply, report; once a period, and soon after anything changes."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tidegate.adapters.kube import ApiError, Kube
from tidegate.controller.apply import (
    Children,
    Outcome,
    apply_classes,
    apply_finalizers,
    apply_model,
    apply_taints,
)
from tidegate.controller.demand import Occupied, Pickers, Prometheus, Reading
from tidegate.controller.exposure import apply_exposure
from tidegate.controller.gather import Facts, ModelFacts, Problem, gather
from tidegate.controller.podnotes import PodNotes
from tidegate.controller.report import Reporter
from tidegate.controller.telemetry import Telemetry
from tidegate.controller.watch import KopfWatch
from tidegate.controller.world import OWN_KINDS, RESYNC_S, World
from tidegate.core import reasons
from tidegate.core.plan import plan
from tidegate.core.plan.types import Demand, LaneKey, Memory, Plan, Policy

log = logging.getLogger(__name__)

DEBOUNCE_S: Final = 0.1
"""Changes come in bursts (a Deployment, its ReplicaSet, its pods): one round for each burst."""
_AT_ONCE: Final = 8
"""Models applied at the same time."""
_RETRY_S: Final = (1.0, 2.0, 5.0)
_STUCK_S: Final = 60.0
_WARM_UP_ROUNDS: Final = 4


@dataclass(frozen=True, slots=True)
class Options:
    """How the controller runs. Times in seconds."""

    kubeconfig: str | None = None
    picker_urls: tuple[str, ...] = ()
    prometheus_url: str | None = None
    period_s: float = 1.0
    policy: Policy = field(default_factory=Policy)


class Controller:
    """One controller. `run` until its `stopping` is set."""

    def __init__(self, kube: Kube, options: Options) -> None:
        self.stopping = asyncio.Event()
        self.telemetry = Telemetry()
        self._kube, self._options = kube, options
        self._dirty = asyncio.Event()
        self._world = World(kube, self._dirty.set)
        self._watch = KopfWatch(
            OWN_KINDS, options.kubeconfig, self._world.mark, self.telemetry.kopf_restarts.inc
        )
        self._children = Children(kube, self._world, lambda kind: self.telemetry.writes.labels(kind).inc())
        self._notes = PodNotes(kube, self._world, self._wrote)
        self.reporter = Reporter(kube, self._world, self.telemetry, options.policy)
        self._demand = _demand_source(options)
        self._memory = Memory()
        self._failures = 0
        self._beat = time.monotonic()
        self._done_once = False
        self._cold_rounds = 0

    async def run(self) -> None:
        """Work until told to stop; what is being applied then is finished first."""
        helpers = [
            asyncio.create_task(self._world.run(), name="watches"),
            asyncio.create_task(self._kopf(), name="kopf"),
        ]
        try:
            while not self.stopping.is_set():
                await self._round_safely()
                await self._wait()
        finally:
            for task in helpers:
                task.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)
            await self.reporter.doctor.close()
            await self._demand.close()

    def healthy(self) -> str:
        """Why a restart would help, or ""."""
        silent = time.monotonic() - self._beat
        return f"the loop has been silent for {silent:.0f} s" if silent > _STUCK_S else ""

    def ready(self) -> str:
        """Why nothing is decided yet, or ""."""
        if self._done_once:
            return ""
        missing = self._world.missing
        return f"not listed yet: {', '.join(missing)}" if missing else "the first round is under way"

    async def round(self) -> None:
        """One round: the whole of what the controller does."""
        # 1. Look: list what changed; the rest is watched. Not before everything was seen once.
        await self._world.refresh(time.monotonic(), RESYNC_S if self._watch.alive else self._options.period_s)
        if self._world.missing:
            return
        demand, fresh = await self._timed("demand", self._demand.read(time.monotonic()))
        if not self._warm(fresh):
            return
        facts = gather(self._world, demand, demand_fresh=fresh, intended=self._children.intended)

        # 2. Decide: a pure function of what was seen.
        with self.telemetry.seconds.labels("plan").time():
            decided = plan(facts.snapshot, self._options.policy, self._memory, time.time())
        self._memory = decided.memory

        # 3. Apply: classes before what names them; taints and finalizers; notes on pods, which say how
        #    far a lane may be lowered without cutting anything off; each model by itself.
        classes = await self._timed("classes", apply_classes(self._children, facts))
        await apply_finalizers(self._kube, self._world, facts, self._wrote)
        await apply_taints(self._kube, self._world, facts, self._wrote)
        replicas = await self._timed("pods", self._notes.apply(facts, decided, self._demand.occupied))
        models = await self._timed("models", self._apply_models(facts, decided, replicas))

        # 4. Report: status where it changed, events, metrics, and what was done and why.
        reports = await self._timed("status", self.reporter.statuses(facts, decided, models, classes))
        await self.reporter.account(facts, decided, reports)
        self.telemetry.last_success.set_to_current_time()
        self._done_once = True

    def _warm(self, fresh: bool) -> bool:
        """A rate needs two looks: at the start they are waited for, so that a restart changes nothing."""
        if fresh or not self._options.picker_urls or self._done_once:
            return True
        self._cold_rounds += 1
        return self._cold_rounds > _WARM_UP_ROUNDS

    async def _round_safely(self) -> None:
        self._beat = time.monotonic()
        self._dirty.clear()
        try:
            with self.telemetry.seconds.labels("all").time():
                await self.round()
        except ApiError as error:
            self._failed(error.reason)
            log.warning("round: %s; next in %.1f s", error, self._pause())
        except Exception as error:
            self._failed(type(error).__name__)
            log.exception("round failed; next in %.1f s", self._pause())
        else:
            if self._failures:
                log.info("rounds succeed again after %d that did not", self._failures)
            self._failures = 0

    def _failed(self, reason: str) -> None:
        self._failures += 1
        self.telemetry.errors.labels("round", reason).inc()

    def _pause(self) -> float:
        """Seconds until the next round at the latest."""
        if not self._failures:
            return self._options.period_s
        return max(self._options.period_s, _RETRY_S[min(self._failures, len(_RETRY_S)) - 1])

    async def _wait(self) -> None:
        """Until something changed or the period is over; a failing loop is not hurried by events."""
        waits = [asyncio.create_task(self.stopping.wait())]
        if not self._failures:
            waits.append(asyncio.create_task(self._dirty.wait()))
        done, _ = await asyncio.wait(waits, timeout=self._pause(), return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        if done and not self.stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), DEBOUNCE_S)

    async def _apply_models(
        self, facts: Facts, decided: Plan, replicas: Mapping[LaneKey, int]
    ) -> dict[str, Outcome]:
        limit = asyncio.Semaphore(_AT_ONCE)

        async def one(found: ModelFacts) -> Outcome:
            async with limit:
                return await self._apply_model(facts, found, decided, replicas)

        outcomes = await asyncio.gather(*(one(m) for m in facts.models.values()))
        return dict(zip(facts.models, outcomes, strict=True))

    async def _apply_model(
        self, facts: Facts, found: ModelFacts, decided: Plan, replicas: Mapping[LaneKey, int]
    ) -> Outcome:
        """Whatever goes wrong with one model stays with it."""
        try:
            outcome = await apply_model(self._children, self._world, facts, found, decided, replicas)
            await apply_exposure(self._children, self._world, facts, found, outcome)
        except Exception as error:
            self.telemetry.errors.labels("ModelDeployment", type(error).__name__).inc()
            log.exception("ModelDeployment %s: not applied; again in %.1f s", found.ref, self._pause())
            return Outcome(Problem(reasons.APPLY_FAILED, f"{type(error).__name__}: {error}"))
        if outcome.problem:
            self.telemetry.errors.labels("ModelDeployment", outcome.problem.reason).inc()
        elif not found.hands_off and not found.deleting:
            self.reporter.changed(found, decided)
        return outcome

    async def _kopf(self) -> None:
        """Kopf begins when the kinds are there: without them it would only fail and be restarted."""
        while any(kind.plural in self._world.missing for kind in OWN_KINDS):  # noqa: ASYNC110
            await asyncio.sleep(0.2)
        await self._watch.run()

    async def _timed(self, phase: str, work: Coroutine[Any, Any, Any]) -> Any:
        with self.telemetry.seconds.labels(phase).time():
            return await work

    def _wrote(self, kind: str) -> None:
        self.telemetry.writes.labels(kind).inc()


class _NoDemand:
    """Where nobody can be asked: nothing is known, so nothing is taken away and nothing added."""

    occupied: Mapping[str, Occupied] = {}

    async def read(self, now: float) -> tuple[Mapping[LaneKey, Demand], bool]:  # noqa: ARG002
        return {}, False

    async def close(self) -> None:
        return None


def _demand_source(options: Options) -> Reading:
    if options.prometheus_url:
        return Prometheus(options.prometheus_url, options.period_s)
    if options.picker_urls:
        return Pickers(options.picker_urls, options.period_s)
    log.warning("no --picker-url and no --prometheus-url: demand is unknown, lanes stay at their minimum")
    return _NoDemand()
