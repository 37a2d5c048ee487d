"""The extender's protocol, its memory, and what it does with events; no API server."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson
import pytest
from aiohttp.test_utils import TestClient, TestServer

from tidegate.adapters.kube import kinds
from tidegate.api.names import ANNOTATION_DEFAULT_CLASS, API_VERSION, LABEL_CLASS, LABEL_POOL, SCHEDULER_NAME
from tidegate.core.place import ASSUME_S
from tidegate.extender.desk import Desk
from tidegate.extender.gather import Cluster
from tidegate.extender.metrics import Metrics
from tidegate.extender.server import application

GPU = "nvidia.com/gpu"
Raw = dict[str, Any]


def node(name: str, gpus: int = 4) -> Raw:
    ready = [{"type": "Ready", "status": "True"}]
    return {
        "metadata": {"name": name, "labels": {"gpu": "yes"}},
        "spec": {},
        "status": {"allocatable": {GPU: str(gpus)}, "conditions": ready},
    }


def pod(name: str, qos: str | None, gpus: int = 1, on: str | None = None, **meta: Any) -> Raw:
    labels = {LABEL_POOL: "p"} | ({LABEL_CLASS: qos} if qos else {})
    spec: Raw = {"containers": [{"resources": {"limits": {GPU: str(gpus)}}}], "schedulerName": SCHEDULER_NAME}
    if on:
        spec["nodeName"] = on
    stamp = "2026-01-01T00:00:00Z"
    bound = {"type": "PodScheduled", "status": "True", "lastTransitionTime": stamp}
    return {
        "metadata": {
            "name": name,
            "namespace": "ns",
            "uid": f"uid-{name}",
            "creationTimestamp": stamp,
            "labels": labels,
            **meta,
        },
        "spec": spec,
        "status": {"conditions": [bound]} if on else {},
    }


def qos(name: str, priority: int, reclaim: str) -> Raw:
    spec = {"priority": priority, "reclaim": reclaim}
    return {
        "apiVersion": API_VERSION,
        "kind": "QoSClass",
        "metadata": {"name": name},
        "spec": spec,
    }


def gpu_pool(gold: int, mode: str = "Enforce") -> Raw:
    spec = {
        "mode": mode,
        "nodeSelector": {"matchLabels": {"gpu": "yes"}},
        "reservations": [{"name": "chat", "qosClass": "gold", "gpus": gold}],
    }
    return {"apiVersion": API_VERSION, "kind": "GPUPool", "metadata": {"name": "p"}, "spec": spec}


class Setting:
    """A desk over a small pool, with a clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now, self.woken, self.ready = 2e9, [], True
        self.cluster, self.metrics = Cluster(), Metrics()
        self.desk = Desk(self.cluster, self.metrics, lambda: self.now, self.woken.append)
        for obj in (qos("gold", 1000, "Never"), qos("bulk", 0, "Always"), qos("silver", 500, "Never")):
            self.cluster.see(kinds.QOS_CLASS, "ADDED", obj)
        self.cluster.see(kinds.GPU_POOL, "ADDED", gpu_pool(4))
        for name in ("a", "b"):
            self.cluster.see(kinds.NODE, "ADDED", node(name))
        self.client = TestClient(TestServer(application(self.desk, self.metrics, lambda: self.ready)))

    def seen(self, raw: Raw, event: str = "ADDED") -> None:
        self.cluster.see(kinds.POD, event, raw)

    async def filter(self, raw: Raw, *nodes: str) -> Raw:
        self.seen(raw)
        answer = await self.client.post("/filter", json={"Pod": raw, "NodeNames": list(nodes or ("a", "b"))})
        assert answer.status == 200
        return dict(orjson.loads(await answer.read()))

    async def preempt(self, raw: Raw, **proposed: list[str]) -> Raw:
        victims = {n: {"Pods": [{"UID": u} for u in v], "NumPDBViolations": 0} for n, v in proposed.items()}
        body = {"Pod": raw, "NodeNameToVictims": None, "NodeNameToMetaVictims": victims}
        answer = await self.client.post("/preempt", json=body)
        assert answer.status == 200
        return dict(orjson.loads(await answer.read())["NodeNameToMetaVictims"])


