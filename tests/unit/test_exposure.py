"""What exposes a model to gateways of others, against the field names that are published for it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from support.builders import external, mdep
from support.gateway_api import check
from tidegate.adapters.kube import Kind
from tidegate.adapters.kube import kinds as k
from tidegate.api.common import InvalidObject
from tidegate.api.modeldeployment import ModelDeployment
from tidegate.controller.exposure import rendered

ROOT = Path(__file__).parents[2]
GATEWAYS = {"parentRefs": [{"name": "front"}]}
Object = dict[str, Any]


def expose(raw: Object, **exposure: Any) -> Object:
    return {**raw, "metadata": {**raw["metadata"], "uid": "u"}, "spec": {**raw["spec"], "exposure": exposure}}


def render(raw: Object) -> dict[str, Object]:
    wanted, problem = rendered(ModelDeployment.from_object(raw))
    assert problem is None
    return {kind.name: whole(kind, obj) for kind, obj in wanted}


def whole(kind: Kind, obj: Object) -> Object:
    return {"apiVersion": kind.api_version, "kind": kind.name, **obj}


TRITON = {"engine": {"type": "Triton"}, "model": {"name": "ranker", "uri": "pvc://models"}}
CASES = {
    "a vLLM model": (expose(mdep(), **GATEWAYS), {"tidegate.dev/model": "m"}, 8000),
    "with a port of its own": (
        expose(mdep(engine={"type": "vLLM", "args": ["--port=9000"]}), **GATEWAYS),
        {"tidegate.dev/model": "m"},
        9000,
    ),
    "a Triton model": (expose(mdep(**TRITON), **GATEWAYS), {"tidegate.dev/model": "m"}, 8000),
    "engines of others": (expose(external(), **GATEWAYS), {"app": "x"}, 8000),
}


@pytest.mark.parametrize(("raw", "labels", "port"), CASES.values(), ids=CASES)
def test_a_pool_selects_what_the_picker_serves(raw: Object, labels: Object, port: int) -> None:
    made = render(raw)
    assert [check(o) for o in made.values()] == [[], []]
    pool = made["InferencePool"]
    assert pool["spec"] == {
        "selector": {"matchLabels": labels},
        "targetPorts": [{"number": port}],
        "endpointPickerRef": {
            "name": "tidegate-picker",
            "port": {"number": 9002},
            "failureMode": "FailClose",
        },
    }
    [owner] = pool["metadata"]["ownerReferences"]
    assert owner["uid"] == "u"
    [backend] = made["HTTPRoute"]["spec"]["rules"][0]["backendRefs"]
    assert backend["name"] == pool["metadata"]["name"]


def test_the_picker_can_be_another_service() -> None:
    picker = {"service": "own", "port": 443, "failureMode": "FailOpen"}
    made = render(expose(mdep(), endpointPicker=picker))
    assert made["InferencePool"]["spec"]["endpointPickerRef"] == {
        "name": "own",
        "port": {"number": 443},
        "failureMode": "FailOpen",
    }
    assert "HTTPRoute" not in made


@pytest.mark.parametrize("exposure", [{}, {"parentRefs": []}])
def test_nothing_is_made_where_it_is_not_asked_for(exposure: Object) -> None:
    assert rendered(ModelDeployment.from_object(expose(mdep(), **exposure))) == ([], None)
    assert rendered(ModelDeployment.from_object(mdep())) == ([], None)


def test_a_route_takes_what_has_one_of_the_model_s_names() -> None:
    model = {"name": "org/m", "uri": "hf://org/m", "aliases": ["m"]}
    spec = render(expose(mdep(model=model), **GATEWAYS))["HTTPRoute"]["spec"]
    assert [m["headers"][0]["value"] for r in spec["rules"] for m in r["matches"]] == ["org/m", "m"]
    assert {m["headers"][0]["name"] for r in spec["rules"] for m in r["matches"]} == {"X-Gateway-Model-Name"}
    assert "hostnames" not in spec
    kserve = render(expose(mdep(**TRITON), **GATEWAYS))["HTTPRoute"]["spec"]
    assert kserve["rules"][0]["matches"] == [{"path": {"type": "PathPrefix", "value": "/v2/models/ranker"}}]


def test_a_host_name_is_a_model_s_alone() -> None:
    parents = [{"name": "front", "namespace": "edge", "sectionName": "https"}]
    spec = render(expose(mdep(), parentRefs=parents, hostnames=["m.example.com"]))["HTTPRoute"]["spec"]
    assert spec["parentRefs"] == parents
    assert spec["hostnames"] == ["m.example.com"]
    assert [m for r in spec["rules"] for m in r["matches"]] == [
        {"path": {"type": "PathPrefix", "value": "/"}}
    ]


def test_no_rule_has_more_matches_than_may_be() -> None:
    adapters = [{"name": f"a{n}", "uri": f"hf://org/a{n}"} for n in range(64)]
    model = {"name": "m", "uri": "hf://org/m", "adapters": adapters}
    route = render(expose(mdep(model=model), **GATEWAYS))["HTTPRoute"]
    assert check(route) == []
    assert [len(r["matches"]) for r in route["spec"]["rules"]] == [64, 1]


def test_what_a_pool_cannot_say_is_told() -> None:
    selector = {"matchExpressions": [{"key": "app", "operator": "In", "values": ["x", "y"]}]}
    raw = mdep(engine={"type": "External", "endpoints": {"selector": selector, "port": 8000}})
    wanted, problem = rendered(ModelDeployment.from_object(expose(raw, **GATEWAYS)))
    assert (wanted, problem.reason) == ([], "NotExposable")
    assert "spec.engine.endpoints.selector" in problem.message
    slashed = mdep(**{**TRITON, "model": {"name": "org/ranker", "uri": "pvc://models"}})
    wanted, problem = rendered(ModelDeployment.from_object(expose(slashed, **GATEWAYS)))
    assert (wanted, problem.reason) == ([], "NotExposable")
    assert "hostnames" in problem.message
    assert set(render(expose(slashed, **GATEWAYS, hostnames=["r.example.com"]))) == {
        "InferencePool",
        "HTTPRoute",
    }


@pytest.mark.parametrize(
    ("exposure", "said"),
    [
        ({**GATEWAYS, "hostnames": ["m.example.com:80"]}, "hostnames"),
        ({"endpointPicker": {"port": 0}}, "port"),
        ({"endpointPicker": {"service": "a.b"}}, "service"),
        ({"endpointPicker": {"failureMode": "Open"}}, "failureMode"),
    ],
)
def test_what_is_wrong_is_an_error_that_names_the_field(exposure: Object, said: str) -> None:
    with pytest.raises(InvalidObject, match=said):
        ModelDeployment.from_object(expose(mdep(), **exposure))


# ── the examples ────────────────────────────────────────────────────────────────────────────────

FILES = sorted((ROOT / "examples/gateways").glob("*.yaml"))
KNOWN = {"ServiceAccount", "ClusterRoleBinding", "Deployment", "Service"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_examples_have_published_fields_only_and_fit_together(path: Path) -> None:
    objects = list(yaml.safe_load_all(path.read_text()))
    models = [o for o in objects if o["kind"] == "ModelDeployment"]
    others = [o for o in objects if o["kind"] not in {"ModelDeployment", *KNOWN}]
    assert {o["metadata"]["name"]: check(o) for o in others} == {o["metadata"]["name"]: [] for o in others}
    assert bool(models) == (path.stem != "picker")
    for model in models:
        made = render(model)
        assert {kind: check(o) for kind, o in made.items()} == {"InferencePool": [], "HTTPRoute": []}
        gateways = {o["metadata"]["name"] for o in others if o["kind"] == "Gateway"}
        assert {p["name"] for p in made["HTTPRoute"]["spec"]["parentRefs"]} <= gateways
        service, ports = _service()
        reference = made["InferencePool"]["spec"]["endpointPickerRef"]
        assert reference["name"] == service
        assert reference["port"]["number"] in ports
        policies = [o["spec"]["targetRef"] for o in others if "targetRef" in o["spec"]]
        assert {p["name"] for p in policies} <= {made["InferencePool"]["metadata"]["name"]}
        assert {o["metadata"].get("namespace") for o in others} <= {model["metadata"]["namespace"], None}


def _service() -> tuple[str, set[int]]:
    objects = yaml.safe_load_all((ROOT / "examples/gateways/picker.yaml").read_text())
    [service] = [o for o in objects if o["kind"] == "Service"]
    return service["metadata"]["name"], {p["port"] for p in service["spec"]["ports"]}


def test_the_check_can_fail() -> None:
    pool = render(expose(mdep(), **GATEWAYS))["InferencePool"]
    spec = pool["spec"]
    for wrong in (
        {**spec, "extensionRef": {"name": "x"}},
        {**spec, "targetPorts": []},
        {**spec, "targetPorts": [{"number": 0}]},
        {**spec, "selector": {"matchLabels": {}}},
        {**spec, "appProtocol": "h2"},
        {name: value for name, value in spec.items() if name != "selector"},
        {**spec, "endpointPickerRef": {"port": {"number": 9002}}},
        {**spec, "endpointPickerRef": "tidegate-picker"},
    ):
        assert check({**pool, "spec": wrong}), wrong
    assert check({**pool, "extra": 1})
    assert check({**pool, "kind": "InferenceModel"})


def test_kinds_are_where_they_are_published() -> None:
    assert (
        k.INFERENCE_POOL.path("ns", "m")
        == "/apis/inference.networking.k8s.io/v1/namespaces/ns/inferencepools/m"
    )
    assert k.HTTP_ROUTE.path("ns") == "/apis/gateway.networking.k8s.io/v1/namespaces/ns/httproutes"
