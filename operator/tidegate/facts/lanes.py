"""ModelDeployment objects as the planner sees them: a model and its lanes."""

from collections.abc import Iterable, Mapping
from typing import Any

from tidegate.api import modeldeployment as api
from tidegate.api import qosclass as api_class
from tidegate.api.names import ANNOTATION_SLOTS
from tidegate.core import reasons
from tidegate.core.plan.types import Lane, LaneKey, Model
from tidegate.facts.classes import objectives


def pool_of(obj: api.ModelDeployment, pools: Iterable[str]) -> tuple[str, tuple[str, str] | None]:
    """Name of the model's pool ("" when it cannot be said), and (reason, message) of what is wrong.

    Without `spec.poolRefs` it is the only pool there is.
    """
    names = sorted(pools)
    listed = ", ".join(names) or "none"
    if obj.spec.pool_refs:
        name = obj.spec.pool_refs[0].name
        if name in names:
            return name, None
        return name, (
            reasons.POOL_NOT_FOUND,
            f"spec.poolRefs[0]: GPUPool {name} does not exist; there are: {listed}",
        )
    if len(names) == 1:
        return names[0], None
    return "", (
        reasons.POOL_NOT_FOUND,
        (
            f"spec.poolRefs is empty, and there is not exactly one GPUPool to take (there are: {listed});"
            " name one in spec.poolRefs"
        ),
    )


def served(obj: api.ModelDeployment, default_class: str | None) -> tuple[str, ...]:
    """Names of the classes that the model serves, in order; the default class where it lists none."""
    return tuple(c.qos_class for c in entries(obj, default_class))


def entries(obj: api.ModelDeployment, default_class: str | None) -> list[api.ClassLane]:
    """The model's `spec.classes`, or what stands for them: the default class, with nothing set."""
    if obj.spec.classes or default_class is None:
        return obj.spec.classes
    return [api.ClassLane(qos_class=default_class)]


def model(
    obj: api.ModelDeployment,
    pool: str,
    default_class: str | None,
    workloads: Mapping[LaneKey, Mapping[str, Any]],
    classes: Mapping[str, api_class.QoSClass] | None = None,
) -> Model:
    """A model with one lane for every class it serves.

    Args:
        obj: the ModelDeployment.
        pool: its pool's name, from `pool_of`.
        default_class: the default QoSClass, for a model that lists no classes.
        workloads: the raw Deployment of each lane that has one.
        classes: QoSClass objects, for objectives that the model overrides in part.
    """
    spec = obj.spec
    namespace, name = obj.metadata.namespace or "default", obj.metadata.name
    lanes = tuple(
        _lane(obj, entry, workloads.get(LaneKey(namespace, name, entry.qos_class)), classes or {})
        for entry in entries(obj, default_class)
    )
    to_zero = spec.scaling.scale_to_zero_after
    return Model(
        namespace=namespace,
        name=name,
        pool=pool,
        lanes=lanes,
        max_replicas=spec.max_replicas,
        paused=spec.scaling.paused,
        external=spec.engine.type == "External",
        scale_down_delay_s=spec.scaling.scale_down_delay.total_seconds(),
        scale_to_zero_after_s=to_zero.total_seconds() if to_zero else None,
    )


def _lane(
    obj: api.ModelDeployment,
    entry: api.ClassLane,
    workload: Mapping[str, Any] | None,
    classes: Mapping[str, api_class.QoSClass],
) -> Lane:
    replicas = ready = 0
    if workload is not None:
        # A Deployment without spec.replicas has one (apps/v1 default).
        asked = (workload.get("spec") or {}).get("replicas")
        replicas = 1 if asked is None else asked
        ready = (workload.get("status") or {}).get("readyReplicas") or 0
    base = classes.get(entry.qos_class)
    own = objectives(base.spec.objectives.overridden(entry.objectives)) if base and entry.objectives else None
    return Lane(
        key=LaneKey(obj.metadata.namespace or "default", obj.metadata.name, entry.qos_class),
        gpus=obj.gpus_per_replica,
        min_replicas=entry.min_replicas,
        max_replicas=entry.max_replicas,
        pinned=obj.spec.scaling.replicas.get(entry.qos_class),
        replicas=replicas,
        ready=ready,
        objectives=own,
        slots=_slots(workload or {}),
    )


def _slots(workload: Mapping[str, Any]) -> int | None:
    """What the lane's pods say of their engine, None where they say nothing that can be read."""
    template = (workload.get("spec") or {}).get("template") or {}
    notes = (template.get("metadata") or {}).get("annotations") or {}
    text = str(notes.get(ANNOTATION_SLOTS, ""))
    return int(text) if text.isdecimal() and int(text) > 0 else None


def minimums(models: Iterable[Model]) -> dict[tuple[str, str, str], int]:
    """`minReplicas` of every lane, for `facts.pods.pod`."""
    return {lane.key: lane.min_replicas for m in models for lane in m.lanes}
