"""Writes what the plan says: children, taints, finalizers. One object's failure stops no other."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tidegate.adapters.kube import ApiError, Kind, Kube
from tidegate.adapters.kube import kinds as k
from tidegate.api import names
from tidegate.controller.drift import claims, digest, fingerprint, without
from tidegate.controller.gather import Facts, ModelFacts, Problem
from tidegate.controller.world import World, owned
from tidegate.core import reasons
from tidegate.core.plan.types import LaneKey, Plan
from tidegate.render.lane import lane
from tidegate.render.priorityclass import priority_class
from tidegate.render.service import service

log = logging.getLogger(__name__)

Object = dict[str, Any]


@dataclass(slots=True)
class Outcome:
    """What came of one object's children.

    `conflicts` are fields left to other managers; `unexposed` is why gateways do not find it.
    """

    problem: Problem | None = None
    conflicts: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    unexposed: Problem | None = None


class Children:
    """Applies children, and remembers what it applied so that a steady state writes nothing.

    A child is written when what is rendered changed, or when the live object is not as our last
    write left it. After a restart each is applied once, which the API server answers without a
    change where nothing differs.
    """

    def __init__(self, kube: Kube, world: World, wrote: Callable[[str], None]) -> None:
        self._kube, self._world, self._wrote = kube, world, wrote
        self._applied: dict[tuple[Kind, str, str], tuple[str, str, str]] = {}
        self.intended: dict[tuple[str, str], int] = {}
        """Replicas of each lane's Deployment as last planned. What a hand made of them is no plan."""

    async def ensure(
        self, kind: Kind, wanted: Object, owner_uid: str, outcome: Outcome, planned: int | None = None
    ) -> None:
        """Bring one child to what is rendered. Raises ApiError.

        `planned` are a lane's replicas by the plan; it asks for more while some are being emptied.
        """
        meta = wanted["metadata"]
        name, namespace = meta["name"], meta.get("namespace", "")
        live = self._world.get(kind, name, namespace)
        remembered = self._applied.get((kind, namespace, name))
        if live is None:
            live = await self._unlabelled(kind, name, namespace)
        if live is not None and (problem := _foreign(kind, live, owner_uid)):
            outcome.problem = problem
            return
        taken = claims(live, wanted) if live else []
        outcome.conflicts += [f"{kind.name} {name}: {c}" for c in taken]
        if any(c.path == ("spec", "replicas") for c in taken):
            self.intended.pop((namespace, name), None)
        wanted = without(wanted, taken)
        rendered = digest(wanted)
        if live and remembered and remembered[:2] == (rendered, fingerprint(live)):
            self._intend(namespace, name, wanted, planned)
            return
        if live and _immutable_differs(kind, live, wanted):
            await self.remove(kind, live)
            return  # made anew once it is gone
        result = await self._kube.apply(kind, wanted, manager=names.FIELD_MANAGER, force=True)
        self._world.written(kind, result)
        self._intend(namespace, name, wanted, planned)
        version = result["metadata"]["resourceVersion"]
        now = (rendered, fingerprint(result), version)
        self._applied[kind, namespace, name] = now
        before = remembered[2] if remembered else (live or {}).get("metadata", {}).get("resourceVersion")
        if version not in (before, (live or {}).get("metadata", {}).get("resourceVersion")):
            self._wrote(kind.name)
            if remembered and remembered[:2] == now[:2]:  # it is again as we had left it
                outcome.repaired.append(f"{kind.name} {name}")

    def _intend(self, namespace: str, name: str, wanted: Object, planned: int | None) -> None:
        if planned is not None and "replicas" in wanted["spec"]:
            self.intended[namespace, name] = planned

    async def remove(self, kind: Kind, obj: Object) -> None:
        """Delete one child. Its pods drain as their own grace says. Raises ApiError."""
        meta = obj["metadata"]
        name, namespace = meta["name"], meta.get("namespace", "")
        if not meta.get("deletionTimestamp"):
            await self._kube.delete(kind, name, namespace or None, uid=meta["uid"])
            self._wrote(kind.name)
        self._world.forget(kind, name, namespace)
        self._applied.pop((kind, namespace, name), None)
        self.intended.pop((namespace, name), None)

    def let_go(self, found: ModelFacts) -> None:
        """A model that is not to be touched has the replicas that its people give it."""
        for qos_class in found.classes:
            namespace, name = found.ref.split("/")
            self.intended.pop((namespace, names.lane_name(name, qos_class)), None)

    async def _unlabelled(self, kind: Kind, name: str, namespace: str) -> Object | None:
        """An object of this name that our watch does not see: somebody else's, or without its label."""
        try:
            return await self._kube.get(kind, name, namespace or None)
        except ApiError as error:
            if error.status == 404:
                return None
            raise


