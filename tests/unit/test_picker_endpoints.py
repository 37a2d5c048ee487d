"""From the cluster's objects to what the picker knows: who serves which name, and where."""

from typing import Any

import pytest

from tidegate.api.modeldeployment import ModelDeployment
from tidegate.core.types import Objectives, QoSClass
from tidegate.facts.endpoints import World, names_taken, start_times, world

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


# ── the engine's names, ports and starts ────────────────────────────────────────────────────────

ALIASED = {"name": "m", "uri": "pvc://a/b", "aliases": ["n"]}
EXTERNAL = {"type": "External", "endpoints": {"selector": {"matchLabels": {"app": "x"}}, "port": 9000}}
NAMES: list[tuple[str, dict[str, Any], dict[str, str]]] = [
    ("vLLM is told the aliases", {"model": ALIASED}, {}),
    ("Triton is not", {"model": ALIASED, "engine": {"type": "Triton"}}, {"n": "m"}),
    ("nor is what somebody else runs", {"model": ALIASED, "engine": EXTERNAL}, {"n": "m"}),
    ("a name of its own", {"model": {**ALIASED, "engineName": "x/y"}}, {"m": "x/y", "n": "x/y"}),
    (
        "an adapter's own name",
        {"model": {**ALIASED, "adapters": [{"name": "sql", "engineName": "v7"}, {"name": "law"}]}},
        {"sql": "v7"},
    ),
]


@pytest.mark.parametrize(("spec", "expected"), [n[1:] for n in NAMES], ids=[n[0] for n in NAMES])
def test_what_the_engine_calls_it(spec: dict[str, Any], expected: dict[str, str]) -> None:
    served = see([deployment(**spec)]).models["ns", "m"]
    assert served.engine_names == expected
    for name in served.names:
        assert served.engine_name(name) == expected.get(name, name)


def test_an_adapter_is_known_by_the_engine_s_name() -> None:
    model = {**ALIASED, "adapters": [{"name": "sql", "engineName": "v7"}]}
    served = see([deployment(model=model)]).models["ns", "m"]
    assert [served.adapter(name) for name in ("m", "n", "sql")] == ["", "", "v7"]


def test_names_that_an_older_model_has() -> None:
    ours = deployment("m", "young", day=2, model={**ALIASED, "name": "m", "aliases": ["n", "free"]})
    theirs = deployment("m", "old", day=1, model=ALIASED)
    for order in ([ours, theirs], [theirs, ours]):
        assert names_taken(order) == {("young", "m"): {"m": ("old", "m"), "n": ("old", "m")}}


GRPC: list[tuple[str, dict[str, Any], dict[str, int], str | None]] = [
    ("Triton's port by its name", {"type": "Triton"}, {"http": 8000, "grpc": 8001}, "10.0.0.1:8001"),
    ("no such port", {"type": "Triton"}, {"http": 8000}, None),
    ("vLLM's is none of KServe", {"type": "vLLM"}, {"http": 8000, "grpc": 8001}, None),
]


@pytest.mark.parametrize(("engine", "ports", "expected"), [g[1:] for g in GRPC], ids=[g[0] for g in GRPC])
def test_where_grpc_is_spoken(engine: dict[str, Any], ports: dict[str, int], expected: str | None) -> None:
    found = see([deployment(engine=engine)], pod(ports=ports))
    assert found.grpc_addresses.get("10.0.0.1:8000") == expected
    assert found.ready(("ns", "m"), grpc=True) == (["10.0.0.1:8000"] if expected else [])
    assert found.ready() == ["10.0.0.1:8000"]


def test_an_external_engine_s_grpc_port_is_given() -> None:
    endpoints = {**EXTERNAL["endpoints"], "grpcPort": 9001}
    engine = {**EXTERNAL, "endpoints": endpoints, "protocol": "KServeV2"}
    found = see([deployment(engine=engine)], pod(labels={"app": "x"}))
    assert found.grpc_addresses == {"10.0.0.1:9000": "10.0.0.1:9001"}


def timed(started: str | None, ready_at: str | None, **more: Any) -> dict[str, Any]:
    """A pod with the times of its start, in seconds of one minute."""
    raw = pod(ready=ready_at is not None, **more)
    if started is not None:
        raw["status"]["startTime"] = f"2026-01-01T00:00:{started}Z"
    if ready_at is not None:
        raw["status"]["conditions"][0]["lastTransitionTime"] = f"2026-01-01T00:00:{ready_at}Z"
    return raw


STARTS: list[tuple[str, list[dict[str, Any]], float | None, float | None]] = [
    ("none ready", [timed("10", None)], None, 20.0),
    ("the shortest counts", [timed("00", "40"), timed("00", "12", ip="10.0.0.2")], 12.0, None),
    ("the foremost of two", [timed("25", None), timed("10", None, ip="10.0.0.2")], None, 20.0),
    (
        "one that goes is not coming",
        [timed("10", None, deletionTimestamp="2026-01-01T00:00:00Z")],
        None,
        None,
    ),
    ("one that failed is not coming", [timed("10", None, phase="Failed")], None, None),
    ("not begun", [timed(None, None)], None, None),
    ("both", [timed("00", "08"), timed("27", None, ip="10.0.0.2")], 8.0, 3.0),
]


@pytest.mark.parametrize(
    ("pods", "start_s", "starting_s"), [s[1:] for s in STARTS], ids=[s[0] for s in STARTS]
)
def test_how_long_a_start_takes(
    pods: list[dict[str, Any]], start_s: float | None, starting_s: float | None
) -> None:
    one = deployment()
    now_s = one.metadata.creation_timestamp.timestamp() + 30  # type: ignore[union-attr]
    starts = start_times([one], pods, {})
    assert starts.get(("ns", "m")) == start_s
    model = world([one], pods, CLASSES, None, starts, now_s).flow_models["ns", "m"]
    assert (model.start_s, model.starting_s) == (start_s, starting_s)


def test_a_start_is_remembered_while_nothing_is_ready_and_forgotten_with_its_model() -> None:
    known = {("ns", "m"): 12.0, ("ns", "gone"): 3.0}
    assert start_times([deployment()], [timed("00", None)], known) == {("ns", "m"): 12.0}
