"""A real kube-scheduler with the extender: who is placed, who waits, who gives way."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import pytest

from support.wait import eventually
from tidegate.adapters.kube import ApiError, Kube, kinds
from tidegate.api.names import LABEL_CLASS, LABEL_MODEL, LABEL_POOL, SCHEDULER_NAME
from tidegate.local.cluster import CONTROL_PLANE, LocalCluster

GPU = "nvidia.com/gpu"
CLASSES = {"gold": (1000, "Never"), "silver": (500, "Never"), "bulk": (0, "Always")}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A control plane with our scheduler and the extender, and no kubelet."""
    parts = CONTROL_PLANE | {"tidegate-scheduler", "extender"}
    with LocalCluster.start(tmp_path_factory.mktemp("extender"), parts=parts) as running:
        yield running


@pytest.fixture
async def kube(cluster: LocalCluster) -> AsyncIterator[Kube]:
    async with await Kube.connect(str(cluster.kubeconfig)) as client:
        yield client


class Bench:
    """Plain Node objects, classes, a pool, and pods in one namespace."""

    def __init__(self, kube: Kube) -> None:
        self.kube = kube

    async def classes(self) -> None:
        for name, (priority, reclaim) in CLASSES.items():
            spec = {"priority": priority, "reclaim": reclaim, "allowedNamespaces": {}}
            await self.ensure(kinds.QOS_CLASS, {"metadata": {"name": name}, "spec": spec})
            await self.ensure(
                kinds.PRIORITY_CLASS, {"metadata": {"name": f"tidegate-{name}"}, "value": priority}
            )

    async def ensure(self, kind: Any, obj: dict[str, Any]) -> None:
        full = {"apiVersion": kind.api_version, "kind": kind.name, **obj}
        try:
            await self.kube.create(kind, full)
        except ApiError as error:
            if error.status != 409:
                raise

    async def nodes(self, count: int, gpus: int) -> None:
        for i in range(count):
            name = f"plain-{i}"
            meta = {"name": name, "labels": {"tidegate.dev/test": "plain"}}
            await self.kube.create(kinds.NODE, {"apiVersion": "v1", "kind": "Node", "metadata": meta})
            size = {GPU: str(gpus), "cpu": "64", "memory": "256Gi", "pods": "110"}
            ready = {"type": "Ready", "status": "True", "reason": "Test", "message": "no kubelet"}
            status = {"status": {"capacity": size, "allocatable": size, "conditions": [ready]}}
            await self.kube.merge(kinds.NODE, name, status, subresource="status")
            await self.kube.merge(kinds.NODE, name, {"spec": {"taints": None}})

    async def pool(self, *reservations: dict[str, Any], mode: str = "Enforce") -> None:
        spec = {
            "mode": mode,
            "nodeSelector": {"matchLabels": {"tidegate.dev/test": "plain"}},
            "reservations": list(reservations),
            "taint": False,
        }
        await self.kube.apply(
            kinds.GPU_POOL, {"metadata": {"name": "p"}, "spec": spec}, manager="test", force=True
        )

    async def pod(self, name: str, qos: str, gpus: int = 1) -> None:
        container = {
            "name": "engine",
            "image": "none",
            "resources": {"limits": {GPU: str(gpus)}, "requests": {GPU: str(gpus)}},
        }
        labels = {LABEL_CLASS: qos, LABEL_POOL: "p", LABEL_MODEL: "m"}
        spec = {
            "schedulerName": SCHEDULER_NAME,
            "priorityClassName": f"tidegate-{qos}",
            "terminationGracePeriodSeconds": 0,
            "containers": [container],
        }
        meta = {"name": name, "namespace": "default", "labels": labels}
        await self.kube.create(kinds.POD, {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})

    async def pods(self) -> dict[str, dict[str, Any]]:
        items, _ = await self.kube.list(kinds.POD, "default")
        for item in items:  # the kubelet's part: what is told to go, goes
            if "deletionTimestamp" in item["metadata"]:
                await self.kube.delete(kinds.POD, item["metadata"]["name"], "default", grace_s=0)
        return {i["metadata"]["name"]: i for i in items}

    async def bound(self, prefix: str = "") -> dict[str, str]:
        pods = await self.pods()
        return {
            n: p["spec"]["nodeName"]
            for n, p in pods.items()
            if n.startswith(prefix) and "nodeName" in p["spec"]
        }

    async def until(self, what: Callable[[dict[str, str]], bool]) -> dict[str, str]:
        """Wait until what is bound fulfils a condition; fails with what is bound instead."""
        return await eventually(self.bound, until=what)

    async def refusal(self, name: str) -> str:
        """The message with which kube-scheduler leaves a pod waiting."""

        async def look() -> str:
            conditions = (await self.kube.get(kinds.POD, name, "default"))["status"].get("conditions") or ()
            refused = (c for c in conditions if c["type"] == "PodScheduled" and c["status"] == "False")
            return next((str(c["message"]) for c in refused), "")

        return await eventually(look, until=lambda message: "tidegate" in message)

    async def clean(self) -> None:
        for name in await self.pods():
            await self.kube.delete(kinds.POD, name, "default", grace_s=0)
        nodes, _ = await self.kube.list(kinds.NODE)
        for node in nodes:
            await self.kube.delete(kinds.NODE, node["metadata"]["name"])
        await self.kube.delete(kinds.GPU_POOL, "p")


