"""Every error, in the shape of every protocol, through the service: status, code, and when to try again."""

import asyncio
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from tritonclient.grpc import service_pb2 as triton

from support.ext_proc import response_headers, response_trailers
from support.picking import WORLD, immediate_headers, play, request, service
from tidegate.core.flowtypes import Reason, Refused
from tidegate.http2.grpc import Status, pack
from tidegate.picker.errors import CATALOGUE, KSERVE, OPENAI, Code, RefusedError
from tidegate.picker.protocols import KSERVE_VERBS, OPENAI_PATHS
from tidegate.picker.service import Service

CHAT = b'{"model":"%s","messages":[]}'
INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"


def chat(model: str = "chat", **more: Any) -> list[pb.ProcessingRequest]:
    return request("/v1/chat/completions", CHAT % model.encode(), **more)


def infer(model: str = "rank", **more: Any) -> list[pb.ProcessingRequest]:
    return request(f"/v2/models/{model}/infer", b'{"inputs":[]}', **more)


def grpc(model: str = "rank", body: bytes | None = None, path: str = INFER, **more: Any) -> list[Any]:
    message = triton.ModelInferRequest(model_name=model).SerializeToString()
    body = pack(message) if body is None else body
    return request(path, body, content_type="application/grpc", **more)


def refused_by(at: Service, messages: list[pb.ProcessingRequest]) -> pb.ProcessingResponse:
    [reply] = asyncio.run(play(at, messages))
    assert reply.WhichOneof("response") == "immediate_response"
    return reply


LARGE = {"max_body": 64}
CASES: list[tuple[str, list[pb.ProcessingRequest], int, str, str]] = [
    ("OpenAI", chat("nothing"), 404, "model_not_found", "'nothing' does not exist"),
    ("OpenAI", request("/v1/nothing", b"{}"), 404, "unknown_url", "no POST /v1/nothing"),
    ("OpenAI", request("/v1/chat/completions", b"{"), 400, "invalid_json", "not valid JSON"),
    ("OpenAI", request("/v1/chat/completions", b"[]"), 400, "invalid_body", "JSON object"),
    ("OpenAI", request("/v1/completions", b"{}"), 400, "model_required", "model must be a string"),
    ("OpenAI", request("/v1/responses", b"x" * 65), 413, "body_too_large", "64 bytes"),
    ("OpenAI", request("/v1/rerank", CHAT % b"rank"), 400, "protocol_mismatch", "/v2/models/rank/infer"),
    ("OpenAI", chat(token="bad"), 401, "invalid_token", "not valid for this cluster"),
    ("OpenAI", chat(token="poor"), 403, "class_not_allowed", "poor may not use class"),
    ("OpenAI", chat(token=""), 403, "class_not_allowed", "system:anonymous"),
    ("OpenAI", chat(x_tidegate_qos="gold"), 403, "class_not_allowed", "it serves high, low"),
    ("OpenAI", chat("empty"), 503, "NoReadyEndpoint", "no replica of ns/empty is ready"),
    ("OpenAI", request("/v1/embeddings", CHAT % b"nothing"), 404, "model_not_found", "does not exist"),
    ("OpenAI", request("/tokenize", CHAT % b"empty"), 503, "not_ready", "no replica of 'empty'"),
    ("OpenAI", request("/detokenize", CHAT % b"chat", token="poor"), 403, "class_not_allowed", "may not"),
    ("OpenAI", request("/v1/audio/transcriptions", b"--x"), 400, "model_required", "x-tidegate-model"),
    (
        "OpenAI",
        request("/v1/audio/translations", b"--x", x_tidegate_model="no"),
        404,
        "model_not_found",
        "'no' does not exist",
    ),
    ("KServeV2", infer("nothing"), 404, "model_not_found", "'nothing' does not exist"),
    ("KServeV2", request("/v2/repository/index", b"{}"), 404, "unknown_url", "no POST /v2/repository/index"),
    ("KServeV2", request("/v2/models/rank/generate", b"{"), 400, "invalid_json", "not valid JSON"),
    ("KServeV2", request("/v2/models/rank/infer", b"x" * 65), 413, "body_too_large", "64 bytes"),
    ("KServeV2", infer("chat"), 400, "protocol_mismatch", "/v1/chat/completions"),
    ("KServeV2", infer(token="bad"), 401, "invalid_token", "not valid"),
    ("KServeV2", infer(token="poor"), 403, "class_not_allowed", "poor may not use"),
    ("KServeV2", request("/v2/models/chat", method="GET"), 400, "protocol_mismatch", "speaks OpenAI"),
    ("KServeV2", request("/v2/models/rank", method="GET", token="poor"), 403, "class_not_allowed", "may not"),
    ("gRPC", grpc("nothing"), 5, "model_not_found", "'nothing' does not exist"),
    ("gRPC", grpc(path="/inference.GRPCInferenceService/LogSettings"), 12, "unknown_url", "there is no POST"),
    ("gRPC", grpc(path="/other.Service/Call"), 12, "unknown_url", "there is no POST /other.Service/Call"),
    ("gRPC", grpc(body=b""), 3, "invalid_body", "no message"),
    ("gRPC", grpc(body=b"\0\0\0\0\x09x"), 3, "invalid_body", "ends inside a gRPC message"),
    ("gRPC", grpc(body=pack(b"\xff\xff")), 3, "invalid_body", "no inference.ModelInferRequest"),
    ("gRPC", grpc(body=b"\x01\0\0\0\x01x"), 12, "compressed", "compression_algorithm=None"),
    ("gRPC", grpc(body=b"\0\0\0\0\x00"), 3, "model_required", "model_name must name"),
    ("gRPC", grpc(body=b"\0" + b"\xff" * 4, path=STREAM), 8, "body_too_large", "64 bytes"),
    ("gRPC", grpc(body=b"\0" * 65), 8, "body_too_large", "64 bytes"),
    ("gRPC", grpc("chat"), 3, "protocol_mismatch", "speaks OpenAI and not KServeV2"),
    ("gRPC", grpc("bare"), 3, "protocol_mismatch", "spec.engine.endpoints.grpcPort"),
    ("gRPC", grpc(token="bad"), 16, "invalid_token", "not valid"),
    ("gRPC", grpc(token="poor", path=STREAM), 7, "class_not_allowed", "poor may not use"),
]


