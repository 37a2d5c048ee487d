"""The controller killed, told to stop, without an API server, without a cluster; and fed with demand."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from support.stage import Process, Stage
from support.wait import eventually
from tidegate.adapters.kube import Kube
from tidegate.adapters.kube import kinds as k
from tidegate.api import names
from tidegate.local.cluster import LocalCluster


class Picker:
    """A server of a picker's metrics, whose figures a test sets."""

    def __init__(self) -> None:
        self.text = ""
        self.url = ""

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=self.text)

    def show(self, namespace: str, model: str, qos_class: str, **values: float) -> None:
        labels = f'{{namespace="{namespace}",model="{model}",qos_class="{qos_class}"}}'
        self.text = "".join(f"tidegate_{name}{labels} {value}\n" for name, value in values.items())


@pytest.fixture
async def picker() -> AsyncIterator[Picker]:
    picker = Picker()
    app = web.Application()
    app.router.add_get("/metrics", picker.metrics)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    picker.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield picker
    await runner.cleanup()


@pytest.fixture
def process(control_plane: LocalCluster, tmp_path: Path, picker: Picker) -> Iterator[Process]:
    process = Process(control_plane, tmp_path / "controller.log", "--picker-url", picker.url)
    process.start()
    yield process
    process.stop(signal.SIGKILL)


@pytest.fixture
async def stage(process: Process, kube: Kube, namespace: str) -> AsyncIterator[Stage]:
    await asyncio.to_thread(process.wait_ready)
    stage = Stage(kube, namespace)
    yield stage
    await stage.close()


async def children(stage: Stage) -> dict[str, Any]:
    found = {}
    for kind in (k.DEPLOYMENT, k.SERVICE, k.POD, k.MODEL_DEPLOYMENT):
        for obj in (await stage.kube.list(kind, stage.namespace))[0]:
            found[f"{kind.name} {obj['metadata']['name']}"] = obj["metadata"]["resourceVersion"]
    return found


async def test_killed_in_the_middle_and_started_again_changes_nothing(stage: Stage, process: Process) -> None:
    await stage.standard()
    await stage.model()
    process.stop(signal.SIGKILL)  # wherever it is
    process.start()
    await asyncio.to_thread(process.wait_ready)
    await stage.ready("llama", "Unknown", "Progressing")
    await eventually(lambda: stage.deployment(stage.low))
    await asyncio.sleep(2)
    before = await children(stage)
    assert process.stop(signal.SIGTERM) == 0
    process.start()
    await asyncio.to_thread(process.wait_ready)
    await asyncio.sleep(3)
    assert await children(stage) == before


async def test_demand_raises_a_lane_and_is_told_with_its_reason(
    stage: Stage, process: Process, picker: Picker, kube: Kube
) -> None:
    await stage.standard()
    await stage.model()
    await eventually(lambda: stage.deployment(stage.low))
    picker.show(
        stage.namespace, "llama", stage.low, arrivals_total=0, queue_requests=200, queue_tokens=400_000
    )

    async def raised() -> bool:
        return bool((await stage.deployment(stage.low))["spec"]["replicas"] > 0)

    await eventually(raised)

    async def told() -> list[Any]:
        decisions = process.ask("/debug/decisions").json()
        ref = f"{stage.namespace}/llama"
        return [d for d in decisions if d["object"] == ref and stage.low in d["message"]]

    mine = await eventually(told)
    assert {"time", "kind", "object", "reason", "message"} == mine[-1].keys()
    assert process.metric("tidegate_rebalances_total") >= 1
    assert process.metric("tidegate_reconcile_errors_total") == 0

    async def event() -> bool:
        events = (await kube.list(k.EVENT, stage.namespace))[0]
        return any(e["reason"] == mine[-1]["reason"] and stage.low in e["note"] for e in events)

    await eventually(event)


async def test_the_api_server_restarted_under_it(
    stage: Stage, process: Process, control_plane: LocalCluster, kube: Kube
) -> None:
    await stage.standard()
    await stage.model()
    await eventually(lambda: stage.deployment(stage.low))
    await asyncio.to_thread(control_plane.restart, "kube-apiserver")
    await eventually(lambda: stage.model("second"))  # its admission takes a moment
    await eventually(lambda: stage.deployment(stage.high, "second"))
    lane = names.lane_name("llama", stage.high)
    await kube.merge(k.DEPLOYMENT, lane, {"spec": {"replicas": 9}}, stage.namespace)

    async def repaired() -> bool:
        return bool((await stage.deployment(stage.high))["spec"]["replicas"] == 1)

    await eventually(repaired)
    assert process.ask("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("args", "said"),
    [
        pytest.param([], "Give --kubeconfig FILE or set KUBECONFIG", id="no cluster"),
        pytest.param(["--period", "5"], "must be a duration with a unit", id="period without unit"),
        pytest.param(["--log-level", "loud"], "is not one of 'debug', 'info'", id="log level"),
    ],
)
def test_what_cannot_start_says_why(args: list[str], said: str, tmp_path: Path) -> None:
    environment = {**os.environ, "KUBECONFIG": str(tmp_path / "none"), "COLUMNS": "200"}
    command = [sys.executable, "-m", "tidegate", "controller", *args]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
