"""Paths and bodies of the protocols; classes; reports of engines."""

from typing import Any

import orjson
import pytest

from tidegate.core.load import EngineReport
from tidegate.core.types import QoSClass, TenantFrom, Tenants
from tidegate.facts.endpoints import ServedModel
from tidegate.picker import classify, protocols
from tidegate.picker.engines import read_report
from tidegate.picker.errors import KSERVE, OPENAI, Code, RefusedError
from tidegate.picker.identity import Caller
from tidegate.picker.protocols import (
    BYTES_PER_TOKEN,
    WALKED_BYTES,
    ListedModel,
    Reads,
    Wants,
    engine_path,
    for_engine,
    model_list,
    read_body,
    read_form,
    route,
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
    *(
        ("POST", path, OPENAI, Wants.INFERENCE, None)
        for path in (
            "/v1/responses",
            "/v1/embeddings",
            "/v1/rerank",
            "/rerank",
            "/v2/rerank",
            "/v1/score",
            "/score",
            "/classify",
            "/pooling",
            "/v1/audio/transcriptions",
            "/v1/audio/translations",
        )
    ),
    ("POST", "/tokenize", OPENAI, Wants.ASIDE, None),
    ("POST", "/detokenize", OPENAI, Wants.ASIDE, None),
    ("GET", "/tokenize", OPENAI, Wants.NOTHING_WE_HAVE, None),
    ("GET", "/v1/responses/resp_1", OPENAI, Wants.NOTHING_WE_HAVE, None),
    ("GET", "/v2", KSERVE, Wants.SERVER, None),
    ("GET", "/v2/", KSERVE, Wants.SERVER, None),
    ("GET", "/v2x", OPENAI, Wants.NOTHING_WE_HAVE, None),
    ("GET", "/v2/models/m", KSERVE, Wants.ASIDE, "m"),
    ("GET", "/v2/models/m/versions/3", KSERVE, Wants.ASIDE, "m"),
    ("GET", "/v2/models/m/config", KSERVE, Wants.ASIDE, "m"),
    ("GET", "/v2/models/m/versions/3/stats", KSERVE, Wants.ASIDE, "m"),
    ("GET", "/v2/models/m/versions/3/ready", KSERVE, Wants.MODEL_READY, "m"),
    ("GET", "/v2/models/m/versions/..%2F..%2Frepository", KSERVE, Wants.NOTHING_WE_HAVE, None),
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


GRPC_ROUTES = [
    ("ModelInfer", Wants.INFERENCE, Reads.INFER_MESSAGE, False, False),
    ("ModelStreamInfer", Wants.INFERENCE, Reads.INFER_MESSAGE, True, False),
    ("ModelReady", Wants.ASIDE, Reads.NAME_MESSAGE, False, True),
    ("ModelMetadata", Wants.ASIDE, Reads.NAME_MESSAGE, False, False),
    ("ModelConfig", Wants.ASIDE, Reads.NAME_MESSAGE, False, False),
    ("ServerLive", Wants.ANY_ENGINE, Reads.NOTHING, False, True),
    ("ServerReady", Wants.ANY_ENGINE, Reads.NOTHING, False, True),
    ("RepositoryModelUnload", Wants.NOTHING_WE_HAVE, Reads.OPENAI, False, False),
    ("SystemSharedMemoryRegister", Wants.NOTHING_WE_HAVE, Reads.OPENAI, False, False),
]


@pytest.mark.parametrize(("method", "wants", "reads", "streams", "anybody"), GRPC_ROUTES)
def test_grpc_route(method: str, wants: Wants, reads: Reads, streams: bool, anybody: bool) -> None:
    found = route("POST", f"/inference.GRPCInferenceService/{method}", "application/grpc+proto")
    assert (found.wants, found.reads, found.streams, found.open) == (wants, reads, streams, anybody)
    assert (found.protocol, found.grpc) == (KSERVE, True)
    for other in ("application/json", "application/grpc-web+proto", ""):
        plain = route("POST", f"/inference.GRPCInferenceService/{method}", other)
        assert (plain.wants, plain.grpc) == (Wants.NOTHING_WE_HAVE, False)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v2/models/m/infer", "/v2/models/org%2Fn/infer"),
        ("/v2/models/m/versions/3/generate?x=%2F", "/v2/models/org%2Fn/versions/3/generate?x=%2F"),
        ("/v2/models/m", "/v2/models/org%2Fn"),
    ],
)
def test_the_path_with_the_engine_s_name(path: str, expected: str) -> None:
    assert engine_path(path, "org/n") == expected


