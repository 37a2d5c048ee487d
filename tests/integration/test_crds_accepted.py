"""What a real API server accepts of the three kinds, fills in and keeps."""

import uuid
from typing import Any

import pytest

from support.builders import dry_run, engine, external, mdep, named, pool, qos, reserve
from tidegate.adapters.kube import Kube, kinds
from tidegate.api.crd import definitions
from tidegate.api.qosclass import QoSClass

ACCEPTED = {
    "exposed by host names": (
        kinds.MODEL_DEPLOYMENT,
        mdep(exposure={"parentRefs": [{"name": "g"}], "hostnames": ["m.example.com", "*.m.example.com"]}),
    ),
    "exposed by a pool alone": (
        kinds.MODEL_DEPLOYMENT,
        mdep(exposure={"endpointPicker": {"service": "picker", "failureMode": "FailOpen"}}),
    ),
    "bare class": (kinds.QOS_CLASS, qos(priority=0)),
    "top priority": (kinds.QOS_CLASS, qos(priority=1_000_000_000)),
    "tenants by header": (
        kinds.QOS_CLASS,
        qos(tenant={"from": "Header", "header": "x-team", "weights": {"a": 2}}),
    ),
    "all four operators": (
        kinds.QOS_CLASS,
        qos(
            allowedNamespaces={
                "matchExpressions": [
                    {"key": "a", "operator": "In", "values": ["1"]},
                    {"key": "b", "operator": "NotIn", "values": ["1"]},
                    {"key": "c.d/e", "operator": "Exists"},
                    {"key": "f", "operator": "DoesNotExist"},
                ]
            }
        ),
    ),
    "bare pool": (kinds.GPU_POOL, pool()),
    "pool of DRA devices": (kinds.GPU_POOL, pool(devices={"deviceClassName": "gpu.nvidia.com"})),
    "shares of exactly 100": (
        kinds.GPU_POOL,
        pool(reservations=[{"name": n, "qosClass": n, "sharePercent": 50} for n in ("a", "b")]),
    ),
    "limit on borrowing only": (kinds.GPU_POOL, reserve(gpus=0, maxBorrow=4)),
    "bare model": (kinds.MODEL_DEPLOYMENT, mdep()),
    "External": (kinds.MODEL_DEPLOYMENT, external()),
    "External speaks KServe": (kinds.MODEL_DEPLOYMENT, external(protocol="KServeV2")),
    "env": (
        kinds.MODEL_DEPLOYMENT,
        engine(
            env=[
                {"name": "A", "value": ""},
                {"name": "B", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "k"}}},
            ]
        ),
    ),
    "quantities": (
        kinds.MODEL_DEPLOYMENT,
        engine(resources={"requests": {"cpu": 8, "memory": "64Gi"}, "limits": {"memory": "1.5Ti"}}),
    ),
    "rollout in percent": (kinds.MODEL_DEPLOYMENT, mdep(rollout={"maxSurge": "25%", "maxUnavailable": 0})),
    "pod overrides of any shape": (
        kinds.MODEL_DEPLOYMENT,
        mdep(podOverrides={"spec": {"tolerations": [{"key": "x", "operator": "Exists"}]}}),
    ),
    "pinned": (
        kinds.MODEL_DEPLOYMENT,
        mdep(classes=[{"qosClass": "a", "maxReplicas": 0}], maxReplicas=0, scaling={"replicas": {"a": 0}}),
    ),
}


@pytest.mark.parametrize(("kind", "obj"), ACCEPTED.values(), ids=ACCEPTED)
async def test_accepted(kube: Kube, kind: Any, obj: Any) -> None:
    made = await dry_run(kube, kind, obj)
    if "podOverrides" in obj["spec"]:
        assert made["spec"]["podOverrides"] == obj["spec"]["podOverrides"]


async def test_the_server_fills_in_the_same_defaults_as_the_models(kube: Kube) -> None:
    made = await dry_run(kube, kinds.QOS_CLASS, qos(objectives={"timeToFirstToken": "1s"}))
    assert made["spec"] == {
        "priority": 5,
        "reclaim": "Never",
        "minRuntime": "0s",
        "objectives": {"timeToFirstToken": "1s", "attainmentPercent": 99, "window": "720h"},
        "minimumSharePercent": 0,
        "queue": {"maxRequests": 1000, "maxWait": "30s"},
        "tenant": {"from": "None"},
    }
    assert (
        QoSClass.from_object(made).spec
        == QoSClass.from_object(qos(objectives={"timeToFirstToken": "1s"})).spec
    )


async def test_a_status_is_a_subresource_and_kept_as_written(kube: Kube) -> None:
    name = f"test-{uuid.uuid4().hex[:8]}"
    status = {"conditions": [{"type": "Ready", "status": "False", "reason": "NoNodes", "message": "none"}]}
    await kube.create(kinds.GPU_POOL, {**named(name, pool()), "status": {"nodes": 3}})
    try:
        assert "status" not in await kube.get(kinds.GPU_POOL, name)
        written = await kube.merge(kinds.GPU_POOL, name, {"status": status}, subresource="status")
        assert written["status"] == status
        assert written["metadata"]["generation"] == 1
    finally:
        await kube.delete(kinds.GPU_POOL, name)


async def test_definitions_are_established_without_complaints(kube: Kube) -> None:
    for crd in definitions():
        found = await kube.get(kinds.CRD, crd["metadata"]["name"])
        conditions = {c["type"]: c["status"] for c in found["status"]["conditions"]}
        assert conditions["Established"] == "True"
        assert conditions.get("NonStructuralSchema", "False") == "False"