@pytest.fixture
async def bench(kube: Kube) -> AsyncIterator[Bench]:
    made = Bench(kube)
    await made.classes()
    yield made
    await made.clean()


def _count(bound: Iterable[str], prefix: str) -> int:
    return sum(n.startswith(prefix) for n in bound)


async def test_batch_borrows_what_is_idle_and_gives_it_back_to_the_owner(bench: Bench) -> None:
    await bench.nodes(2, 4)
    await bench.pool({"name": "chat", "qosClass": "gold", "gpus": 4})
    for i in range(10):
        await bench.pod(f"bulk-{i}", "bulk")
    await bench.until(lambda b: _count(b, "bulk") == 8)
    for i in range(2):
        await bench.pod(f"gold-{i}", "gold", gpus=2)
    await bench.until(lambda b: _count(b, "gold") == 2 and _count(b, "bulk") == 4)
    assert _count(await bench.pods(), "bulk") == 6, "each GPU was asked back once, and nobody else went"
    # The reservation is full now, and nothing beyond it pushes anybody out.
    await bench.pod("gold-more", "gold", gpus=2)
    await asyncio.sleep(2)
    assert _count(await bench.bound(), "gold") == 2
    assert _count(await bench.bound(), "bulk") == 4
    assert _count(await bench.pods(), "bulk") == 6


async def test_a_class_that_is_never_reclaimed_does_not_eat_anothers_reservation(bench: Bench) -> None:
    await bench.nodes(2, 4)
    await bench.pool({"name": "chat", "qosClass": "gold", "gpus": 6})
    for i in range(4):
        await bench.pod(f"silver-{i}", "silver")
    await bench.until(lambda b: _count(b, "silver") == 2)
    waiting = next(iter({f"silver-{i}" for i in range(4)} - set(await bench.bound())))
    message = await bench.refusal(waiting)
    assert "class silver asks for 1 GPU" in message
    assert "class gold has 6 GPUs reserved (chat), 6 of them not in use yet" in message
    for i in range(3):
        await bench.pod(f"gold-{i}", "gold", gpus=2)
    await bench.until(lambda b: _count(b, "gold") == 3)
    assert _count(await bench.bound(), "silver") == 2, "not borrowed, so never preempted"


async def test_a_change_of_the_pool_wakes_those_who_wait(bench: Bench) -> None:
    await bench.nodes(1, 4)
    await bench.pool({"name": "chat", "qosClass": "gold", "gpus": 4})
    await bench.pod("silver-0", "silver")
    await bench.refusal("silver-0")
    await bench.pool({"name": "chat", "qosClass": "gold", "gpus": 3})
    await bench.until(lambda b: "silver-0" in b)


async def test_a_pool_that_observes_blocks_nothing(bench: Bench) -> None:
    await bench.nodes(1, 4)
    await bench.pool({"name": "chat", "qosClass": "gold", "gpus": 4}, mode="Observe")
    for i in range(4):
        await bench.pod(f"silver-{i}", "silver")
    await bench.until(lambda b: _count(b, "silver") == 4)


async def test_a_burst_spends_no_gpu_twice_and_keeps_blocks_whole(bench: Bench) -> None:
    await bench.nodes(4, 4)
    await bench.pool({"name": "chat", "qosClass": "gold", "gpus": 8})
    await asyncio.gather(*(bench.pod(f"gold-{i}", "gold", gpus=4) for i in range(2)))
    await asyncio.gather(
        *(bench.pod(f"silver-{i}", "silver") for i in range(20)),
        *(bench.pod(f"gold-{i}", "gold", gpus=4) for i in range(2, 4)),
    )
    # Eight reserved and eight unreserved; gold beyond its reservation competes for the latter.
    bound = await bench.until(lambda b: _count(b, "gold") * 4 + _count(b, "silver") == 16)
    assert _count(bound, "gold") >= 2
    per_node: dict[str, int] = {}
    for name, node in bound.items():
        per_node[node] = per_node.get(node, 0) + (4 if name.startswith("gold") else 1)
    assert set(per_node.values()) == {4}


async def test_the_extender_killed_under_load_over_commits_nothing(
    cluster: LocalCluster, bench: Bench
) -> None:
    await bench.nodes(4, 4)
    await bench.pool({"name": "chat", "qosClass": "gold", "gpus": 8})

    async def load() -> None:
        for i in range(16):
            await bench.pod(f"silver-{i}", "silver")
            await asyncio.sleep(0.03)

    running = asyncio.create_task(load())
    await asyncio.sleep(0.2)
    os.kill(cluster.pid("extender"), signal.SIGKILL)
    await running
    await asyncio.to_thread(cluster.wait_ready, "extender")
    bound = await bench.until(lambda b: _count(b, "silver") == 8)
    assert len(bound) == 8
    for i in range(4):
        await bench.pod(f"gold-{i}", "gold", gpus=2)
    await bench.until(lambda b: _count(b, "gold") == 4)
    assert _count(await bench.bound(), "silver") == 8
