"""Paths, bodies and error shapes of the two protocols; classes; reports of engines."""

from typing import Any

import orjson
import pytest

from tidegate.core.load import EngineReport
from tidegate.core.types import QoSClass, TenantFrom, Tenants
from tidegate.facts.endpoints import ServedModel
from tidegate.picker import classify
from tidegate.picker.engines import read_report
from tidegate.picker.identity import Caller
from tidegate.picker.protocols import (
    KSERVE,
    OPENAI,
    BadRequestError,
    Wants,
    error_body,
    read_body,
    route,
    with_priority,
)

ROUTES = [
    ("POST", "/v1/chat/completions", OPENAI, Wants.INFERENCE, None),
    ("POST", "/v1/completions?x=1", OPENAI, Wants.INFERENCE, None),
    ("GET", "/v1/chat/completions", OPENAI, Wants.NOTHING_WE_HAVE, None),
    ("POST", "/v1/load_lora_adapter", OPENAI, Wants.NOTHING_WE_HAVE, None),
    ("POST", "/v1/chat/completions/../load_lora_adapter", OPENAI, Wants.NOTHING_WE_HAVE, None),
    ("GET", "/v1/models", OPENAI, Wants.MODEL_LIST, None),
    ("GET", "/v1/models/org%2Fm", OPENAI, Wants.MODEL, "org/m"),
    ("GET", "/metrics", OPENAI, Wants.NOTHING_WE_HAVE, None),
    ("POST", "/v2/models/m/infer", KSERVE, Wants.INFERENCE, "m"),
    ("POST", "/v2/models/m/versions/3/infer", KSERVE, Wants.INFERENCE, "m"),
    ("POST", "/v2/models/m/generate_stream", KSERVE, Wants.INFERENCE, "m"),
    ("POST", "/v2/repository/models/m/unload", KSERVE, Wants.NOTHING_WE_HAVE, None),
    ("GET", "/v2/models/m/ready", KSERVE, Wants.MODEL_READY, "m"),
    ("GET", "/v2/health/live", KSERVE, Wants.HEALTH, None),
]


@pytest.mark.parametrize(("method", "path", "protocol", "wants", "model"), ROUTES)
def test_route(method: str, path: str, protocol: str, wants: Wants, model: str | None) -> None:
    found = route(method, path)
    assert (found.protocol, found.wants, found.model) == (protocol, wants, model)


BODIES: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
    ("text in messages", {"messages": [{"role": "user", "content": "x" * 396}], "max_tokens": 7}, (100, 7)),
    ("text in parts", {"messages": [{"content": [{"type": "text", "text": "x" * 36}]}]}, (10, 256)),
    ("token ids", {"prompt": [1, 2, 3], "max_tokens": 5}, (3, 5)),
    ("newer name of the limit", {"prompt": "abcd", "max_completion_tokens": 9}, (1, 9)),
    ("several answers", {"prompt": "abcd", "max_tokens": 9, "n": 3}, (1, 27)),
    ("nonsense is the engine's to refuse", {"prompt": "abcd", "max_tokens": "many", "n": -1}, (1, 256)),
    ("not ASCII", {"prompt": "潮" * 4}, (3, 256)),
    ("nothing", {}, (1, 256)),
]


@pytest.mark.parametrize(("body", "expected"), [b[1:] for b in BODIES], ids=[b[0] for b in BODIES])
def test_openai_body(body: dict[str, Any], expected: tuple[int, int]) -> None:
    found = read_body(route("POST", "/v1/chat/completions"), orjson.dumps({"model": "m", **body}))
    assert (found.model, found.prompt_tokens, found.output_tokens) == ("m", *expected)


def test_embeddings_make_no_output() -> None:
    found = read_body(route("POST", "/v1/embeddings"), b'{"model":"m","input":"abcd"}')
    assert (found.prompt_tokens, found.output_tokens) == (1, 0)