async def apply_classes(children: Children, facts: Facts) -> dict[str, Outcome]:
    """A PriorityClass for every QoSClass that can be read and is not going."""
    outcomes = {}
    for name, found in facts.classes.items():
        if found.obj and not found.raw["metadata"].get("deletionTimestamp"):
            outcomes[name] = outcome = Outcome()
            wanted = priority_class(found.obj)
            child = (k.PRIORITY_CLASS, wanted, found.obj.metadata.uid, None)
            await _guarded(f"QoSClass {name}", outcome, [child], children)
    return outcomes


async def apply_model(
    children: Children,
    world: World,
    facts: Facts,
    found: ModelFacts,
    plan: Plan,
    replicas: Mapping[LaneKey, int],
) -> Outcome:
    """Lanes and Service of one model; what is rendered no more is deleted.

    `replicas` are what each lane's Deployment is to ask for now, on its way to what is planned.
    """
    outcome = Outcome()
    model = found.obj
    if model is None or found.deleting or found.hands_off or found.model is None:
        children.let_go(found)
        return outcome
    uid = model.metadata.uid
    wanted: list[_Child] = []
    pool = facts.pools[found.pool].obj
    for qos_class in found.classes:
        qos = facts.classes[qos_class].obj if qos_class in facts.classes else None
        step = plan.lanes.get(found.key(qos_class))
        if pool and qos and step and step.applied and qos_class not in found.lane_problems:
            now = replicas.get(found.key(qos_class), step.replicas)
            wanted.append((k.DEPLOYMENT, lane(model, qos, pool, now), uid, step.replicas))
    wanted.append((k.SERVICE, service(model), uid, None))
    await _guarded(f"ModelDeployment {found.ref}", outcome, wanted, children)
    await _remove_lanes(children, world, found, outcome)
    return outcome


_Child = tuple[Kind, Object, str, int | None]
"""Kind, what is rendered, its owner's UID, and a lane's planned replicas."""


async def _guarded(what: str, outcome: Outcome, wanted: Iterable[_Child], children: Children) -> None:
    """Apply each child; a refusal is this object's problem and the next period tries again."""
    for kind, obj, uid, planned in wanted:
        try:
            await children.ensure(kind, obj, uid, outcome, planned)
        except ApiError as error:
            name = obj["metadata"]["name"]
            log.warning("%s: applying %s %s: %s; again in the next period", what, kind.name, name, error)
            if error.status != 409:
                outcome.problem = Problem(reasons.APPLY_FAILED, f"{kind.name} {name}: {error.message}")


async def _remove_lanes(children: Children, world: World, found: ModelFacts, outcome: Outcome) -> None:
    keep = {names.lane_name(found.raw["metadata"]["name"], c) for c in found.classes}
    mine = owned(world.objects(k.DEPLOYMENT), found.raw["metadata"]["uid"])
    for deployment in mine:
        if deployment["metadata"]["name"] not in keep:
            try:
                await children.remove(k.DEPLOYMENT, deployment)
            except ApiError as error:
                outcome.problem = Problem(reasons.APPLY_FAILED, f"deleting a lane: {error.message}")


async def apply_taints(kube: Kube, world: World, facts: Facts, wrote: Callable[[str], None]) -> None:
    """The pool's taint on its nodes and on no others. A pool that cannot be read keeps its own."""
    desired: dict[str, str] = {}
    kept = {names.bounded(n) for n, p in facts.pools.items() if p.obj is None}
    for name, pool in facts.pools.items():
        if pool.obj and pool.enforced and pool.obj.spec.taint and not pool.obj.metadata.deletion_timestamp:
            for node in pool.matched:
                desired.setdefault(node["metadata"]["name"], names.bounded(name))
    for node in world.objects(k.NODE):
        patch = taint_patch(node, desired.get(node["metadata"]["name"]), kept)
        if patch is not None:
            try:
                world.written(k.NODE, await kube.merge(k.NODE, node["metadata"]["name"], patch))
                wrote("Node")
            except ApiError as error:
                log.warning("node %s: taint: %s; again in the next period", node["metadata"]["name"], error)


