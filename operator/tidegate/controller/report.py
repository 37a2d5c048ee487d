"""Tells what a round did: status of every object, events, decisions, metrics."""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tidegate.adapters.kube import ApiError, Kind, Kube
from tidegate.adapters.kube import kinds as k
from tidegate.api import names
from tidegate.controller import status as render_status
from tidegate.controller.apply import Outcome
from tidegate.controller.conditions import changed
from tidegate.controller.doctor import Doctor
from tidegate.controller.events import Events
from tidegate.controller.gather import Facts, ModelFacts
from tidegate.controller.history import Decisions, Moves, preemptions
from tidegate.controller.pods import LaneView, by_lane, lane_view, ready_pods
from tidegate.controller.poolreport import PoolReport, report
from tidegate.controller.telemetry import Telemetry
from tidegate.controller.world import World
from tidegate.core import reasons
from tidegate.core.plan.types import Decision, Plan, Policy
from tidegate.render.engine import slots

log = logging.getLogger(__name__)

Object = dict[str, Any]


class Reporter:
    """Writes status where it changed, and keeps the account of what was done."""

    def __init__(self, kube: Kube, world: World, telemetry: Telemetry, policy: Policy) -> None:
        self.decisions = Decisions()
        self.doctor = Doctor()
        self._kube, self._world, self._telemetry, self._policy = kube, world, telemetry, policy
        self._events, self._moves = Events(kube), Moves()
        self._said: dict[tuple[object, str], tuple[str, str]] = {}

    async def statuses(
        self, facts: Facts, plan: Plan, models: Mapping[str, Outcome], classes: Mapping[str, Outcome]
    ) -> dict[str, PoolReport]:
        """Write the status of everything whose status changed; returns the pools' figures."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        reports = {
            n: report(p.core, p.pods, facts.snapshot.classes) for n, p in facts.pools.items() if p.core
        }
        for name, found in facts.classes.items():
            wanted = render_status.class_status(name, found, classes.get(name, Outcome()), facts, now)
            await self._write(k.QOS_CLASS, found.raw, wanted)
        for name, pool in facts.pools.items():
            wanted = render_status.pool_status(pool, reports.get(name), facts, now)
            await self._write(k.GPU_POOL, pool.raw, wanted)
        pods = self._world.objects(k.POD)
        self.doctor.examine(facts.models.values(), pods, time.time())
        lanes = by_lane(pods)
        for ref, model in facts.models.items():
            views = {
                name: replace(view, attained=attained(facts, model, name))
                for name, view in self._views(model, lanes, pods).items()
            }
            outcome = models.get(ref, Outcome())
            wanted = render_status.model_status(model, plan, outcome, views, now)
            await self._write(k.MODEL_DEPLOYMENT, model.raw, wanted)
            for child in outcome.repaired:
                await self._events.post(
                    model.raw,
                    "Repair",
                    reasons.DRIFT_REPAIRED,
                    f"{child} was edited by hand",
                    now=time.time(),
                )
        self._telemetry.show_pools(reports)
        return reports

    async def account(self, facts: Facts, plan: Plan, reports: Mapping[str, PoolReport]) -> None:
        """Borrows and reclaims that pods show, and what the plan decided: log, metrics, events."""
        now = time.time()
        fewer = {
            lane.key: lane.replicas - plan.lanes[lane.key].replicas
            for m in facts.snapshot.models
            for lane in m.lanes
            if lane.key in plan.lanes and plan.lanes[lane.key].applied
        }
        self._moves.lowered(now, plan.decisions, fewer)
        for decision in plan.decisions:
            await self._decided(facts, decision, now)
        current = {(d.lane, d.kind) for d in plan.decisions}
        self._said = {key: said for key, said in self._said.items() if key in current}
        gone = preemptions(self._world.objects(k.POD))
        for move in self._moves.observe(now, reports, facts.snapshot.pods, gone):
            counter = self._telemetry.borrows if move.kind == "borrow" else self._telemetry.reclaims
            counter.labels(move.pool, move.qos_class).inc()
            ref = f"{move.pod.namespace}/{move.pod.model}"
            await self._tell(facts, now, move.kind, ref, move.reason, move.message)

    def changed(self, found: ModelFacts, plan: Plan) -> None:
        """Count replicas that the plan changed, once they are written."""
        for lane in found.model.lanes if found.model else ():
            step = plan.lanes.get(lane.key)
            if step and step.applied and step.replicas != lane.replicas:
                self._telemetry.rebalances.labels(found.pool).inc()

    async def _decided(self, facts: Facts, decision: Decision, now: float) -> None:
        key = (decision.lane, decision.kind)
        text = (decision.reason, decision.message if decision.applied else "")
        if self._said.get(key) == text:
            return
        self._said[key] = text
        if decision.kind == "rebalance" and decision.applied:
            self._telemetry.rebalances.labels(decision.pool).inc()
        message = decision.message if decision.applied else f"would: {decision.message}"
        await self._tell(facts, now, decision.kind, decision.object, decision.reason, message)

    async def _tell(self, facts: Facts, now: float, kind: str, ref: str, reason: str, message: str) -> None:
        self.decisions.add(now, kind, ref, reason, message)
        log.info("%s %s: %s: %s", kind, ref, reason, message)
        about = facts.models.get(ref)
        if about is not None:
            await self._events.post(
                about.raw, kind.capitalize(), reason, message, now=now, warning=kind == "blocked"
            )

    def _views(
        self, model: ModelFacts, lanes: Mapping[tuple[str, str, str], list[Object]], pods: list[Object]
    ) -> dict[str, LaneView]:
        namespace, name = model.ref.split("/")
        if model.obj and model.obj.spec.engine.endpoints:
            selector = model.obj.spec.engine.endpoints.selector
            theirs = [
                p
                for p in pods
                if p["metadata"].get("namespace") == namespace
                and selector.matches(p["metadata"].get("labels") or {})
            ]
            count = ready_pods(theirs)
            return {c: LaneView(replicas=count, ready=count) for c in model.classes}
        # The share that lower classes leave free is worth nothing to the lowest.
        kept = math.ceil(slots(model.obj) * self._policy.headroom) if model.obj else 0
        views = {}
        for qos_class in model.classes:
            deployment = self._world.get(k.DEPLOYMENT, names.lane_name(name, qos_class), namespace)
            mine = lanes.get((namespace, names.bounded(name), qos_class), [])
            view = lane_view(deployment, mine, kept if len(model.classes) > 1 else 0)
            if not view.trouble:
                view = replace(view, trouble=next((a for p in mine if (a := self.doctor.answer(p))), ""))
            views[qos_class] = view
        return views

    async def _write(self, kind: Kind, raw: Object, wanted: Object) -> None:
        if not render_status.differs(raw, wanted):
            return
        meta = raw["metadata"]
        if "url" not in wanted and "url" in (raw.get("status") or {}):
            wanted = {**wanted, "url": None}
        try:
            result = await self._kube.merge(
                kind, meta["name"], {"status": wanted}, meta.get("namespace"), subresource="status"
            )
        except ApiError as error:
            if error.status != 404:  # gone meanwhile
                log.warning("%s %s: status: %s; again in the next period", kind.name, meta["name"], error)
                self._telemetry.errors.labels(kind.name, error.reason).inc()
            return
        self._world.written(kind, result)
        self._telemetry.writes.labels(f"{kind.name}/status").inc()
        for condition in changed((raw.get("status") or {}).get("conditions") or (), wanted["conditions"]):
            if condition["reason"] == reasons.WAITS_FOR_GPUS:
                continue  # for a moment in every reclaim, which is told by itself
            bad = condition["type"] != "Ready" or condition["status"] == "False"
            note = condition["message"] or condition["reason"]
            await self._events.post(raw, "Report", condition["reason"], note, now=time.time(), warning=bad)


def attained(facts: Facts, model: ModelFacts, qos_class: str) -> int | None:
    """Of a hundred requests, those that met all objectives, rounded down: 99 is at least 99."""
    seen = facts.snapshot.demand.get(model.key(qos_class))
    return 100 * seen.kept // seen.judged if seen is not None and seen.judged else None