@pytest.mark.parametrize(
    ("protocol", "messages", "status", "code", "words"),
    CASES,
    ids=[f"{c[0]} {c[3]} {i}" for i, c in enumerate(CASES)],
)
def test_every_error_has_its_protocol_s_shape(
    protocol: str, messages: list[pb.ProcessingRequest], status: int, code: str, words: str
) -> None:
    reply = refused_by(service(**LARGE), messages)
    immediate, headers = reply.immediate_response, immediate_headers(reply)
    assert headers["x-tidegate-code"] == code
    assert headers["x-request-id"]
    assert immediate.details == f"tidegate_{code}"
    if protocol == "gRPC":
        assert (immediate.status.code, immediate.grpc_status.status) == (200, status)
        assert words in immediate.body.decode()
        assert "content-type" not in headers
        return
    assert (immediate.status.code, immediate.grpc_status.status) == (status, 0)
    assert headers["content-type"] == "application/json"
    assert ("www-authenticate" in headers) is (status == 401)
    assert ("retry-after" in headers) is (status in (429, 503))
    answer = orjson.loads(immediate.body)
    if protocol == "KServeV2":
        assert set(answer) == {"error"}
        assert words in answer["error"]
    else:
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert answer["error"]["code"] == code
        assert words in answer["error"]["message"]


# ── every route by every error that all of them have ────────────────────────────────────────────


def _json(path: str) -> Any:
    return lambda model, **more: request(path, orjson.dumps({"model": model}), **more)


def _form(path: str) -> Any:
    return lambda model, **more: request(path, b"--x--", x_tidegate_model=model, **more)


def _rest(verb: str, method: str = "POST") -> Any:
    return lambda model, **more: request(f"/v2/models/{model}{verb}", b"{}", method=method, **more)


def _call(method: str, kind: Any, field: str) -> Any:
    def build(model: str, **more: Any) -> list[pb.ProcessingRequest]:
        body = pack(kind(**{field: model}).SerializeToString())
        return request(
            f"/inference.GRPCInferenceService/{method}", body, content_type="application/grpc", **more
        )

    return build


