"""What the engine gets: its own name of the model, its priority, and the rest as it came."""

import asyncio
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from tritonclient.grpc import service_pb2 as triton

from support.ext_proc import response_headers, response_trailers, set_headers, streamed
from support.picking import immediate_headers, play, request, service
from tidegate.http2.grpc import pack
from tidegate.picker.exchange import MESSAGE_BYTES, BrokenStreamError
from tidegate.picker.kservegrpc import Frames
from tidegate.picker.protocols import POOLED_PATHS
from tidegate.picker.service import Service

CALL = "/inference.GRPCInferenceService/"


def sent(messages: list[pb.ProcessingRequest], **settings: Any) -> tuple[dict[str, str], bytes]:
    """The headers and the body that leave for the engine."""
    replies = asyncio.run(play(service(**settings), messages))
    assert replies[0].WhichOneof("response") == "request_headers", replies[0]
    return set_headers(replies[0]), b"".join(c.body for c in streamed(replies))


@pytest.mark.parametrize(
    ("asked", "named"),
    [("chat", "chat"), ("talk", "chat"), ("sql", "lora-1")],
    ids=["its own name", "an alias", "an adapter"],
)
@pytest.mark.parametrize(
    "path",
    ["/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/v2/rerank", "/score", "/tokenize"],
)
def test_an_engine_is_asked_by_its_own_name(path: str, asked: str, named: str) -> None:
    headers, body = sent(request(path, orjson.dumps({"model": asked, "input": "x"})))
    pooled = path in ("/v1/embeddings", "/v2/rerank", "/score")
    priority = {"priority": 1_000_000_000 - 900} if pooled else {}
    assert orjson.loads(body) == {"model": named, "input": "x"} | priority
    assert headers["x-gateway-destination-endpoint"] == "10.0.0.1:8000"
    assert ("x-vllm-priority" in headers) is (path != "/tokenize")


def test_a_body_whose_name_is_right_is_not_touched() -> None:
    raw = b'{ "model" : "chat", "x": 1.50 }'
    assert sent(request("/v1/completions", raw))[1] == raw


@pytest.mark.parametrize(("qos", "expected"), [(True, 1_000_000_000 - 10), (False, 0)])
@pytest.mark.parametrize("path", sorted(POOLED_PATHS))
def test_a_client_s_own_priority_does_not_reach_what_reads_no_header(
    path: str, qos: bool, expected: int
) -> None:
    raw = orjson.dumps({"model": "chat", "input": "x", "priority": -5})
    headers, body = sent(request(path, raw, x_tidegate_qos="low"), qos=qos)
    assert orjson.loads(body) == {"model": "chat", "input": "x", "priority": expected}
    assert headers["x-vllm-priority"] == str(expected)


def test_a_form_goes_as_it_came() -> None:
    form = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nchat\r\n--x--\r\n'
    headers, body = sent(
        request("/v1/audio/transcriptions", form, x_tidegate_model="talk", x_tidegate_qos="low")
    )
    assert body == form
    assert headers["x-vllm-priority"] == str(1_000_000_000 - 10)


@pytest.mark.parametrize("asked", ["rank", "sort"])
def test_a_path_names_the_model_as_triton_does(asked: str) -> None:
    headers, body = sent(request(f"/v2/models/{asked}/versions/2/infer?a=1", b'{"id":"7"}'))
    assert headers[":path"] == "/v2/models/org%2Frank/versions/2/infer?a=1"
    assert orjson.loads(body) == {"id": "7", "parameters": {"priority": 1}}


def test_metadata_waits_for_nobody() -> None:
    async def run() -> list[pb.ProcessingResponse]:
        at = service()
        await play(at, request("/v2/models/rank/infer", b"{}"))
        replies = await play(at, request("/v2/models/sort", method="GET"))
        assert at.desk.flow.held("10.0.0.2:8000") == (0, 0)
        return replies

    [headers] = asyncio.run(run())
    assert set_headers(headers)[":path"] == "/v2/models/org%2Frank"


@pytest.mark.parametrize(("hint", "sent_on"), [("10.0.0.2:8000", True), ("10.0.0.9:8000", False)])
def test_what_does_not_wait_goes_where_its_gateway_lets_it(hint: str, sent_on: bool) -> None:
    [asked] = request("/v2/models/rank", method="GET")
    space = asked.metadata_context.filter_metadata["envoy.lb.subset_hint"]
    space.update({"x-gateway-destination-endpoint-subset": [hint]})
    [reply] = asyncio.run(play(service(), [asked]))
    assert (reply.WhichOneof("response") == "request_headers") is sent_on
    if not sent_on:
        assert immediate_headers(reply)["x-tidegate-code"] == "not_ready"


def test_who_asks_for_the_server_is_told_of_the_gateway() -> None:
    [reply] = asyncio.run(play(service(), request("/v2", method="GET", token="")))
    assert orjson.loads(reply.immediate_response.body)["name"] == "tidegate"


