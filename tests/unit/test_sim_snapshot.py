"""Snapshots: what is seen of a cluster becomes a scenario, and what is not seen is said."""

from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from support import builders
from tidegate.adapters.metrics import Sample
from tidegate.api.gpupool import GPUPool
from tidegate.api.modeldeployment import ModelDeployment
from tidegate.api.qosclass import QoSClass
from tidegate.sim import build
from tidegate.sim.cluster.build import cluster
from tidegate.sim.scenario import Scenario
from tidegate.sim.snapshot import NothingToSimulateError, Seen, Traffic, document, together, traffic

Raw = dict[str, Any]
CHAT, BATCH = ("default", "m", "chat"), ("default", "m", "batch")


def a_class(name: str, priority: int, **spec: Any) -> QoSClass:
    raw = builders.named(name, builders.qos(**{"priority": priority, **spec}))
    return QoSClass.from_object(raw)


def classes() -> list[QoSClass]:
    tenant = {"from": "User", "weights": {"alice": 3}}
    return [
        a_class("batch", 0, reclaim="Always", objectives={"completion": "24h"}, allowedNamespaces={}),
        a_class("chat", 9, objectives={"timeToFirstToken": "1s"}, tenant=tenant),
    ]


def model(*args: str, **spec: Any) -> ModelDeployment:
    lanes = [{"qosClass": "batch"}, {"qosClass": "chat"}]
    engine = {"type": "vLLM", "args": list(args)} if args else {"type": "vLLM"}
    return ModelDeployment.from_object(builders.mdep(**{"engine": engine, "classes": lanes, **spec}))


