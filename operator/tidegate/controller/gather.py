"""From copies of the cluster to facts: every object is read by itself, and a bad one is a fact too."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from tidegate.adapters.kube import kinds as k
from tidegate.api import names
from tidegate.api.common import InvalidObject
from tidegate.api.gpupool import GPUPool
from tidegate.api.modeldeployment import ModelDeployment
from tidegate.api.qosclass import QoSClass
from tidegate.controller.world import World
from tidegate.core import reasons
from tidegate.core.flowtypes import ModelKey
from tidegate.core.plan.types import Demand, LaneKey, Model, Snapshot
from tidegate.core.types import Pod, Pool
from tidegate.facts import classes as class_facts
from tidegate.facts import lanes as lane_facts
from tidegate.facts import pods as pod_facts
from tidegate.facts import pools as pool_facts
from tidegate.facts.endpoints import names_taken
from tidegate.facts.quantities import DEFAULT_RESOURCE, devices
from tidegate.render.engine import RenderError
from tidegate.render.lane import lane
from tidegate.render.overrides import InvalidOverrideError

Object = dict[str, Any]


class Problem(NamedTuple):
    """What is wrong with an object. `final`: no retry will help before somebody changes something."""

    reason: str
    message: str
    final: bool = False


@dataclass(frozen=True, slots=True)
class ClassFacts:
    """A QoSClass: as written, as read, and who uses it."""

    raw: Object
    obj: QoSClass | None
    problem: Problem | None = None
    used_by: tuple[str, ...] = ()
    is_default: bool = False
    claims_default: bool = False
    holders: tuple[str, ...] = ()
    """Everything that names it, reservations included: while there is any, it may not go."""


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """A GPUPool: as written, as read, its nodes and pods, and who uses it."""

    raw: Object
    obj: GPUPool | None
    problem: Problem | None = None
    core: Pool | None = None
    matched: tuple[Object, ...] = ()
    pods: tuple[Pod, ...] = ()
    holders: tuple[str, ...] = ()

    @property
    def enforced(self) -> bool:
        """Whether anything may be changed for this pool."""
        return self.obj is not None and self.obj.spec.mode == "Enforce"


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A ModelDeployment: as written, as read, its pool and the classes it may serve.

    `hands_off` is the reason why nothing of it may be touched, or "". `lane_problems` are by class.
    """

    raw: Object
    obj: ModelDeployment | None
    problem: Problem | None = None
    pool: str = ""
    classes: tuple[str, ...] = ()
    lane_problems: Mapping[str, Problem] = field(default_factory=dict)
    hands_off: str = ""
    model: Model | None = None
    largest_node: int = 0
    """GPUs of its pool's largest node, ready or not; 0 when it is not known."""
    taken: Mapping[str, ModelKey] = field(default_factory=dict)
    """Names that clients ask for and that lead to an older model: namespace and name of that."""

    @property
    def ref(self) -> str:
        """namespace/name."""
        meta = self.raw["metadata"]
        return f"{meta.get('namespace', 'default')}/{meta['name']}"

    @property
    def deleting(self) -> bool:
        """Whether it is on its way out."""
        return bool(self.raw["metadata"].get("deletionTimestamp"))

    def key(self, qos_class: str) -> LaneKey:
        """The key of one of its lanes."""
        namespace, name = self.ref.split("/")
        return LaneKey(namespace, name, qos_class)


@dataclass(frozen=True, slots=True)
class Facts:
    """What one round of the loop works on. By name; models by namespace/name."""

    classes: Mapping[str, ClassFacts]
    pools: Mapping[str, PoolFacts]
    models: Mapping[str, ModelFacts]
    snapshot: Snapshot


