"""From raw objects to plain values: named cases."""

from datetime import timedelta

import pytest

from tidegate.api import gpupool, modeldeployment, qosclass
from tidegate.core import reasons
from tidegate.core.plan.types import LaneKey
from tidegate.core.types import Objectives, Reclaim, TenantFrom, Tenants
from tidegate.facts import classes, lanes, pods, pools
from tidegate.facts.quantities import devices, seconds

GPU = "nvidia.com/gpu"


def raw_node(name="n0", gpus="8", ready="True", labels=None, **spec):
    return {
        "metadata": {"name": name, "labels": labels or {"pool": "h100"}},
        "spec": spec,
        "status": {"allocatable": {GPU: gpus}, "conditions": [{"type": "Ready", "status": ready}]},
    }


def raw_pool(**spec):
    return gpupool.GPUPool.from_object(
        {"metadata": {"name": "h100"}, "spec": {"nodeSelector": {"matchLabels": {"pool": "h100"}}} | spec}
    )


def container(gpus=None, field="limits", **more):
    return {"name": "c", "resources": {field: {GPU: gpus}} if gpus else {}, **more}


def raw_pod(*containers, labels=None, status=None, node="n0", init=(), **metadata):
    return {
        "metadata": {
            "name": "p", "namespace": "ns", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": labels or {}, **metadata,
        },
        "spec": {"containers": list(containers), "initContainers": list(init), "priority": 7}
        | ({"nodeName": node} if node else {}),
        "status": status or {},
    }  # fmt: skip


QUANTITIES = {"4": 4, 4: 4, "4.0": 4, "4e0": 4, "2k": 2000, "0": 0}


@pytest.mark.parametrize(("text", "count"), QUANTITIES.items(), ids=map(str, QUANTITIES))
def test_devices(text, count):
    assert devices(text) == count


def test_seconds():
    assert seconds("1970-01-01T00:01:00Z") == 60.0
    assert seconds("1970-01-01T00:00:00.5Z") == 0.5
    assert seconds(None) is None


GPUS = {
    "containers add up": ([container("2"), container("1"), container()], [], 3),
    "requests alone": ([container("2", "requests")], [], 2),
    "an init container that needs more": ([container("2")], [container("4")], 4),
    "an init container that needs less": ([container("2")], [container("1")], 2),
    "a sidecar runs beside": ([container("2")], [container("1", restartPolicy="Always")], 3),
    "an init container beside a sidecar before it": (
        [container("1")], [container("1", restartPolicy="Always"), container("4")], 5,
    ),
    "none": ([container()], [], 0),
}  # fmt: skip


@pytest.mark.parametrize(("containers", "init", "count"), GPUS.values(), ids=GPUS)
def test_gpus_of_a_pod(containers, init, count):
    raw = raw_pod(*containers, init=init)
    assert pods.gpus(raw["spec"]) == count
    assert (pods.pod(raw, {}, {}) is None) == (count == 0)


def test_a_lanes_pod():
    labels = {"tidegate.dev/model": "llama", "tidegate.dev/qos-class": "batch"}
    status = {
        "phase": "Running",
        "conditions": [
            {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T00:00:02Z"},
            {"type": "Ready", "status": "True"},
        ],
    }
    got = pods.pod(
        raw_pod(container("2"), labels=labels, status=status), {"batch"}, {("ns", "llama", "batch"): 3}
    )
    assert got is not None
    assert got.lane == LaneKey("ns", "llama", "batch")
    assert (got.gpus, got.node, got.ready, got.terminating, got.lane_minimum) == (2, "n0", True, False, 3)
    assert (got.created_s, got.started_s, got.priority) == (1767225600.0, 1767225602.0, 7)


PODS = {
    "ended well": (raw_pod(container("1"), status={"phase": "Succeeded"}), None),
    "failed": (raw_pod(container("1"), status={"phase": "Failed"}), None),
    "pending": (raw_pod(container("1"), node=None), (None, None, False)),
    "going": (raw_pod(container("1"), deletionTimestamp="2026-01-01T00:00:00Z"), ("n0", None, True)),
    "a class that does not exist": (
        raw_pod(container("1"), labels={"tidegate.dev/qos-class": "gone"}), ("n0", None, False),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "expected"), PODS.values(), ids=PODS)
def test_other_pods(raw, expected):
    got = pods.pod(raw, {"batch"}, {})
    assert (got and (got.node, got.qos_class, got.terminating)) == expected


NODES = {
    "ready": (raw_node(), 8),
    "not Ready": (raw_node(ready="False"), 0),
    "unknown": (raw_node(ready="Unknown"), 0),
    "cordoned": (raw_node(unschedulable=True), 0),
    "no GPUs": (
        {"metadata": {"name": "n"}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}},
        0,
    ),
    "just made": ({"metadata": {"name": "n"}}, 0),
}


