"""Parts die under load, and come back: what is lost is only what had to be."""

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.chat import Caller
from support.processes import process_of
from support.wait import eventually
from tidegate.adapters.kube import Kube, kinds
from tidegate.load import runner
from tidegate.load.results import ANSWERED, Record
from tidegate.load.scenario import Phase, Scenario, Stream
from tidegate.local.cluster import LocalCluster

SECONDS, FAULT_AT_S, BACK_WITHIN_S = 14.0, 4.0, 6.0


def light_load(tmp_path: Path, token: str) -> Scenario:
    """Ten short streamed requests a second to both models."""
    lengths = tmp_path / "lengths.csv"
    rows = "".join(f"{i * 0.1:.1f},{50 + i % 40},{10 + i % 30}\n" for i in range(400))
    lengths.write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    stream = Stream(
        name="light",
        qos_class="interactive",
        models=["chat-8b", "code-8b"],
        lengths=lengths,
        phases=[Phase(seconds=SECONDS, per_second=10)],
        token=token,
        timeout_s=30,
    )
    return Scenario(seconds=SECONDS, streams=[stream])


async def under_load(
    cluster: LocalCluster, scenario: Scenario, component: str, sig: signal.Signals = signal.SIGKILL
) -> list[Record]:
    """Run the load, kill a component in the middle of it, and wait until it is ready again."""

    async def kill() -> None:
        await asyncio.sleep(FAULT_AT_S)
        pid = await asyncio.to_thread(cluster.pid, component)
        os.kill(pid, sig)

        async def other_pid() -> int:
            return await asyncio.to_thread(cluster.pid, component)

        await eventually(other_pid, until=lambda now: now not in {0, pid})
        await asyncio.to_thread(cluster.wait_ready, component)

    url = await asyncio.to_thread(cluster.url, "gateway")
    state, _ = await asyncio.gather(runner.run(scenario, url, drain_s=30), kill())
    return state.records


def not_answered(records: list[Record]) -> list[str]:
    return [f"{r.scheduled_s:.1f} s: {r.status} {r.detail}" for r in records if r.outcome != ANSWERED]


@pytest.mark.parametrize("component", ["controller", "extender", "kube-apiserver"])
async def test_requests_go_on_without(
    examples: LocalCluster, tokens: dict[str, str], tmp_path: Path, component: str
) -> None:
    """Nothing that is not in the path of a request may cost one."""
    records = await under_load(examples, light_load(tmp_path, tokens["interactive"]), component)
    assert len(records) > 100
    assert not not_answered(records)


async def test_a_killed_picker_costs_only_what_was_inside_it(
    examples: LocalCluster, tokens: dict[str, str], tmp_path: Path, gateway: httpx.AsyncClient
) -> None:
    records = await under_load(examples, light_load(tmp_path, tokens["interactive"]), "picker")
    after = [r for r in records if r.scheduled_s > FAULT_AT_S + BACK_WITHIN_S]
    before = [r for r in records if r.end_s is not None and r.end_s < FAULT_AT_S]
    assert len(after) > 20
    assert len(before) > 20
    assert not not_answered(after)
    assert not not_answered(before)
    assert all(r.status in {0, 200, 500, 503} for r in records), "each one fails with a reason"
    await eventually(lambda: in_flight(examples, gateway), until=lambda n: n == 0)


async def in_flight(cluster: LocalCluster, client: httpx.AsyncClient) -> float:
    text = (await client.get(f"{cluster.url('picker')}/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith("tidegate_inflight_requests{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


async def test_a_client_that_leaves_gives_its_room_back(
    examples: LocalCluster, gateway: httpx.AsyncClient, chat: Caller
) -> None:
    async with chat.stream("chat-8b", tokens=4000) as lines:
        async for _ in lines:
            break
        assert await in_flight(examples, gateway) >= 1
    await eventually(lambda: in_flight(examples, gateway), until=lambda n: n == 0, within_s=10)


async def engine_pods(kube: Kube) -> list[dict[str, Any]]:
    pods, _ = await kube.list(kinds.POD, "team-a", labels="tidegate.dev/model=chat-8b")
    return [p for p in pods if "deletionTimestamp" not in p["metadata"]]


def restarts(pod: dict[str, Any]) -> int:
    return int(pod["status"]["containerStatuses"][0]["restartCount"])


async def test_an_engine_killed_in_the_middle_of_a_stream(
    examples: LocalCluster, gateway: httpx.AsyncClient, chat: Caller, kube: Kube
) -> None:
    """The stream breaks, its room comes back, the pod restarts, and the model is served again."""
    pods = await engine_pods(kube)
    before = {p["metadata"]["name"]: restarts(p) for p in pods}
    broke = False
    try:
        async with chat.stream("chat-8b", tokens=8000) as lines:
            started = time.monotonic()
            async for line in lines:
                if started:
                    for pod in pods:
                        os.kill(process_of(pod), signal.SIGKILL)
                    started = 0.0
                assert line != "[DONE]"
    except httpx.HTTPError:
        broke = True
    assert broke, "a stream that an engine left must not end as if it were whole"
    await eventually(lambda: in_flight(examples, gateway), until=lambda n: n == 0)

    async def restarted() -> bool:
        now = {p["metadata"]["name"]: restarts(p) for p in await engine_pods(kube)}
        return all(now.get(name, count + 1) > count for name, count in before.items())

    await eventually(restarted)

    async def answered() -> int:
        return (await chat.chat("chat-8b")).status_code

    await eventually(answered, until=lambda status: status == 200)


async def test_a_restarted_controller_changes_nothing(examples: LocalCluster, kube: Kube) -> None:
    async def versions() -> dict[str, str]:
        objects: list[dict[str, Any]] = []
        for kind in (kinds.MODEL_DEPLOYMENT, kinds.DEPLOYMENT, kinds.SERVICE):
            for namespace in ("team-a", "team-b"):
                objects += (await kube.list(kind, namespace))[0]
        return {
            f"{o['kind']}/{o['metadata']['name']}": o["metadata"]["generation"]
            for o in objects
            if "generation" in o["metadata"]
        }

    async def at_rest() -> bool:
        now = await versions()
        await asyncio.sleep(3)
        return now == await versions()

    await eventually(at_rest, within_s=90)
    before = await versions()
    os.kill(examples.pid("controller"), signal.SIGKILL)
    await asyncio.sleep(1)
    await asyncio.to_thread(examples.wait_ready, "controller")
    await asyncio.sleep(5)
    assert await versions() == before
