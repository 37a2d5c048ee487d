"""What a real API server says about mistakes in the three kinds."""

import uuid
from typing import Any

import pytest

from support.builders import dry_run, engine, external, mdep, named, pool, qos, reserve
from tidegate.adapters.kube import ApiError, Kube, kinds
from tidegate.api.crd import definitions

DURATION = "must be a duration with a unit, such as 500ms, 5s, 2m or 24h"
LABEL = "must be a lower-case name of letters, digits and '-', such as team-a, at most 63 characters"
SELECTOR = "values must list at least one value for In and NotIn, and be left out for Exists and DoesNotExist"


# name: (kind, object, field that the server names, what it says)
REFUSED = {
    "name of a class": (
        kinds.QOS_CLASS,
        named("a.b", qos()),
        "",
        (
            "metadata.name must be a lower-case name of letters, digits and '-', at most 63 characters:"
            " it becomes the value of a label"
        ),
    ),
    "model's name too long": (
        kinds.MODEL_DEPLOYMENT,
        named("a" * 64, mdep()),
        "",
        "at most 63 characters",
    ),
    "name too long": (kinds.QOS_CLASS, named("a" * 64, qos()), "", "metadata.name must be a lower-case name"),
    "priority required": (
        kinds.QOS_CLASS,
        {"metadata": {"name": "c"}, "spec": {}},
        "spec.priority",
        "Required",
    ),
    "spec required": (kinds.GPU_POOL, {"metadata": {"name": "p"}}, "spec", "Required value"),
    "priority is a number": (
        kinds.QOS_CLASS,
        qos(priority="high"),
        "spec.priority",
        "must be of type integer",
    ),
    "priority below 0": (kinds.QOS_CLASS, qos(priority=-1), "spec.priority", "greater than or equal to 0"),
    "priority too high": (
        kinds.QOS_CLASS,
        qos(priority=2**31),
        "spec.priority",
        "less than or equal to 1000000000",
    ),
    "reclaim": (
        kinds.QOS_CLASS,
        qos(reclaim="Sometimes"),
        "spec.reclaim",
        'supported values: "Never", "AboveMinimum", "Always"',
    ),
    "duration without a unit": (kinds.QOS_CLASS, qos(minRuntime="30"), "spec.minRuntime", DURATION),
    "duration as a number": (
        kinds.QOS_CLASS,
        qos(minRuntime=30),
        "spec.minRuntime",
        "must be of type string",
    ),
    "duration in a wrong unit": (
        kinds.QOS_CLASS,
        qos(queue={"maxWait": "2min"}),
        "spec.queue.maxWait",
        DURATION,
    ),
    "objective of nothing": (
        kinds.QOS_CLASS,
        qos(objectives={"timeToFirstToken": "0s"}),
        "spec.objectives.timeToFirstToken",
        "must be longer than 0s; leave it out to aim at nothing",
    ),
    "percent above 100": (
        kinds.QOS_CLASS,
        qos(minimumSharePercent=101),
        "spec.minimumSharePercent",
        "less than or equal to 100",
    ),
    "header without Header": (
        kinds.QOS_CLASS,
        qos(tenant={"from": "User", "header": "x-team"}),
        "spec.tenant",
        "spec.tenant.header must be set when spec.tenant.from is Header, and only then",
    ),
    "Header without header": (
        kinds.QOS_CLASS,
        qos(tenant={"from": "Header"}),
        "spec.tenant",
        "spec.tenant.header must be set when spec.tenant.from is Header, and only then",
    ),
    "key of a label": (
        kinds.QOS_CLASS,
        qos(allowedNamespaces={"matchLabels": {"not a key": "x"}}),
        "spec.allowedNamespaces.matchLabels",
        "matchLabels: each key must be a label key, such as tidegate.dev/tier",
    ),
    "In without values": (
        kinds.QOS_CLASS,
        qos(allowedNamespaces={"matchExpressions": [{"key": "a", "operator": "In"}]}),
        "spec.allowedNamespaces.matchExpressions[0]",
        SELECTOR,
    ),
    "Exists with values": (
        kinds.QOS_CLASS,
        qos(allowedNamespaces={"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["x"]}]}),
        "spec.allowedNamespaces.matchExpressions[0]",
        SELECTOR,
    ),
    "mode": (kinds.GPU_POOL, pool(mode="Watch"), "spec.mode", 'supported values: "Observe", "Enforce"'),
    "pool of every node": (
        kinds.GPU_POOL,
        pool(nodeSelector={}),
        "spec.nodeSelector",
        "spec.nodeSelector must ask for at least one label: {} would take every node of the cluster",
    ),
    "two kinds of devices": (
        kinds.GPU_POOL,
        pool(devices={"resourceName": "nvidia.com/gpu", "deviceClassName": "gpu"}),
        "spec.devices",
        "spec.devices must set exactly one of resourceName and deviceClassName",
    ),
    "no kind of devices": (
        kinds.GPU_POOL,
        pool(devices={}),
        "spec.devices",
        "spec.devices must set exactly one of resourceName and deviceClassName",
    ),
    "negative reservation": (
        kinds.GPU_POOL,
        reserve(gpus=-1),
        "spec.reservations[1].gpus",
        "spec.reservations[].gpus must be at least 0",
    ),
    "gpus and share": (
        kinds.GPU_POOL,
        reserve(gpus=1, sharePercent=10),
        "spec.reservations[1]",
        "spec.reservations[] must set exactly one of gpus and sharePercent",
    ),
    "neither gpus nor share": (
        kinds.GPU_POOL,
        reserve(),
        "spec.reservations[1]",
        "spec.reservations[] must set exactly one of gpus and sharePercent",
    ),
    "shares above 100": (
        kinds.GPU_POOL,
        pool(reservations=[{"name": n, "qosClass": n, "sharePercent": 60} for n in ("a", "b")]),
        "spec.reservations",
        "spec.reservations[].sharePercent must be at most 100 together",
    ),
    "lends more than it has": (
        kinds.GPU_POOL,
        reserve(gpus=4, maxLend=5),
        "spec.reservations[1]",
        "spec.reservations[].maxLend must be at most spec.reservations[].gpus",
    ),
    "class that cannot be a name": (
        kinds.GPU_POOL,
        reserve(qosClass="My Class", gpus=1),
        "spec.reservations[1].qosClass",
        LABEL,
    ),
    "reservation twice": (
        kinds.GPU_POOL,
        pool(reservations=[{"name": "a", "qosClass": c, "gpus": 1} for c in ("a", "b")]),
        "spec.reservations[1]",
        "Duplicate value",
    ),
    "two pools": (
        kinds.MODEL_DEPLOYMENT,
        mdep(poolRefs=[{"name": "a"}, {"name": "b"}]),
        "spec.poolRefs",
        "spec.poolRefs may name at most one pool in v1alpha1",
    ),
    "no weights": (
        kinds.MODEL_DEPLOYMENT,
        mdep(model={"name": "m"}),
        "spec",
        "spec.model.uri must be set unless spec.engine.type is External",
    ),
    "adapters in Triton": (
        kinds.MODEL_DEPLOYMENT,
        mdep(
            engine={"type": "Triton"},
            model={"name": "m", "uri": "pvc://a/b", "adapters": [{"name": "n", "uri": "pvc://a/n"}]},
        ),
        "spec",
        (
            "spec.model.adapters and revision must be left out when spec.engine.type is Triton:"
            " its repository says what it serves"
        ),
    ),
    "weights from elsewhere": (
        kinds.MODEL_DEPLOYMENT,
        mdep(model={"name": "m", "uri": "https://host/m"}),
        "spec.model.uri",
        "must begin with hf://, s3://, gs://, oci:// or pvc://, such as hf://org/model",
    ),
    "engine": (
        kinds.MODEL_DEPLOYMENT,
        mdep(engine={"type": "TGI"}),
        "spec.engine.type",
        'supported values: "vLLM", "Triton", "External"',
    ),
    "External without endpoints": (
        kinds.MODEL_DEPLOYMENT,
        mdep(engine={"type": "External"}),
        "spec.engine",
        (
            "spec.engine.endpoints (selector and port) must be set when spec.engine.type is External,"
            " and only then"
        ),
    ),
    "endpoints of our own": (
        kinds.MODEL_DEPLOYMENT,
        engine(endpoints={"selector": {"matchLabels": {"app": "x"}}, "port": 80}),
        "spec.engine",
        (
            "spec.engine.endpoints (selector and port) must be set when spec.engine.type is External,"
            " and only then"
        ),
    ),
    "External with an image": (
        kinds.MODEL_DEPLOYMENT,
        external(image="x"),
        "spec.engine",
        (
            "spec.engine.image, args, env, resources and qosScheduler must be left out when spec.engine.type"
            " is External: pods that somebody else makes are never edited"
        ),
    ),
    "External with overrides": (
        kinds.MODEL_DEPLOYMENT,
        {**external(), "spec": {**external()["spec"], "podOverrides": {"spec": {}}}},
        "spec",
        (
            "spec.podOverrides must be left out when spec.engine.type is External: pods that somebody else"
            " makes are never edited"
        ),
    ),
    "every pod of the namespace": (
        kinds.MODEL_DEPLOYMENT,
        mdep(engine={"type": "External", "endpoints": {"selector": {}, "port": 80}}),
        "spec.engine.endpoints.selector",
        (
            "spec.engine.endpoints.selector must ask for at least one label: {} would take every pod of the"
            " namespace"
        ),
    ),
    "port": (
        kinds.MODEL_DEPLOYMENT,
        mdep(
            engine={"type": "External", "endpoints": {"selector": {"matchLabels": {"a": "b"}}, "port": 70000}}
        ),
        "spec.engine.endpoints.port",
        "less than or equal to 65535",
    ),
    "vLLM speaks OpenAI": (
        kinds.MODEL_DEPLOYMENT,
        engine(protocol="KServeV2"),
        "spec.engine",
        "spec.engine.protocol must be OpenAI when spec.engine.type is vLLM",
    ),
    "Triton speaks KServe": (
        kinds.MODEL_DEPLOYMENT,
        mdep(engine={"type": "Triton", "protocol": "OpenAI"}),
        "spec.engine",
        "spec.engine.protocol must be KServeV2 when spec.engine.type is Triton",
    ),
    "plugin in Triton": (
        kinds.MODEL_DEPLOYMENT,
        mdep(engine={"type": "Triton", "qosScheduler": "Auto"}),
        "spec.engine",
        "spec.engine.qosScheduler must be Off unless spec.engine.type is vLLM",
    ),
    "value twice": (
        kinds.MODEL_DEPLOYMENT,
        engine(env=[{"name": "A", "value": "1", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]),
        "spec.engine.env[0]",
        "spec.engine.env[] must not set both value and valueFrom",
    ),
    "value from nowhere": (
        kinds.MODEL_DEPLOYMENT,
        engine(env=[{"name": "A", "valueFrom": {}}]),
        "spec.engine.env[0].valueFrom",
        "spec.engine.env[].valueFrom must set exactly one of secretKeyRef and configMapKeyRef",
    ),
    "GPUs by hand": (
        kinds.MODEL_DEPLOYMENT,
        engine(resources={"limits": {"nvidia.com/gpu": 1}}),
        "spec.engine.resources",
        "spec.engine.resources must not name GPUs: they follow from spec.parallelism",
    ),
    "no quantity": (
        kinds.MODEL_DEPLOYMENT,
        engine(resources={"requests": {"memory": "64 GB"}}),
        "spec.engine.resources.requests.memory",
        "should match",
    ),
    "no GPU": (
        kinds.MODEL_DEPLOYMENT,
        mdep(parallelism={"tensor": 0}),
        "spec.parallelism.tensor",
        "or equal to 1",
    ),
    "maximum below minimum": (
        kinds.MODEL_DEPLOYMENT,
        mdep(classes=[{"qosClass": "a"}, {"qosClass": "b", "minReplicas": 2, "maxReplicas": 1}]),
        "spec.classes[1]",
        "spec.classes[].maxReplicas must be at least spec.classes[].minReplicas",
    ),
    "class twice": (
        kinds.MODEL_DEPLOYMENT,
        mdep(classes=[{"qosClass": "a"}, {"qosClass": "a"}]),
        "spec.classes[1]",
        "Duplicate value",
    ),
    "minima above the maximum of all": (
        kinds.MODEL_DEPLOYMENT,
        mdep(maxReplicas=3, classes=[{"qosClass": c, "minReplicas": 2} for c in ("a", "b")]),
        "spec",
        "spec.maxReplicas must be at least the sum of spec.classes[].minReplicas",
    ),
    "pin of a class not served": (
        kinds.MODEL_DEPLOYMENT,
        mdep(classes=[{"qosClass": "a"}], scaling={"replicas": {"b": 1}}),
        "spec",
        "spec.scaling.replicas may only name classes of spec.classes",
    ),
    "nothing can be replaced": (
        kinds.MODEL_DEPLOYMENT,
        mdep(rollout={"maxSurge": "0%", "maxUnavailable": 0}),
        "spec.rollout",
        "spec.rollout.maxSurge and spec.rollout.maxUnavailable must not both be 0: nothing could be replaced",
    ),
    "host names without a gateway": (
        kinds.MODEL_DEPLOYMENT,
        mdep(exposure={"hostnames": ["m.example.com"]}),
        "spec.exposure",
        "spec.exposure.hostnames may only be set with spec.exposure.parentRefs: they are the route's",
    ),
    "a host name with a port": (
        kinds.MODEL_DEPLOYMENT,
        mdep(exposure={"parentRefs": [{"name": "g"}], "hostnames": ["m.example.com:80"]}),
        "spec.exposure.hostnames[0]",
        "must be a host name in lower case and without a port, such as llama.example.com or *.example.com",
    ),
    "no port": (
        kinds.MODEL_DEPLOYMENT,
        mdep(exposure={"endpointPicker": {"port": 0}}),
        "spec.exposure.endpointPicker.port",
        "should be greater than or equal to 1",
    ),
    "no part of a rollout": (
        kinds.MODEL_DEPLOYMENT,
        mdep(rollout={"maxSurge": "half"}),
        "spec.rollout.maxSurge",
        "should match",
    ),
}


@pytest.mark.parametrize(("kind", "obj", "field", "says"), REFUSED.values(), ids=REFUSED)
async def test_refused_with_a_message(kube: Kube, kind: Any, obj: Any, field: str, says: str) -> None:
    with pytest.raises(ApiError) as error:
        await dry_run(kube, kind, obj)
    assert (error.value.status, error.value.reason) == (422, "Invalid")
    assert f"{field}: " in error.value.message
    assert says in error.value.message


def _messages(schema: Any) -> set[str]:
    found = {r["message"] for r in schema.get("x-kubernetes-validations", ())}
    children = [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]
    return found.union(*map(_messages, children))


def test_every_rule_has_a_case_above() -> None:
    schemas = [d["spec"]["versions"][0]["schema"]["openAPIV3Schema"] for d in definitions()]
    rules = set().union(*map(_messages, schemas))
    elsewhere = {"spec.priority is immutable; make a new QoSClass with the other priority and move to it"}
    assert rules - {says for _, _, _, says in REFUSED.values()} == elsewhere


UNKNOWN = {
    "misspelt field": (kinds.QOS_CLASS, qos(reclaims="Never"), 'unknown field "spec.reclaims"'),
    "field of another kind": (kinds.GPU_POOL, pool(priority=1), 'unknown field "spec.priority"'),
    "misspelt below": (
        kinds.MODEL_DEPLOYMENT,
        mdep(classes=[{"qosClass": "a", "minReplica": 1}]),
        'unknown field "spec.classes[0].minReplica"',
    ),
}


@pytest.mark.parametrize(("kind", "obj", "says"), UNKNOWN.values(), ids=UNKNOWN)
async def test_unknown_fields_are_refused(kube: Kube, kind: Any, obj: Any, says: str) -> None:
    with pytest.raises(ApiError) as error:
        await dry_run(kube, kind, obj)
    assert error.value.status == 400
    assert says in error.value.message


async def test_priority_is_immutable(kube: Kube) -> None:
    name = f"test-{uuid.uuid4().hex[:8]}"
    await kube.create(kinds.QOS_CLASS, named(name, qos()))
    try:
        await kube.merge(kinds.QOS_CLASS, name, {"spec": {"priority": 5, "reclaim": "Always"}})
        with pytest.raises(ApiError) as error:
            await kube.merge(kinds.QOS_CLASS, name, {"spec": {"priority": 6}})
    finally:
        await kube.delete(kinds.QOS_CLASS, name)
    assert "spec.priority is immutable; make a new QoSClass with the other priority" in error.value.message
