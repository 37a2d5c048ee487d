"""Replicas die, are lent out, and are given up: no request that was taken is lost by it."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from support.chat import Caller
from support.processes import process_of
from support.wait import eventually
from tidegate.adapters.kube import Kube, kinds
from tidegate.local.cluster import LocalCluster

NAME, NAMESPACE = "steady", "team-a"
STEP_S = 0.0155
"""One decode step of the emulated engine at its real speed, with a few requests."""
Object = dict[str, Any]


@pytest.fixture
async def steady(examples: LocalCluster, kube: Kube) -> AsyncIterator[str]:
    """A model of its own at real speed: two interactive replicas of one GPU, batch where asked for."""
    model = {
        "apiVersion": "tidegate.dev/v1alpha1",
        "kind": "ModelDeployment",
        "metadata": {"name": NAME, "namespace": NAMESPACE},
        "spec": {
            "poolRefs": [{"name": "gpus"}],
            "model": {"name": NAME, "uri": "hf://example/steady"},
            "engine": {
                "type": "vLLM",
                "args": ["--max-num-seqs=16"],
                "env": [{"name": "TIDEGATE_EMULATOR_SPEED", "value": "1"}],
            },
            "classes": [{"qosClass": "interactive"}, {"qosClass": "batch"}],
            "scaling": {"replicas": {"interactive": 2, "batch": 0}, "scaleDownDelay": "1s"},
        },
    }
    await kube.create(kinds.MODEL_DEPLOYMENT, model)
    await eventually(lambda: ready(kube, "interactive"), until=lambda pods: len(pods) == 2)
    # The picker sees them when its watch does, and sends there after their first report.
    await eventually(lambda: endpoints(examples), until=lambda found: sum(e["ready"] for e in found) == 2)
    yield NAME
    await kube.delete(kinds.MODEL_DEPLOYMENT, NAME, NAMESPACE)
    await eventually(lambda: pods_of(kube), until=lambda pods: not pods)


async def pods_of(kube: Kube, qos_class: str = "") -> list[Object]:
    labels = f"tidegate.dev/model={NAME}" + (f",tidegate.dev/qos-class={qos_class}" if qos_class else "")
    return (await kube.list(kinds.POD, NAMESPACE, labels=labels))[0]


async def ready(kube: Kube, qos_class: str) -> list[Object]:
    def is_ready(pod: Object) -> bool:
        conditions = pod["status"].get("conditions", ())
        return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)

    return [p for p in await pods_of(kube, qos_class) if is_ready(p)]


async def endpoints(cluster: LocalCluster) -> list[Object]:
    """The model's endpoints as the picker sees them."""
    async with httpx.AsyncClient() as client:
        state = (await client.get(f"{cluster.url('picker')}/debug/state")).json()
    flow = state.get("flow", state)
    return [e for e in flow["endpoints"] if e["model"] == NAME]


async def pin(kube: Kube, **replicas: int) -> None:
    patch = {"spec": {"scaling": {"replicas": replicas}}}
    await kube.merge(kinds.MODEL_DEPLOYMENT, NAME, patch, NAMESPACE)


def standing(pod: Object) -> str:
    return str(pod["metadata"].get("annotations", {}).get("tidegate.dev/standing", ""))


async def test_a_whole_answer_survives_its_replica(
    examples: LocalCluster, kube: Kube, chat: Caller, steady: str
) -> None:
    """The engine is killed while it works on it; another one begins anew, and the client sees one answer."""
    tokens = round(4 / STEP_S)
    asked = asyncio.create_task(chat.chat(steady, tokens=tokens))
    busy = await eventually(
        lambda: endpoints(examples), until=lambda found: any(e["requests"] for e in found)
    )
    address = next(e["address"] for e in busy if e["requests"]).rpartition(":")[0]
    pod = next(p for p in await pods_of(kube) if p["status"].get("podIP") == address)
    await asyncio.sleep(1)
    os.kill(process_of(pod), signal.SIGKILL)
    answer = await asked
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == tokens


