"""From the cluster's objects to what the picker knows: who serves which name, and where."""

from typing import Any

import pytest

from tidegate.api.modeldeployment import ModelDeployment
from tidegate.core.types import Objectives, QoSClass
from tidegate.facts.endpoints import World, world

CLASSES = {name: QoSClass(name, rank) for rank, name in enumerate(("low", "mid", "high"))}


def deployment(name: str = "m", namespace: str = "ns", *, day: int = 1, **spec: Any) -> ModelDeployment:
    full: dict[str, Any] = {
        "model": {"name": name, "uri": "hf://x/y"},
        "engine": {"type": "vLLM"},
        "classes": [{"qosClass": "high"}, {"qosClass": "low"}],
    }
    meta = {"name": name, "namespace": namespace, "creationTimestamp": f"2026-01-{day:02d}T00:00:00Z"}
    return ModelDeployment.from_object({"metadata": meta, "spec": full | spec})


def pod(
    model: str = "m",
    ip: str | None = "10.0.0.1",
    *,
    namespace: str = "ns",
    ports: dict[str, int] | None = None,
    ready: bool = True,
    phase: str = "Running",
    labels: dict[str, str] | None = None,
    **meta: Any,
) -> dict[str, Any]:
    named = [{"name": n, "containerPort": p} for n, p in (ports or {"http": 8000}).items()]
    status: dict[str, Any] = {
        "phase": phase,
        "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
    }
    if ip:
        status["podIP"] = ip
    own = {"tidegate.dev/model": model, "tidegate.dev/qos-class": "low"}
    return {
        "metadata": {
            "name": f"pod-{ip}",
            "namespace": namespace,
            "labels": own if labels is None else labels,
            "annotations": {"tidegate.dev/slots": "16", "tidegate.dev/step-tokens": "512"},
            **meta,
        },
        "spec": {"containers": [{"name": "engine", "ports": named}]},
        "status": status,
    }


def see(deployments: list[ModelDeployment], *pods: dict[str, Any], default: str | None = "mid") -> World:
    found = world(deployments, pods, CLASSES, default)
    assert found == world(deployments[::-1], pods[::-1], CLASSES, default)
    return found


def test_a_ready_pod_is_an_endpoint() -> None:
    found = see([deployment()], pod())
    [endpoint] = found.endpoints
    assert (endpoint.address, endpoint.model, endpoint.lane) == ("10.0.0.1:8000", ("ns", "m"), "low")
    assert (endpoint.slots, endpoint.chunk, endpoint.ready, endpoint.draining) == (16, 512, True, False)
    assert found.metrics_urls == {"10.0.0.1:8000": "http://10.0.0.1:8000/metrics"}


def test_a_model_s_own_objectives_lie_over_its_classes() -> None:
    own = {"perThousandPromptTokens": "100ms", "completion": "9s", "attainmentPercent": 90}
    one = deployment(classes=[{"qosClass": "high", "objectives": own}, {"qosClass": "low"}])
    base = Objectives(ttft_s=2.0, completion_s=60.0)
    classes = {**CLASSES, "high": QoSClass("high", 2, objectives=base)}
    [model] = world([one], [], classes, None).flow_models.values()
    assert model.objectives == {
        "high": Objectives(2.0, per_thousand_prompt_tokens_s=0.1, completion_s=9.0, attainment=0.9)
    }


PODS = [
    ("not ready", pod(ready=False), ("10.0.0.1:8000", False, False)),
    ("going", pod(deletionTimestamp="2026-01-01T00:00:00Z"), ("10.0.0.1:8000", True, True)),
    ("no address yet", pod(ip=None), None),
    ("ended", pod(phase="Failed"), None),
    ("no port called http", pod(ports={"grpc": 8001}), None),
    ("another model's", pod("other"), None),
    ("in another namespace", pod(namespace="elsewhere"), None),
    ("IPv6", pod(ip="fd00::1"), ("[fd00::1]:8000", True, False)),
]


@pytest.mark.parametrize(("raw", "expected"), [p[1:] for p in PODS], ids=[p[0] for p in PODS])
def test_pods(raw: dict[str, Any], expected: tuple[str, bool, bool] | None) -> None:
    found = [(e.address, e.ready, e.draining) for e in see([deployment()], raw).endpoints]
    assert found == ([expected] if expected else [])


@pytest.mark.parametrize(
    ("annotation", "expected"), [("8", 8), ("0", 256), ("many", 256), ("", 256)], ids=str
)
def test_slots(annotation: str, expected: int) -> None:
    raw = pod(annotations={"tidegate.dev/slots": annotation})
    assert see([deployment()], raw).endpoints[0].slots == expected