def message(name: str = "rank", **more: Any) -> bytes:
    return bytes(triton.ModelInferRequest(model_name=name, **more).SerializeToString())


def messages(data: bytes) -> list[triton.ModelInferRequest]:
    return [triton.ModelInferRequest.FromString(raw) for raw in Frames(1 << 20).feed(data)]


def grpc(method: str, body: bytes | list[bytes], **more: str) -> list[pb.ProcessingRequest]:
    return request(CALL + method, body, content_type="application/grpc", **more)


def test_a_grpc_call_goes_to_the_grpc_port_with_triton_s_name_and_priority() -> None:
    given = message("sort", id="7", parameters={"priority": {"string_param": "x"}, "a": {"int64_param": 3}})
    headers, body = sent(grpc("ModelInfer", pack(given), x_tidegate_qos="low"), show_endpoint=True)
    assert headers["x-gateway-destination-endpoint"] == "10.0.0.2:8001"
    [got] = messages(body)
    assert (got.model_name, got.id) == ("org/rank", "7")
    assert got.parameters["priority"].uint64_param == 2
    assert got.parameters["a"].int64_param == 3


@pytest.mark.parametrize("method", ["ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics"])
def test_other_messages_name_the_model_too(method: str) -> None:
    kind = getattr(triton, f"{method}Request")
    headers, body = sent(grpc(method, pack(kind(name="sort", version="2").SerializeToString())))
    [raw] = Frames(1 << 20).feed(body)
    assert kind.FromString(raw) == kind(name="org/rank", version="2")
    assert headers["x-gateway-destination-endpoint"] == "10.0.0.2:8001"


@pytest.mark.parametrize("method", ["ServerLive", "ServerReady", "ServerMetadata"])
def test_any_engine_answers_for_the_server(method: str) -> None:
    headers, body = sent(grpc(method, pack(b""), token=""))
    assert (headers["x-gateway-destination-endpoint"], body) == ("10.0.0.2:8001", pack(b""))


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
def test_where_bodies_are_buffered_messages_are_rewritten_too(method: str) -> None:
    head, body = grpc(method, pack(message("sort", id="7")))
    head.protocol_config.request_body_mode = ProcessingMode.BUFFERED
    first, reply = asyncio.run(play(service(), [head, body]))
    assert first.WhichOneof("response") == "request_headers"
    common = reply.request_body.response
    [got] = messages(common.body_mutation.body)
    assert (got.model_name, got.id) == ("org/rank", "7")
    named = {o.header.key: o.header.raw_value for o in common.header_mutation.set_headers}
    assert named["x-gateway-destination-endpoint"] == b"10.0.0.2:8001"


# ── streams ─────────────────────────────────────────────────────────────────────────────────────


def body_message(data: bytes, *, end: bool = False) -> pb.ProcessingRequest:
    return pb.ProcessingRequest(request_body=pb.HttpBody(body=data, end_of_stream=end))


def opened(data: bytes) -> list[pb.ProcessingRequest]:
    """A stream whose client goes on."""
    head, _ = grpc("ModelStreamInfer", b"")
    return [head, body_message(data)]


def test_a_stream_is_sent_with_its_first_message_and_what_follows_goes_after_it() -> None:
    second, third = pack(message("rank", id="2")), pack(message("rank", id="3"))
    then = [
        body_message(second[:7]),
        response_headers(),
        body_message(second[7:] + third[:3]),
        body_message(third[3:]),
        body_message(b"", end=True),
        response_trailers(),
    ]
    replies = asyncio.run(play(service(), opened(pack(message("rank", id="1"))), then=then))
    chunks = streamed(replies)
    got = messages(b"".join(c.body for c in chunks))
    assert [(m.id, m.model_name, m.parameters["priority"].uint64_param) for m in got] == [
        (number, "org/rank", 1) for number in "123"
    ]
    assert [c.end_of_stream for c in chunks] == [False, False, False, True]
    assert replies[-1].WhichOneof("response") == "response_trailers"


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (pack(message("chat")), "invalid_body"),
        (b"\x01\0\0\0\0", "compressed"),
        (pack(b"\xff"), "invalid_body"),
        (b"\0\xff\xff\xff\xff", "body_too_large"),
    ],
    ids=["another model", "compressed", "no message", "too large"],
)
def test_a_later_message_that_is_wrong_ends_the_stream_with_its_reason(bad: bytes, code: str) -> None:
    async def run(then: list[pb.ProcessingRequest]) -> list[pb.ProcessingResponse]:
        at = service(max_body=1000)
        try:
            return await play(at, opened(pack(message())), then=then)
        finally:
            assert at.desk.flow.held("10.0.0.2:8000") == (0, 0)
            assert at.receiving == 0

    last = asyncio.run(run([body_message(bad)]))[-1]
    assert immediate_headers(last)["x-tidegate-code"] == code
    with pytest.raises(BrokenStreamError):
        asyncio.run(run([response_headers(), body_message(bad)]))