BODIES: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
    ("text in messages", {"messages": [{"role": "user", "content": "x" * 396}], "max_tokens": 7}, (100, 7)),
    ("text in parts", {"messages": [{"content": [{"type": "text", "text": "x" * 36}]}]}, (10, 256)),
    ("token ids", {"prompt": [1, 2, 3], "max_tokens": 5}, (3, 5)),
    ("newer name of the limit", {"prompt": "abcd", "max_completion_tokens": 9}, (1, 9)),
    ("several answers", {"prompt": "abcd", "max_tokens": 9, "n": 3}, (1, 27)),
    ("nonsense is the engine's to refuse", {"prompt": "abcd", "max_tokens": "many", "n": -1}, (1, 256)),
    ("instructions count", {"input": "x" * 20, "instructions": "x" * 20, "max_output_tokens": 5}, (10, 5)),
    ("not ASCII", {"prompt": "潮" * 4}, (3, 256)),
    ("nothing", {}, (1, 256)),
]


@pytest.mark.parametrize(("body", "expected"), [b[1:] for b in BODIES], ids=[b[0] for b in BODIES])
def test_openai_body(body: dict[str, Any], expected: tuple[int, int]) -> None:
    found = read_body(route("POST", "/v1/chat/completions"), orjson.dumps({"model": "m", **body}))
    assert (found.model, found.prompt_tokens, found.output_tokens) == ("m", *expected)


def test_a_large_body_is_measured_by_its_length_and_not_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    def walked(*_: Any) -> int:
        raise AssertionError("walked")

    for given in (
        {"messages": [[1] * 200_000]},
        {"prompt": [1] * 200_000},
        {"text_1": [7], "text_2": [1] * 200_000},
    ):
        body = orjson.dumps({"model": "m", **given})
        assert len(body) > WALKED_BYTES
        with monkeypatch.context() as patched:
            patched.setattr(protocols, "_size", walked)
            found = read_body(route("POST", "/v1/chat/completions"), body)
            assert found.prompt_tokens == -(-len(body) // BYTES_PER_TOKEN)
            kserve = orjson.dumps({"text_input": [1] * 200_000})
            found = read_body(route("POST", "/v2/models/m/generate"), kserve)
            assert found.prompt_tokens == -(-len(kserve) // BYTES_PER_TOKEN)


def test_a_long_query_counts_with_every_document_of_a_large_body_too() -> None:
    body = orjson.dumps({"model": "m", "query": "x" * 4000, "documents": ["abcd"] * 60_000})
    found = read_body(route("POST", "/v1/rerank"), body)
    assert len(body) > WALKED_BYTES
    assert found.prompt_tokens == 1 << 20


PREFILL_ONLY: list[tuple[str, dict[str, Any], int]] = [
    ("/v1/embeddings", {"input": "abcd"}, 1),
    ("/v1/embeddings", {"input": ["abcd", "abcd"]}, 2),
    ("/pooling", {"input": [1, 2, 3]}, 3),
    ("/v1/rerank", {"query": "abcd", "documents": ["abcdefgh", "abcd"]}, 5),
    ("/v2/rerank", {"query": "abcd", "documents": "abcd"}, 2),
    ("/score", {"text_1": "abcd", "text_2": ["abcd"] * 3}, 6),
    ("/v1/score", {"queries": "abcd", "documents": ["abcd"]}, 2),
    ("/tokenize", {"prompt": "abcdefgh"}, 2),
    ("/detokenize", {"tokens": [1, 2]}, 1),
]


@pytest.mark.parametrize(("path", "body", "expected"), PREFILL_ONLY)
def test_what_makes_no_output(path: str, body: dict[str, Any], expected: int) -> None:
    found = read_body(route("POST", path), orjson.dumps({"model": "m", "stream": True, **body}))
    assert (found.prompt_tokens, found.output_tokens, found.streamed) == (expected, 0, False)


def test_a_form_is_told_by_its_headers() -> None:
    found = read_form({"x-tidegate-model": " whisper "}, 32_000)
    assert (found.model, found.prompt_tokens, found.streamed) == ("whisper", 100, False)
    found = read_form({"x-gateway-model-name": "w", "accept": "text/event-stream"}, 1)
    assert (found.model, found.prompt_tokens, found.streamed) == ("w", 1, True)
    with pytest.raises(RefusedError, match="header x-tidegate-model must name the model") as raised:
        read_form({"x-tidegate-model": ""}, 9)
    assert raised.value.code is Code.MODEL_REQUIRED


def test_kserve_body_names_its_size() -> None:
    way = route("POST", "/v2/models/m/generate")
    found = read_body(way, b'{"text_input":"12345678","parameters":{"max_tokens":5}}')
    assert (found.model, found.prompt_tokens, found.output_tokens) == ("m", 2, 5)


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        pytest.param(b"", Code.INVALID_JSON, "not valid JSON", id="empty"),
        pytest.param(b"\xff\xfe", Code.INVALID_JSON, "not valid JSON", id="bytes"),
        pytest.param(b"[" * 5000, Code.INVALID_JSON, "not valid JSON", id="no end of it"),
        pytest.param(b"[]", Code.INVALID_BODY, "JSON object", id="a list"),
        pytest.param(b"{}", Code.MODEL_REQUIRED, "model must be a string", id="no model"),
        pytest.param(b'{"model":3}', Code.MODEL_REQUIRED, "model must be a string", id="model is a number"),
        pytest.param(b'{"model":""}', Code.MODEL_REQUIRED, "model must be a string", id="model is empty"),
    ],
)
def test_bad_bodies(body: bytes, code: Code, words: str) -> None:
    with pytest.raises(RefusedError, match=words) as raised:
        read_body(route("POST", "/v1/chat/completions"), body)
    assert raised.value.code is code