def gather(
    world: World,
    demand: Mapping[LaneKey, Demand],
    *,
    demand_fresh: bool,
    intended: Mapping[tuple[str, str], int] | None = None,
) -> Facts:
    """Read the world. Never fails for what a user wrote.

    Args:
        world: Copies of the cluster's objects.
        demand: As measured.
        demand_fresh: Whether every source of it answers.
        intended: Replicas last planned, by namespace and name of a Deployment: they stand for what the
            Deployment asks for, so that a hand's change is repaired and not planned with.
    """
    class_objects = _read_all(world, k.QOS_CLASS, QoSClass)
    pool_objects = _read_all(world, k.GPU_POOL, GPUPool)
    default = class_facts.default_class([o for _, o, _ in class_objects if o])
    classes = {o.metadata.name: o for _, o, _ in class_objects if o}
    labels = {n["metadata"]["name"]: n["metadata"].get("labels") or {} for n in world.objects(k.NAMESPACE)}
    enforced = {o.metadata.name: o.spec.mode == "Enforce" for _, o, _ in pool_objects if o}
    invalid_pools = {r["metadata"]["name"] for r, o, _ in pool_objects if o is None}
    workloads = _workloads(world, intended or {})
    models = {}
    for raw, obj, problem in _read_all(world, k.MODEL_DEPLOYMENT, ModelDeployment):
        found = (
            _model(raw, obj, classes, labels, enforced, invalid_pools, default, workloads)
            if obj
            else ModelFacts(raw, None, problem)
        )
        models[found.ref] = found
    planned = [m.model for m in models.values() if m.model and not m.deleting]
    pods, pod_pool = _pods(world, classes, planned, [o for _, o, _ in pool_objects if o])
    pools = _pools(world, pool_objects, labels, pods, pod_pool, models)
    models = {ref: _renderable(m, classes, pools) for ref, m in models.items()}
    planned = [m.model for m in models.values() if m.model and not m.deleting]
    models = {
        ref: replace(m, largest_node=_largest(pools[m.pool])) if m.pool in pools else m
        for ref, m in models.items()
    }
    taken = names_taken(m.obj for m in models.values() if m.obj and not m.deleting)
    models |= {ref: replace(models[ref], taken=lost) for key, lost in taken.items() if (ref := "/".join(key))}
    snapshot = Snapshot(
        classes={n: class_facts.qos_class(o) for n, o in classes.items()},
        pools={n: p.core for n, p in pools.items() if p.core},
        models=tuple(planned),
        pods=tuple(pods),
        demand=_complete(demand, planned, fresh=demand_fresh),
        incomplete="; ".join(f"{kind}: the API server does not answer" for kind in world.stale),
    )
    return Facts(_classes(class_objects, default, models, pools), pools, models, snapshot)


def _read_all(world: World, kind: Any, model: Any) -> list[tuple[Object, Any, Problem | None]]:
    found: list[tuple[Object, Any, Problem | None]] = []
    for raw in world.objects(kind):
        try:
            found.append((raw, model.from_object(raw), None))
        except InvalidObject as error:
            found.append((raw, None, Problem(reasons.INVALID_SPEC, str(error), final=True)))
    return found


def _workloads(world: World, intended: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], Object]:
    """Lanes' Deployments with the replicas that were planned for them.

    After a start that is what they ask for, less the replicas that are being emptied.
    """
    found = {}
    emptied = Counter(
        (raw["metadata"]["namespace"], labels.get(names.LABEL_MODEL), labels.get(names.LABEL_CLASS))
        for raw in world.objects(k.POD)
        if names.ANNOTATION_DRAINING in (raw["metadata"].get("annotations") or ())
        and not raw["metadata"].get("deletionTimestamp")
        and (labels := raw["metadata"].get("labels") or {})
    )
    for obj in world.objects(k.DEPLOYMENT):
        key = (obj["metadata"]["namespace"], obj["metadata"]["name"])
        planned = intended.get(key)
        labels = obj["metadata"].get("labels") or {}
        leaving = emptied[key[0], labels.get(names.LABEL_MODEL), labels.get(names.LABEL_CLASS)]
        if planned is None and leaving:
            planned = max(0, obj["spec"].get("replicas", 1) - leaving)
        found[key] = obj if planned is None else {**obj, "spec": {**obj["spec"], "replicas": planned}}
    return found


