"""The Deployment of one lane: the replicas of a model that one class pays for."""

from typing import Any, Final

from tidegate.api import names
from tidegate.api.gpupool import DEFAULT_RESOURCE, GPUPool
from tidegate.api.modeldeployment import ModelDeployment
from tidegate.api.qosclass import QoSClass
from tidegate.render import engine
from tidegate.render.overrides import override

Object = dict[str, Any]

DEFAULT_GRACE_S: Final = 600
"""Drain of a lane that is never reclaimed and whose class promises no completion time."""
PROGRESS_DEADLINE_S: Final = engine.STARTUP_LIMIT_S + 300
"""A rollout is stuck only after the longest start, and some time to be placed."""


def lane_labels(model: ModelDeployment, qos_class: str, pool: str) -> dict[str, str]:
    """Labels of a lane's pods, by which every part of Tidegate knows them."""
    return {
        names.LABEL_MODEL: names.bounded(model.metadata.name),
        names.LABEL_CLASS: qos_class,
        names.LABEL_POOL: names.bounded(pool),
    }


def grace_s(qos: QoSClass, pool: GPUPool) -> int:
    """Seconds that a replica may finish what it does before it is killed.

    kube-scheduler deletes victims with the pod's own grace, so it is set by what may happen to the
    pod: one that can be reclaimed goes within the pool's drain timeout.
    """
    if qos.spec.reclaim == "Never":
        completion = qos.spec.objectives.completion
        return int(completion.total_seconds()) if completion else DEFAULT_GRACE_S
    return int(pool.spec.reclaim.drain_timeout.total_seconds())


def lane(model: ModelDeployment, qos: QoSClass, pool: GPUPool, replicas: int) -> Object:
    """The Deployment of a model's lane for one class.

    Raises:
        RenderError: Something in the spec cannot be turned into a pod.
        InvalidOverrideError: spec.podOverrides is refused.
    """
    labels = lane_labels(model, qos.metadata.name, pool.metadata.name)
    resource = gpu_resource(pool)
    template = _template(model, qos, pool, labels)
    if model.spec.pod_overrides:
        template = override(template, model.spec.pod_overrides, resource)
    rollout = model.spec.rollout
    return {
        "metadata": {
            "name": names.lane_name(model.metadata.name, qos.metadata.name),
            "namespace": model.metadata.namespace,
            "labels": labels | {names.LABEL_MANAGED_BY: names.FIELD_MANAGER},
            "ownerReferences": [owner_reference(model)],
        },
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": rollout.max_surge, "maxUnavailable": rollout.max_unavailable},
            },
            "revisionHistoryLimit": 2,
            "progressDeadlineSeconds": PROGRESS_DEADLINE_S,
            "template": template,
        },
    }


def gpu_resource(pool: GPUPool) -> str:
    """The extended resource of the pool's GPUs. Raises RenderError for DRA pools."""
    devices = pool.spec.devices
    if devices.device_class_name:
        raise engine.RenderError(
            f"GPUPool {pool.metadata.name}: spec.devices.deviceClassName is not supported yet; "
            f"set spec.devices.resourceName, such as {DEFAULT_RESOURCE}"
        )
    return devices.resource_name or DEFAULT_RESOURCE


def owner_reference(owner: ModelDeployment | QoSClass) -> Object:
    """The child goes when its owner goes."""
    return {
        "apiVersion": names.API_VERSION,
        "kind": owner.kind,
        "name": owner.metadata.name,
        "uid": owner.metadata.uid,
        "controller": True,
    }


def _template(model: ModelDeployment, qos: QoSClass, pool: GPUPool, labels: dict[str, str]) -> Object:
    grace = grace_s(qos, pool)
    spec: Object = {
        "schedulerName": names.SCHEDULER_NAME,
        "priorityClassName": names.priority_class_name(qos.metadata.name),
        "terminationGracePeriodSeconds": grace,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "runAsGroup": 10001,
            "fsGroup": 10001,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "tolerations": [
            {
                "key": names.TAINT_POOL,
                "operator": "Equal",
                "value": names.bounded(pool.metadata.name),
                "effect": "NoSchedule",
            },
            # Clouds and GPU operators taint GPU nodes with the resource's own name.
            {"key": gpu_resource(pool), "operator": "Exists", "effect": "NoSchedule"},
        ],
        "containers": [engine.container(model, gpu_resource(pool), grace)],
        "volumes": engine.volumes(model),
        **_placement(pool),
    }
    annotations = {
        names.ANNOTATION_SLOTS: str(engine.slots(model)),
        names.ANNOTATION_STEP_TOKENS: str(engine.step_tokens(model)),
    }
    managed = labels | {names.LABEL_MANAGED_BY: names.FIELD_MANAGER}
    return {"metadata": {"labels": managed, "annotations": annotations}, "spec": spec}


def _placement(pool: GPUPool) -> Object:
    """The pool's nodes: equalities as nodeSelector, anything else as required affinity."""
    selector = pool.spec.node_selector
    placement: Object = {}
    if selector.match_labels:
        placement["nodeSelector"] = dict(selector.match_labels)
    if selector.match_expressions:
        terms = [{"matchExpressions": [e.to_json() for e in selector.match_expressions]}]
        affinity = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
        placement["affinity"] = {"nodeAffinity": affinity}
    return placement
