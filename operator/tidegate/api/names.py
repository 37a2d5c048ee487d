"""Names that Tidegate writes into a cluster: group, labels, annotations, child names."""

import hashlib
from typing import Final

GROUP: Final = "tidegate.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
CATEGORY: Final = "tidegate"
FIELD_MANAGER: Final = "tidegate"
SYSTEM_NAMESPACE: Final = "tidegate-system"
SCHEDULER_NAME: Final = "tidegate-scheduler"

LABEL_MODEL: Final = f"{GROUP}/model"
"""The ModelDeployment's name (a served name such as `org/model` is no label value)."""
LABEL_CLASS: Final = f"{GROUP}/qos-class"
LABEL_POOL: Final = f"{GROUP}/pool"
LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"
TAINT_POOL: Final = f"{GROUP}/pool"

ANNOTATION_DEFAULT_CLASS: Final = f"{GROUP}/is-default-class"
ANNOTATION_SLOTS: Final = f"{GROUP}/slots"
"""On engine pods: how many requests the engine runs at once (vLLM's --max-num-seqs)."""
ANNOTATION_STEP_TOKENS: Final = f"{GROUP}/step-tokens"
"""On engine pods: the most tokens that a step computes (vLLM's --max-num-batched-tokens)."""
ANNOTATION_STANDING: Final = f"{GROUP}/standing"
"""On lane pods: whose GPUs it stands on, `reserved`, `spare` or `lent` (docs/concepts/placement.md)."""
ANNOTATION_DRAINING: Final = f"{GROUP}/draining"
"""On lane pods that the plan gives up: since when (RFC 3339). The picker sends nothing there any more."""
ANNOTATION_DELETION_COST: Final = "controller.kubernetes.io/pod-deletion-cost"
"""Kubernetes' own: of pods that are ready alike, a ReplicaSet deletes the cheapest first."""
ANNOTATION_WOKEN: Final = f"{GROUP}/woken-at"
"""On pending pods: written to make kube-scheduler look at them again (Unix seconds)."""
FINALIZER: Final = f"{GROUP}/in-use"

ENGINE_PORT_NAME: Final = "http"
"""Name of the engine container's serving port; endpoints are podIP and this port."""
GRPC_PORT_NAME: Final = "grpc"
"""Name of its port for KServe v2 over gRPC, where it has one."""

MAX_NAME: Final = 63


def bounded(name: str, limit: int = MAX_NAME) -> str:
    """Return `name`, or a prefix of it with a hash when it is longer than `limit` characters."""
    if len(name) <= limit:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: limit - 9].rstrip('-.')}-{digest}"


def priority_class_name(qos_class: str) -> str:
    """Name of the PriorityClass that belongs to a QoSClass."""
    return f"tidegate-{qos_class}"


def lane_name(model: str, qos_class: str) -> str:
    """Name of the Deployment of one lane of a ModelDeployment."""
    # A Deployment's pods carry `-<hash>-<suffix>`; 47 leaves room for both within a host name.
    return bounded(f"{model}-{qos_class}", 47)