TRAILERS = pb.ProcessingRequest(request_trailers=pb.HttpTrailers())


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
def test_trailers_end_a_call(method: str) -> None:
    head, _ = grpc(method, b"")
    data = pack(message(id="1"))
    replies = asyncio.run(play(service(), [head, body_message(data), TRAILERS]))
    [got] = messages(b"".join(c.body for c in streamed(replies)))
    assert (got.id, got.model_name) == ("1", "org/rank")
    assert not any(c.end_of_stream for c in streamed(replies))
    assert [r.WhichOneof("response") for r in replies].count("request_trailers") == 1


def test_a_call_of_two_messages_is_refused_when_the_second_is_seen() -> None:
    head, _ = grpc("ModelInfer", b"")
    for parts in ([pack(b"x"), b"\0"], [pack(b"x"), pack(b"")], [pack(b"x") + pack(b"y") * 100_000]):
        [reply] = asyncio.run(play(service(), [head, *map(body_message, parts)]))
        assert immediate_headers(reply)["x-tidegate-code"] == "invalid_body"
        assert reply.immediate_response.grpc_status.status == 3
        assert b"more than one message" in reply.immediate_response.body


def test_of_a_call_no_message_is_cut_out_past_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = 0
    feed = Frames.feed

    def counted(self: Frames, data: bytes) -> Iterator[bytes]:
        nonlocal cut
        for one in feed(self, data):
            cut += 1
            yield one

    monkeypatch.setattr(Frames, "feed", counted)
    head, body = grpc("ModelInfer", pack(b"x") * 1000)
    head.protocol_config.request_body_mode = ProcessingMode.BUFFERED
    asyncio.run(play(service(), [head, body]))
    assert cut == 1


def test_empty_messages_of_a_stream_are_bounded() -> None:
    many = pack(b"") * 1000
    [reply] = asyncio.run(play(service(max_body=500 * MESSAGE_BYTES), opened(pack(message()) + many)))
    assert immediate_headers(reply)["x-tidegate-code"] == "body_too_large"


async def queued_behind_another(at: Service, then: list[pb.ProcessingRequest]) -> pb.ProcessingResponse:
    """The first reply to a stream that cannot be dispatched and goes on meanwhile."""
    first: asyncio.Queue[pb.ProcessingRequest | None] = asyncio.Queue()
    second: asyncio.Queue[pb.ProcessingRequest | None] = asyncio.Queue()
    replies: asyncio.Queue[pb.ProcessingResponse] = asyncio.Queue()
    sent_on = asyncio.Event()

    async def note(_: pb.ProcessingResponse) -> None:
        sent_on.set()

    for one in opened(pack(message())):
        first.put_nowait(one)
    for one in [*opened(pack(message())), *then]:
        second.put_nowait(one)
    ahead = asyncio.create_task(at.serve(first.get, note))
    await sent_on.wait()
    behind = asyncio.create_task(at.serve(second.get, replies.put))
    try:
        return await asyncio.wait_for(replies.get(), timeout=5)
    finally:
        for queue in (first, second):
            queue.put_nowait(None)
        await asyncio.gather(ahead, behind)


@pytest.mark.parametrize(
    "more", [[pack(message(id="x" * 3000))], [pack(message())] * 40], ids=["one large", "many small"]
)
def test_a_stream_that_goes_on_in_the_queue_counts_as_what_is_received(more: list[bytes]) -> None:
    at = service(max_receiving=2500)
    reply = asyncio.run(queued_behind_another(at, [body_message(one) for one in more]))
    assert immediate_headers(reply)["x-tidegate-code"] == "memory_full"
    assert at.receiving == 0
    assert not list(at.desk.flow.waiting())


def test_a_stream_that_was_sent_on_counts_until_its_messages_are_whole() -> None:
    async def run(*then: pb.ProcessingRequest) -> list[pb.ProcessingResponse]:
        at = service(max_receiving=1000)
        try:
            return await play(at, opened(pack(message())), then=then)
        finally:
            assert at.receiving == 0

    part = body_message(pack(message(id="x" * 3000))[:2000])
    assert immediate_headers(asyncio.run(run(part))[-1])["x-tidegate-code"] == "memory_full"
    with pytest.raises(BrokenStreamError):
        asyncio.run(run(response_headers(), part))


def test_trailers_end_a_stream_that_goes_on() -> None:
    replies = asyncio.run(play(service(), opened(pack(message())), then=[response_headers(), TRAILERS]))
    assert [r.WhichOneof("response") for r in replies] == [
        "request_headers",
        "request_body",
        "response_headers",
        "request_trailers",
    ]


def test_a_stream_that_ends_before_a_message_is_refused() -> None:
    head, _ = grpc("ModelStreamInfer", b"")
    [reply] = asyncio.run(play(service(), [head, body_message(b"", end=True)]))
    assert immediate_headers(reply)["x-tidegate-code"] == "invalid_body"
