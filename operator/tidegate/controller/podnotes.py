"""What the controller notes on the lanes' pods: whose GPUs they stand on, and that they are emptied.

The notes are annotations, so a restarted controller finds them, and the picker reads them.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

from tidegate.adapters.kube import ApiError, Kube
from tidegate.adapters.kube import kinds as k
from tidegate.api import names
from tidegate.controller.demand import Occupied
from tidegate.controller.gather import Facts, ModelFacts
from tidegate.controller.pods import by_lane, is_ready
from tidegate.controller.world import World
from tidegate.core import reasons
from tidegate.core.plan.drain import Drain, Replica, drain, limit_s
from tidegate.core.plan.types import LaneKey, Plan
from tidegate.core.quota import Ground, standings
from tidegate.facts.quantities import seconds

log = logging.getLogger(__name__)

Object = dict[str, Any]
Notes = dict[str, str | None]
"""Annotations to set; None takes one off."""

COST_MARKED: Final = "-1000"
"""Below the 0 of everybody else."""
COST_RELEASED: Final = "-2000"
"""Of several that are emptied, those found empty go first."""
_AT_ONCE: Final = 8
_UNMARKED: Final[Notes] = {names.ANNOTATION_DRAINING: None, names.ANNOTATION_DELETION_COST: None}


def grounds(facts: Facts) -> dict[str, Ground]:
    """Whose GPUs every placed pod of an enforced pool stands on, by UID."""
    found: dict[str, Ground] = {}
    for pool in facts.pools.values():
        if pool.core and pool.enforced:
            there = [p for p in pool.pods if p.node and not p.terminating]
            stands = standings(there, pool.core.reservations, facts.snapshot.classes, pool.core.capacity)
            found |= {uid: stand.ground for uid, stand in stands.items()}
    return found


def replica(raw: Object, ground: Ground | None, occupied: Mapping[str, Occupied]) -> Replica:
    """A raw pod as a drain sees it."""
    meta = raw["metadata"]
    notes = meta.get("annotations") or {}
    there = occupied.get((raw.get("status") or {}).get("podIP") or "")
    since = notes.get(names.ANNOTATION_DRAINING)
    return Replica(
        name=meta["name"],
        ready=is_ready(raw),
        created_s=seconds(meta.get("creationTimestamp")) or 0.0,
        ground=ground or Ground.RESERVED,
        in_flight=there.requests if there else None,
        marked_s=_seconds_or(since, 0.0) if since is not None else None,
        empty=bool(there and there.drained),
        released=since is not None and notes.get(names.ANNOTATION_DELETION_COST) == COST_RELEASED,
    )


def _seconds_or(stamp: str, default: float) -> float:
    """A time that somebody wrote by hand may be unreadable: then the drain is as old as can be."""
    try:
        return seconds(stamp) or default
    except ValueError:
        return default


def notes_of(found: Drain, now: float) -> dict[str, Notes]:
    """Annotations by the name of the pod."""
    stamp = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    marked: Notes = {names.ANNOTATION_DRAINING: stamp, names.ANNOTATION_DELETION_COST: COST_MARKED}
    released: Notes = {names.ANNOTATION_DELETION_COST: COST_RELEASED}
    return (
        dict.fromkeys(found.mark, marked)
        | dict.fromkeys(found.release, released)
        | dict.fromkeys(found.unmark, _UNMARKED)
    )


def changes(raw: Object, wanted: Notes) -> Notes:
    """Those notes that the pod does not have yet."""
    have = raw["metadata"].get("annotations") or {}
    return {name: value for name, value in wanted.items() if have.get(name) != value}


class PodNotes:
    """Writes notes where they changed; in a steady state nothing."""

    def __init__(self, kube: Kube, world: World, wrote: Callable[[str], None]) -> None:
        self._kube, self._world, self._wrote = kube, world, wrote

    async def apply(self, facts: Facts, plan: Plan, occupied: Mapping[str, Occupied]) -> dict[LaneKey, int]:
        """Note all that is to be noted; returns how many replicas each lane's Deployment is to ask for."""
        now = time.time()
        ground = grounds(facts)
        pods = by_lane(self._world.objects(k.POD))
        replicas: dict[LaneKey, int] = {}
        work: list[tuple[Object, Notes]] = []
        for found in facts.models.values():
            if found.obj is None or found.deleting or found.hands_off == reasons.EXTERNAL:
                continue
            for qos_class in found.classes:
                key = found.key(qos_class)
                mine = _staying(pods.get((key.namespace, names.bounded(key.model), qos_class), ()))
                seen = [replica(raw, ground.get(raw["metadata"]["uid"]), occupied) for raw in mine]
                decided = self._drain(facts, found, key, plan, seen, now)
                replicas[key] = decided.replicas
                marks = notes_of(decided, now)
                for raw in mine:
                    wanted = dict(marks.get(raw["metadata"]["name"], {}))
                    if stand := ground.get(raw["metadata"]["uid"]):
                        wanted[names.ANNOTATION_STANDING] = stand.value
                    if new := changes(raw, wanted):
                        work.append((raw, new))
        await self._write(work)
        return replicas

    def _drain(
        self, facts: Facts, found: ModelFacts, key: LaneKey, plan: Plan, seen: list[Replica], now: float
    ) -> Drain:
        step = plan.lanes.get(key)
        lane = next((x for x in found.model.lanes if x.key == key), None) if found.model else None
        name = names.lane_name(key.model, key.qos_class)
        deployment = self._world.get(k.DEPLOYMENT, name, key.namespace)
        current = deployment["spec"].get("replicas", 1) if deployment else 0
        qos = facts.snapshot.classes.get(key.qos_class)
        if step is None or lane is None or qos is None or not step.applied or found.hands_off:
            # Not ours to lower now, so nothing is emptied either.
            return Drain(current, unmark=tuple(r.name for r in seen if r.marked_s is not None))
        limit = limit_s(lane.objectives or qos.objectives)
        seen = [replace(r, asked=r.name in step.leaving) for r in seen]
        result = drain(step.replicas, current, seen, limit, now)
        late = [r for r in seen if r.name in result.release and not r.empty]
        for r in late:
            log.warning(
                "%s: pod %s goes after %.0f s with requests in flight: %s",
                *(key, r.name, limit, "unknown" if r.in_flight is None else r.in_flight),
            )
        if result.mark:
            log.info("%s: emptied before they go: %s", key, ", ".join(result.mark))
        if result.unmark and step.replicas > current - len(result.unmark):
            log.info("%s: wanted again: %s", key, ", ".join(result.unmark))
        return result

    async def _write(self, work: list[tuple[Object, Notes]]) -> None:
        limit = asyncio.Semaphore(_AT_ONCE)

        async def one(raw: Object, notes: Notes) -> None:
            meta = raw["metadata"]
            patch = {"metadata": {"uid": meta["uid"], "annotations": notes}}
            async with limit:
                try:
                    result = await self._kube.merge(k.POD, meta["name"], patch, meta["namespace"])
                except ApiError as error:
                    if error.status not in (404, 409):  # gone, or another of its name
                        where = f"{meta['namespace']}/{meta['name']}"
                        log.warning("pod %s: noting: %s; again in the next period", where, error)
                    return
            self._world.written(k.POD, result)
            self._wrote("Pod")

        await asyncio.gather(*(one(raw, notes) for raw, notes in work))


def _staying(pods: Iterable[Object]) -> list[Object]:
    """Those that we made and that are not going."""
    return [
        p
        for p in pods
        if not p["metadata"].get("deletionTimestamp")
        and (p["metadata"].get("labels") or {}).get(names.LABEL_MANAGED_BY) == names.FIELD_MANAGER
    ]
