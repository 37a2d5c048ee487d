"""The Node objects and their heartbeats."""

import asyncio
import logging
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tidegate import __version__
from tidegate.adapters.kube import ApiError, Kube
from tidegate.adapters.kube.kinds import LEASE, NODE, POD
from tidegate.api.names import GROUP
from tidegate.local.kubelet.clock import rfc3339, rfc3339_micro
from tidegate.local.kubelet.model import GPU

log = logging.getLogger(__name__)

LABEL_RACK: Final = f"{GROUP}/rack"
LABEL_NVLINK: Final = f"{GROUP}/nvlink-domain"
LABEL_PROCESS: Final = f"{GROUP}/process-node"
"""On our own nodes, and so what tells which left-over nodes may be deleted."""
HEARTBEAT_S: Final = 10.0
LEASE_S: Final = 40
"""As the kubelet: renewed every 10 s, held for 40 s."""
_LEASES: Final = "kube-node-lease"
_NODES_A_RACK: Final = 2
_RACKS_A_ZONE: Final = 2
_ARCH: Final = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True, slots=True)
class Fleet:
    """`count` nodes of `gpus` GPUs each, all answered for at `host`:`port`."""

    count: int
    gpus: int
    host: str
    port: int

    def names(self) -> list[str]:
        """Names of the nodes, in order."""
        return [f"gpu-node-{i}" for i in range(1, self.count + 1)]


def labels(name: str, index: int, gpus: int) -> dict[str, str]:
    """Labels of a node; `index` counts from 1. One NVLink domain a node, as in an HGX A100."""
    rack = (index - 1) // _NODES_A_RACK
    return {
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": _ARCH.get(platform.machine(), platform.machine()),
        "topology.kubernetes.io/region": "local",
        "topology.kubernetes.io/zone": f"local-{rack // _RACKS_A_ZONE + 1}",
        "nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB",
        "nvidia.com/gpu.memory": "81920",
        "nvidia.com/gpu.count": str(gpus),
        LABEL_RACK: f"rack-{rack + 1}",
        LABEL_NVLINK: f"nvlink-{index}",
        LABEL_PROCESS: "true",
    }


def status(name: str, fleet: Fleet, since: str, now: float) -> dict[str, Any]:
    """Status of a node that is ready since the time `since`."""
    # Processes share the machine: CPU and memory are not what limits a pod here, GPUs are.
    resources = {"cpu": "256", "memory": "2Ti", "ephemeral-storage": "4Ti", "pods": "250"}
    resources[GPU] = str(fleet.gpus)
    good = {"lastHeartbeatTime": rfc3339(now), "lastTransitionTime": since}
    conditions = [
        {"type": kind, "status": "False", "reason": f"KubeletHas{fine}", **good}
        for kind, fine in (
            ("MemoryPressure", "SufficientMemory"),
            ("DiskPressure", "NoDiskPressure"),
            ("PIDPressure", "SufficientPID"),
        )
    ]
    message = "process kubelet: pods run as local processes"
    conditions.append(
        {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": message, **good}
    )
    return {
        "capacity": resources,
        "allocatable": resources,
        "conditions": conditions,
        "addresses": [
            {"type": "InternalIP", "address": fleet.host},
            {"type": "Hostname", "address": name},
        ],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": fleet.port}},
        "nodeInfo": {
            "architecture": _ARCH.get(platform.machine(), platform.machine()),
            "bootID": "",
            "containerRuntimeVersion": f"process://{__version__}",
            "kernelVersion": platform.release(),
            "kubeProxyVersion": "",
            "kubeletVersion": f"v{__version__}+tidegate",
            "machineID": "",
            "operatingSystem": "linux",
            "osImage": "processes on one machine",
            "systemUUID": "",
        },
    }


class Nodes:
    """Keeps the nodes there and Ready."""

    def __init__(self, kube: Kube, fleet: Fleet, now: Callable[[], float]) -> None:
        self._kube, self._fleet, self._now = kube, fleet, now
        self._since = rfc3339(now())
        self.written = asyncio.Event()
        """Set once all nodes stand and are Ready."""

    async def run(self) -> None:
        """Write nodes and leases every 10 s until cancelled; a lost API server is waited for."""
        cleaned = False
        while True:
            try:
                for index, name in enumerate(self._fleet.names(), start=1):
                    await self._heartbeat(name, index)
                self.written.set()
                if not cleaned:
                    await self._delete_left_over()
                    cleaned = True
            except ApiError as error:
                log.warning("heartbeat failed: %s", error)
                await asyncio.sleep(1.0)
            else:
                await asyncio.sleep(HEARTBEAT_S)

    async def _heartbeat(self, name: str, index: int) -> None:
        """Write a node's status and lease; a node that is missing is made."""
        # The status goes with every lease, since the controller-manager may have marked the node
        # Unknown while this process was stopped, and only a status takes that back.
        patch = {"status": status(name, self._fleet, self._since, self._now())}
        try:
            node = await self._kube.merge(NODE, name, patch, subresource="status")
        except ApiError as error:
            if error.status != 404:
                raise
            await self._create(name, index)
            node = await self._kube.merge(NODE, name, patch, subresource="status")
        wanted = labels(name, index, self._fleet.gpus)
        if not wanted.items() <= (node["metadata"].get("labels") or {}).items():
            await self._kube.merge(NODE, name, {"metadata": {"labels": wanted}})
        await self._renew(name, node["metadata"]["uid"])

    async def _create(self, name: str, index: int) -> None:
        body = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": labels(name, index, self._fleet.gpus)},
        }
        try:
            await self._kube.create(NODE, body)
        except ApiError as error:
            if error.status != 409:
                raise

    async def _renew(self, name: str, uid: str) -> None:
        spec = {
            "holderIdentity": name,
            "leaseDurationSeconds": LEASE_S,
            "renewTime": rfc3339_micro(self._now()),
        }
        try:
            await self._kube.merge(LEASE, name, {"spec": spec}, _LEASES)
        except ApiError as error:
            if error.status != 404:
                raise
            owner = {"apiVersion": "v1", "kind": "Node", "name": name, "uid": uid}
            await self._kube.create(
                LEASE,
                {
                    "apiVersion": LEASE.api_version,
                    "kind": LEASE.name,
                    "metadata": {"name": name, "namespace": _LEASES, "ownerReferences": [owner]},
                    "spec": spec,
                },
            )

    async def _delete_left_over(self) -> None:
        """Delete nodes, and the dead pods on them, that an earlier, larger fleet had."""
        ours = set(self._fleet.names())
        nodes, _ = await self._kube.list(NODE, labels=f"{LABEL_PROCESS}=true")
        for node in nodes:
            name = node["metadata"]["name"]
            if name in ours:
                continue
            log.info("deleting node %s: %d nodes are asked for", name, self._fleet.count)
            await self._kube.delete(NODE, name)
            pods, _ = await self._kube.list(POD, fields=f"spec.nodeName={name}")
            for pod in pods:
                meta = pod["metadata"]
                await self._kube.delete(POD, meta["name"], meta["namespace"], grace_s=0, uid=meta["uid"])
