"""The three kinds as pydantic models: reading, defaults, and what is said about mistakes."""

from datetime import UTC, datetime, timedelta

import pytest

from tidegate.api.common import InvalidObject, LabelSelector, format_duration, parse_duration
from tidegate.api.enforcement import NOT_YET, not_enforced
from tidegate.api.gpupool import GPUPool
from tidegate.api.modeldeployment import ClassStatus, ModelDeployment, replicas_line
from tidegate.api.qosclass import ObjectiveOverrides, QoSClass


def qos(**spec):
    return {"metadata": {"name": "c"}, "spec": {"priority": 5, **spec}}


def pool(**spec):
    base = {"nodeSelector": {"matchLabels": {"gpu": "yes"}}}
    return {"metadata": {"name": "p"}, "spec": base | spec}


def mdep(**spec):
    base = {"model": {"name": "m", "uri": "hf://org/m"}, "engine": {"type": "vLLM"}}
    return {"metadata": {"name": "m", "namespace": "team"}, "spec": base | spec}


DURATIONS = {
    "zero without a unit": ("0", timedelta(0), "0s"),
    "milliseconds": ("500ms", timedelta(milliseconds=500), "500ms"),
    "seconds": ("5s", timedelta(seconds=5), "5s"),
    "fraction": ("1.5s", timedelta(seconds=1.5), "1500ms"),
    "sum": ("1h30m", timedelta(minutes=90), "90m"),
    "days are hours": ("720h", timedelta(days=30), "720h"),
    "microseconds": ("250us", timedelta(microseconds=250), "250us"),
}


@pytest.mark.parametrize(("text", "value", "written"), DURATIONS.values(), ids=DURATIONS)
def test_durations_are_go_syntax(text, value, written):
    assert parse_duration(text) == value
    assert format_duration(value) == written
    assert parse_duration(written) == value


@pytest.mark.parametrize(
    "text", ["", "5", "5 s", "-5s", "2min", "1d", "s", "5sec", "9999999h", 5, None, "1h" * 11]
)
def test_anything_else_is_no_duration(text):
    with pytest.raises(ValueError, match="must be a duration with a unit, such as 500ms"):
        parse_duration(text)