@pytest.fixture
async def s() -> AsyncIterator[Setting]:
    made = Setting()
    await made.client.start_server()
    yield made
    await made.client.close()


async def test_a_burst_does_not_spend_the_same_gpus_twice(s: Setting) -> None:
    placed = [(await s.filter(pod(f"s{i}", "silver")))["NodeNames"] for i in range(6)]
    assert [len(p) for p in placed] == [1, 1, 1, 1, 0, 0]
    assert len({p[0] for p in placed[:4]}) == 1, "packed"
    refused = await s.filter(pod("s9", "silver"))
    assert set(refused["FailedNodes"]) == {"a", "b"}
    assert "class gold has 4 GPUs reserved (chat)" in " ".join(refused["FailedNodes"].values())


async def test_what_was_assumed_and_never_seen_ends_and_wakes_those_refused(s: Setting) -> None:
    for i in range(5):
        await s.filter(pod(f"s{i}", "silver"))
    s.now += ASSUME_S + 1
    s.desk.tick()
    assert s.woken == ["uid-s4"]
    assert len((await s.filter(pod("s4", "silver")))["NodeNames"]) == 1


async def test_a_pod_that_comes_back_is_offered_another_node(s: Setting) -> None:
    first = (await s.filter(pod("g", "gold")))["NodeNames"]
    second = (await s.filter(pod("g", "gold")))["NodeNames"]
    assert {*first, *second} == {"a", "b"}


