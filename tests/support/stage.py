"""A controller process and a stage of objects for tests of it."""

import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import httpx

from support.ports import free_port
from support.wait import PATIENCE_S, eventually
from tidegate.adapters.kube import Kube
from tidegate.adapters.kube import kinds as k
from tidegate.api import names
from tidegate.local.cluster import LocalCluster

Object = dict[str, Any]


class Process:
    """`tidegate controller`, to be started, killed and started again."""

    def __init__(self, cluster: LocalCluster, log: Path, *args: str) -> None:
        self.port = free_port()
        self.log = log
        self._argv = [
            sys.executable, "-m", "tidegate", "controller", "--port", str(self.port), "--period", "500ms",
            "--kubeconfig", str(cluster.kubeconfig_for("tidegate-controller")), *args,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(self._argv, stdout=out, stderr=out)

    def stop(self, sent: int = signal.SIGTERM) -> int:
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(sent)
        return self._process.wait(20)

    def wait_ready(self, timeout_s: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + timeout_s
        answer = ""
        while time.monotonic() < deadline:
            assert self._process is not None
            assert self._process.poll() is None, self.log.read_text()[-4000:]
            try:
                response = self.ask("/readyz")
                answer = response.text
                if response.status_code == 200:
                    return
            except httpx.HTTPError as error:
                answer = str(error)
            time.sleep(0.1)
        raise AssertionError(f"not ready: {answer}\n{self.log.read_text()[-4000:]}")

    def ask(self, path: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", trust_env=False)

    def metric(self, name: str) -> float:
        text = self.ask("/metrics").text
        rows = [line for line in text.splitlines() if line.split("{")[0].split(" ")[0] == name]
        return sum(float(line.rsplit(" ", 1)[1]) for line in rows)


class Stage:
    """Objects of one test under names of its own, taken away at its end."""

    def __init__(self, kube: Kube, namespace: str) -> None:
        self.kube, self.namespace = kube, namespace
        self.tag = uuid.uuid4().hex[:6]
        self.high, self.low, self.pool = f"high-{self.tag}", f"low-{self.tag}", f"pool-{self.tag}"
        self.nodes: list[str] = []
        self.cluster_wide: list[tuple[Any, str]] = []

    async def qos(self, name: str, priority: int, reclaim: str, **more: Any) -> Object:
        meta = {"name": name, "annotations": more.pop("annotations", {})}
        spec = {"priority": priority, "reclaim": reclaim, "allowedNamespaces": {}} | more
        self.cluster_wide.append((k.QOS_CLASS, name))
        return await self.kube.create(k.QOS_CLASS, _typed(k.QOS_CLASS, {"metadata": meta, "spec": spec}))

    async def gpu_pool(self, **more: Any) -> Object:
        spec = {
            "nodeSelector": {"matchLabels": {"test": self.pool}},
            "reclaim": {"drainTimeout": "5s"},
            "reservations": [{"name": "main", "qosClass": self.high, "gpus": 4}],
        } | more
        self.cluster_wide.append((k.GPU_POOL, self.pool))
        body = {"metadata": {"name": self.pool}, "spec": spec}
        return await self.kube.create(k.GPU_POOL, _typed(k.GPU_POOL, body))

    async def node(self, gpus: int = 4) -> str:
        name = f"node-{self.tag}-{len(self.nodes)}"
        meta = {"name": name, "labels": {"test": self.pool}}
        await self.kube.create(k.NODE, {"apiVersion": "v1", "kind": "Node", "metadata": meta})
        resources = {"nvidia.com/gpu": str(gpus), "cpu": "64", "memory": "512Gi", "pods": "110"}
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": ""}
        status = {"capacity": resources, "allocatable": resources, "conditions": [ready]}
        await self.kube.merge(k.NODE, name, {"status": status}, subresource="status")
        self.nodes.append(name)
        return name

    async def model(self, name: str = "llama", **more: Any) -> Object:
        spec = {
            "poolRefs": [{"name": self.pool}],
            "model": {"name": f"{name}-{self.tag}", "uri": "hf://org/llama"},
            "engine": {"type": "vLLM", "args": ["--max-num-seqs=16"]},
            "parallelism": {"tensor": 2},
            "classes": [
                {"qosClass": self.high, "minReplicas": 1, "maxReplicas": 2},
                {"qosClass": self.low, "maxReplicas": 2},
            ],
        } | more
        body = {"metadata": {"name": name, "namespace": self.namespace}, "spec": spec}
        return await self.kube.create(k.MODEL_DEPLOYMENT, _typed(k.MODEL_DEPLOYMENT, body))

    async def standard(self) -> None:
        """Two classes, a pool of one node, no model."""
        await self.qos(self.high, 900, "Never")
        await self.qos(self.low, 100, "Always")
        await self.node()
        await self.gpu_pool()

    async def deployment(self, qos_class: str, model: str = "llama") -> Object:
        return await self.kube.get(k.DEPLOYMENT, names.lane_name(model, qos_class), self.namespace)

    async def condition(self, kind: Any, name: str, type_: str = "Ready") -> Object:
        namespace = self.namespace if kind.namespaced else None
        obj = await self.kube.get(kind, name, namespace)
        found = {c["type"]: c for c in obj["status"]["conditions"]}
        return found[type_]

    async def ready(self, name: str, status: str, reason: str) -> Object:
        async def check() -> Object:
            found = await self.condition(k.MODEL_DEPLOYMENT, name)
            assert (found["status"], found["reason"]) == (status, reason), found
            return found

        return await eventually(check)

    async def close(self) -> None:
        for model in (await self.kube.list(k.MODEL_DEPLOYMENT, self.namespace))[0]:
            await self.kube.delete(k.MODEL_DEPLOYMENT, model["metadata"]["name"], self.namespace)
        for kind, name in self.cluster_wide:
            await self.kube.delete(kind, name)
        for name in self.nodes:
            await self.kube.delete(k.NODE, name)


def _typed(kind: Any, body: Object) -> Object:
    return {"apiVersion": kind.api_version, "kind": kind.name, **body}
