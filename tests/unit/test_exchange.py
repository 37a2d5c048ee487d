"""One exchange with Envoy: what is answered to which message, and in which order."""

import orjson
import pytest
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from support.ext_proc import (
    kinds,
    request_body,
    request_headers,
    response_headers,
    response_trailers,
    set_headers,
    streamed,
)
from tidegate.picker.exchange import (
    CHUNK_BYTES,
    SERVED_KEY,
    SUBSET_KEY,
    SUBSET_NAMESPACE,
    Exchange,
    Outcome,
    Phase,
    ProtocolError,
)

CHAT = b'{"model":"m"}'


def held(body: bytes = CHAT, *, trailers: bool = False, max_body: int = 1 << 20) -> Exchange:
    exchange = Exchange(max_body)
    assert exchange.feed(request_headers()) == []
    for message in request_body([body], trailers=trailers):
        assert exchange.feed(message) == []
    assert exchange.phase is Phase.HELD
    return exchange


def test_nothing_is_answered_until_all_is_here_and_then_in_order() -> None:
    exchange = held()
    replies = exchange.send("10.0.0.1:8000", headers={"x-vllm-priority": "7"}, drop=("authorization",))
    assert kinds(replies) == ["request_headers", "request_body"]
    common = replies[0].request_headers.response
    assert common.clear_route_cache
    assert set_headers(replies[0]) == {
        "x-gateway-destination-endpoint": "10.0.0.1:8000",
        "x-vllm-priority": "7",
    }
    assert list(common.header_mutation.remove_headers) == ["authorization"]
    metadata = replies[0].dynamic_metadata["envoy.lb"]
    assert metadata["x-gateway-destination-endpoint"] == "10.0.0.1:8000"
    assert [(c.body, c.end_of_stream) for c in streamed(replies)] == [(CHAT, True)]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        pytest.param(0, [0], id="an empty body is one empty chunk"),
        pytest.param(CHUNK_BYTES, [CHUNK_BYTES], id="just one"),
        pytest.param(CHUNK_BYTES + 1, [CHUNK_BYTES, 1], id="one byte more"),
    ],
)
def test_bodies_leave_in_chunks_that_envoy_takes(size: int, expected: list[int]) -> None:
    chunks = streamed(held(b"x" * size).send("a:1", headers={}))
    assert [len(c.body) for c in chunks] == expected
    assert [c.end_of_stream for c in chunks] == [False] * (len(expected) - 1) + [True]


def test_with_trailers_the_body_does_not_end_the_request() -> None:
    replies = held(trailers=True).send("a:1", headers={})
    assert kinds(replies) == ["request_headers", "request_body", "request_trailers"]
    assert [c.end_of_stream for c in streamed(replies)] == [False]


def test_a_request_without_a_body_is_answered_without_one() -> None:
    exchange = Exchange()
    exchange.feed(request_headers("/v1/models", method="GET", end=True))
    assert exchange.phase is Phase.HELD
    [reply] = exchange.answer(200, b"{}", reason="models")
    assert reply.immediate_response.status.code == 200
    assert reply.immediate_response.details == "tidegate_models"
    assert exchange.outcome(dispatched=False) is Outcome.CANCELLED


@pytest.mark.parametrize("declared", [True, False], ids=["by its content-length", "by what came"])
def test_too_large_a_body_is_refused_at_once(declared: bool) -> None:
    exchange = Exchange(max_body=100)
    if declared:
        [reply] = exchange.feed(request_headers(content_length="101"))
    else:
        exchange.feed(request_headers())
        first, second = request_body([b"x" * 60, b"x" * 60])
        assert exchange.feed(first) == []
        [reply] = exchange.feed(second)
    immediate = reply.immediate_response
    assert immediate.status.code == 413
    error = orjson.loads(immediate.body)["error"]
    assert error["code"] == "body_too_large"
    assert "100 bytes" in error["message"]
    assert exchange.body == b""
    assert exchange.feed(request_body([b"more"])[0]) == []


