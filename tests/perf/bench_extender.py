"""Pods a second of kube-scheduler with and without the extender, on plain Node objects.

Both run in one cluster, one after the other in turns, so that only their ratio is read. There is no
kubelet: a pod counts when it is bound.
`python tests/perf/bench_extender.py [--quick] [--nodes N] [--pods N] [--rounds N]`
"""

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from report import record, row  # type: ignore[import-not-found]  # beside this file

from tidegate.adapters.kube import ApiError, Kube, Reflector, kinds
from tidegate.api.names import LABEL_CLASS, LABEL_MODEL, LABEL_POOL, SCHEDULER_NAME
from tidegate.local.cluster import CONTROL_PLANE, LocalCluster

GPU = "nvidia.com/gpu"
GPUS = 8
UNITS = {"default-scheduler": "kube-scheduler", SCHEDULER_NAME: "tidegate-scheduler"}
ROUND_S = 90.0
"""A round takes seconds; one that hangs must not hold the others up."""
TARGET = 0.85
"""An HTTP extender costs; a short list was seen at 0.86 to 1.06 of the scheduler alone."""


class NotBoundError(Exception):
    """A scheduler did not place what it was given."""


async def main() -> int:
    """Measure and record; 1 when pods were not bound."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="100 nodes, few pods: that it works")
    parser.add_argument("--nodes", type=int, help="default 1000")
    parser.add_argument("--pods", type=int, help="pods a round; default 400")
    parser.add_argument("--rounds", type=int, help="rounds for each scheduler; default 3")
    options = parser.parse_args()
    nodes = options.nodes or (100 if options.quick else 1000)
    pods = options.pods or (60 if options.quick else 400)
    rounds = options.rounds or (1 if options.quick else 3)
    parts = CONTROL_PLANE | {"tidegate-scheduler", "extender"}
    with (
        tempfile.TemporaryDirectory(prefix="tidegate-bench-") as folder,
        LocalCluster.start(Path(folder) / "cluster", parts=parts) as cluster,
    ):
        _same_but_for_the_extender(cluster)
        async with await Kube.connect(str(cluster.kubeconfig)) as kube:
            await _prepare(kube, nodes)
            rates = await _measure(cluster, kube, pods, rounds)
            latency = await _handler_ms(cluster.url("extender"))
    _record(rates, latency, nodes, quick=options.quick)
    return 0


def _same_but_for_the_extender(cluster: LocalCluster) -> None:
    """Give the default scheduler our scheduler's configuration: all nodes scored, packed, no extender."""
    config = yaml.safe_load((cluster.layout.config / "tidegate-scheduler.yaml").read_text())
    del config["extenders"]
    config["profiles"][0]["schedulerName"] = "default-scheduler"
    (cluster.layout.config / "kube-scheduler.yaml").write_text(yaml.safe_dump(config))
    cluster.restart("kube-scheduler")


