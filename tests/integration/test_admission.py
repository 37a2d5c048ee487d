"""Who may carry a class: the admission policies on a real API server, for models, pods and lanes."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from support.builders import mdep
from tidegate.adapters.kube import ApiError, Kube, kinds

MakeNamespace = Callable[..., Awaitable[str]]
MakeClass = Callable[..., Awaitable[str]]

PROD = {"matchLabels": {"tier": "prod"}}


def expression(operator: str, *values: str) -> dict[str, Any]:
    requirement: dict[str, Any] = {"key": "tier", "operator": operator}
    return {"matchExpressions": [requirement | ({"values": list(values)} if values else {})]}


def model(namespace: str, *classes: str) -> dict[str, Any]:
    obj = mdep(classes=[{"qosClass": c} for c in classes]) if classes else mdep()
    return obj | {"metadata": {"name": "m", "namespace": namespace}}


def pod(namespace: str, qos_class: str | None = None, priority: str | None = None) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "containers": [{"name": "c", "image": "example.org/none"}],
        "schedulerName": "nobody",
    }
    if priority:
        spec["priorityClassName"] = priority
    labels = {"tidegate.dev/qos-class": qos_class} if qos_class else {}
    return {"metadata": {"name": "p", "namespace": namespace, "labels": labels}, "spec": spec}


@pytest.fixture
async def make_class(kube: Kube) -> AsyncIterator[MakeClass]:
    """Makes a QoSClass and its PriorityClass, and waits until the policies see it."""
    made: list[str] = []

    async def make(allowed: dict[str, Any] | None, *, default: bool = False) -> str:
        name = f"c-{uuid.uuid4().hex[:8]}"
        spec: dict[str, Any] = {"priority": 5}
        if allowed is not None:
            spec["allowedNamespaces"] = allowed
        meta = {"name": name, "annotations": {"tidegate.dev/is-default-class": str(default).lower()}}
        made.append(name)
        await kube.create(kinds.QOS_CLASS, {"metadata": meta, "spec": spec})
        await kube.create(kinds.PRIORITY_CLASS, {"metadata": {"name": f"tidegate-{name}"}, "value": 5})
        await _seen(kube)
        return name

    yield make
    for name in made:
        await kube.delete(kinds.QOS_CLASS, name)
        await kube.delete(kinds.PRIORITY_CLASS, f"tidegate-{name}")
    await _seen(kube)  # a default class that is gone must not be held against the next test's models


async def _seen(kube: Kube) -> None:
    """Wait until the API server's policies know of a class made after all others.

    A class that nothing allows denies as soon as it is seen, and classes are seen in order.
    """
    name = f"c-{uuid.uuid4().hex[:8]}"
    await kube.create(kinds.QOS_CLASS, {"metadata": {"name": name}, "spec": {"priority": 1}})
    try:
        await denied(kube, kinds.MODEL_DEPLOYMENT, model("default", name))
    finally:
        await kube.delete(kinds.QOS_CLASS, name)


async def dry_run(kube: Kube, kind: Any, obj: dict[str, Any]) -> str | None:
    """What the server says against creating the object; None when it would."""
    body = {"apiVersion": kind.api_version, "kind": kind.name, **obj}
    try:
        await kube.request(
            "POST", kind.path(obj["metadata"]["namespace"]), query={"dryRun": "All"}, body=body
        )
    except ApiError as error:
        if (error.status, error.reason) != (403, "Forbidden"):
            raise
        return error.message
    return None


async def denied(kube: Kube, kind: Any, obj: dict[str, Any]) -> str:
    """Wait until the server would refuse the object: policies hear of changes a moment later."""
    async with asyncio.timeout(20):
        while True:
            if said := await dry_run(kube, kind, obj):
                return said
            await asyncio.sleep(0.05)


MATRIX = {
    "absent allows none": (None, {"tier": "prod"}, False),
    "{} allows all": ({}, {}, True),
    "label equal": (PROD, {"tier": "prod", "other": "x"}, True),
    "label differs": (PROD, {"tier": "dev"}, False),
    "label absent": (PROD, {}, False),
    "In": (expression("In", "prod", "stage"), {"tier": "stage"}, True),
    "In, other value": (expression("In", "prod", "stage"), {"tier": "dev"}, False),
    "In, absent": (expression("In", "prod"), {}, False),
    "NotIn": (expression("NotIn", "dev"), {"tier": "prod"}, True),
    "NotIn, that value": (expression("NotIn", "dev"), {"tier": "dev"}, False),
    "NotIn, absent": (expression("NotIn", "dev"), {}, True),
    "Exists": (expression("Exists"), {"tier": ""}, True),
    "Exists, absent": (expression("Exists"), {}, False),
    "DoesNotExist": (expression("DoesNotExist"), {}, True),
    "DoesNotExist, present": (expression("DoesNotExist"), {"tier": "x"}, False),
    "both must hold": (PROD | expression("In", "dev"), {"tier": "prod"}, False),
}


@pytest.mark.parametrize(("allowed", "labels", "may"), MATRIX.values(), ids=MATRIX)
async def test_models_and_pods_by_namespace(
    kube: Kube, make_class: MakeClass, make_namespace: MakeNamespace, allowed: Any, labels: Any, may: bool
) -> None:
    name, namespace = await make_class(allowed), await make_namespace(labels)
    candidates = (
        (kinds.MODEL_DEPLOYMENT, model(namespace, name)),
        (kinds.POD, pod(namespace, name)),
        (kinds.POD, pod(namespace, name, f"tidegate-{name}")),
    )
    for kind, obj in candidates:
        said = await dry_run(kube, kind, obj)
        if may:
            assert said is None
        else:
            assert f"namespace {namespace} may not use QoSClass {name}: " in (said or "")


async def test_the_message_says_why(kube: Kube, make_class: MakeClass, make_namespace: MakeNamespace) -> None:
    none, prod, namespace = await make_class(None), await make_class(PROD), await make_namespace()
    for name, why in (
        (none, "that class has no spec.allowedNamespaces, so no namespace may"),
        (prod, "its labels do not match spec.allowedNamespaces of that class"),
    ):
        said = await dry_run(kube, kinds.MODEL_DEPLOYMENT, model(namespace, name))
        assert said is not None
        assert said.endswith(f"namespace {namespace} may not use QoSClass {name}: {why}")


async def test_one_class_of_several_is_enough_to_be_denied(
    kube: Kube, make_class: MakeClass, make_namespace: MakeNamespace
) -> None:
    free, closed, namespace = await make_class({}), await make_class(PROD), await make_namespace()
    assert await dry_run(kube, kinds.MODEL_DEPLOYMENT, model(namespace, free)) is None
    said = await dry_run(kube, kinds.MODEL_DEPLOYMENT, model(namespace, free, closed))
    assert f"may not use QoSClass {closed}" in (said or "")


async def test_a_model_without_classes_claims_the_default_one(
    kube: Kube, make_class: MakeClass, make_namespace: MakeNamespace
) -> None:
    prod, dev = await make_namespace({"tier": "prod"}), await make_namespace()
    assert await dry_run(kube, kinds.MODEL_DEPLOYMENT, model(dev)) is None
    default = await make_class(PROD, default=True)
    said = await dry_run(kube, kinds.MODEL_DEPLOYMENT, model(dev))
    assert f"namespace {dev} may not use QoSClass {default}" in (said or "")
    assert await dry_run(kube, kinds.MODEL_DEPLOYMENT, model(prod)) is None


async def test_a_class_that_is_not_there_denies_nothing(kube: Kube, namespace: str) -> None:
    # The controller says so in a condition: classes and models may be applied in any order.
    assert await dry_run(kube, kinds.MODEL_DEPLOYMENT, model(namespace, "nobody")) is None


async def test_a_priority_class_without_the_label_is_no_way_around(
    kube: Kube, make_class: MakeClass, make_namespace: MakeNamespace
) -> None:
    closed, other, namespace = await make_class(PROD), await make_class({}), await make_namespace()
    for label in (None, other):
        said = await dry_run(kube, kinds.POD, pod(namespace, label, f"tidegate-{closed}"))
        assert said is not None
        assert said.endswith(
            f"a pod with priorityClassName tidegate-{closed} must carry the label"
            f" tidegate.dev/qos-class: {closed}"
        )


async def test_pods_without_a_class_are_nobody_s_business(kube: Kube, namespace: str) -> None:
    assert await dry_run(kube, kinds.POD, pod(namespace)) is None


async def test_only_new_claims_are_judged(
    kube: Kube, make_class: MakeClass, make_namespace: MakeNamespace
) -> None:
    first, second = await make_class(PROD), await make_class(PROD)
    namespace = await make_namespace({"tier": "prod"})
    await kube.create(kinds.MODEL_DEPLOYMENT, model(namespace, first))
    await kube.create(kinds.POD, pod(namespace, first, f"tidegate-{first}"))
    await kube.merge(kinds.NAMESPACE, namespace, {"metadata": {"labels": {"tier": None}}})
    await denied(kube, kinds.POD, pod(namespace, first))

    # What was there may still be changed, and goes when it is deleted.
    await kube.merge(kinds.MODEL_DEPLOYMENT, "m", {"spec": {"maxReplicas": 3}}, namespace)
    await kube.merge(kinds.POD, "p", {"metadata": {"annotations": {"a": "b"}}}, namespace)
    with pytest.raises(ApiError, match=f"may not use QoSClass {second}"):
        await kube.merge(
            kinds.MODEL_DEPLOYMENT,
            "m",
            {"spec": {"classes": [{"qosClass": first}, {"qosClass": second}]}},
            namespace,
        )
    with pytest.raises(ApiError, match=f"must carry the label tidegate.dev/qos-class: {first}"):
        await kube.merge(
            kinds.POD, "p", {"metadata": {"labels": {"tidegate.dev/qos-class": None}}}, namespace
        )
    await kube.delete(kinds.POD, "p", namespace, grace_s=0)
    await kube.delete(kinds.MODEL_DEPLOYMENT, "m", namespace)


@pytest.mark.parametrize("may", [True, False], ids=["allowed", "not allowed"])
async def test_pods_of_a_lane_are_judged_by_their_namespace(
    kube: Kube, make_class: MakeClass, make_namespace: MakeNamespace, may: bool
) -> None:
    """They are made by kube-controller-manager's own account, not by the author of the model."""
    name = await make_class(PROD)
    namespace = await make_namespace({"tier": "prod"} if may else {})
    labels = {"tidegate.dev/qos-class": name, "app": "lane"}
    template = pod(namespace, name, f"tidegate-{name}")
    lane = {
        "metadata": {"name": "lane", "namespace": namespace},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": template["spec"]},
        },
    }
    await kube.create(kinds.DEPLOYMENT, lane)
    async with asyncio.timeout(30):
        while True:
            pods, _ = await kube.list(kinds.POD, namespace)
            sets, _ = await kube.list(kinds.REPLICA_SET, namespace)
            failed = [
                c["message"]
                for s in sets
                for c in s.get("status", {}).get("conditions", [])
                if c["type"] == "ReplicaFailure"
            ]
            if pods or failed:
                break
            await asyncio.sleep(0.1)
    assert bool(pods) is may
    if not may:
        assert f"namespace {namespace} may not use QoSClass {name}" in failed[0]


async def test_the_expressions_have_the_right_types(kube: Kube) -> None:
    """kube-controller-manager checks each against the schemas of its kinds, and warns in the status."""
    async with asyncio.timeout(30):
        while True:
            policies, _ = await kube.list(kinds.ADMISSION_POLICY)
            ours = [p for p in policies if p["metadata"]["name"].startswith("tidegate-")]
            if ours and all("observedGeneration" in p.get("status", {}) for p in ours):
                break
            await asyncio.sleep(0.2)
    assert {p["metadata"]["name"]: p["status"].get("typeChecking", {}) for p in ours} == {
        "tidegate-model-classes": {},
        "tidegate-pod-classes": {},
        "tidegate-pod-priority": {},
    }
