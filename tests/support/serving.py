"""Models, pods and callers in a real API server, for a picker that watches it."""

import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Final

from tidegate.adapters.kube import Kube, kinds

_RFC3339: Final = "%Y-%m-%dT%H:%M:%SZ"


async def token_for(kube: Kube, namespace: str, account: str, uses: list[str]) -> str:
    """A ServiceAccount with the verb `use` on these classes, and a token of it."""
    meta = {"namespace": namespace, "name": account}
    await kube.create(kinds.SERVICE_ACCOUNT, {"metadata": meta})
    if uses:
        role = f"{namespace}-{account}"
        rule = {
            "apiGroups": ["tidegate.dev"],
            "resources": ["qosclasses"],
            "verbs": ["use"],
            "resourceNames": uses,
        }
        await kube.create(kinds.CLUSTER_ROLE, {"metadata": {"name": role}, "rules": [rule]})
        binding = {
            "metadata": {"name": role},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
            "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": namespace}],
        }
        await kube.create(kinds.CLUSTER_ROLE_BINDING, binding)
    request = {"metadata": {"namespace": namespace}, "spec": {"expirationSeconds": 3600}}
    answer = await kube.create(kinds.SERVICE_ACCOUNT, request, name=account, subresource="token")
    return str(answer["status"]["token"])


async def make_pod(
    kube: Kube,
    namespace: str,
    model: str,
    lane: str,
    port: int,
    *,
    slots: int = 4,
    ready: bool = True,
    more_ports: Mapping[str, int] | None = None,
    labels: Mapping[str, str] | None = None,
) -> str:
    """A pod that says it is an engine on this machine; `more_ports` are named container ports."""
    name = f"engine-{uuid.uuid4().hex[:6]}"
    own = {"tidegate.dev/model": model, "tidegate.dev/qos-class": lane}
    ports = {"http": port, **(more_ports or {})}
    container = {
        "name": "engine",
        "image": "x",
        "ports": [{"name": n, "containerPort": p} for n, p in ports.items()],
    }
    pod = {
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": own if labels is None else dict(labels),
            "annotations": {"tidegate.dev/slots": str(slots)},
        },
        "spec": {"schedulerName": "nobody", "containers": [container]},
    }
    await kube.create(kinds.POD, pod)
    await set_ready(kube, namespace, name, ready)
    return name


async def set_ready(
    kube: Kube, namespace: str, pod: str, ready: bool, *, started_s: float | None = None
) -> None:
    """Set a pod's readiness, as its kubelet would; `started_s`: so long ago it was started."""
    now = datetime.now(UTC)
    condition = {
        "type": "Ready",
        "status": "True" if ready else "False",
        "lastTransitionTime": now.strftime(_RFC3339),
    }
    status: dict[str, object] = {
        "phase": "Running",
        "podIP": "127.0.0.1",
        "podIPs": [{"ip": "127.0.0.1"}],
        "conditions": [condition],
    }
    if started_s is not None:
        status["startTime"] = (now - timedelta(seconds=started_s)).strftime(_RFC3339)
    await kube.merge(kinds.POD, pod, {"status": status}, namespace, subresource="status")