def _model(
    raw: Object,
    obj: ModelDeployment,
    classes: Mapping[str, QoSClass],
    namespaces: Mapping[str, dict[str, str]],
    enforced: Mapping[str, bool],
    invalid_pools: set[str],
    default: str | None,
    workloads: Mapping[tuple[str, str], Object],
) -> ModelFacts:
    namespace = obj.metadata.namespace or "default"
    served = lane_facts.served(obj, default)
    pool, missing = lane_facts.pool_of(obj, [*enforced, *invalid_pools])
    problem = Problem(*missing) if missing else None
    if pool in invalid_pools:
        problem = Problem(reasons.POOL_NOT_FOUND, f"GPUPool {pool} cannot be read; see its conditions")
    if not served:
        problem = Problem(
            reasons.NO_CLASS,
            "spec.classes is empty and no QoSClass is the default; list the classes, or annotate one "
            f"QoSClass with {names.ANNOTATION_DEFAULT_CLASS}=true",
        )
    lanes = {c: p for c in served if (p := _lane_problem(c, classes, namespace, namespaces))}
    deployments = {
        LaneKey(namespace, obj.metadata.name, c): d
        for c in served
        if (d := workloads.get((namespace, names.lane_name(obj.metadata.name, c))))
    }
    hands_off = ""
    if obj.spec.engine.external:
        hands_off = reasons.EXTERNAL
    elif obj.spec.scaling.paused:
        hands_off = reasons.PAUSED
    elif pool in enforced and not enforced[pool]:
        hands_off = reasons.OBSERVED
    planned = None
    if problem is None:
        whole = lane_facts.model(obj, pool, default, deployments, classes)
        planned = _without(whole, {c for c, p in lanes.items() if p.reason == reasons.NAMESPACE_NOT_ALLOWED})
    return ModelFacts(raw, obj, problem, pool, served, lanes, hands_off, planned)


def _without(model: Model, forbidden: set[str]) -> Model:
    return replace(model, lanes=tuple(x for x in model.lanes if x.key.qos_class not in forbidden))


def _lane_problem(
    name: str, classes: Mapping[str, QoSClass], namespace: str, namespaces: Mapping[str, dict[str, str]]
) -> Problem | None:
    qos = classes.get(name)
    if qos is None:
        there = ", ".join(sorted(classes)) or "none"
        return Problem(
            reasons.CLASS_NOT_FOUND, f"spec.classes: QoSClass {name} does not exist; there are: {there}"
        )
    if not qos.spec.allows_namespace(namespaces.get(namespace, {})):
        return Problem(
            reasons.NAMESPACE_NOT_ALLOWED,
            f"spec.classes: QoSClass {name} is not allowed in namespace {namespace}; "
            "its spec.allowedNamespaces must select the namespace's labels",
        )
    return None


def _pods(
    world: World, classes: Mapping[str, QoSClass], models: Iterable[Model], pools: Iterable[GPUPool]
) -> tuple[list[Pod], dict[str, str]]:
    """Pods that hold or want GPUs, and by UID the pool that their label names."""
    minimums = lane_facts.minimums(models)
    resources = sorted({pool_facts.resource(p) for p in pools}) or [DEFAULT_RESOURCE]
    found, labelled = [], {}
    for raw in world.objects(k.POD):
        for resource in resources:
            if pod := pod_facts.pod(raw, classes, minimums, resource):
                found.append(pod)
                labelled[pod.uid] = (raw["metadata"].get("labels") or {}).get(names.LABEL_POOL, "")
                break
    return found, labelled