def taint_patch(node: Object, pool: str | None, kept: set[str]) -> Object | None:
    """A merge patch that gives the node its pool's taint, or takes it away; None when it is right."""
    taints = (node.get("spec") or {}).get("taints") or []
    ours = [t for t in taints if t.get("key") == names.TAINT_POOL]
    wanted = [{"key": names.TAINT_POOL, "value": pool, "effect": "NoSchedule"}] if pool else []
    if any(t.get("value") in kept for t in ours) and not pool:
        return None
    if [{x: t.get(x) for x in ("key", "value", "effect")} for t in ours] == wanted:
        return None
    others = [t for t in taints if t.get("key") != names.TAINT_POOL]
    meta = {"resourceVersion": node["metadata"]["resourceVersion"]}
    return {"metadata": meta, "spec": {"taints": [*others, *wanted]}}


async def apply_finalizers(kube: Kube, world: World, facts: Facts, wrote: Callable[[str], None]) -> None:
    """Hold classes and pools while something names them; let them go when nothing does."""
    held: list[tuple[Kind, Object, bool]] = [
        (k.QOS_CLASS, c.raw, bool(c.holders)) for c in facts.classes.values()
    ]
    # In Observe mode nothing of a pool is blocked, its deletion least of all.
    held += [(k.GPU_POOL, p.raw, bool(p.holders) and p.enforced) for p in facts.pools.values()]
    for kind, raw, hold in held:
        patch = finalizer_patch(raw, hold=hold)
        if patch is not None:
            name = raw["metadata"]["name"]
            try:
                world.written(kind, await kube.merge(kind, name, patch))
                wrote(kind.name)
            except ApiError as error:
                if error.status not in (404, 409):  # gone, or changed since: seen again in the next period
                    log.warning("%s %s: finalizer: %s; again in the next period", kind.name, name, error)


def finalizer_patch(raw: Mapping[str, Any], *, hold: bool) -> Object | None:
    """A merge patch that adds or removes our finalizer; None when it is right.

    An object that is going already takes no new finalizer (the API server would refuse it).
    """
    meta = raw["metadata"]
    present = list(meta.get("finalizers") or [])
    has = names.FINALIZER in present
    if has == hold or (hold and meta.get("deletionTimestamp")):
        return None
    wanted = [*present, names.FINALIZER] if hold else [f for f in present if f != names.FINALIZER]
    return {"metadata": {"resourceVersion": meta["resourceVersion"], "finalizers": wanted}}


def _foreign(kind: Kind, live: Object, owner_uid: str) -> Problem | None:
    """Why a live object of our child's name is not ours to write, or None."""
    meta = live["metadata"]
    owners = meta.get("ownerReferences") or []
    if any(r.get("uid") == owner_uid for r in owners):
        return None
    controlled = next((r for r in owners if r.get("controller")), None)
    applied = any(
        e.get("manager") == names.FIELD_MANAGER and e.get("operation") == "Apply"
        for e in meta.get("managedFields") or []
    )
    where = f"{kind.name} {meta['name']}"
    if controlled:
        belongs = f"{controlled.get('kind')} {controlled.get('name')} ({controlled.get('uid')})"
        return Problem(
            reasons.NAME_TAKEN, f"{where} exists and belongs to {belongs}; waiting until it is gone"
        )
    if applied:
        return None  # ours, with its owner taken off by hand
    return Problem(
        reasons.NAME_TAKEN, f"{where} exists and is not Tidegate's; rename it, or this ModelDeployment"
    )


def _immutable_differs(kind: Kind, live: Object, wanted: Object) -> bool:
    """A lane that moved to another pool has another selector, which a Deployment cannot change."""
    if kind is not k.DEPLOYMENT:
        return False
    old, new = live["spec"].get("selector"), wanted["spec"].get("selector")
    return bool(new) and old != new