ENDS = [
    ("refused here", [], 429, False, Outcome.REFUSED),
    ("left while it waited", [], 0, False, Outcome.CANCELLED),
    ("left before an answer", [], 0, True, Outcome.CANCELLED),
    ("answered", [response_headers(200), response_trailers()], 0, True, Outcome.ANSWERED),
    ("answered without a body", [response_headers(204, end=True)], 0, True, Outcome.ANSWERED),
    ("the engine said that it is wrong", [response_headers(400)], 0, True, Outcome.ANSWERED),
    ("the engine was not there", [response_headers(503)], 0, True, Outcome.LOST),
]


@pytest.mark.parametrize(
    ("messages", "refused", "dispatched", "expected"), [e[1:] for e in ENDS], ids=[e[0] for e in ENDS]
)
def test_outcomes(messages: list, refused: int, dispatched: bool, expected: Outcome) -> None:
    exchange = held()
    if dispatched:
        exchange.send("a:1", headers={})
    if refused:
        exchange.refuse(refused, "no", code="no", retry_after="3")
    for message in messages:
        assert len(exchange.feed(message)) == 1
    assert exchange.outcome(dispatched) is expected


def test_a_refusal_has_the_protocol_s_shape_and_its_headers() -> None:
    exchange = Exchange()
    exchange.feed(request_headers("/v2/models/m/infer", end=True))
    [reply] = exchange.refuse(429, "no room", code="QueueFull", retry_after="3")
    immediate = reply.immediate_response
    assert orjson.loads(immediate.body) == {"error": "no room"}
    named = {o.header.key: o.header.raw_value for o in immediate.headers.set_headers}
    assert named == {"content-type": b"application/json", "retry-after": b"3"}


@pytest.mark.parametrize(
    "message",
    [response_headers(), response_trailers(), *request_body([b"x"])],
    ids=lambda m: m.WhichOneof("request"),
)
def test_messages_out_of_order_are_an_error_that_says_what_to_configure(message) -> None:
    with pytest.raises(ProtocolError, match="FULL_DUPLEX_STREAMED"):
        Exchange().feed(message)


def test_nothing_is_sent_twice_or_answered_after_it_was_sent() -> None:
    exchange = held()
    exchange.send("a:1", headers={})
    with pytest.raises(ProtocolError):
        exchange.send("a:1", headers={})
    with pytest.raises(ProtocolError):
        exchange.refuse(429, "late", code="late")


# ── what other gateways do ──────────────────────────────────────────────────────────────────────


def hinted(value: object, *, namespace: str = SUBSET_NAMESPACE, key: str = SUBSET_KEY) -> Exchange:
    message = request_headers()
    message.metadata_context.filter_metadata[namespace].update({key: value})
    exchange = Exchange()
    exchange.feed(message)
    return exchange


def test_a_hint_is_read_from_its_own_namespace_and_key_alone() -> None:
    assert hinted(["10.0.0.1:1", "10.0.0.2:1"]).subset == ("10.0.0.1:1", "10.0.0.2:1")
    assert hinted("10.0.0.1:1").subset == ("10.0.0.1:1",)
    for bad in ([], "", 7, None, {"a": 1}, [1, None]):
        assert hinted(bad).subset == (), bad
    assert hinted(["a:1"], key="another").subset is None
    assert hinted(["a:1"], namespace="envoy.lb").subset is None
    forged = Exchange()
    forged.feed(request_headers(x_gateway_destination_endpoint_subset="a:1"))
    assert forged.subset is None


def test_fallbacks_are_named_in_header_and_metadata_alike() -> None:
    first, *_ = held().send("a:1", "b:1", headers={})
    assert set_headers(first)["x-gateway-destination-endpoint"] == "a:1,b:1"
    assert first.dynamic_metadata["envoy.lb"]["x-gateway-destination-endpoint"] == "a:1,b:1"