def a_pod(number: int, lane: str = "chat", *, ready: bool = True, slots: str = "32", **notes: str) -> Raw:
    return {
        "metadata": {
            "name": f"p{number}",
            "namespace": "default",
            "uid": f"u{number}",
            "labels": {"tidegate.dev/model": "m", "tidegate.dev/qos-class": lane},
            "annotations": {"tidegate.dev/slots": slots, **notes},
        },
        "spec": {"containers": [{"name": "engine", "ports": [{"name": "http", "containerPort": 8000}]}]},
        "status": {
            "phase": "Running",
            "podIP": f"10.0.0.{number}",
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


ARGS = ("--max-num-batched-tokens=1024", "--block_size", "32", "--num-gpu-blocks-override=5000")
FLOWS = {CHAT: Traffic(3.0, 400.0, 120.0), BATCH: Traffic(2.0, 3000.0, 200.0, queued=40, in_flight=60)}


def seen(**changes: Any) -> Seen:
    base: dict[str, Any] = {
        "classes": classes(),
        "models": [model(*ARGS)],
        "pods": [a_pod(1), a_pod(2), a_pod(3, "batch")],
        "traffic": FLOWS,
        "window_s": 10.0,
    }
    return Seen(**(base | changes))


def notes(found: Mapping[str, Any]) -> str:
    return "\n".join(found["notes"])


def test_lanes_engines_and_arrivals_as_they_are() -> None:
    found = document(seen())
    assert [(g["lane"], g["count"]) for g in found["replicas"]] == [("chat", 2), ("batch", 1)]
    assert found["engine"] == {
        "max-num-seqs": 32,
        "max-num-batched-tokens": 1024,
        "block-size": 32,
        "num-gpu-blocks": 5000,
    }
    chat, batch = found["streams"]
    assert (chat["class"], chat["arrivals"]) == ("chat", {"poisson": {"perSecond": 3.0}})
    assert chat["lengths"] == {"trace": "chat", "meanPrompt": 400.0, "meanOutput": 120.0}
    assert (batch["class"], batch["outstanding"], "arrivals" in batch) == ("batch", 100, False)
    assert batch["lengths"]["trace"] == "summaries"
    assert "40 requests waiting all the time" in notes(found)


def test_what_it_writes_can_be_simulated() -> None:
    found = orjson.loads(orjson.dumps(document(seen())))
    setting = build.setting(Scenario.read(found))
    assert [r.address for r in setting.replicas] == ["m-chat-0", "m-chat-1", "m-batch-0"]
    assert setting.classes["chat"].objectives.ttft_s == 1.0


def test_a_pool_with_nodes_is_planned() -> None:
    """And engines of one model, which the plan moves between lanes, are alike."""
    node = {
        "metadata": {"name": "n", "labels": {"gpu": "yes"}},
        "spec": {},
        "status": {
            "allocatable": {"nvidia.com/gpu": "8"},
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }
    pools = [GPUPool.from_object(builders.pool())]
    pods = [a_pod(1), a_pod(2, slots="8", lane="batch")]
    found = orjson.loads(orjson.dumps(document(seen(pools=pools, nodes=[node], pods=pods))))
    assert "engines of its lanes differ" in notes(found)
    scenario = Scenario.read(found)
    spec = cluster(scenario, build.setting(scenario))
    assert spec is not None
    assert spec.capacity == 8
    assert [(x.key.qos_class, x.replicas) for m in spec.models for x in m.lanes] == [
        ("batch", 1),
        ("chat", 1),
    ]


def test_no_tenant_nor_namespace_selector_is_written() -> None:
    found = document(seen())
    text = orjson.dumps(found).decode()
    assert "alice" not in text
    assert "allowedNamespaces" not in text
    assert "class chat is shared by tenants" in notes(found)


def test_lanes_with_other_engines_say_so() -> None:
    pods = [a_pod(1), a_pod(2, slots="8", lane="batch")]
    found = document(seen(pods=pods, kv_tokens={"10.0.0.1:8000": 64_000}))
    assert [g.get("engine", {}).get("max-num-seqs") for g in found["replicas"]] == [None, 8]


def test_the_cache_is_what_the_engine_said() -> None:
    found = document(seen(models=[model()], kv_tokens={"10.0.0.1:8000": 64_000}, pods=[a_pod(1)]))
    assert found["engine"]["num-gpu-blocks"] == 4000
    assert "max-num-batched-tokens is not set; 2048 is assumed" in notes(found)
    assert "KV cache" not in notes(found)


MISSING = {
    "no picker": ({"traffic": None}, "no picker could be asked: arrivals are 1 request/s for each replica"),
    "nothing came": ({"traffic": {}}, "nothing came while pickers were watched: arrivals are 1 request/s"),
    "no size of the cache": ({"models": [model()]}, "its KV cache is not known; 25001 blocks are assumed"),
    "not ready": ({"pods": [a_pod(1), a_pod(2, ready=False)]}, "1 pods are left out: they are not ready"),
    "draining": (
        {"pods": [a_pod(1), a_pod(2, **{"tidegate.dev/draining": "2026-01-01T00:00:00Z"})]},
        "1 pods are left out",
    ),
    "a profile": ({"models": [model(*ARGS, profileRef={"name": "p"})]}, "set stepTime to a copy of it"),
    "own objectives": (
        {"models": [model(*ARGS, classes=[{"qosClass": "chat", "objectives": {"completion": "9s"}}])]},
        "m overrides objectives of its classes",
    ),
    "no replica of another": (
        {"traffic": FLOWS | {("default", "gone", "chat"): Traffic(1.0)}},
        "requests for gone are left out: no replica of it serves",
    ),
    "how fast": ({}, "nothing here says how fast these engines are"),
}


@pytest.mark.parametrize(("changes", "note"), MISSING.values(), ids=MISSING)
def test_what_is_assumed_is_noted(changes: dict[str, Any], note: str) -> None:
    found = document(seen(**changes))
    assert note in notes(found)
    build.setting(Scenario.read(found))


def test_without_pods_the_status_tells_the_replicas() -> None:
    raw = builders.mdep(classes=[{"qosClass": "chat"}, {"qosClass": "batch"}])
    raw["status"] = {"classes": [{"qosClass": "chat", "ready": 4}]}
    found = document(seen(models=[ModelDeployment.from_object(raw)], pods=None))
    assert found["replicas"] == [{"model": "m", "lane": "chat", "count": 4}]
    assert "pods could not be listed" in notes(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"classes": []}, "no QoSClass"), ({"pods": []}, "no replica of 1 ModelDeployments serves")],
    ids=["no class", "no replica"],
)
def test_an_empty_cluster_is_no_scenario(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(NothingToSimulateError, match=message):
        document(seen(**changes))


def test_gpus_of_pools_are_noted() -> None:
    raw = builders.pool()
    raw["status"] = {"capacity": 16, "allocated": 6, "foreign": 1}
    pool = GPUPool.from_object(raw)
    assert "pool p: 16 GPUs, 9 of them idle" in notes(document(seen(pools=[pool])))
    assert "pool p: 16 GPUs, 7 of them idle" in notes(document(seen(pools=[pool], idle_gpus={"p": 7.0})))


# ── what pickers say ────────────────────────────────────────────────────────────────────────────


def samples(arrivals: float, queued: float) -> list[Sample]:
    labels = {"namespace": "default", "model": "m", "qos_class": "batch"}
    return [
        Sample("tidegate_arrivals_total", labels, arrivals),
        Sample("tidegate_prompt_tokens_total", labels, 100 * arrivals),
        Sample("tidegate_output_tokens_total", labels, 10 * arrivals),
        Sample("tidegate_queue_requests", labels, queued),
        Sample("tidegate_inflight_requests", labels | {"lane": "batch"}, 3),
        Sample("tidegate_inflight_requests", labels | {"lane": "chat"}, 2),
        Sample("tidegate_requests_total", {"outcome": "answered"}, 5),
    ]


def test_rates_between_two_looks() -> None:
    found = traffic(samples(20, 9), samples(50, 4), 10.0)
    assert found == {BATCH: Traffic(3.0, 100.0, 10.0, queued=4, in_flight=5)}


def test_a_counter_that_fell_began_again() -> None:
    assert traffic(samples(50, 0), samples(20, 0), 10.0)[BATCH].per_second == 2.0


def test_pickers_add_up() -> None:
    found = together([{BATCH: Traffic(3.0, 100.0, 10.0, 1, 2)}, {BATCH: Traffic(1.0, 200.0, None, 4, 8)}])
    assert found[BATCH].per_second == 4.0
    assert found[BATCH].prompt == pytest.approx(125.0)
    assert found[BATCH].output == pytest.approx(10.0)
    assert (found[BATCH].queued, found[BATCH].in_flight) == (5, 10)