SELECTORS = {
    "empty matches all": ({}, {}, True),
    "label equal": ({"matchLabels": {"a": "1"}}, {"a": "1", "b": "2"}, True),
    "label differs": ({"matchLabels": {"a": "1"}}, {"a": "2"}, False),
    "label absent": ({"matchLabels": {"a": "1"}}, {}, False),
    "In": ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1", "2"]}]}, {"a": "2"}, True),
    "In, absent": ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1"]}]}, {}, False),
    "NotIn": ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, {"a": "1"}, False),
    "NotIn, absent": ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, {}, True),
    "Exists": ({"matchExpressions": [{"key": "a", "operator": "Exists"}]}, {"a": ""}, True),
    "Exists, absent": ({"matchExpressions": [{"key": "a", "operator": "Exists"}]}, {}, False),
    "DoesNotExist": ({"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]}, {"a": ""}, False),
    "DoesNotExist, absent": ({"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]}, {}, True),
    "all must hold": (
        {"matchLabels": {"a": "1"}, "matchExpressions": [{"key": "b", "operator": "Exists"}]},
        {"a": "1"},
        False,
    ),
}


@pytest.mark.parametrize(("selector", "labels", "expected"), SELECTORS.values(), ids=SELECTORS)
def test_selectors_match_as_in_kubernetes(selector, labels, expected):
    assert LabelSelector.model_validate(selector).matches(labels) is expected


MISTAKES = {
    "required": (QoSClass, {"metadata": {"name": "c"}, "spec": {}}, "spec.priority is required"),
    "no spec": (QoSClass, {"metadata": {"name": "c"}}, "spec is required"),
    "misspelt": (
        QoSClass,
        qos(reclaims="Never"),
        "spec.reclaims is not a known field; did you mean reclaim?",
    ),
    "misspelt below": (
        QoSClass,
        qos(queue={"maxWaits": "5s"}),
        "spec.queue.maxWaits is not a known field; did you mean maxWait?",
    ),
    "misspelt in a list": (
        ModelDeployment,
        mdep(classes=[{"qosClass": "a", "minReplica": 1}]),
        "spec.classes[0].minReplica is not a known field; did you mean minReplicas?",
    ),
    "unknown": (QoSClass, qos(queue={"zzz": 1}), "known here: maxRequests, maxWait"),
    "not one of": (
        QoSClass,
        qos(reclaim="Sometimes"),
        "spec.reclaim must be one of 'Never', 'AboveMinimum' or",
    ),
    "too small": (QoSClass, qos(priority=-1), "spec.priority must be at least 0, not -1"),
    "too large": (
        QoSClass,
        qos(minimumSharePercent=101),
        "spec.minimumSharePercent must be at most 100, not 101",
    ),
    "no unit": (QoSClass, qos(minRuntime=30), "spec.minRuntime must be a duration with a unit"),
    "zero objective": (
        QoSClass,
        qos(objectives={"timeToFirstToken": "0s"}),
        "spec.objectives.timeToFirstToken must be longer than 0s",
    ),
    "index": (
        GPUPool,
        pool(
            reservations=[
                {"name": "a", "qosClass": "a", "gpus": 1},
                {"name": "b", "qosClass": "b", "gpus": -1},
            ]
        ),
        "spec.reservations[1].gpus must be at least 0, not -1",
    ),
    "both sizes": (
        GPUPool,
        pool(reservations=[{"name": "a", "qosClass": "a", "gpus": 1, "sharePercent": 5}]),
        "spec.reservations[0] must set exactly one of gpus and sharePercent",
    ),
    "name": (
        GPUPool,
        pool(reservations=[{"name": "A b", "qosClass": "a", "gpus": 1}]),
        "spec.reservations[0].name must match ^[a-z0-9]",
    ),
    "too long": (GPUPool, pool(topologyKey="k" * 400), "spec.topologyKey may hold at most 317 characters"),
    "External without endpoints": (
        ModelDeployment,
        mdep(engine={"type": "External"}),
        "spec.engine must set endpoints when type is External, and only then",
    ),
    "several": (
        QoSClass,
        qos(priority=-1, reclaim="x"),
        "spec.priority must be at least 0, not -1; spec.reclaim",
    ),
}


@pytest.mark.parametrize(("kind", "raw", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_name_the_field_and_the_fix(kind, raw, message):
    with pytest.raises(InvalidObject) as error:
        kind.from_object(raw)
    assert message in str(error.value)


def test_defaults_of_a_class():
    spec = QoSClass.from_object(qos()).spec
    assert (spec.reclaim, spec.min_runtime) == ("Never", timedelta(0))
    assert (spec.queue.max_requests, spec.queue.max_wait) == (1000, timedelta(seconds=30))
    assert (spec.objectives.attainment_percent, spec.objectives.window) == (99, timedelta(hours=720))
    assert spec.objectives.time_to_first_token is None
    assert spec.tenant.from_ == "None"


def test_an_absent_selector_allows_no_namespace_and_an_empty_one_all():
    assert not QoSClass.from_object(qos()).spec.allows_namespace({"a": "1"})
    assert QoSClass.from_object(qos(allowedNamespaces={})).spec.allows_namespace({})
    chosen = QoSClass.from_object(qos(allowedNamespaces={"matchLabels": {"tier": "prod"}})).spec
    assert chosen.allows_namespace({"tier": "prod"})
    assert not chosen.allows_namespace({"tier": "dev"})


def test_default_class_is_claimed_by_annotation():
    raw = qos()
    raw["metadata"]["annotations"] = {"tidegate.dev/is-default-class": "true"}
    assert QoSClass.from_object(raw).claims_default
    assert not QoSClass.from_object(qos()).claims_default


def test_defaults_of_a_pool_and_shares_in_whole_gpus():
    obj = GPUPool.from_object(pool(reservations=[{"name": "a", "qosClass": "a", "sharePercent": 33}]))
    assert (obj.spec.mode, obj.spec.taint, obj.spec.devices.resource_name) == (
        "Enforce",
        True,
        "nvidia.com/gpu",
    )
    assert obj.spec.reclaim.drain_timeout == timedelta(seconds=30)
    assert obj.spec.reservations[0].gpus_of(16) == 5
    assert GPUPool.from_object(pool(devices={"deviceClassName": "gpu"})).spec.devices.resource_name is None


ENGINES = {
    "vLLM": ({"type": "vLLM"}, "OpenAI", "vllm/vllm-openai:v0.32.0", 8000),
    "Triton": ({"type": "Triton"}, "KServeV2", "nvcr.io/nvidia/tritonserver:24.10-py3", 8000),
    "own image": ({"type": "vLLM", "image": "mirror/vllm:1"}, "OpenAI", "mirror/vllm:1", 8000),
    "External": (
        {"type": "External", "endpoints": {"selector": {"matchLabels": {"app": "x"}}, "port": 9000}},
        "OpenAI",
        "",
        9000,
    ),
}


@pytest.mark.parametrize(("engine", "protocol", "image", "port"), ENGINES.values(), ids=ENGINES)
def test_engine_defaults(engine, protocol, image, port):
    made = ModelDeployment.from_object(mdep(engine=engine)).spec.engine
    assert (made.effective_protocol, made.effective_image, made.port) == (protocol, image, port)


def test_gpus_of_a_replica_and_served_names():
    obj = ModelDeployment.from_object(
        mdep(
            parallelism={"tensor": 4, "pipeline": 2},
            model={
                "name": "org/m",
                "aliases": ["m"],
                "uri": "hf://org/m",
                "adapters": [{"name": "sql", "uri": "hf://org/sql"}],
            },
        )
    )
    assert obj.gpus_per_replica == 8
    assert obj.spec.model.served_names == ("org/m", "m", "sql")


def test_objectives_of_a_model_lie_over_those_of_its_class():
    base = QoSClass.from_object(
        qos(objectives={"timeToFirstToken": "1s", "attainmentPercent": 95})
    ).spec.objectives
    merged = base.overridden(ObjectiveOverrides(time_to_first_token=timedelta(seconds=3)))
    assert (merged.time_to_first_token, merged.attainment_percent) == (timedelta(seconds=3), 95)
    assert base.overridden(None) == base


def test_metadata_and_status_pass_over_what_they_do_not_know():
    raw = qos()
    raw["metadata"] |= {"managedFields": [{}], "deletionTimestamp": "2026-01-02T03:04:05Z", "generation": 3}
    raw["status"] = {
        "usedBy": 2,
        "fromALaterVersion": True,
        "conditions": [{"type": "Ready", "status": "True"}],
    }
    obj = QoSClass.from_object(raw)
    assert obj.metadata.deletion_timestamp == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert (obj.metadata.generation, obj.status.used_by, obj.status.conditions[0].type) == (3, 2, "Ready")


def test_written_json_reads_back_the_same():
    obj = ModelDeployment.from_object(mdep(scaling={"scaleDownDelay": "10s", "replicas": {"a": 1}}))
    written = obj.spec.to_json()
    assert written["scaling"]["scaleDownDelay"] == "10s"
    assert ModelDeployment.from_object({"metadata": {"name": "m"}, "spec": written}).spec == obj.spec


def test_replicas_line_is_what_kubectl_get_shows():
    classes = [
        ClassStatus(qos_class="interactive", ready=2, desired=2),
        ClassStatus(qos_class="batch", desired=3),
    ]
    assert replicas_line(classes) == "interactive 2/2, batch 0/3"


UNENFORCED = {
    "nothing": (QoSClass, qos(), []),
    "default written out": (QoSClass, qos(minimumSharePercent=0, tenant={"from": "None"}), []),
    "share and tenant are": (QoSClass, qos(minimumSharePercent=5, tenant={"from": "Namespace"}), []),
    "objectives": (
        QoSClass,
        qos(
            objectives={
                "timeToFirstToken": "1s",
                "perThousandPromptTokens": "0.1s",
                "timePerOutputToken": "1s",
                "attainmentPercent": 95,
                "window": "24h",
            }
        ),
        [],
    ),
    "an object that is left out": (ModelDeployment, mdep(exposure={}), []),
    "in a list": (
        ModelDeployment,
        mdep(
            classes=[
                {"qosClass": "a"},
                {"qosClass": "b", "objectives": {"timeToFirstToken": "1s", "timePerOutputToken": "50ms"}},
            ]
        ),
        ["spec.classes[1].objectives.timePerOutputToken"],
    ),
    "plugin": (
        ModelDeployment,
        mdep(engine={"type": "vLLM", "qosScheduler": "Auto"}),
        ["spec.engine.qosScheduler"],
    ),
}


@pytest.mark.parametrize(("kind", "raw", "expected"), UNENFORCED.values(), ids=UNENFORCED)
def test_promises_not_kept_yet_are_named(kind, raw, expected):
    assert not_enforced(kind.from_object(raw)) == expected


def _alias_exists(kind, path):
    model = kind
    for step in path.split("."):
        field = next((f for f in model.model_fields.values() if f.alias == step.removesuffix("[]")), None)
        if field is None:
            return False
        inner = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((m for m in inner if hasattr(m, "model_fields")), None)
    return True


@pytest.mark.parametrize(("kind", "path"), [(k, p) for k, paths in NOT_YET.items() for p in paths])
def test_the_table_names_fields_that_exist(kind, path):
    assert _alias_exists(kind, path)