def test_priority_goes_into_triton_s_json_and_leaves_tensors_alone() -> None:
    assert for_engine(b'{"id":"1"}', priority=2) == (b'{"id":"1","parameters":{"priority":2}}', None)
    body, length = for_engine(b'{"parameters":{"a":1}}\x00\x01', 22, priority=1)
    assert body == b'{"parameters":{"a":1,"priority":1}}\x00\x01'
    assert length == 35


def test_the_engine_s_name_goes_into_the_body_and_the_rest_stays() -> None:
    body = orjson.dumps({"model": "alias", "seed": 2**63 - 1, "temperature": 0.1, "x": None})
    made, _ = for_engine(body, model="org/m")
    assert orjson.loads(made) == {**orjson.loads(body), "model": "org/m"}


def test_a_body_that_cannot_be_written_again_is_the_client_s_mistake() -> None:
    deep = b'{"model":"m","x":' + b"[" * 400 + b"]" * 400 + b"}"
    assert read_body(route("POST", "/v1/completions"), deep).model == "m"
    with pytest.raises(RefusedError, match="nested too deep"):
        for_engine(deep, model="n")


def test_an_adapter_is_listed_with_its_parent() -> None:
    listed = orjson.loads(model_list([ListedModel("m", 7.0), ListedModel("sql", 7.0, "m")]))["data"]
    assert [(m["id"], m["parent"], m["created"]) for m in listed] == [("m", None, 7), ("sql", "m", 7)]


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
LORA = """
vllm:num_requests_running 0
vllm:lora_requests_info{max_lora="4",running_lora_adapters="old",waiting_lora_adapters=""} 1.7e9
vllm:lora_requests_info{max_lora="4",running_lora_adapters="sql,law",waiting_lora_adapters="sql"} 1.8e9
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
    ("vLLM with LoRA: the newest sample", LORA, EngineReport(9.0, 0, 0, adapters=("law", "sql"))),
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
