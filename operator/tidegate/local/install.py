"""The task that makes an API server a Tidegate cluster: `python -m tidegate.local.install DIR`.

Applies what `tidegate.render.manifests` says an installation consists of, waits until the API
server serves it, and writes a kubeconfig for each part's ServiceAccount. A process of its own, so
that the supervisor stays small; doing it again changes nothing.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from tidegate.adapters.kube import ApiError, Kind, Kube, kinds
from tidegate.api import names
from tidegate.local import kubeconfig
from tidegate.local.layout import Layout
from tidegate.render.manifests import install_objects

Object = dict[str, Any]

KUBELET_USER = "tidegate-kubelet"
TOKEN_S = 10 * 365 * 24 * 3600
_PATIENCE_S = 60.0

_KINDS = {(kind.api_version, kind.name): kind for kind in vars(kinds).values() if isinstance(kind, Kind)}
_FIRST = {"CustomResourceDefinition": 0, "Namespace": 1, "ServiceAccount": 2}


def kubelet_rbac() -> list[Object]:
    """The process kubelet stands for many nodes: it has a node's role, not restricted to one node.

    A role of its own lets it delete nodes that are no longer asked for, which a node may not.
    """
    group = "rbac.authorization.k8s.io"
    role = {
        "apiVersion": kinds.CLUSTER_ROLE.api_version,
        "kind": kinds.CLUSTER_ROLE.name,
        "metadata": {"name": KUBELET_USER},
        "rules": [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["delete"]}],
    }
    bindings = [
        {
            "apiVersion": kinds.CLUSTER_ROLE_BINDING.api_version,
            "kind": kinds.CLUSTER_ROLE_BINDING.name,
            "metadata": {"name": name},
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": bound},
            "subjects": [{"apiGroup": group, "kind": "User", "name": KUBELET_USER}],
        }
        for name, bound in ((KUBELET_USER, "system:node"), (f"{KUBELET_USER}-nodes", KUBELET_USER))
    ]
    return [role, *bindings]


def kind_of(obj: Object) -> Kind:
    """The Kind of a manifest. Raises KeyError naming it when Tidegate has no such kind."""
    key = (str(obj["apiVersion"]), str(obj["kind"]))
    if key not in _KINDS:
        raise KeyError(f"tidegate.adapters.kube.kinds has no {key[1]} of {key[0]}")
    return _KINDS[key]


async def install(kube: Kube, objects: Iterable[Object]) -> None:
    """Apply everything, definitions first, and return when the API server serves it."""
    ordered = sorted(objects, key=lambda obj: _FIRST.get(obj["kind"], 3))
    for definition in (obj for obj in ordered if obj["kind"] == "CustomResourceDefinition"):
        await kube.apply(kinds.CRD, definition, manager=names.FIELD_MANAGER, force=True)
    for definition in (obj for obj in ordered if obj["kind"] == "CustomResourceDefinition"):
        name = definition["metadata"]["name"]
        await _until(partial(_established, kube, name), f"CRD {name} to be established")
        await _until(partial(_served, kube, definition), f"{name} to be served")
    for obj in ordered:
        if obj["kind"] != "CustomResourceDefinition":
            await kube.apply(kind_of(obj), obj, manager=names.FIELD_MANAGER, force=True)


async def token(kube: Kube, account: str, namespace: str) -> str:
    """A token of a ServiceAccount, good for as long as a local cluster is likely to live."""
    request = {"metadata": {"namespace": namespace}, "spec": {"expirationSeconds": TOKEN_S}}
    answer = await kube.create(kinds.SERVICE_ACCOUNT, request, name=account, subresource="token")
    return str(answer["status"]["token"])


async def write_kubeconfigs(kube: Kube, layout: Layout, accounts: Iterable[str]) -> None:
    """One for each part that runs under a ServiceAccount."""
    for account in accounts:
        kubeconfig.write(
            layout.kubeconfig_of(account),
            server=kube.host,
            ca=layout.pki / "ca.crt",
            user=account,
            token=await token(kube, account, names.SYSTEM_NAMESPACE),
            namespace=names.SYSTEM_NAMESPACE,
        )


async def _established(kube: Kube, name: str) -> bool:
    conditions = (await kube.get(kinds.CRD, name)).get("status", {}).get("conditions", [])
    return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)


async def _served(kube: Kube, definition: Object) -> bool:
    """Whether objects can be listed: an established kind answers 404 and 429 for a moment more."""
    spec = definition["spec"]
    kind = Kind(
        f"{spec['group']}/{spec['versions'][0]['name']}", spec["names"]["plural"], spec["names"]["kind"]
    )
    try:
        await kube.list(kind)
    except ApiError as error:
        if error.status in (404, 429):
            return False
        raise
    return True


async def policies_judge(kube: Kube) -> bool:
    """Whether the API server finds the parameters of Tidegate's admission policies.

    It discovers custom kinds at its own pace, after a restart up to half a minute later, and refuses
    whatever the policies judge until then.
    """
    probe = {
        "apiVersion": kinds.MODEL_DEPLOYMENT.api_version,
        "kind": kinds.MODEL_DEPLOYMENT.name,
        "metadata": {"name": "tidegate-probe"},
        "spec": {
            "model": {"name": "tidegate-probe", "uri": "hf://tidegate/probe"},
            "engine": {"type": "vLLM"},
            "classes": [{"qosClass": "tidegate-probe"}],
        },
    }
    try:
        await kube.request(
            "POST", kinds.MODEL_DEPLOYMENT.path("default"), query={"dryRun": "All"}, body=probe
        )
    except ApiError as error:
        if error.status == 404 or "failed to configure policy" in error.message:
            return False
        raise
    return True


async def _exists(kube: Kube, kind: Kind, name: str, namespace: str | None = None) -> bool:
    try:
        await kube.get(kind, name, namespace)
    except ApiError as error:
        if error.status == 404:
            return False
        raise
    return True


async def _until(holds: Callable[[], Awaitable[bool]], what: str) -> None:
    try:
        async with asyncio.timeout(_PATIENCE_S):
            while not await holds():  # noqa: ASYNC110  the event is at the API server
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise TimeoutError(f"waited {_PATIENCE_S:.0f} s for {what}") from None


async def run(layout: Layout) -> None:
    """Install, and see that the controller manager works: it makes every namespace's account."""
    objects = [*install_objects(namespace=names.SYSTEM_NAMESPACE), *kubelet_rbac()]
    async with await Kube.connect(str(layout.kubeconfig)) as kube:
        await install(kube, objects)
        print(f"applied {len(objects)} objects")
        accounts = [obj["metadata"]["name"] for obj in objects if obj["kind"] == "ServiceAccount"]
        await write_kubeconfigs(kube, layout, accounts)
        await _until(
            lambda: _exists(kube, kinds.SERVICE_ACCOUNT, "default", names.SYSTEM_NAMESPACE),
            "kube-controller-manager to make the service account `default`",
        )
        await _until(partial(policies_judge, kube), "the API server to find the policies' parameters")


if __name__ == "__main__":
    asyncio.run(run(Layout(Path(sys.argv[1]))))