def test_triton_s_metrics_have_their_own_port() -> None:
    found = see([deployment(engine={"type": "Triton"})], pod(ports={"http": 8000, "metrics": 8002}))
    assert found.metrics_urls == {"10.0.0.1:8000": "http://10.0.0.1:8002/metrics"}
    assert found.models["ns", "m"].protocol == "KServeV2"


def test_external_pods_are_found_by_their_own_labels() -> None:
    engine = {"type": "External", "endpoints": {"selector": {"matchLabels": {"app": "x"}}, "port": 9000}}
    found = see(
        [deployment(engine=engine)],
        pod(labels={"app": "x"}, ip="10.0.0.2"),
        pod(labels={"app": "y"}, ip="10.0.0.3"),
    )
    assert [(e.address, e.lane) for e in found.endpoints] == [("10.0.0.2:9000", "")]


def test_names_aliases_and_adapters_lead_to_the_model() -> None:
    model = {
        "name": "org/m",
        "uri": "hf://x/y",
        "aliases": ["m"],
        "adapters": [{"name": "a", "uri": "hf://x/a"}],
    }
    found = see([deployment(model=model)])
    for name in ("org/m", "m", "a"):
        served = found.find(name)
        assert served is not None
        assert served.key == ("ns", "m")
    assert found.find("M") is None


def test_of_two_that_want_a_name_the_older_has_it_and_it_is_said() -> None:
    found = see([deployment("m", "young", day=2), deployment("m", "old", day=1)])
    served = found.find("m")
    assert served is not None
    assert served.key == ("old", "m")
    assert found.notes == ("ModelDeployment young/m: the name m is served by old/m, which is older",)


@pytest.mark.parametrize(
    ("classes", "default", "expected"),
    [
        pytest.param([{"qosClass": "low"}, {"qosClass": "high"}], None, ("low", "high"), id="in order"),
        pytest.param([{"qosClass": "gold"}, {"qosClass": "high"}], None, ("high",), id="that exist"),
        pytest.param([], "mid", ("mid",), id="the default"),
        pytest.param([], None, (), id="none"),
    ],
)
def test_classes(classes: list[dict[str, str]], default: str | None, expected: tuple[str, ...]) -> None:
    found = see([deployment(classes=classes)], default=default)
    assert found.models["ns", "m"].classes == expected


GOING = pod(deletionTimestamp="2026-01-01T00:00:00Z")
STARTABLE: list[tuple[str, dict[str, Any], list[dict[str, Any]], bool]] = [
    ("can be scaled up", {}, [], True),
    ("a pod is coming", {"scaling": {"paused": True}}, [pod(ip=None, phase="Pending")], True),
    ("paused", {"scaling": {"paused": True}}, [], False),
    (
        "its last pod goes",
        {"scaling": {"paused": True}},
        [pod(deletionTimestamp="2026-01-01T00:00:00Z")],
        False,
    ),
    ("pinned to none", {"scaling": {"replicas": {"high": 0, "low": 0}}}, [], False),
    ("one lane may grow", {"scaling": {"replicas": {"high": 0}}}, [], True),
    ("none allowed", {"maxReplicas": 0}, [], False),
    ("the default class's lane", {"classes": []}, [], True),
]


@pytest.mark.parametrize(
    ("spec", "pods", "expected"), [s[1:] for s in STARTABLE], ids=[s[0] for s in STARTABLE]
)
def test_whether_waiting_makes_sense(
    spec: dict[str, Any], pods: list[dict[str, Any]], expected: bool
) -> None:
    assert see([deployment(**spec)], *pods).flow_models["ns", "m"].startable is expected


@pytest.mark.parametrize(
    ("notes", "lent", "draining"),
    [
        pytest.param({}, False, False, id="nothing said"),
        pytest.param({"tidegate.dev/standing": "lent"}, True, False, id="its GPUs may be asked back"),
        pytest.param({"tidegate.dev/standing": "spare"}, False, False, id="spare"),
        pytest.param({"tidegate.dev/standing": "reserved"}, False, False, id="reserved"),
        pytest.param({"tidegate.dev/draining": "2026-01-01T00:00:00Z"}, False, True, id="being emptied"),
    ],
)
def test_what_the_controller_notes_on_a_pod(notes: dict[str, str], lent: bool, draining: bool) -> None:
    [endpoint] = see([deployment()], pod(annotations=notes)).endpoints
    assert (endpoint.lent, endpoint.draining) == (lent, draining)