async def test_a_stream_is_not_put_on_gpus_that_may_be_asked_back(
    examples: LocalCluster, kube: Kube, chat: Caller, pipeline: Caller, steady: str
) -> None:
    """Batch replicas fill the spare GPUs and borrow beyond; the pods and the picker say which do."""
    await pin(kube, batch=6)
    pods = await eventually(lambda: ready(kube, "batch"), until=lambda found: len(found) == 6)
    pods = await eventually(
        lambda: ready(kube, "batch"), until=lambda found: {standing(p) for p in found} == {"spare", "lent"}
    )
    assert {standing(p) for p in await pods_of(kube, "interactive")} == {"reserved"}
    lent = {p["status"]["podIP"] for p in pods if standing(p) == "lent"}

    async def known() -> bool:
        found = await endpoints(examples)
        told = {e["address"].rpartition(":")[0] for e in found if e["lent"]}
        return told == lent and sum(e["ready"] for e in found) == 8

    await eventually(known)

    async def stream() -> bool:
        async with chat.stream(steady, tokens=round(3 / STEP_S)) as lines:
            return [line async for line in lines][-1] == "[DONE]"

    streams = [asyncio.create_task(stream()) for _ in range(60)]
    used: set[str] = set()
    while not all(s.done() for s in streams):
        used |= {e["address"].rpartition(":")[0] for e in await endpoints(examples) if e["requests"]}
        await asyncio.sleep(0.1)
    assert all(s.result() for s in streams)
    assert len(used) >= 3, "spare batch replicas serve streams too"
    assert not used & lent

    whole = [asyncio.create_task(pipeline.chat(steady, tokens=round(2 / STEP_S))) for _ in range(90)]
    await eventually(
        lambda: endpoints(examples), until=lambda found: any(e["lent"] and e["requests"] for e in found)
    )
    assert {a.status_code for a in await asyncio.gather(*whole)} == {200}


async def test_a_lane_that_shrinks_waits_for_a_stream(
    examples: LocalCluster, kube: Kube, chat: Caller, steady: str
) -> None:
    """Both replicas stream for 20 s when one is not wanted any more; both streams come to their end."""
    tokens = round(20 / STEP_S)

    async def stream() -> int:
        # So long a prompt would wait behind the other for more than a part of its objective: one each.
        async with chat.stream(steady, tokens=tokens, prompt="word " * 3600) as lines:
            events = [line async for line in lines]
        assert events[-1] == "[DONE]"
        deltas = [json.loads(e)["choices"][0]["delta"] for e in events[:-1]]
        return sum(bool(d.get("content")) for d in deltas)

    streams = [asyncio.create_task(stream()) for _ in range(2)]
    await eventually(lambda: endpoints(examples), until=lambda found: all(e["requests"] for e in found))
    await pin(kube, interactive=1)
    marked = await eventually(
        lambda: endpoints(examples), until=lambda found: any(e["draining"] for e in found), within_s=15
    )
    [leaving] = [e["address"] for e in marked if e["draining"]]
    answers = await asyncio.gather(*(chat.chat(steady, tokens=5) for _ in range(8)))
    assert {a.status_code for a in answers} == {200}
    now = {e["address"]: e for e in await endpoints(examples)}
    assert now[leaving]["requests"] == 1, "nothing new goes there, and what was there goes on"
    assert not any(s.done() for s in streams)
    assert len(await ready(kube, "interactive")) == 2
    assert await asyncio.gather(*streams) == [tokens, tokens]
    gone = await eventually(
        lambda: pods_of(kube, "interactive"),
        until=lambda pods: [p for p in pods if "deletionTimestamp" not in p["metadata"]][1:] == [],
    )
    staying = [p for p in gone if "deletionTimestamp" not in p["metadata"]]
    assert [p["status"]["podIP"] for p in staying] != [leaving.rpartition(":")[0]]
    assert "tidegate.dev/draining" not in staying[0]["metadata"].get("annotations", {})