async def _prepare(kube: Kube, nodes: int) -> None:
    for name, priority, reclaim in (("gold", 1000, "Never"), ("bulk", 0, "Always")):
        spec = {"priority": priority, "reclaim": reclaim, "allowedNamespaces": {}}
        await kube.create(kinds.QOS_CLASS, _object(kinds.QOS_CLASS, name, spec=spec))
        priority_class = _object(kinds.PRIORITY_CLASS, f"tidegate-{name}", value=priority)
        await kube.create(kinds.PRIORITY_CLASS, priority_class)
    gate = asyncio.Semaphore(16)

    async def make(i: int) -> None:
        async with gate:
            name = f"plain-{i:05}"
            await kube.create(kinds.NODE, _object(kinds.NODE, name))
            size = {GPU: str(GPUS), "cpu": "64", "memory": "256Gi", "pods": "110"}
            ready = {"type": "Ready", "status": "True", "reason": "Bench", "message": "no kubelet"}
            status = {"status": {"capacity": size, "allocatable": size, "conditions": [ready]}}
            await kube.merge(kinds.NODE, name, status, subresource="status")
            await kube.merge(kinds.NODE, name, {"spec": {"taints": None}})

    await asyncio.gather(*(make(i) for i in range(nodes)))
    pool = {
        "nodeSelector": {"matchLabels": {"tidegate.dev/bench": "plain"}},
        "reservations": [{"name": "chat", "qosClass": "gold", "gpus": nodes * GPUS // 2}],
        "taint": False,
    }
    await kube.create(kinds.GPU_POOL, _object(kinds.GPU_POOL, "p", spec=pool))


async def _measure(cluster: LocalCluster, kube: Kube, pods: int, rounds: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {"default-scheduler": [], SCHEDULER_NAME: []}
    for round_ in range(rounds + 1):
        for scheduler, found in rates.items():
            rate = await _round(
                kube, cluster.pid(UNITS[scheduler]), scheduler, pods if round_ else min(pods, 40), round_
            )
            if round_:  # the first warms caches and connections
                found.append(rate)
                print(f"{scheduler}: {rate:.0f} pods/s", flush=True)
    return rates


async def _round(kube: Kube, pid: int, scheduler: str, pods: int, number: int) -> float:
    """Pods bound a second. The scheduler is stopped while they are made, which is not measured."""
    bound: dict[str, float] = {}
    made: set[str] = set()
    done = asyncio.Event()

    def hear(event: str, obj: dict[str, Any]) -> None:
        name = obj["metadata"]["name"]
        if event != "DELETED" and obj["spec"].get("nodeName") and name not in bound:
            bound[name] = time.perf_counter()
            if len(bound) == pods:
                done.set()

    mark = f"{scheduler}-{number}"
    watch = Reflector(kube, kinds.POD, namespace="default", labels=f"round={mark}", on_change=hear)
    task = asyncio.create_task(watch.run())
    gate = asyncio.Semaphore(16)

    async def make(i: int) -> None:
        async with gate:
            name = f"{mark}-{i:05}"
            await kube.create(kinds.POD, _pod(name, mark, scheduler, "bulk" if i % 2 else "gold"))
            made.add(name)

    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.gather(*(make(i) for i in range(pods)))
    finally:
        os.kill(pid, signal.SIGCONT)
    begun = time.perf_counter()
    try:
        async with asyncio.timeout(ROUND_S):
            await done.wait()
    except TimeoutError:
        raise NotBoundError(f"{scheduler} bound {len(bound)} of {pods} pods within {ROUND_S:.0f} s") from None
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await _remove(kube, sorted(made))
    return pods / (max(bound.values()) - begun)


async def _remove(kube: Kube, names: list[str]) -> None:
    gate = asyncio.Semaphore(16)

    async def one(name: str) -> None:
        async with gate:
            await kube.delete(kinds.POD, name, "default", grace_s=0)

    await asyncio.gather(*(one(n) for n in names))
    async with asyncio.timeout(60):
        while (await kube.list(kinds.POD, "default"))[0]:  # noqa: ASYNC110  nothing tells us
            await asyncio.sleep(0.1)


def _pod(name: str, mark: str, scheduler: str, qos: str) -> dict[str, Any]:
    resources = {"limits": {GPU: "1"}, "requests": {GPU: "1"}}
    spec = {
        "schedulerName": scheduler,
        "priorityClassName": f"tidegate-{qos}",
        "containers": [{"name": "engine", "image": "none", "resources": resources}],
    }
    labels = {LABEL_CLASS: qos, LABEL_POOL: "p", LABEL_MODEL: "m", "round": mark}
    made = _object(kinds.POD, name, spec=spec)
    made["metadata"] |= {"namespace": "default", "labels": labels}
    return made


def _object(kind: Any, name: str, **more: Any) -> dict[str, Any]:
    meta = {"name": name, "labels": {"tidegate.dev/bench": "plain"}}
    return {"apiVersion": kind.api_version, "kind": kind.name, "metadata": meta, **more}


async def _handler_ms(url: str) -> float:
    """Mean time in the filter handler, of the extender's own metrics."""
    import aiohttp

    async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
        text = await response.text()
    values = dict(
        line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("tidegate_extender_seconds_")
    )
    total = float(values['tidegate_extender_seconds_sum{verb="filter"}'])
    return 1000 * total / float(values['tidegate_extender_seconds_count{verb="filter"}'])


def _record(rates: dict[str, list[float]], latency: float, nodes: int, *, quick: bool) -> None:
    without, with_ = rates["default-scheduler"], rates[SCHEDULER_NAME]
    pairs = [b / a for a, b in zip(without, with_, strict=True)]
    record(
        "extender",
        [
            row(f"scheduling with the extender, {nodes} nodes", with_, "pods/s"),
            row(f"scheduling without the extender, {nodes} nodes", without, "pods/s"),
            row("with / without", pairs, "ratio", at_least=TARGET, claims=not quick),
            row("mean time in the filter handler", [latency], "ms"),
        ],
    )


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except (ApiError, NotBoundError) as error:
        sys.exit(f"bench_extender: {error}")