def test_kserve_body_names_its_size() -> None:
    way = route("POST", "/v2/models/m/generate")
    found = read_body(way, b'{"text_input":"12345678","parameters":{"max_tokens":5}}')
    assert (found.model, found.prompt_tokens, found.output_tokens) == ("m", 2, 5)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        pytest.param(b"", "not valid JSON", id="empty"),
        pytest.param(b"\xff\xfe", "not valid JSON", id="bytes"),
        pytest.param(b"[]", "JSON object", id="a list"),
        pytest.param(b'{"model":3}', "model must be a string", id="model is a number"),
        pytest.param(b'{"model":""}', "model must be a string", id="model is empty"),
    ],
)
def test_bad_bodies(body: bytes, words: str) -> None:
    with pytest.raises(BadRequestError, match=words):
        read_body(route("POST", "/v1/chat/completions"), body)


def test_priority_goes_into_triton_s_json_and_leaves_tensors_alone() -> None:
    assert with_priority(b'{"id":"1"}', 2) == (b'{"id":"1","parameters":{"priority":2}}', None)
    body, length = with_priority(b'{"parameters":{"a":1}}\x00\x01', 1, 22)
    assert body == b'{"parameters":{"a":1,"priority":1}}\x00\x01'
    assert length == 35


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (429, "rate_limit_error"),
        (503, "server_error"),
    ],
)
def test_error_shape(status: int, kind: str) -> None:
    error = orjson.loads(error_body(OPENAI, status, "why"))["error"]
    assert (error["type"], error["message"], error["param"]) == (kind, "why", None)


# ── classes ─────────────────────────────────────────────────────────────────────────────────────

MODEL = ServedModel(("ns", "m"), ("m",), ("low", "high"), "OpenAI", "vLLM")
CLASSES = {"high": QoSClass("high", 900), "low": QoSClass("low", 10)}


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        pytest.param(None, ("low", "high"), id="in the model's order"),
        pytest.param("high", ("high",), id="the one that is named"),
    ],
)
def test_candidates(named: str | None, expected: tuple[str, ...]) -> None:
    assert classify.candidates(MODEL, named) == expected


def test_classes_that_cannot_be_had() -> None:
    assert "it serves low, high" in classify.candidates(MODEL, "gold").message  # type: ignore[union-attr]
    nothing = ServedModel(("ns", "m"), ("m",), (), "OpenAI", "vLLM")
    assert "serves no class" in classify.candidates(nothing, None).message  # type: ignore[union-attr]


def test_scales_of_the_engines() -> None:
    assert classify.vllm_priority(CLASSES["high"]) < classify.vllm_priority(CLASSES["low"])
    assert classify.vllm_priority(QoSClass("top", 1_000_000_000)) == 0
    assert [classify.triton_priority(c, MODEL, CLASSES) for c in ("high", "low")] == [1, 2]
    left = {"low": CLASSES["low"]}
    assert [classify.triton_priority(c, MODEL, left) for c in ("high", "low")] == [2, 1], "one is gone"


def test_a_trusted_gateway_that_names_no_class_gets_the_least() -> None:
    assert classify.trusted(MODEL, None, CLASSES) == "low"
    assert classify.trusted(MODEL, "high", CLASSES) == "high"


ROBOT = "system:serviceaccount:team-a:robot"
WHO = {
    "nobody asks": (TenantFrom.NONE, ROBOT, {"x-team": "red"}, ""),
    "namespace of the calling ServiceAccount": (TenantFrom.NAMESPACE, ROBOT, {}, "team-a"),
    "else of the model": (TenantFrom.NAMESPACE, "ann", {}, "ns"),
    "user": (TenantFrom.USER, "ann", {"x-team": "red"}, "ann"),
    "header": (TenantFrom.HEADER, ROBOT, {"x-team": " red "}, "red"),
    "header before its aliases": (
        TenantFrom.HEADER, "", {"x-gateway-inference-fairness-id": "blue", "x-team": "red"}, "red",
    ),
    "alias": (TenantFrom.HEADER, "", {"x-gateway-inference-fairness-id": "blue"}, "blue"),
    "the other alias": (TenantFrom.HEADER, "", {"x-team": "", "x-llm-d-inference-fairness-id": "b"}, "b"),
    "no header": (TenantFrom.HEADER, ROBOT, {}, ""),
}  # fmt: skip


