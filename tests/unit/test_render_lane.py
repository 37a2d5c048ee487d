"""What a model and a class become: the Deployment of a lane, the Service, the PriorityClass."""

import copy
import itertools
from typing import Any

import pytest

from support.builders import mdep, named, pool, qos
from tidegate.api import names
from tidegate.api.gpupool import GPUPool
from tidegate.api.modeldeployment import ModelDeployment
from tidegate.api.qosclass import QoSClass
from tidegate.render.engine import RenderError
from tidegate.render.lane import lane
from tidegate.render.overrides import InvalidOverrideError
from tidegate.render.priorityclass import priority_class
from tidegate.render.service import service, service_name

Object = dict[str, Any]


def render(
    model: Object | None = None, qos_class: Object | None = None, gpus: Object | None = None
) -> Object:
    return lane(
        ModelDeployment.from_object(model or mdep()),
        QoSClass.from_object(qos_class or named("interactive", qos())),
        GPUPool.from_object(gpus or named("h100", pool())),
        3,
    )


def engine_of(deployment: Object) -> Object:
    return deployment["spec"]["template"]["spec"]["containers"][0]


def args(**engine: Any) -> list[str]:
    return engine_of(render(mdep(engine={"type": "vLLM", **engine})))["args"]


def test_a_lane_is_marked_placed_and_secured() -> None:
    deployment = render(mdep(parallelism={"tensor": 2, "pipeline": 2}))
    labels = {names.LABEL_MODEL: "m", names.LABEL_CLASS: "interactive", names.LABEL_POOL: "h100"}
    pod = deployment["spec"]["template"]
    spec = pod["spec"]
    assert deployment["spec"]["replicas"] == 3
    assert deployment["spec"]["selector"] == {"matchLabels": labels}
    assert labels.items() <= pod["metadata"]["labels"].items()
    assert spec["nodeSelector"] == {"gpu": "yes"}
    taint = {"key": names.TAINT_POOL, "operator": "Equal", "value": "h100", "effect": "NoSchedule"}
    assert taint in spec["tolerations"]
    assert engine_of(deployment)["resources"]["limits"] == {"nvidia.com/gpu": "4"}
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    context = engine_of(deployment)["securityContext"]
    assert context["readOnlyRootFilesystem"]
    assert not context["allowPrivilegeEscalation"]
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert {m["mountPath"] for m in engine_of(deployment)["volumeMounts"]} == {"/tmp", "/dev/shm"}
    assert "replicas" not in str(pod)


@pytest.mark.parametrize(
    ("spec", "drain", "seconds"),
    [
        pytest.param({"objectives": {"completion": "60s"}}, "5s", 60, id="never: completion objective"),
        pytest.param({}, "5s", 600, id="never without one: ten minutes"),
        pytest.param({"reclaim": "Always", "objectives": {"completion": "24h"}}, "5s", 5, id="always: drain"),
        pytest.param({"reclaim": "AboveMinimum"}, "30s", 30, id="above minimum: drain"),
    ],
)
def test_grace_is_what_may_happen_to_the_pod(spec: Object, drain: str, seconds: int) -> None:
    deployment = render(None, named("c", qos(**spec)), named("p", pool(reclaim={"drainTimeout": drain})))
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == seconds
    sleep = engine_of(deployment)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert 0 < sleep < seconds


def test_a_grace_too_short_to_share_has_no_pre_stop() -> None:
    deployment = render(
        None, named("c", qos(reclaim="Always")), named("p", pool(reclaim={"drainTimeout": "2s"}))
    )
    assert "lifecycle" not in engine_of(deployment)


def test_vllm_is_told_the_model_its_names_and_the_policy() -> None:
    model = {"name": "org/m", "aliases": ["short"], "uri": "hf://org/m", "revision": "abc"}
    found = engine_of(render(mdep(model=model, parallelism={"tensor": 2})))["args"]
    line = " ".join(found)
    for part in ("--model org/m", "--served-model-name org/m short", "--port 8000", "--tensor-parallel-size 2",  # noqa: E501
                 "--pipeline-parallel-size 1", "--scheduling-policy priority", "--revision abc"):  # fmt: skip
        assert part in line