def _pools(
    world: World,
    objects: list[tuple[Object, Any, Problem | None]],
    namespaces: Mapping[str, dict[str, str]],
    pods: list[Pod],
    pod_pool: Mapping[str, str],
    models: Mapping[str, ModelFacts],
) -> dict[str, PoolFacts]:
    nodes = world.objects(k.NODE)
    users: dict[str, list[str]] = {}
    for model in models.values():
        for name in {model.pool, *_named_pools(model.raw)} - {""}:
            users.setdefault(name, []).append(f"ModelDeployment {model.ref}")
    pools: dict[str, PoolFacts] = {}
    for raw, obj, problem in objects:
        name = raw["metadata"]["name"]
        holders = tuple(sorted(users.get(name, ())))
        if obj is None:
            pools[name] = PoolFacts(raw, None, problem, holders=holders)
            continue
        selector = obj.spec.node_selector
        matched = tuple(n for n in nodes if selector.matches(n["metadata"].get("labels") or {}))
        pool = pool_facts.pool(obj, matched, namespaces)
        there = {n.name for n in pool.nodes}
        label = names.bounded(name)
        mine = tuple(p for p in pods if (p.node in there if p.node else pod_pool.get(p.uid) == label))
        pools[name] = PoolFacts(raw, obj, None, pool, matched, mine, holders)
    return pools


def _renderable(
    found: ModelFacts, classes: Mapping[str, QoSClass], pools: Mapping[str, PoolFacts]
) -> ModelFacts:
    """A model whose pods cannot be made is a fact too, and takes no GPUs from the others' plan."""
    pool = pools[found.pool].obj if found.pool in pools else None
    if found.obj is None or found.model is None or pool is None or found.obj.spec.engine.external:
        return found
    try:
        for name in found.classes:
            if name in classes:
                lane(found.obj, classes[name], pool, 0)
    except InvalidOverrideError as error:
        problem = Problem(reasons.INVALID_POD_OVERRIDES, str(error), final=True)
    except RenderError as error:
        problem = Problem(reasons.INVALID_SPEC, str(error), final=True)
    else:
        return found
    return replace(found, problem=problem, model=None)


def _largest(pool: PoolFacts) -> int:
    resource = pool_facts.resource(pool.obj) if pool.obj else DEFAULT_RESOURCE
    sizes = (
        devices(((n.get("status") or {}).get("allocatable") or {}).get(resource) or 0) for n in pool.matched
    )
    return max(sizes, default=0)


def _named_pools(raw: Object) -> list[str]:
    refs = (raw.get("spec") or {}).get("poolRefs") or []
    return [str(r.get("name")) for r in refs if isinstance(r, dict)]


def _classes(
    objects: list[tuple[Object, Any, Problem | None]],
    default: str | None,
    models: Mapping[str, ModelFacts],
    pools: Mapping[str, PoolFacts],
) -> dict[str, ClassFacts]:
    users: dict[str, set[str]] = {}
    for model in models.values():
        written = (model.raw.get("spec") or {}).get("classes") or []
        listed = {str(c.get("qosClass")) for c in written if isinstance(c, dict)}
        for name in listed | set(model.classes):
            users.setdefault(name, set()).add(f"ModelDeployment {model.ref}")
    reserved: dict[str, set[str]] = {}
    for name, pool in pools.items():
        for entry in (pool.raw.get("spec") or {}).get("reservations") or []:
            reserved.setdefault(str(entry.get("qosClass")), set()).add(f"GPUPool {name}")
    found = {}
    for raw, obj, problem in objects:
        name = raw["metadata"]["name"]
        used = tuple(sorted(users.get(name, ())))
        found[name] = ClassFacts(
            raw,
            obj,
            problem,
            used_by=used,
            is_default=name == default,
            claims_default=bool(obj and obj.claims_default),
            holders=(*used, *sorted(reserved.get(name, ()))),
        )
    return found


def _complete(
    demand: Mapping[LaneKey, Demand], models: Iterable[Model], *, fresh: bool
) -> dict[LaneKey, Demand]:
    """A picker that answers and does not name a class of a model has seen no request for it."""
    whole = dict(demand)
    if fresh:
        for model in models:
            for lane in model.lanes:
                whole.setdefault(lane.key, Demand())
    return whole