ROUTES: dict[str, tuple[str, str, Any]] = {
    **{path: ("OpenAI", "chat", _json(path)) for path in sorted(OPENAI_PATHS) if "audio" not in path},
    **{path: ("OpenAI", "chat", _form(path)) for path in sorted(OPENAI_PATHS) if "audio" in path},
    **{f"/v2 {verb}": ("KServeV2", "rank", _rest(f"/{verb}")) for verb in sorted(KSERVE_VERBS)},
    "/v2 versions": ("KServeV2", "rank", _rest("/versions/1/infer")),
    "/v2 metadata": ("KServeV2", "rank", _rest("", "GET")),
    "/v2 config": ("KServeV2", "rank", _rest("/config", "GET")),
    "ModelInfer": ("gRPC", "rank", _call("ModelInfer", triton.ModelInferRequest, "model_name")),
    "ModelStreamInfer": ("gRPC", "rank", _call("ModelStreamInfer", triton.ModelInferRequest, "model_name")),
    "ModelMetadata": ("gRPC", "rank", _call("ModelMetadata", triton.ModelMetadataRequest, "name")),
    "ModelConfig": ("gRPC", "rank", _call("ModelConfig", triton.ModelConfigRequest, "name")),
}
WRONG: dict[str, tuple[Code | Reason, dict[str, Any]]] = {
    "unknown model": (Code.MODEL_NOT_FOUND, {"model": "nothing"}),
    "bad token": (Code.INVALID_TOKEN, {"token": "bad"}),
    "no right": (Code.CLASS_NOT_ALLOWED, {"token": "poor"}),
    "nobody": (Code.CLASS_NOT_ALLOWED, {"token": ""}),
    "class not served": (Code.CLASS_NOT_ALLOWED, {"x_tidegate_qos": "gold"}),
    "too large": (Code.BODY_TOO_LARGE, {"content_length": "17000000"}),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("wrong", WRONG)
def test_every_route_says_every_error(route: str, wrong: str) -> None:
    protocol, model, build = ROUTES[route]
    code, how = WRONG[wrong]
    reply = refused_by(service(), build(**{"model": model, **how}))
    immediate, headers, kind = reply.immediate_response, immediate_headers(reply), CATALOGUE[code]
    assert headers["x-tidegate-code"] == code
    if protocol == "gRPC":
        assert (immediate.status.code, immediate.grpc_status.status) == (200, kind.grpc)
        return
    assert (immediate.status.code, immediate.grpc_status.status) == (kind.http, 0)
    error = orjson.loads(immediate.body)["error"]
    assert isinstance(error, str) if protocol == "KServeV2" else error["code"] == code


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shown", [True, False])
def test_every_route_is_answered_with_what_became_of_it(route: str, shown: bool) -> None:
    _, model, build = ROUTES[route]
    then = [response_headers(), response_trailers()]
    replies = asyncio.run(play(service(show_endpoint=shown), build(model), then=then))
    [answer] = [r for r in replies if r.WhichOneof("response") == "response_headers"]
    options = answer.response_headers.response.header_mutation.set_headers
    told = {o.header.key: o.header.raw_value.decode() for o in options}
    assert told["x-tidegate-qos"] == "high"
    assert told["x-request-id"]
    assert ("x-tidegate-endpoint" in told) is shown
    waits = route not in ("/tokenize", "/detokenize", "/v2 metadata", "/v2 config")
    assert ("x-tidegate-queue-seconds" in told) is (waits and route not in ("ModelMetadata", "ModelConfig"))


class GoneMeanwhile(dict[str, str]):
    """gRPC ports that were there when the replica was chosen, and are not when it is its turn."""

    def get(self, _key: object, _default: object = None) -> None:  # type: ignore[override]
        """Nothing."""


@pytest.mark.parametrize("shown", [True, False])
def test_a_replica_without_its_grpc_port_is_not_named_to_strangers(shown: bool) -> None:
    _, model, build = ROUTES["ModelInfer"]
    at = service(show_endpoint=shown)
    at.desk.set_world(replace(WORLD, grpc_addresses=GoneMeanwhile(WORLD.grpc_addresses)))
    reply = refused_by(at, build(model))
    assert immediate_headers(reply)["x-tidegate-code"] == "not_ready"
    text = reply.immediate_response.body.decode()
    assert "does not speak gRPC; try again" in text
    assert ("10.0.0.2" in text) is shown


@pytest.mark.parametrize(
    "messages", [chat("x" * 9000), infer("x" * 9000), grpc("x" * 9000)], ids=["OpenAI", "KServeV2", "gRPC"]
)
def test_a_name_without_end_is_not_told_back(messages: list[pb.ProcessingRequest]) -> None:
    reply = refused_by(service(), messages)
    assert immediate_headers(reply)["x-tidegate-code"] == "model_not_found"
    assert len(reply.immediate_response.body) < 1200


@pytest.mark.parametrize("messages", [chat(), infer(), grpc()], ids=["OpenAI", "KServeV2", "gRPC"])
def test_an_api_server_that_is_away_is_no_fault_of_the_client(messages: list[pb.ProcessingRequest]) -> None:
    headers = immediate_headers(refused_by(service(away=True), messages))
    assert (headers["x-tidegate-code"], headers["retry-after"]) == ("identity_unknown", "1")


def test_a_full_queue_says_when_to_try_again_and_what_the_class_was() -> None:
    async def run() -> pb.ProcessingResponse:
        at = service()
        holding = [asyncio.create_task(play(at, grpc("rank"))) for _ in range(1)]
        await asyncio.gather(*holding)
        at.desk.flow.report("10.0.0.2:8000", _full(), 0, 0)
        waits = asyncio.create_task(at.serve(_forever(grpc(x_tidegate_qos="low")), _nothing))
        for _ in range(100):
            await asyncio.sleep(0)
        [refused] = await play(at, grpc(x_tidegate_qos="low"))
        waits.cancel()
        return refused

    reply = asyncio.run(run())
    headers = immediate_headers(reply)
    assert reply.immediate_response.grpc_status.status == Status.RESOURCE_EXHAUSTED
    assert headers["x-tidegate-code"] == "QueueFull"
    assert int(headers["retry-after"]) >= 1
    assert int(headers["grpc-retry-pushback-ms"]) == 1000 * int(headers["retry-after"])
    assert headers["x-tidegate-qos"] == "low"
    assert float(headers["x-tidegate-queue-seconds"]) == 0


def _full() -> Any:
    from tidegate.core.load import EngineReport

    return EngineReport(0.0, running=1, waiting=0)


def _forever(messages: list[pb.ProcessingRequest]) -> Any:
    left = list(messages)

    async def read() -> pb.ProcessingRequest | None:
        if left:
            return left.pop(0)
        return await asyncio.Event().wait()  # type: ignore[return-value]

    return read


async def _nothing(_reply: pb.ProcessingResponse) -> None:
    return None


# ── the catalogue ───────────────────────────────────────────────────────────────────────────────


def test_every_code_can_be_said() -> None:
    assert set(CATALOGUE) == {*Code, *Reason}


def test_every_code_is_told_of_with_its_status() -> None:
    page = (Path(__file__).parents[2] / "docs/concepts/request-path.md").read_text()
    rows = [line.split("|")[1:4] for line in page.splitlines() if line.startswith("| `")]
    told = {
        code: (http.strip(), grpc.split()[0])
        for codes, http, grpc in rows
        if http.strip().isdecimal()
        for code in re.findall(r"`(\w+)`", codes)
    }
    assert told == {code: (str(kind.http), str(kind.grpc)) for code, kind in CATALOGUE.items()}


@pytest.mark.parametrize("reason", Reason)
def test_the_queue_s_own_words_are_kept(reason: Reason) -> None:
    status = CATALOGUE[reason].http
    no = RefusedError.of(Refused(status, reason, "why", 7))
    assert (no.code, no.message, no.retry_after_s) == (reason, "why", 7)
    assert orjson.loads(no.body(OPENAI))["error"]["code"] == reason
    assert orjson.loads(no.body(KSERVE)) == {"error": "why"}
    assert no.headers(grpc=True)["grpc-retry-pushback-ms"] == "7000"
    assert "grpc-retry-pushback-ms" not in no.headers(grpc=False)