@pytest.mark.parametrize(
    ("given", "gone", "end"),
    [
        pytest.param(["--max-num-seqs", "8"], [], ["--max-num-seqs", "8"], id="added at the end"),
        pytest.param(
            ["--scheduling-policy=fcfs"], ["priority"], ["--scheduling-policy=fcfs"], id="with equals"
        ),
        pytest.param(["--model", "x"], ["org/m"], ["--model", "x"], id="as two"),
        pytest.param(["-O3"], [], ["-O3"], id="a short flag"),
    ],
)
def test_a_users_arguments_win_and_ours_are_not_said_twice(
    given: list[str], gone: list[str], end: list[str]
) -> None:
    found = args(args=given)
    assert found[-len(end) :] == end
    assert not set(gone) & set(found)
    flags = [a.split("=")[0] for a in found if a.startswith("--")]
    assert len(flags) == len(set(flags))


@pytest.mark.parametrize(
    ("given", "slots"),
    [
        (["--max-num-seqs=16"], "16"),
        (["--max-num-seqs", "64"], "64"),
        (["--max-num-seqs", "many"], "256"),
        ([], "256"),
    ],
)
def test_slots_are_told_to_the_picker(given: list[str], slots: str) -> None:
    deployment = render(mdep(engine={"type": "vLLM", "args": given}))
    assert deployment["spec"]["template"]["metadata"]["annotations"][names.ANNOTATION_SLOTS] == slots


def test_tokens_of_a_step_are_told_to_the_picker() -> None:
    for given, tokens in ((["--max-num-batched-tokens=512"], "512"), ([], "2048")):
        deployment = render(mdep(engine={"type": "vLLM", "args": given}))
        told = deployment["spec"]["template"]["metadata"]["annotations"]
        assert told[names.ANNOTATION_STEP_TOKENS] == tokens


def test_a_users_port_is_the_containers_port() -> None:
    ports = engine_of(render(mdep(engine={"type": "vLLM", "args": ["--port=9000"]})))["ports"]
    assert ports == [{"name": "http", "containerPort": 9000}]


NAMES: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"aliases": ["n"]}, ["m", "n"], []),
    ({"aliases": ["n"], "engineName": "x/y"}, ["x/y"], []),
    (
        {
            "adapters": [
                {"name": "sql", "uri": "hf://a/b"},
                {"name": "law", "engineName": "v7", "uri": "s3://c/d"},
            ]
        },
        ["m"],
        ["sql=a/b", "v7=s3://c/d"],
    ),
]


@pytest.mark.parametrize(("fields", "served", "modules"), NAMES)
def test_vllm_is_told_the_names_it_answers_to(
    fields: dict[str, Any], served: list[str], modules: list[str]
) -> None:
    args = engine_of(render(mdep(model={"name": "m", "uri": "hf://a/m", **fields})))["args"]

    def values(flag: str) -> list[str]:
        rest = args[args.index(flag) + 1 :] if flag in args else []
        return list(itertools.takewhile(lambda a: not a.startswith("--"), rest))

    assert (values("--served-model-name"), values("--lora-modules")) == (served, modules)
    assert ("--enable-lora" in args) is bool(modules)


