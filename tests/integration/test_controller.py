"""The controller as a process of its own, under its own account, against a real API server."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from support.stage import Object, Process, Stage
from support.wait import eventually
from tidegate.adapters.kube import ApiError, Kube
from tidegate.adapters.kube import kinds as k
from tidegate.api import names
from tidegate.local.cluster import LocalCluster


@pytest.fixture(scope="module")
def controller(control_plane: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = Process(control_plane, tmp_path_factory.mktemp("controller") / "controller.log")
    process.start()
    process.wait_ready()
    yield process
    assert process.stop() == 0, process.log.read_text()[-4000:]
    assert "Traceback" not in process.log.read_text()


@pytest.fixture
async def stage(controller: Process, kube: Kube, namespace: str) -> AsyncIterator[Stage]:
    stage = Stage(kube, namespace)
    yield stage
    await stage.close()


async def absent(kube: Kube, kind: Any, name: str, namespace: str | None = None) -> bool:
    try:
        await kube.get(kind, name, namespace)
    except ApiError as error:
        return error.status == 404
    return False


async def test_a_model_becomes_lanes_a_service_and_conditions(stage: Stage, kube: Kube) -> None:
    await stage.standard()
    model = await stage.model()
    await stage.ready("llama", "Unknown", "Progressing")

    deployment = await eventually(lambda: stage.deployment(stage.high))
    pod = deployment["spec"]["template"]["spec"]
    engine = pod["containers"][0]
    assert deployment["spec"]["replicas"] == 1
    assert deployment["metadata"]["ownerReferences"][0]["uid"] == model["metadata"]["uid"]
    assert deployment["spec"]["selector"]["matchLabels"] == {
        names.LABEL_MODEL: "llama", names.LABEL_CLASS: stage.high, names.LABEL_POOL: stage.pool,
    }  # fmt: skip
    assert (pod["schedulerName"], pod["priorityClassName"]) == (
        names.SCHEDULER_NAME,
        f"tidegate-{stage.high}",
    )
    assert engine["resources"] == {"limits": {"nvidia.com/gpu": "2"}, "requests": {"nvidia.com/gpu": "2"}}
    assert (await stage.deployment(stage.low))["spec"]["replicas"] == 0
    service = await kube.get(k.SERVICE, "llama", stage.namespace)
    assert service["spec"]["selector"] == {names.LABEL_MODEL: "llama"}
    assert (await kube.get(k.PRIORITY_CLASS, f"tidegate-{stage.high}"))["value"] == 900

    pods = await eventually(lambda: _pods(kube, stage.namespace))
    assert pods[0]["spec"]["priority"] == 900
    await _make_ready(kube, pods[0])
    done = await stage.ready("llama", "True", "Ready")
    assert done["message"] == f"{stage.high} 1/1, {stage.low} 0/0 replicas ready"
    status = (await kube.get(k.MODEL_DEPLOYMENT, "llama", stage.namespace))["status"]
    assert status["replicas"] == f"{stage.high} 1/1, {stage.low} 0/0"
    assert {c["type"]: c["status"] for c in status["conditions"]} == {
        "Ready": "True", "Reconciling": "False", "Stalled": "False",
    }  # fmt: skip
    pool = (await kube.get(k.GPU_POOL, stage.pool))["status"]
    assert (pool["capacity"], pool["nodes"], pool["freeBlocks"]) == (
        4,
        1,
        [{"nodeGpus": 4, "largestFree": 4}],
    )
    assert (await kube.get(k.QOS_CLASS, stage.high))["status"]["usedBy"] == 1
    events = (await kube.list(k.EVENT, stage.namespace))[0]
    assert any(e["regarding"]["kind"] == "ModelDeployment" and e["reason"] == "Ready" for e in events)


async def _pods(kube: Kube, namespace: str) -> list[Object]:
    return (await kube.list(k.POD, namespace))[0]


async def _make_ready(kube: Kube, pod: Object) -> None:
    condition = {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    status = {"phase": "Running", "podIP": "127.0.0.1", "conditions": [condition]}
    await kube.merge(k.POD, pod["metadata"]["name"], {"status": status}, pod["metadata"]["namespace"],
                     subresource="status")  # fmt: skip


async def test_a_steady_state_writes_nothing(stage: Stage, kube: Kube, controller: Process) -> None:
    await stage.standard()
    await stage.model()
    await stage.ready("llama", "Unknown", "Progressing")
    await eventually(lambda: stage.deployment(stage.low))
    await asyncio.sleep(2)

    async def versions() -> dict[str, str]:
        found = {}
        for kind, name in ((k.QOS_CLASS, stage.high), (k.GPU_POOL, stage.pool), (k.NODE, stage.nodes[0]),
                           (k.PRIORITY_CLASS, f"tidegate-{stage.high}")):  # fmt: skip
            found[f"{kind.name} {name}"] = (await kube.get(kind, name))["metadata"]["resourceVersion"]
        for kind in (k.MODEL_DEPLOYMENT, k.DEPLOYMENT, k.SERVICE):
            for obj in (await kube.list(kind, stage.namespace))[0]:
                key = f"{kind.name} {obj['metadata']['name']}"
                found[key] = obj["metadata"]["resourceVersion"]
        return found

    before, writes = await versions(), controller.metric("tidegate_writes_total")
    await asyncio.sleep(3)
    assert await versions() == before
    assert controller.metric("tidegate_writes_total") == writes


async def test_drift_is_repaired(stage: Stage, kube: Kube) -> None:
    await stage.standard()
    await stage.model()
    lane = names.lane_name("llama", stage.high)
    before = await eventually(lambda: stage.deployment(stage.high))
    containers = [{"name": "engine", "image": "evil/image", "args": ["--port", "1"]}]
    patch = {"spec": {"replicas": 7, "template": {"spec": {"containers": containers}}}}
    await kube.merge(k.DEPLOYMENT, lane, patch, stage.namespace)

    async def repaired() -> bool:
        now = await stage.deployment(stage.high)
        return bool(now["spec"] == before["spec"])

    await eventually(repaired)
    await kube.delete(k.SERVICE, "llama", stage.namespace)
    await eventually(lambda: kube.get(k.SERVICE, "llama", stage.namespace))
    await kube.merge(
        k.DEPLOYMENT, lane, {"metadata": {"labels": None, "ownerReferences": None}}, stage.namespace
    )

    async def owned() -> bool:
        meta = (await stage.deployment(stage.high))["metadata"]
        return bool(meta["labels"][names.LABEL_MANAGED_BY] == "tidegate" and meta["ownerReferences"])

    await eventually(owned)


async def test_another_managers_apply_is_a_conflict_and_not_fought(stage: Stage, kube: Kube) -> None:
    await stage.standard()
    await stage.model()
    await eventually(lambda: stage.deployment(stage.high))
    lane = {"metadata": {"name": names.lane_name("llama", stage.high), "namespace": stage.namespace},
            "spec": {"revisionHistoryLimit": 9}}  # fmt: skip
    await kube.apply(k.DEPLOYMENT, lane, manager="somebody", force=True)

    async def told() -> Object:
        return await stage.condition(k.MODEL_DEPLOYMENT, "llama", "Conflict")

    condition = await eventually(told)
    assert "spec.revisionHistoryLimit (applied by somebody)" in condition["message"]
    await asyncio.sleep(1.5)
    assert (await stage.deployment(stage.high))["spec"]["revisionHistoryLimit"] == 9


async def test_an_object_of_somebody_else_is_not_overwritten(stage: Stage, kube: Kube) -> None:
    await stage.standard()
    port = {"name": "x", "port": 1}
    theirs = {"metadata": {"name": "llama", "namespace": stage.namespace}, "spec": {"ports": [port]}}
    await kube.create(k.SERVICE, theirs)
    await stage.model()
    found = await stage.ready("llama", "False", "NameTaken")
    assert "Service llama exists and is not Tidegate's" in found["message"]
    assert (await kube.get(k.SERVICE, "llama", stage.namespace))["spec"]["ports"][0]["port"] == 1


async def test_deletion_leaves_nothing_and_finalizers_hold_what_is_used(stage: Stage, kube: Kube) -> None:
    await stage.standard()
    await stage.model()
    await eventually(lambda: stage.deployment(stage.high))

    async def held() -> bool:
        pool = await kube.get(k.GPU_POOL, stage.pool)
        qos = await kube.get(k.QOS_CLASS, stage.high)
        return all(names.FINALIZER in o["metadata"].get("finalizers", []) for o in (pool, qos))

    await eventually(held)
    await kube.delete(k.QOS_CLASS, stage.high)
    await kube.delete(k.GPU_POOL, stage.pool)

    async def says_who() -> bool:
        found = await stage.condition(k.QOS_CLASS, stage.high)
        return found["reason"] == "InUse" and f"{stage.namespace}/llama" in found["message"]

    await eventually(says_who)
    await kube.delete(k.MODEL_DEPLOYMENT, "llama", stage.namespace)

    async def nothing_left() -> bool:
        assert not (await kube.list(k.DEPLOYMENT, stage.namespace))[0]
        assert not (await kube.list(k.SERVICE, stage.namespace))[0]
        assert not (await kube.list(k.POD, stage.namespace))[0]
        assert await absent(kube, k.GPU_POOL, stage.pool)
        assert await absent(kube, k.QOS_CLASS, stage.high)
        assert await absent(kube, k.PRIORITY_CLASS, f"tidegate-{stage.high}")
        taints = (await kube.get(k.NODE, stage.nodes[0]))["spec"].get("taints", [])
        return all(t["key"] != names.TAINT_POOL for t in taints)

    await eventually(nothing_left)


async def test_the_pools_taint_follows_the_pool(stage: Stage, kube: Kube) -> None:
    node = await stage.node()
    await stage.gpu_pool(reservations=[])

    def tainted(wanted: bool) -> Callable[[], Awaitable[bool]]:
        async def check() -> bool:
            taints = (await kube.get(k.NODE, node))["spec"].get("taints", [])
            ours = [t for t in taints if t["key"] == names.TAINT_POOL]
            values = [(t["value"], t["effect"]) for t in ours]
            return values == ([(stage.pool, "NoSchedule")] if wanted else [])

        return check

    await eventually(tainted(True))
    for patch, wanted in (
        ({"taint": False}, False),
        ({"taint": True}, True),
        ({"mode": "Observe"}, False),
        ({"mode": "Enforce"}, True),
        ({"nodeSelector": {"matchLabels": {"test": "elsewhere"}}}, False),
    ):
        await kube.merge(k.GPU_POOL, stage.pool, {"spec": patch})
        await eventually(tainted(wanted))


async def test_two_defaults_are_both_told_and_the_newest_wins(stage: Stage, kube: Kube) -> None:
    mark = {names.ANNOTATION_DEFAULT_CLASS: "true"}
    await stage.qos(stage.high, 900, "Never", annotations=mark)
    await asyncio.sleep(1.1)  # creation times have seconds
    await stage.qos(stage.low, 100, "Always", annotations=mark)

    async def told() -> bool:
        for name in (stage.high, stage.low):
            found = await stage.condition(k.QOS_CLASS, name, "SeveralDefaults")
            assert f"the newest, {stage.low}, is it" in found["message"]
        newest = (await kube.get(k.QOS_CLASS, stage.low))["status"]["default"]
        return newest is True and not (await kube.get(k.QOS_CLASS, stage.high))["status"]["default"]

    await eventually(told)


async def test_bad_references_are_conditions_and_the_others_go_on(stage: Stage, kube: Kube) -> None:
    await stage.standard()
    classes = [{"qosClass": stage.high, "minReplicas": 1}]
    await stage.model("no-pool", poolRefs=[{"name": "nowhere"}], classes=classes)
    lanes = [*classes, {"qosClass": "no-such-class"}]
    await stage.model("no-class", classes=lanes)
    await stage.model("too-large", parallelism={"tensor": 8}, classes=classes)
    overrides = {"spec": {"volumes": [{"name": "x", "hostPath": {"path": "/"}}]}}
    await stage.model("bad-overrides", podOverrides=overrides, classes=classes)
    triton = {"type": "Triton"}
    await stage.model("bad-uri", engine=triton, classes=classes)
    await stage.model("good", classes=classes)

    assert (
        "GPUPool nowhere does not exist" in (await stage.ready("no-pool", "False", "PoolNotFound"))["message"]
    )
    missing = await stage.ready("no-class", "False", "ClassNotFound")
    assert "QoSClass no-such-class does not exist" in missing["message"]
    await eventually(lambda: stage.deployment(stage.high, "no-class"))  # its other lane goes on
    large = await stage.ready("too-large", "False", "ReplicaTooLarge")
    assert "needs 8 GPUs on one node" in large["message"]
    assert "has 4" in large["message"]
    weak = await stage.ready("bad-overrides", "False", "InvalidPodOverrides")
    assert "spec.podOverrides.spec.volumes[x].hostPath" in weak["message"]
    assert (await stage.condition(k.MODEL_DEPLOYMENT, "bad-overrides", "Stalled"))["status"] == "True"
    await stage.ready("bad-uri", "False", "InvalidSpec")
    assert (await eventually(lambda: stage.deployment(stage.high, "good")))["spec"]["replicas"] == 1


async def test_paused_observed_and_external_objects_are_not_touched(stage: Stage, kube: Kube) -> None:
    await stage.standard()
    await stage.model("paused", scaling={"paused": True})
    endpoints = {"selector": {"matchLabels": {"app": "theirs"}}, "port": 8000}
    model = {"name": "theirs"}
    await stage.model("external", model=model, engine={"type": "External", "endpoints": endpoints})
    await stage.ready("paused", "True", "Paused")
    await stage.ready("external", "False", "NoEndpoints")
    await kube.merge(k.GPU_POOL, stage.pool, {"spec": {"mode": "Observe"}})
    await stage.model("observed")
    seen = await stage.ready("observed", "True", "Observed")
    assert f"planned is {stage.high} 1" in seen["message"]
    assert not (await kube.list(k.DEPLOYMENT, stage.namespace))[0]
    assert not (await kube.list(k.SERVICE, stage.namespace))[0]


async def test_pausing_keeps_what_runs(stage: Stage, kube: Kube) -> None:
    await stage.standard()
    await stage.model()
    await eventually(lambda: stage.deployment(stage.high))
    await kube.merge(k.MODEL_DEPLOYMENT, "llama", {"spec": {"scaling": {"paused": True}}}, stage.namespace)
    await stage.ready("llama", "True", "Paused")
    lane = names.lane_name("llama", stage.high)
    await kube.merge(k.DEPLOYMENT, lane, {"spec": {"replicas": 3}}, stage.namespace)
    await asyncio.sleep(2)
    assert (await stage.deployment(stage.high))["spec"]["replicas"] == 3


async def test_a_lane_taken_out_of_the_spec_goes(stage: Stage, kube: Kube) -> None:
    await stage.standard()
    await stage.model()
    await eventually(lambda: stage.deployment(stage.low))
    classes = {"spec": {"classes": [{"qosClass": stage.high, "minReplicas": 1}]}}
    await kube.merge(k.MODEL_DEPLOYMENT, "llama", classes, stage.namespace)
    await eventually(lambda: absent(kube, k.DEPLOYMENT, names.lane_name("llama", stage.low), stage.namespace))
    assert (await stage.deployment(stage.high))["spec"]["replicas"] == 1


async def test_what_is_not_enforced_is_said(stage: Stage) -> None:
    await stage.standard()
    await stage.model(profileRef={"name": "fitted"})

    async def told() -> bool:
        found = await stage.condition(k.MODEL_DEPLOYMENT, "llama", "NotEnforced")
        return "spec.profileRef" in found["message"]

    await eventually(told)
