"""The generated CRDs: what a structural schema must be, and what we promise beyond it."""

import pytest

from tidegate.api.crd import definitions

CRDS = {d["spec"]["names"]["kind"]: d for d in definitions()}


def _root(crd):
    return crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def _nodes(schema, path=""):
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from _nodes(child, f"{path}.{name}")
    for key, mark in (("items", "[]"), ("additionalProperties", "{}")):
        if isinstance(schema.get(key), dict):
            yield from _nodes(schema[key], path + mark)


NODES = [(k, p, s) for k, crd in CRDS.items() for p, s in _nodes(_root(crd))]
OURS = [(k, p, s) for k, p, s in NODES if p.startswith((".spec", ".status"))]


@pytest.mark.parametrize("key", ["$defs", "$ref", "anyOf", "allOf", "oneOf", "title", "const", "nullable"])
def test_schemas_are_structural(key):
    assert [f"{k}{p}" for k, p, s in NODES if key in s] == []


def test_every_node_has_a_type():
    untyped = [f"{k}{p}" for k, p, s in NODES if "type" not in s and not s.get("x-kubernetes-int-or-string")]
    assert untyped == []


def test_every_field_has_a_description():
    fields = [(k, p, s) for k, p, s in OURS if not p.endswith(("[]", "{}"))]
    assert [f"{k}{p}" for k, p, s in fields if not s.get("description")] == []


def test_every_list_map_and_string_is_bounded():
    loose = []
    for kind, path, schema in OURS:
        is_map = "additionalProperties" in schema
        if (
            (schema.get("type") == "array" and "maxItems" not in schema)
            or (is_map and "maxProperties" not in schema)
            or (schema.get("type") == "string" and not {"maxLength", "enum", "format"} & schema.keys())
            or (schema.get("x-kubernetes-int-or-string") and "maxLength" not in schema)
        ):
            loose.append(f"{kind}{path}")
    assert loose == []


def test_every_integer_of_a_spec_is_bounded():
    numbers = [(k, p, s) for k, p, s in OURS if p.startswith(".spec") and s.get("type") == "integer"]
    assert [f"{k}{p}" for k, p, s in numbers if not {"minimum", "maximum"} <= s.keys()] == []


def test_keys_of_list_maps_are_required():
    for kind, path, schema in OURS:
        for key in schema.get("x-kubernetes-list-map-keys", ()):
            assert key in schema["items"]["required"], f"{kind}{path}"


def test_every_list_says_how_it_merges_where_people_share_it():
    lists = {f"{k}{p}": s.get("x-kubernetes-list-type", "") for k, p, s in OURS if s.get("type") == "array"}
    assert lists["GPUPool.spec.reservations"] == "map"
    assert lists["ModelDeployment.spec.classes"] == "map"
    assert lists["QoSClass.status.conditions"] == "map"


def test_a_status_has_no_defaults():
    assert [f"{k}{p}" for k, p, s in OURS if p.startswith(".status") and "default" in s] == []


DEFAULTS = {
    "QoSClass.spec.reclaim": "Never",
    "QoSClass.spec.minRuntime": "0s",
    "QoSClass.spec.queue": {},
    "QoSClass.spec.queue.maxWait": "30s",
    "QoSClass.spec.objectives.attainmentPercent": 99,
    "QoSClass.spec.objectives.window": "720h",
    "GPUPool.spec.mode": "Enforce",
    "GPUPool.spec.taint": True,
    "GPUPool.spec.devices": {"resourceName": "nvidia.com/gpu"},
    "GPUPool.spec.reclaim.drainTimeout": "30s",
    "ModelDeployment.spec.parallelism.tensor": 1,
    "ModelDeployment.spec.scaling.scaleDownDelay": "5m",
    "ModelDeployment.spec.classes[].minReplicas": 0,
}


@pytest.mark.parametrize(("path", "default"), DEFAULTS.items(), ids=DEFAULTS)
def test_defaults_show_in_the_schema(path, default):
    assert {f"{k}{p}": s for k, p, s in NODES}[path]["default"] == default


def test_overrides_of_objectives_have_no_defaults_of_their_own():
    nodes = {f"{k}{p}": s for k, p, s in NODES}
    assert "default" not in nodes["ModelDeployment.spec.classes[].objectives.window"]


NAMES = {
    "QoSClass": ("qosclasses", "qos", "Cluster"),
    "GPUPool": ("gpupools", "gpool", "Cluster"),
    "ModelDeployment": ("modeldeployments", "mdep", "Namespaced"),
}


@pytest.mark.parametrize(("kind", "expected"), NAMES.items(), ids=NAMES)
def test_names_scope_and_columns(kind, expected):
    spec = CRDS[kind]["spec"]
    names, version = spec["names"], spec["versions"][0]
    assert (names["plural"], names["shortNames"][0], spec["scope"]) == expected
    assert names["categories"] == ["tidegate"]
    assert version["subresources"] == {"status": {}}
    columns = {c["name"]: c for c in version["additionalPrinterColumns"]}
    assert columns["Ready"]["jsonPath"] == '.status.conditions[?(@.type=="Ready")].status'
    assert columns["Age"]["type"] == "date"
    assert (columns["Reason"]["priority"], columns["Message"]["priority"]) == (1, 1)


def test_pod_overrides_are_without_a_schema():
    node = {f"{k}{p}": s for k, p, s in NODES}["ModelDeployment.spec.podOverrides"]
    assert node["type"] == "object"
    assert node["x-kubernetes-preserve-unknown-fields"] is True


def test_generating_twice_gives_the_same():
    assert definitions() == definitions()