def test_triton_is_run_probed_and_measured_in_its_own_way() -> None:
    model = {"name": "m", "uri": "pvc://models/ranker"}
    deployment = render(mdep(model=model, engine={"type": "Triton"}))
    engine = engine_of(deployment)
    assert engine["command"] == ["tritonserver"]
    assert "--model-repository=/models/ranker" in engine["args"]
    assert engine["readinessProbe"]["httpGet"] == {"path": "/v2/health/ready", "port": "http"}
    assert engine["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"
    assert {p["name"]: p["containerPort"] for p in engine["ports"]} == {
        "http": 8000,
        "grpc": 8001,
        "metrics": 8002,
    }
    claim = {"name": "models", "persistentVolumeClaim": {"claimName": "models", "readOnly": True}}
    assert claim in deployment["spec"]["template"]["spec"]["volumes"]


def test_triton_cannot_read_hf() -> None:
    with pytest.raises(RenderError, match=r"spec.model.uri: Triton reads a model repository and not hf://"):
        render(mdep(engine={"type": "Triton"}))


def test_expressions_of_the_pool_become_affinity() -> None:
    expression = {"key": "gpu", "operator": "In", "values": ["a", "b"]}
    gpus = named("p", {**pool(), "spec": {"nodeSelector": {"matchExpressions": [expression]}}})
    affinity = render(None, None, gpus)["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    terms = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert terms == [{"matchExpressions": [expression]}]


def test_rendering_is_the_same_every_time() -> None:
    assert render() == render(copy.deepcopy(mdep()))


def test_service_and_priority_class() -> None:
    found = service(ModelDeployment.from_object(mdep()))
    assert found["spec"]["selector"] == {names.LABEL_MODEL: "m"}
    assert found["spec"]["ports"][0]["targetPort"] == "http"
    assert service_name("7b.chat") == "model-7b-chat"
    made = priority_class(QoSClass.from_object(named("batch", qos(priority=7))))
    assert (made["metadata"]["name"], made["value"]) == ("tidegate-batch", 7)


def override(**patch: Any) -> Object:
    return render(mdep(podOverrides=patch))["spec"]["template"]


def test_overrides_merge_by_key_and_keep_ours() -> None:
    toleration = {"key": "spot", "operator": "Exists"}
    sidecar = {"name": "log", "image": "log:1"}
    engine = {"name": "engine", "env": [{"name": "A", "value": "1"}]}
    found = override(
        metadata={"labels": {"team": "x"}},
        spec={"tolerations": [toleration], "containers": [engine, sidecar], "nodeSelector": {"zone": "a"}},
    )
    containers = {c["name"]: c for c in found["spec"]["containers"]}
    assert {"name": "A", "value": "1"} in containers["engine"]["env"]
    assert containers["engine"]["args"]
    assert containers["log"]["securityContext"]["readOnlyRootFilesystem"] is True
    assert found["spec"]["nodeSelector"] == {"gpu": "yes", "zone": "a"}
    assert len(found["spec"]["tolerations"]) == 3
    assert found["metadata"]["labels"]["team"] == "x"


WEAK = {  # one line a case reads best
    "privileged": ({"containers": [{"name": "engine", "securityContext": {"privileged": True}}]},
                   "containers[engine].securityContext.privileged may not be true"),
    "writable root": ({"containers": [{"name": "engine", "securityContext": {"readOnlyRootFilesystem": False}}]},  # noqa: E501
                      "readOnlyRootFilesystem must stay true"),
    "capability": ({"containers": [{"name": "engine", "securityContext": {"capabilities": {"add": ["X"]}}}]},
                   "capabilities.add may not be set"),
    "context taken away": ({"containers": [{"name": "engine", "securityContext": {"runAsNonRoot": None}}],
                            "securityContext": {"runAsNonRoot": None}}, "runAsNonRoot must stay true"),
    "root user": ({"securityContext": {"runAsUser": 0}}, "runAsUser may not be 0"),
    "unconfined": ({"securityContext": {"seccompProfile": {"type": "Unconfined"}}}, "seccompProfile.type"),
    "host network": ({"hostNetwork": True}, "hostNetwork may not be true"),
    "host path": ({"volumes": [{"name": "x", "hostPath": {"path": "/"}}]}, "volumes[x].hostPath is not allowed"),  # noqa: E501
    "host port": ({"containers": [{"name": "engine", "ports": [{"containerPort": 8000, "hostPort": 80}]}]},
                  "hostPort may not be set"),
    "root sidecar": ({"initContainers": [{"name": "i", "image": "i", "securityContext": {"runAsUser": 0}}]},
                     "initContainers[i].securityContext.runAsUser may not be 0"),
    "scheduler": ({"schedulerName": "default-scheduler"}, "schedulerName may not be set"),
    "priority": ({"priorityClassName": "system-node-critical"}, "priorityClassName may not be set"),
    "fewer GPUs": ({"containers": [{"name": "engine", "resources": {"limits": {"nvidia.com/gpu": "0"}}}]},
                   "containers[engine].resources.limits[nvidia.com/gpu] may not be changed"),
    "GPUs for a sidecar": ({"containers": [{"name": "x", "resources": {"limits": {"nvidia.com/gpu": "1"}}}]},
                           "containers[x].resources.limits[nvidia.com/gpu] may not be changed"),
    "no engine": ({"containers": [{"name": "engine", "$patch": "delete"}]}, "must keep the container named engine"),  # noqa: E501
    "nameless": ({"containers": [{}]}, "containers[0] must be an object with name"),
}  # fmt: skip


@pytest.mark.parametrize(("spec", "said"), WEAK.values(), ids=WEAK.keys())
def test_overrides_that_weaken_are_refused(spec: Object, said: str) -> None:
    with pytest.raises(InvalidOverrideError) as refused:
        override(spec=spec)
    assert str(refused.value).startswith("spec.podOverrides.")
    assert said in str(refused.value)


def test_overrides_may_not_take_our_labels() -> None:
    with pytest.raises(InvalidOverrideError, match="belongs to Tidegate"):
        override(metadata={"labels": {names.LABEL_CLASS: "interactive-2"}})
    with pytest.raises(InvalidOverrideError, match=r"spec.podOverrides.kind is not known"):
        override(kind="Pod")
