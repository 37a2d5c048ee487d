"""The examples, applied with kubectl, served through Envoy by every part together."""

import asyncio
import json
import time
from typing import Any

import httpx
import pytest

from support.chat import Caller, body
from support.wait import eventually
from tidegate.adapters.kube import Kube, kinds
from tidegate.local.cluster import LocalCluster


async def model(kube: Kube, namespace: str, name: str) -> dict[str, Any]:
    return await kube.get(kinds.MODEL_DEPLOYMENT, name, namespace)


def condition(obj: dict[str, Any], kind: str) -> dict[str, Any]:
    found = obj.get("status", {}).get("conditions", [])
    return next((c for c in found if c["type"] == kind), {})


async def test_every_model_is_ready_and_says_so(examples: LocalCluster, kube: Kube) -> None:
    for namespace, name in (("team-a", "chat-8b"), ("team-b", "code-8b")):
        obj = await model(kube, namespace, name)
        assert condition(obj, "Ready")["status"] == "True"
        assert condition(obj, "Ready")["observedGeneration"] == obj["metadata"]["generation"]
    table = examples.kubectl("get", "tidegate", "-A").stdout
    assert "chat-8b" in table
    assert "interactive" in table
    assert "gpus" in table


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_a_request_is_answered(chat: Caller, streamed: bool) -> None:
    if streamed:
        async with chat.stream("chat-8b", tokens=20) as lines:
            events = [line async for line in lines]
        assert events[-1] == "[DONE]"
        contents = [json.loads(e)["choices"][0]["delta"].get("content") for e in events[:-1]]
        assert sum(1 for c in contents if c) == 20
    else:
        answer = await chat.chat("chat-8b", tokens=20)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 20


async def test_the_models_are_listed(chat: Caller) -> None:
    answer = await chat.client.get("/v1/models", headers=chat.headers)
    assert answer.status_code == 200
    assert {"chat-8b", "code-8b"} <= {m["id"] for m in answer.json()["data"]}


async def test_a_higher_class_uses_a_lane_of_a_lower_one(chat: Caller) -> None:
    """code-8b has no interactive replica at rest; its standard one serves interactive at once."""
    assert (await chat.chat("code-8b")).status_code == 200


BAD = {
    "unknown model": ({"json": body("no-such-model")}, 404, "no-such-model"),
    "not JSON": ({"content": b"{not json"}, 400, "JSON"),
    "no model": ({"json": {"messages": []}}, 400, "model"),
}


@pytest.mark.parametrize(("request_", "status", "message"), BAD.values(), ids=BAD)
async def test_bad_requests_are_refused_in_the_protocols_shape(
    chat: Caller, request_: dict[str, Any], status: int, message: str
) -> None:
    answer = await chat.client.post("/v1/chat/completions", headers=chat.headers, **request_)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert {"message", "type", "code"} <= set(error)


async def test_who_may_not_use_a_class(gateway: httpx.AsyncClient, pipeline: Caller) -> None:
    forged = await Caller(gateway, "not-a-token").chat("chat-8b")
    assert forged.status_code == 401
    nobody = await Caller(gateway, None).chat("chat-8b")
    assert nobody.status_code == 403
    raised = await pipeline.chat("chat-8b", headers={"x-tidegate-qos": "interactive"})
    assert raised.status_code == 403
    assert "interactive" in raised.json()["error"]["message"]
    own = await pipeline.chat("chat-8b", headers={"x-tidegate-qos": "batch"})
    assert own.status_code == 200


async def test_batch_borrows_idle_gpus_and_gives_them_back(
    examples: LocalCluster, gateway: httpx.AsyncClient, chat: Caller, pipeline: Caller, kube: Kube
) -> None:
    """Backlog makes batch replicas on reserved GPUs; a pinned interactive lane takes them back."""
    stop = asyncio.Event()

    async def keep_busy() -> None:
        while not stop.is_set():
            answer = await pipeline.chat("chat-8b", tokens=250, prompt="a long document " * 700)
            assert answer.status_code in {200, 429, 503}, answer.text

    async def decisions() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (
            await gateway.get(f"{examples.url('controller')}/debug/decisions")
        ).json()
        return [d for d in found if d["time"] >= started]

    async def kinds_of_decisions() -> set[str]:
        return {d["kind"] for d in await decisions()}

    async def allocated() -> int:
        return int((await kube.get(kinds.GPU_POOL, "gpus"))["status"]["allocated"])

    started = time.time()
    clients = [asyncio.create_task(keep_busy()) for _ in range(128)]
    pin = {"spec": {"scaling": {"replicas": {"interactive": 4}}}}
    try:
        await eventually(kinds_of_decisions, until=lambda seen: "borrow" in seen, within_s=60)
        await eventually(allocated, until=lambda gpus: gpus == 16, within_s=60)
        await kube.merge(kinds.MODEL_DEPLOYMENT, "chat-8b", pin, "team-a")
        await eventually(kinds_of_decisions, until=lambda seen: "reclaim" in seen, within_s=60)

        async def interactive_ready() -> int:
            status = (await model(kube, "team-a", "chat-8b"))["status"]
            return next(int(c["ready"]) for c in status["classes"] if c["qosClass"] == "interactive")

        await eventually(interactive_ready, until=lambda ready: ready == 4, within_s=60)
        assert (await chat.chat("chat-8b")).status_code == 200
    finally:
        stop.set()
        await asyncio.gather(*clients)
        await kube.merge(
            kinds.MODEL_DEPLOYMENT, "chat-8b", {"spec": {"scaling": {"replicas": None}}}, "team-a"
        )
    made = await decisions()
    assert {"borrow", "reclaim", "rebalance"} <= {d["kind"] for d in made}
    assert all(d["reason"] and d["message"] for d in made)


async def test_a_model_that_does_not_fit_says_how_many_gpus_are_missing(
    examples: LocalCluster, kube: Kube
) -> None:
    too_big = {
        "apiVersion": "tidegate.dev/v1alpha1",
        "kind": "ModelDeployment",
        "metadata": {"name": "too-big", "namespace": "team-a"},
        "spec": {
            "poolRefs": [{"name": "gpus"}],
            "model": {"name": "too-big", "uri": "hf://example/too-big"},
            "engine": {"type": "vLLM"},
            "parallelism": {"tensor": 8},
            "classes": [{"qosClass": "interactive", "minReplicas": 1}],
        },
    }
    await kube.create(kinds.MODEL_DEPLOYMENT, too_big)
    try:

        async def message() -> str:
            return str(condition(await model(kube, "team-a", "too-big"), "Ready").get("message", ""))

        said = await eventually(message, until=lambda m: "8 GPUs" in m)
        assert "4" in said  # the largest block that there is
    finally:
        await kube.delete(kinds.MODEL_DEPLOYMENT, "too-big", "team-a")
    children = examples.kubectl("get", "deploy,svc", "-n", "team-a", "-o", "name")
    assert "too-big" not in children.stdout or await _gone(examples)


async def _gone(cluster: LocalCluster) -> bool:
    async def names() -> str:
        return (
            await asyncio.to_thread(cluster.kubectl, "get", "deploy,svc,pod", "-n", "team-a", "-o", "name")
        ).stdout

    return bool(await eventually(names, until=lambda out: "too-big" not in out))