@pytest.mark.parametrize(("raw", "gpus"), NODES.values(), ids=NODES)
def test_nodes(raw, gpus):
    assert pools.node(raw).gpus == gpus


def test_the_domain_of_a_node():
    raw = raw_node(labels={"rack": "r1"})
    assert pools.node(raw, GPU, "rack").domain == "r1"
    assert pools.node(raw, GPU, "zone").domain == ""


def test_a_pool():
    obj = raw_pool(
        mode="Observe",
        reclaim={"drainTimeout": "5s"},
        reservations=[
            {"name": "chat", "qosClass": "interactive", "gpus": 4, "maxLend": 2},
            {"name": "third", "qosClass": "standard", "sharePercent": 33,
             "namespaces": {"matchLabels": {"t": "a"}}},
            {"name": "all", "qosClass": "batch", "gpus": 0, "maxBorrow": 4, "namespaces": {}},
        ],
    )  # fmt: skip
    nodes = [
        raw_node("n1"),
        raw_node("n0"),
        raw_node("n2", ready="False"),
        raw_node("x", labels={"pool": "no"}),
    ]
    got = pools.pool(obj, nodes, {"team-a": {"t": "a"}, "team-b": {"t": "b"}})
    assert [(n.name, n.gpus) for n in got.nodes] == [("n0", 8), ("n1", 8), ("n2", 0)]
    assert (got.capacity, got.enforce, got.drain_timeout_s) == (16, False, 5.0)
    chat, third, everyone = got.reservations
    assert (chat.gpus, chat.max_lend, chat.namespaces) == (4, 2, None)
    assert (third.gpus, third.namespaces) == (5, frozenset({"team-a"})), "33% of 16 is 5.28, rounded down"
    assert (everyone.gpus, everyone.max_borrow, everyone.namespaces) == (0, 4, None)
    assert pools.problem(got) is None


def test_reservations_above_the_pool_are_told_with_the_numbers():
    obj = raw_pool(
        reservations=[{"name": "a", "qosClass": "x", "gpus": 6}, {"name": "b", "qosClass": "y", "gpus": 4}]
    )
    assert pools.problem(pools.pool(obj, [raw_node()], {})) == (
        reasons.RESERVATIONS_EXCEED_POOL,
        (
            "spec.reservations ask for 10 GPUs together (a 6, b 4); the pool's 1 schedulable nodes have 8."
            " Lower them by 2 or add nodes"
        ),
    )


def test_a_class():
    obj = qosclass.QoSClass.from_object({
        "metadata": {"name": "gold"},
        "spec": {
            "priority": 10, "reclaim": "AboveMinimum", "minRuntime": "2m",
            "objectives": {"timeToFirstToken": "1s", "perThousandPromptTokens": "100ms",
                           "attainmentPercent": 95},
            "queue": {"maxRequests": 5, "maxWait": "1500ms"},
            "tenant": {"from": "Header", "header": "X-Team", "weights": {"red": 3}},
            "minimumSharePercent": 5,
        },
    })  # fmt: skip
    got = classes.qos_class(obj)
    assert (got.name, got.priority, got.reclaim, got.min_runtime_s) == (
        "gold",
        10,
        Reclaim.ABOVE_MINIMUM,
        120.0,
    )
    assert got.objectives == Objectives(1.0, 0.1, None, None, 0.95, timedelta(days=30).total_seconds())
    assert (got.queue_max_requests, got.queue_max_wait_s) == (5, 1.5)
    assert got.tenants == Tenants(TenantFrom.HEADER, "x-team", {"red": 3})
    assert got.minimum_share == 0.05