@pytest.mark.parametrize(
    ("told", "elsewhere"), [("b:1", "b:1"), ("a:1", ""), ("x:1", ""), ("", ""), (None, ""), (7, "")]
)
def test_who_served_is_believed_only_of_those_that_were_named(told: object, elsewhere: str) -> None:
    exchange = held()
    exchange.send("a:1", "b:1", headers={})
    message = response_headers()
    if told is not None:
        message.metadata_context.filter_metadata["envoy.lb"].update({SERVED_KEY: told})
    assert len(exchange.feed(message)) == 1
    assert exchange.elsewhere == elsewhere


def buffered() -> Exchange:
    exchange = Exchange()
    first = request_headers()
    first.protocol_config.request_body_mode = ProcessingMode.BUFFERED
    assert kinds(exchange.feed(first)) == ["request_headers"]
    return exchange


@pytest.mark.parametrize("changed", [None, b"another"])
@pytest.mark.parametrize("trailers", [False, True])
def test_where_bodies_are_buffered_the_body_s_reply_has_the_endpoint(
    changed: bytes | None, trailers: bool
) -> None:
    exchange = buffered()
    assert exchange.feed(request_body([CHAT], trailers=trailers)[0]) == []
    assert exchange.phase is Phase.HELD
    [reply] = exchange.send("a:1", headers={"x-a": "b"}, drop=("authorization",), body=changed)
    common = reply.request_body.response
    assert [o.header.key for o in common.header_mutation.set_headers] == [
        "x-gateway-destination-endpoint",
        "x-a",
    ]
    assert list(common.header_mutation.remove_headers) == ["authorization"]
    assert reply.dynamic_metadata["envoy.lb"]["x-gateway-destination-endpoint"] == "a:1"
    assert common.body_mutation.WhichOneof("mutation") == ("body" if changed else None)
    assert common.body_mutation.body == (changed or b"")
    if trailers:
        assert kinds(exchange.feed(request_body([b""], trailers=True)[1])) == ["request_trailers"]
    assert kinds(exchange.feed(response_headers())) == ["response_headers"]


def test_a_buffered_body_may_be_refused() -> None:
    exchange = buffered()
    exchange.feed(request_body([CHAT])[0])
    [reply] = exchange.refuse(429, "no room", code="QueueFull")
    assert reply.immediate_response.status.code == 429


@pytest.mark.parametrize("size", [0, 10, 2 * CHUNK_BYTES + 1])
def test_response_bodies_are_passed_on_as_they_come(size: int) -> None:
    exchange = held()
    exchange.send("a:1", headers={})
    exchange.feed(response_headers())
    for end in (False, True):
        replies = exchange.feed(
            pb.ProcessingRequest(response_body=pb.HttpBody(body=b"x" * size, end_of_stream=end))
        )
        pieces = [r.response_body.response.body_mutation.streamed_response for r in replies]
        assert b"".join(p.body for p in pieces) == b"x" * size
        assert all(len(p.body) <= CHUNK_BYTES for p in pieces)
        assert [p.end_of_stream for p in pieces] == [False] * (len(pieces) - 1) + [end]
    assert exchange.done
    assert exchange.outcome(dispatched=True) is Outcome.ANSWERED


@pytest.mark.parametrize("mode", [ProcessingMode.STREAMED, ProcessingMode.BUFFERED])
def test_response_bodies_that_are_only_shown_are_left_as_they_are(mode: int) -> None:
    exchange = Exchange()
    first = request_headers(end=True)
    first.protocol_config.response_body_mode = mode
    exchange.feed(first)
    exchange.send("a:1", headers={})
    exchange.feed(response_headers())
    [reply] = exchange.feed(pb.ProcessingRequest(response_body=pb.HttpBody(body=b"x")))
    assert reply.response_body.response.body_mutation.WhichOneof("mutation") is None