@pytest.mark.parametrize(("source", "user", "headers", "expected"), WHO.values(), ids=WHO)
def test_who_the_tenant_is(source: TenantFrom, user: str, headers: dict[str, str], expected: str) -> None:
    qos = QoSClass("c", 1, tenants=Tenants(source, "x-team"))
    assert classify.tenant(qos, Caller(user), MODEL, headers) == expected


def test_a_tenant_that_the_gateway_has_checked_goes_before_a_header() -> None:
    caller = Caller("ann", tenant="acme")
    for source, expected in ((TenantFrom.HEADER, "acme"), (TenantFrom.USER, "ann"), (TenantFrom.NONE, "")):
        qos = QoSClass("c", 1, tenants=Tenants(source, "x-team"))
        assert classify.tenant(qos, caller, MODEL, {"x-team": "red"}) == expected


def test_a_long_name_of_a_tenant_is_kept_by_its_digest() -> None:
    qos = QoSClass("c", 1, tenants=Tenants(TenantFrom.HEADER, "x-team"))
    names = {classify.tenant(qos, Caller(""), MODEL, {"x-team": "x" * 5000 + end}) for end in "ab"}
    assert [len(name) for name in names] == [64, 64]


def test_the_first_class_header_counts() -> None:
    both = {"x-gateway-inference-objective": "b", "x-tidegate-qos": " a "}
    assert classify.named_class(both) == "a"
    assert classify.named_class({"x-llm-d-inference-objective": ""}) is None


# ── what engines report ─────────────────────────────────────────────────────────────────────────

VLLM = """
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:kv_cache_usage_perc{engine="0"} 0.5
vllm:kv_cache_usage_perc{engine="1"} 0.1
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="100"} 1.0
vllm:cache_config_info{block_size="16",engine="1",num_gpu_blocks="100"} 1.0
vllm:time_to_first_token_seconds_bucket{le="0.1"} 4
"""
UNMEASURED = """
vllm:num_requests_running 0
vllm:cache_config_info{block_size="16",num_gpu_blocks="None"} 1
"""
REPORTS = [
    ("vLLM with two ranks", VLLM, EngineReport(9.0, 5, 1, 0.3, 3200)),
    (
        "vLLM that has not measured its memory",
        UNMEASURED,
        EngineReport(9.0, 0, 0),
    ),
    ("Triton", 'nv_inference_pending_request_count{model="m"} 4\n', EngineReport(9.0, 0, 4)),
    ("something else", "go_goroutines 4\n", None),
]


@pytest.mark.parametrize(("text", "expected"), [r[1:] for r in REPORTS], ids=[r[0] for r in REPORTS])
def test_report(text: str, expected: EngineReport | None) -> None:
    assert read_report(text, 9.0) == expected


@pytest.mark.parametrize(
    ("path", "body", "streamed"),
    [
        pytest.param("/v1/chat/completions", b'{"model":"m","stream":true}', True, id="OpenAI, streamed"),
        pytest.param("/v1/chat/completions", b'{"model":"m","stream":false}', False, id="OpenAI, whole"),
        pytest.param("/v1/completions", b'{"model":"m"}', False, id="OpenAI, nothing said"),
        pytest.param("/v2/models/m/generate_stream", b"{}", True, id="Triton, streamed"),
        pytest.param("/v2/models/m/generate", b'{"stream":true}', False, id="Triton, whole"),
        pytest.param("/v2/models/m/infer", b"{}", False, id="KServe v2"),
    ],
)
def test_whether_the_answer_is_streamed(path: str, body: bytes, streamed: bool) -> None:
    assert read_body(route("POST", path), body).streamed is streamed