def deployment(**spec):
    base = {"model": {"name": "m", "uri": "hf://o/m"}, "engine": {"type": "vLLM"}}
    return modeldeployment.ModelDeployment.from_object(
        {"metadata": {"name": "llama", "namespace": "ns"}, "spec": base | spec}
    )


def test_a_model_and_its_lanes():
    obj = deployment(
        parallelism={"tensor": 2, "pipeline": 2},
        classes=[
            {
                "qosClass": "interactive",
                "minReplicas": 1,
                "maxReplicas": 3,
                "objectives": {"completion": "9s"},
            },
            {"qosClass": "batch"},
        ],
        maxReplicas=5,
        scaling={"scaleDownDelay": "10s", "scaleToZeroAfter": "30s", "replicas": {"batch": 2}},
    )
    key = LaneKey("ns", "llama", "interactive")
    workloads = {key: {"spec": {"replicas": 2}, "status": {"readyReplicas": 1}}}
    gold = qosclass.QoSClass.from_object(
        {
            "metadata": {"name": "interactive"},
            "spec": {"priority": 1, "objectives": {"timeToFirstToken": "1s"}},
        }
    )
    got = lanes.model(obj, "h100", None, workloads, {"interactive": gold})
    first, second = got.lanes
    assert (got.pool, got.max_replicas, got.scale_down_delay_s, got.scale_to_zero_after_s) == (
        "h100",
        5,
        10.0,
        30.0,
    )
    assert (first.key, first.gpus, first.min_replicas, first.max_replicas) == (key, 4, 1, 3)
    assert (first.replicas, first.ready, first.pinned) == (2, 1, None)
    assert first.objectives is not None
    assert (first.objectives.ttft_s, first.objectives.completion_s) == (1.0, 9.0)
    assert (second.replicas, second.ready, second.pinned, second.max_replicas) == (0, 0, 2, None)
    assert lanes.minimums([got]) == {key: 1, LaneKey("ns", "llama", "batch"): 0}


def test_a_deployment_without_replicas_has_one():
    key = LaneKey("ns", "llama", "batch")
    got = lanes.model(deployment(classes=[{"qosClass": "batch"}]), "p", None, {key: {"spec": {}}})
    assert got.lanes[0].replicas == 1


def test_without_classes_the_default_one_is_served():
    assert [x.key.qos_class for x in lanes.model(deployment(), "p", "standard", {}).lanes] == ["standard"]
    assert lanes.model(deployment(), "p", None, {}).lanes == ()
    assert lanes.served(deployment(), None) == ()


POOLS = {
    "named": ([{"name": "a"}], ["a", "b"], "a", None),
    "the only one": ([], ["a"], "a", None),
    "named and missing": (
        [{"name": "c"}], ["b", "a"], "c", "spec.poolRefs[0]: GPUPool c does not exist; there are: a, b",
    ),
    "several and none named": (
        [], ["b", "a"], "",
        ("spec.poolRefs is empty, and there is not exactly one GPUPool to take (there are: a, b);"
        " name one in spec.poolRefs"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("refs", "there", "name", "message"), POOLS.values(), ids=POOLS)
def test_pool_of_a_model(refs, there, name, message):
    got, problem = lanes.pool_of(deployment(poolRefs=refs), there)
    assert (got, problem and problem[1]) == (name, message)
    assert problem is None or problem[0] == reasons.POOL_NOT_FOUND
