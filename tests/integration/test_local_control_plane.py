"""The control plane that other tests stand on."""

from tidegate.adapters.kube import Kube, kinds
from tidegate.local.cluster import LocalCluster


async def test_a_fresh_namespace_has_its_account(kube: Kube, namespace: str) -> None:
    account = await kube.get(kinds.SERVICE_ACCOUNT, "default", namespace)
    assert account["metadata"]["namespace"] == namespace


def test_everything_is_ready(control_plane: LocalCluster) -> None:
    states = {name: unit["state"] for name, unit in control_plane.status()["components"].items()}
    assert states == {
        "etcd": "ready",
        "kube-apiserver": "ready",
        "kube-controller-manager": "ready",
        "kube-scheduler": "ready",
        "install": "done",
    }
