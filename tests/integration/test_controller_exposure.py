"""A model exposed to gateways of others: InferencePool and HTTPRoute, where their CRDs are and where not."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from support.gateway_api import crd
from support.stage import Process, Stage
from support.wait import eventually
from tidegate.adapters.kube import ApiError, Kube
from tidegate.adapters.kube import kinds as k
from tidegate.local.cluster import LocalCluster

Object = dict[str, Any]
CRDS = [
    crd("inference.networking.k8s.io", "InferencePool", "inferencepools"),
    crd("gateway.networking.k8s.io", "HTTPRoute", "httproutes"),
]
KINDS = (k.INFERENCE_POOL, k.HTTP_ROUTE)
PARENTS = {"parentRefs": [{"name": "front"}]}
_SEEN_S = 60
"""The controller looks every ten seconds which kinds there are."""


@pytest.fixture(scope="module")
def controller(control_plane: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = Process(control_plane, tmp_path_factory.mktemp("controller") / "log")
    process.start()
    process.wait_ready()
    yield process
    assert process.stop() == 0, process.log.read_text()[-4000:]
    assert "Traceback" not in process.log.read_text()


@pytest.fixture
async def stage(kube: Kube, namespace: str, controller: Process) -> AsyncIterator[Stage]:
    made = Stage(kube, namespace)
    await made.standard()
    yield made
    await made.close()


async def install(kube: Kube) -> None:
    for one in CRDS:
        await kube.create(k.CRD, one)


async def uninstall(kube: Kube) -> None:
    for one in CRDS:
        await kube.delete(k.CRD, one["metadata"]["name"])

    async def gone() -> bool:
        return not any([await served(kube, kind) for kind in KINDS])

    await eventually(gone, within_s=_SEEN_S)


async def served(kube: Kube, kind: Any) -> bool:
    try:
        listed = await kube.request("GET", f"/apis/{kind.api_version}")
    except ApiError:
        return False
    return any(r["name"] == kind.plural for r in listed["resources"])


async def conditions(stage: Stage, name: str = "llama") -> dict[str, Object]:
    obj = await stage.kube.get(k.MODEL_DEPLOYMENT, name, stage.namespace)
    return {c["type"]: c for c in (obj.get("status") or {}).get("conditions", ())}


async def test_without_the_crds_it_is_said_and_all_else_goes_on(stage: Stage) -> None:
    await stage.model(exposure=PARENTS)

    async def told() -> Object:
        return (await conditions(stage))["NotExposed"]

    found = await eventually(told)
    assert (found["status"], found["reason"]) == ("True", "CRDNotInstalled")
    assert "InferencePool (inference.networking.k8s.io/v1)" in found["message"]
    assert "spec.exposure" in found["message"]
    assert (await stage.deployment(stage.high))["spec"]["replicas"] == 1
    assert (await conditions(stage))["Ready"]["reason"] != "ApplyFailed"


async def test_with_the_crds_pool_and_route_come_stay_right_and_go(stage: Stage, kube: Kube) -> None:
    await stage.model(exposure=PARENTS)
    await eventually(lambda: _condition(stage, "NotExposed"))
    await install(kube)
    try:
        await _life(stage, kube)
    finally:
        await uninstall(kube)
    # The controller goes on without them: a model that is changed now is applied as ever.
    await kube.merge(k.MODEL_DEPLOYMENT, "llama", {"spec": {"exposure": PARENTS}}, stage.namespace)

    async def told_again() -> bool:
        return "NotExposed" in await conditions(stage)

    await eventually(told_again, within_s=_SEEN_S)


async def _condition(stage: Stage, name: str) -> Object:
    return (await conditions(stage))[name]


async def _life(stage: Stage, kube: Kube) -> None:
    async def both() -> list[Object]:
        return [await kube.get(kind, "llama", stage.namespace) for kind in KINDS]

    pool, route = await eventually(both, within_s=_SEEN_S)
    assert pool["spec"]["selector"] == {"matchLabels": {"tidegate.dev/model": "llama"}}
    assert pool["spec"]["endpointPickerRef"]["name"] == "tidegate-picker"
    assert route["spec"]["parentRefs"] == [{"name": "front"}]

    async def clear() -> bool:
        return "NotExposed" not in await conditions(stage)

    await eventually(clear)
    # Nothing is written while nothing changes.
    await asyncio.sleep(2)
    assert [o["metadata"]["resourceVersion"] for o in await both()] == [
        o["metadata"]["resourceVersion"] for o in (pool, route)
    ]
    # A hand's change is repaired.
    wrong = {"spec": {"targetPorts": [{"number": 9}]}}
    await kube.merge(k.INFERENCE_POOL, "llama", wrong, stage.namespace)

    async def repaired() -> bool:
        return (await kube.get(k.INFERENCE_POOL, "llama", stage.namespace))["spec"]["targetPorts"] == [
            {"number": 8000}
        ]

    await eventually(repaired)
    # What is asked for no more goes, the route first, then the pool.
    for exposure, left in (({"parentRefs": None, "endpointPicker": {}}, {"InferencePool"}), (None, set())):
        await kube.merge(k.MODEL_DEPLOYMENT, "llama", {"spec": {"exposure": exposure}}, stage.namespace)

        async def is_left(left: set[str] = left) -> bool:
            return {kind.name for kind in KINDS if (await kube.list(kind, stage.namespace))[0]} == left

        await eventually(is_left)


async def test_a_pool_of_that_name_which_is_somebody_else_s_is_left_alone(stage: Stage, kube: Kube) -> None:
    await install(kube)
    try:

        async def all_served() -> bool:
            return all([await served(kube, kind) for kind in KINDS])

        await eventually(all_served)
        theirs = {"selector": {"matchLabels": {"app": "x"}}, "targetPorts": [{"number": 1}]}
        body = {"apiVersion": k.INFERENCE_POOL.api_version, "kind": "InferencePool", "spec": theirs}
        await kube.create(
            k.INFERENCE_POOL, {**body, "metadata": {"name": "llama", "namespace": stage.namespace}}
        )
        await stage.model(exposure=PARENTS)

        async def told() -> bool:
            return (await conditions(stage))["NotExposed"]["reason"] == "NameTaken"

        await eventually(told, within_s=_SEEN_S)
        assert (await kube.get(k.INFERENCE_POOL, "llama", stage.namespace))["spec"] == theirs
        assert (await kube.list(k.HTTP_ROUTE, stage.namespace))[0] == []
        assert (await conditions(stage))["Ready"]["reason"] != "NameTaken"
    finally:
        await uninstall(kube)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_schema_is_of_this_kind(kind: Any) -> None:
    [one] = [c for c in CRDS if c["spec"]["names"]["kind"] == kind.name]
    versions = (v["name"] for v in one["spec"]["versions"])
    assert kind.api_version in {f"{g}/{v}" for g, v in itertools.product([one["spec"]["group"]], versions)}
