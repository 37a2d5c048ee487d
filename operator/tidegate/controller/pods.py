"""What stands in the cluster for a lane: replicas, what is ready, and why something is not. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tidegate.api import names

Object = dict[str, Any]

_FAILING: Final = (
    "CrashLoopBackOff",
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
)
"""Reasons of a waiting container that do not pass by themselves in a moment."""


@dataclass(frozen=True, slots=True)
class LaneView:
    """One lane as it stands. `rolling`: a changed template is not yet everywhere.

    `waits` says that a pod waits for GPUs, which is no fault of its engine. `attained`: of a hundred
    requests of the class, those that met all objectives; None while none was judged.
    """

    replicas: int = 0
    ready: int = 0
    rolling: bool = False
    trouble: str = ""
    headroom: int = 0
    waits: str = ""
    attained: int | None = None


def lane_view(deployment: Object | None, pods: Iterable[Object], headroom: int = 0) -> LaneView:
    """Read a lane from its Deployment and pods."""
    pods = list(pods)
    if deployment is None:
        return LaneView()
    spec, status = deployment.get("spec") or {}, deployment.get("status") or {}
    wanted = spec.get("replicas", 1)
    current = status.get("observedGeneration", 0) >= deployment["metadata"].get("generation", 0)
    rolling = not current or status.get("updatedReplicas", 0) < wanted
    return LaneView(
        replicas=wanted,
        ready=status.get("readyReplicas", 0),
        rolling=rolling,
        trouble=trouble(deployment, pods),
        headroom=headroom,
        waits=waits(pods),
    )


def ready_pods(pods: Iterable[Object]) -> int:
    """How many are Ready and not going."""
    return sum(1 for p in pods if not p["metadata"].get("deletionTimestamp") and is_ready(p))


def is_ready(pod: Object) -> bool:
    """Whether its probes pass."""
    return _condition(pod, "Ready") == "True"


def trouble(deployment: Object, pods: Iterable[Object]) -> str:
    """The first thing that keeps a lane from its replicas, in one line; "" when nothing is seen."""
    for condition in (deployment.get("status") or {}).get("conditions") or ():
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            return f"pods are refused: {condition.get('message')}"
    ordered = sorted(
        pods, key=lambda p: (p["metadata"].get("creationTimestamp") or "", p["metadata"]["name"])
    )
    for pod in ordered:
        name = pod["metadata"]["name"]
        if reason := _container_trouble(pod):
            return f"pod {name}: {reason}"
        text = _no_place(pod)
        if text and not _for_gpus(text):
            return f"pod {name} has no place: {text}"
    return ""


def waits(pods: Iterable[Object]) -> str:
    """The first pod that waits for GPUs, in one line; "" when none does."""
    waiting = sorted(
        (p["metadata"]["name"], text) for p in pods if (text := _no_place(p)) and _for_gpus(text)
    )
    return f"pod {waiting[0][0]} waits for GPUs: {waiting[0][1]}" if waiting else ""


def _no_place(pod: Object) -> str:
    for condition in (pod.get("status") or {}).get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("reason") == "Unschedulable":
            return condition.get("message") or "unschedulable"
    return ""


def _for_gpus(text: str) -> bool:
    """kube-scheduler's own words for a lack of GPUs, or the extender's."""
    return "Insufficient nvidia.com/gpu" in text or "tidegate: " in text


def _container_trouble(pod: Object) -> str:
    status = pod.get("status") or {}
    every = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
    for container in every:
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") in _FAILING:
            text = waiting.get("message") or ""
            last = ((container.get("lastState") or {}).get("terminated") or {}).get("exitCode")
            code = f", last exit code {last}" if last is not None else ""
            return f"{waiting['reason']}{code}{f': {text}' if text else ''}"
    return ""


def _condition(pod: Object, kind: str) -> str:
    conditions: Iterable[Mapping[str, Any]] = (pod.get("status") or {}).get("conditions") or ()
    return next((str(c.get("status")) for c in conditions if c.get("type") == kind), "")


def by_lane(pods: Iterable[Object]) -> dict[tuple[str, str, str], list[Object]]:
    """Raw pods by namespace, model label and class label."""
    found: dict[tuple[str, str, str], list[Object]] = {}
    for pod in pods:
        labels = pod["metadata"].get("labels") or {}
        if names.LABEL_MODEL in labels and names.LABEL_CLASS in labels:
            key = (pod["metadata"].get("namespace", ""), labels[names.LABEL_MODEL], labels[names.LABEL_CLASS])
            found.setdefault(key, []).append(pod)
    return found
