"""Raw pods as decisions see them. Parsed for every pod event of the cluster, so kept cheap."""

from collections.abc import Container, Mapping
from typing import Any

from tidegate.api.names import ANNOTATION_DRAINING, LABEL_CLASS, LABEL_MODEL
from tidegate.core.types import Pod
from tidegate.facts.quantities import DEFAULT_RESOURCE, condition, devices, seconds

_ENDED = ("Succeeded", "Failed")


def pod(
    raw: Mapping[str, Any],
    classes: Container[str],
    lane_minimums: Mapping[tuple[str, str, str], int],
    gpu_resource: str = DEFAULT_RESOURCE,
) -> Pod | None:
    """A raw pod, or None when it holds no GPU: it asks for none, or has ended.

    A pod without the class label, or with that of a class that does not exist, is foreign.

    Args:
        raw: the pod.
        classes: names of the QoSClasses that exist.
        lane_minimums: minReplicas by lane: namespace, model, class (`facts.lanes.minimums`).
        gpu_resource: the extended resource that is counted.
    """
    spec, status, metadata = raw["spec"], raw.get("status") or {}, raw["metadata"]
    count = gpus(spec, gpu_resource)
    if count == 0 or status.get("phase") in _ENDED:
        return None
    labels = metadata.get("labels") or {}
    qos = labels.get(LABEL_CLASS)
    if qos is not None and qos not in classes:
        qos = None
    model = labels.get(LABEL_MODEL)
    namespace = metadata.get("namespace", "default")
    ready, started = _state(status, spec.get("nodeName") is not None)
    return Pod(
        uid=metadata["uid"],
        name=metadata["name"],
        namespace=namespace,
        gpus=count,
        created_s=seconds(metadata.get("creationTimestamp")) or 0.0,
        qos_class=qos,
        model=model,
        node=spec.get("nodeName"),
        started_s=started,
        ready=ready,
        terminating="deletionTimestamp" in metadata,
        priority=spec.get("priority") or 0,
        lane_minimum=lane_minimums.get((namespace, model, qos), 0) if model and qos else 0,
        draining=ANNOTATION_DRAINING in (metadata.get("annotations") or ()),
    )


def gpus(spec: Mapping[str, Any], gpu_resource: str = DEFAULT_RESOURCE) -> int:
    """GPUs that a pod holds, as kube-scheduler counts them.

    Containers and restartable init containers (sidecars) add up; another init container runs
    beside the sidecars before it only, so the largest such sum counts where it is more.
    Source: k8s.io/component-helpers/resource, PodRequests.
    """
    total = sum(_of(c, gpu_resource) for c in spec.get("containers") or ())
    sidecars = peak = 0
    for container in spec.get("initContainers") or ():
        count = _of(container, gpu_resource)
        if container.get("restartPolicy") == "Always":
            sidecars += count
            peak = max(peak, sidecars)
        else:
            peak = max(peak, sidecars + count)
    return max(total + sidecars, peak)


def _of(container: Mapping[str, Any], gpu_resource: str) -> int:
    # For an extended resource the API server sets requests from limits, and they are equal.
    resources = container.get("resources") or {}
    value = (resources.get("requests") or {}).get(gpu_resource)
    if value is None:
        value = (resources.get("limits") or {}).get(gpu_resource)
    return devices(value) if value is not None else 0


def _state(status: Mapping[str, Any], bound: bool) -> tuple[bool, float | None]:
    """Whether it is Ready, and since when it is bound (None while it is not)."""
    conditions = status.get("conditions")
    ready = condition(conditions, "Ready")
    is_ready = ready is not None and ready.get("status") == "True"
    if not bound:
        return is_ready, None
    scheduled = condition(conditions, "PodScheduled") or {}
    return is_ready, seconds(scheduled.get("lastTransitionTime") or status.get("startTime"))