async def test_an_owner_gets_a_grant_and_filter_accepts_it(s: Setting) -> None:
    for i in range(8):
        s.seen(pod(f"b{i}", "bulk", on="ab"[i // 4]))
    owner = pod("g", "gold", 2)
    s.seen(owner)
    granted = await s.preempt(owner, a=["uid-b0", "uid-b1"], b=["uid-b4", "uid-b5"])
    assert granted == {"b": {"Pods": [{"UID": "uid-b4"}, {"UID": "uid-b5"}], "NumPDBViolations": 0}}
    for i in (4, 5):
        s.seen(pod(f"b{i}", "bulk", on="b"), "DELETED")
    assert (await s.filter(pod("late", "bulk"), "b"))["NodeNames"] == []
    assert (await s.filter(owner, "b"))["NodeNames"] == ["b"]


async def test_settings_made_anew_keep_promises(s: Setting) -> None:
    await s.filter(pod("s0", "silver", 4))
    s.cluster.see(kinds.GPU_POOL, "MODIFIED", gpu_pool(2))
    assert list(s.cluster.view("p").assumed) == ["uid-s0"]
    assert (await s.filter(pod("s1", "silver", 4)))["NodeNames"] == []


async def test_a_model_without_classes_gives_the_default_class_its_block_size(s: Setting) -> None:
    spec = {
        "model": {"name": "m", "uri": "hf://a/m"},
        "engine": {"type": "vLLM"},
        "parallelism": {"tensor": 4},
    }
    meta = {"name": "m", "namespace": "ns"}
    model = {"apiVersion": API_VERSION, "kind": "ModelDeployment", "metadata": meta, "spec": spec}
    s.cluster.see(kinds.MODEL_DEPLOYMENT, "ADDED", model)
    await s.filter(pod("s0", "silver"), "a")
    # Until there is a default class, gold's four GPUs may be any four.
    assert (await s.filter(pod("s1", "silver"), "b"))["NodeNames"] == ["b"]
    s.cluster.see(kinds.POD, "DELETED", pod("s1", "silver"))
    gold = qos("gold", 1000, "Never")
    gold["metadata"]["annotations"] = {ANNOTATION_DEFAULT_CLASS: "true"}
    s.cluster.see(kinds.QOS_CLASS, "MODIFIED", gold)
    refused = await s.filter(pod("s2", "silver"), "b")
    assert refused["NodeNames"] == []
    assert "class gold has 4 GPUs reserved" in refused["FailedNodes"]["b"]


@pytest.mark.parametrize(
    ("change", "raw"),
    [
        pytest.param(lambda s: s.cluster.see(kinds.GPU_POOL, "MODIFIED", gpu_pool(8, "Observe")),
                     pod("x", "silver"), id="the pool observes"),
        pytest.param(lambda _s: None, pod("x", None), id="no class"),
        pytest.param(lambda s: s.cluster.see(kinds.GPU_POOL, "DELETED", gpu_pool(4)), pod("x", "silver"),
                     id="no pool"),
    ],
)  # fmt: skip
async def test_what_is_not_ours_passes(s: Setting, change: Callable[[Setting], None], raw: Raw) -> None:
    s.cluster.see(kinds.GPU_POOL, "MODIFIED", gpu_pool(8))
    change(s)
    assert (await s.filter(raw))["NodeNames"] == ["a", "b"]
    assert list(await s.preempt(raw, a=["uid-y"], b=[])) == ["a"]


async def test_a_class_that_does_not_exist_is_named(s: Setting) -> None:
    answer = await s.filter(pod("x", "ghost"))
    assert "QoSClass ghost" in answer["FailedAndUnresolvableNodes"]["a"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/filter", b"{", "not JSON"),
        ("/filter", b"[]", "must be a JSON object, not list"),
        ("/filter", b'{"NodeNames": ["a"]}', "Pod must be an object"),
        (
            "/filter",
            b'{"Pod": {"metadata": {"uid": "u", "name": "n"}, "spec": {}}}',
            "nodeCacheCapable: true",
        ),
        (
            "/filter",
            b'{"Pod": {"metadata": {}, "spec": {}}, "NodeNames": []}',
            "metadata.uid must be a string",
        ),
        ("/preempt", b'{"NodeNameToVictims": {}}', "nodeCacheCapable: true"),
        ("/preempt", b'{"NodeNameToMetaVictims": {"a": {"Pods": [{}]}}}', "each node needs Pods"),
    ],
)
async def test_what_cannot_be_read_is_400(s: Setting, path: str, body: bytes, message: str) -> None:
    answer = await s.client.post(path, data=body)
    assert answer.status == 400
    assert message in await answer.text()


async def test_not_ready_until_the_copies_are_whole(s: Setting) -> None:
    s.ready = False
    assert (await s.client.get("/readyz")).status == 503
    assert (await s.client.post("/filter", json={})).status == 503
    assert (await s.client.get("/healthz")).status == 200
    s.ready = True
    assert (await s.client.get("/readyz")).status == 200


async def test_decisions_are_counted_by_reason(s: Setting) -> None:
    await s.filter(pod("s0", "silver"))
    await s.filter(pod("s1", "silver", 8))
    text = await (await s.client.get("/metrics")).text()
    assert 'tidegate_extender_decisions_total{reason="Placed",verb="filter"} 1.0' in text
    assert 'reason="NoFreeBlock",verb="filter"} 1.0' in text


async def test_a_lack_of_claim_is_told_once_a_minute(s: Setting, caplog: pytest.LogCaptureFixture) -> None:
    s.seen(pod("b1", "bulk", 4, on="n1"))
    waiting = pod("g1", "silver", 4)
    with caplog.at_level("INFO", logger="tidegate.extender.desk"):
        for _ in range(3):
            await s.preempt(waiting, n1=["uid-b1"])
            s.now += 10.0
        told = [r for r in caplog.records if "NoClaim" in r.getMessage()]
        assert len(told) == 1
        s.now += 60.0
        await s.preempt(waiting, n1=["uid-b1"])
    assert len([r for r in caplog.records if "NoClaim" in r.getMessage()]) == 2
