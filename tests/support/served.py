"""What a served model needs of a cluster: accounts that may use classes, pods, tokens."""

import uuid
from typing import Any

import httpx

from tidegate.adapters.kube import Kube, kinds


async def token_for(
    kube: Kube, namespace: str, account: str, uses: list[str], *, audiences: list[str] | None = None
) -> str:
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
    spec = {"expirationSeconds": 3600, **({"audiences": audiences} if audiences else {})}
    request = {"metadata": {"namespace": namespace}, "spec": spec}
    answer = await kube.create(kinds.SERVICE_ACCOUNT, request, name=account, subresource="token")
    return str(answer["status"]["token"])


async def make_pod(
    kube: Kube, namespace: str, model: str, lane: str, port: int, *, slots: int = 4, ready: bool = True
) -> str:
    name = f"engine-{uuid.uuid4().hex[:6]}"
    labels = {"tidegate.dev/model": model, "tidegate.dev/qos-class": lane}
    container = {"name": "engine", "image": "x", "ports": [{"name": "http", "containerPort": port}]}
    pod = {
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": labels,
            "annotations": {"tidegate.dev/slots": str(slots)},
        },
        "spec": {"schedulerName": "nobody", "containers": [container]},
    }
    await kube.create(kinds.POD, pod)
    await set_ready(kube, namespace, name, ready)
    return name


async def set_ready(kube: Kube, namespace: str, pod: str, ready: bool) -> None:
    condition = {"type": "Ready", "status": "True" if ready else "False"}
    status = {
        "phase": "Running",
        "podIP": "127.0.0.1",
        "podIPs": [{"ip": "127.0.0.1"}],
        "conditions": [condition],
    }
    await kube.merge(kinds.POD, pod, {"status": status}, namespace, subresource="status")


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error, whose shape must be OpenAI's."""
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)
