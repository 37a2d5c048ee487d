"""Whatever a client sends, the picker's decoders answer or refuse: nothing else escapes, nothing piles up."""

import asyncio
import contextlib
import itertools

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as triton

from support.ext_proc import headers as header_message
from support.ext_proc import request_body
from support.picking import play, service
from tidegate.core.types import QoSClass
from tidegate.facts.endpoints import ServedModel
from tidegate.http2.grpc import pack
from tidegate.picker.errors import CATALOGUE, RefusedError
from tidegate.picker.exchange import MESSAGE_BYTES, Exchange, pb, whole
from tidegate.picker.handover import hand_over
from tidegate.picker.kservegrpc import Frames, read_message, rewriter
from tidegate.picker.protocols import OPENAI_PATHS, Reads, Wants, engine_path, for_engine, read_body, route

PATHS = st.one_of(
    st.sampled_from(sorted(OPENAI_PATHS)),
    st.sampled_from(["/v2/models/rank/infer", "/v2/models/rank/generate", "/v2/models/rank", "/v1/models"]),
    st.sampled_from(
        ["/inference.GRPCInferenceService/" + m for m in ("ModelInfer", "ModelStreamInfer", "ModelReady")]
    ),
    st.text(max_size=40).map(lambda t: "/v2/models/" + t),
    st.text(max_size=40).map(lambda t: "/" + t),
)
TYPES = st.sampled_from(["", "application/json", "application/grpc", "multipart/form-data; boundary=x"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
FIELDS = (
    "model", "messages", "prompt", "input", "instructions", "query", "documents", "text_1", "text_2", "n",
    "max_tokens", "max_completion_tokens", "stream", "parameters", "text_input",
)  # fmt: skip
OBJECTS = st.dictionaries(st.sampled_from(FIELDS), JSON | st.just("chat"), max_size=6).map(orjson.dumps)
BODIES = st.one_of(st.binary(max_size=200), OBJECTS, JSON.map(orjson.dumps), OBJECTS.map(lambda b: b[:-1]))
MESSAGES = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda name, raw, text, most: bytes(
            triton.ModelInferRequest(
                model_name=name,
                inputs=[{"name": text, "datatype": "BYTES", "shape": [1]}],
                raw_input_contents=raw,
                parameters={"max_tokens": most},
            ).SerializeToString()
        ),
        st.sampled_from(["", "rank", "chat", "x" * 300]),
        st.lists(st.binary(max_size=20), max_size=2),
        st.sampled_from(["text_input", "other"]),
        st.sampled_from([{}, {"int64_param": -1}, {"uint64_param": 2**64 - 1}, {"string_param": "9" * 5000}]),
    ),
)
NAMES = st.sampled_from(
    [
        "x-tidegate-model",
        "x-tidegate-qos",
        "authorization",
        "content-length",
        "accept",
        "x-request-id",
        "inference-header-content-length",
        "x-envoy-attempt-count",
    ]
)
HEADERS = st.dictionaries(
    NAMES, st.one_of(st.text(max_size=30), st.sampled_from(["9" * 5000, "-1", "12", "²", ""])), max_size=4
)
FUZZ = settings(max_examples=300, deadline=None)


@FUZZ
@given(
    method=st.sampled_from(["GET", "POST", "PUT", ""]),
    path=PATHS,
    kind=TYPES,
    body=BODIES,
    length=st.none() | st.integers(0, 10**14),
)
def test_bodies(method: str, path: str, kind: str, body: bytes, length: int | None) -> None:
    way = route(method, path, kind)
    if way.wants not in (Wants.INFERENCE, Wants.ASIDE) or way.grpc or way.reads is Reads.FORM:
        return
    with contextlib.suppress(RefusedError):
        found = read_body(way, body, length)
        assert 1 <= found.prompt_tokens <= 1 << 21
        assert 0 <= found.output_tokens <= 1 << 20
        if way.reads is not Reads.NOTHING:
            made, new_length = for_engine(body, length, model="m", priority=1)
            head = made if new_length is None else made[:new_length]
            assert orjson.loads(head)["model"] == "m"
            assert orjson.loads(head)["parameters"]["priority"] == 1


@FUZZ
@given(
    message=MESSAGES, method=st.sampled_from(["ModelInfer", "ModelStreamInfer", "ModelReady", "ModelConfig"])
)
def test_messages(message: bytes, method: str) -> None:
    way = route("POST", f"/inference.GRPCInferenceService/{method}", "application/grpc")
    with contextlib.suppress(RefusedError):
        found = read_message(way, message)
        assert found.model
        assert 0 <= found.output_tokens <= 1 << 20
        again = rewriter(way, found.model, "engine", 1)(message)
        assert read_message(way, again).model == "engine"


@FUZZ
@given(
    parts=st.lists(st.one_of(MESSAGES.map(pack), st.binary(max_size=30)), max_size=5),
    cuts=st.lists(st.integers(0, 2000), max_size=8),
    most=st.integers(0, 400),
)
def test_frames_hold_no_more_than_they_may(parts: list[bytes], cuts: list[int], most: int) -> None:
    data = b"".join(parts)
    edges = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    frames, found = Frames(most), []
    with contextlib.suppress(RefusedError):
        for a, b in itertools.pairwise(edges):
            found += frames.feed(data[a:b])
            assert len(frames) <= most + 5
        frames.end()
        assert b"".join(map(pack, found)) == data


@FUZZ
@given(text=st.text(max_size=6000))
def test_numbers_in_headers(text: str) -> None:
    number = whole(text)
    assert number is None or (0 <= number < 10**15 and str(number) == (text.lstrip("0") or "0"))


@FUZZ
@given(
    path=st.text(max_size=30).map(lambda t: f"/v2/models/{t}/infer?{t}"),
    name=st.text(min_size=1, max_size=20),
)
def test_paths_are_renamed_in_their_place(path: str, name: str) -> None:
    way = route("POST", path)
    if way.wants is Wants.INFERENCE:
        again = route("POST", engine_path(path, name))
        assert (again.model, again.wants) == (name, Wants.INFERENCE)


@settings(max_examples=200, deadline=None)
@given(
    method=st.sampled_from(["GET", "POST"]),
    path=PATHS,
    kind=TYPES,
    given_headers=HEADERS,
    body=st.one_of(BODIES, MESSAGES.map(pack), st.lists(MESSAGES.map(pack), max_size=3).map(b"".join)),
    cut=st.integers(0, 200),
    trailers=st.booleans(),
)
def test_the_whole_way(
    method: str, path: str, kind: str, given_headers: dict[str, str], body: bytes, cut: int, trailers: bool
) -> None:
    """Each request is sent on, or answered with a code that is listed; and all room is given back."""
    pairs = {":method": method, ":path": path, "content-type": kind, **given_headers}
    first = pb.ProcessingRequest(request_headers=header_message(pairs))
    at = service(max_body=400)
    written = asyncio.run(play(at, [first, *request_body([body[:cut], body[cut:]], trailers=trailers)]))
    for reply in written[:1]:
        if reply.WhichOneof("response") == "immediate_response":
            said = {
                o.header.key: o.header.raw_value.decode("latin-1")
                for o in reply.immediate_response.headers.set_headers
            }
            code = said.get("x-tidegate-code")
            assert code in CATALOGUE if reply.immediate_response.status.code >= 400 else True
        else:
            assert reply.WhichOneof("response") == "request_headers"
    assert at.receiving == 0
    assert at.desk.flow.bytes == 0
    assert not list(at.desk.flow.in_flight())


@FUZZ
@given(
    path=PATHS,
    kind=TYPES,
    parts=st.lists(st.one_of(MESSAGES.map(pack), BODIES), max_size=8),
    most=st.integers(1, 500),
)
def test_an_exchange_holds_no_more_than_a_body_and_what_came_last(
    path: str, kind: str, parts: list[bytes], most: int
) -> None:
    exchange = Exchange(most)
    pairs = {":method": "POST", ":path": path, "content-type": kind}
    exchange.feed(pb.ProcessingRequest(request_headers=header_message(pairs)))
    for part in parts:
        if exchange.done:
            break
        exchange.feed(pb.ProcessingRequest(request_body=pb.HttpBody(body=part)))
        # A message that is as large as a body may be is taken, with what it costs itself.
        assert exchange.held <= (0 if exchange.done else most + MESSAGE_BYTES)


@FUZZ
@given(body=OBJECTS, name=st.sampled_from(["chat", "talk"]))
def test_what_is_handed_over_can_be_read_again(body: bytes, name: str) -> None:
    exchange = Exchange()
    exchange.feed(
        pb.ProcessingRequest(request_headers=header_message({":method": "POST", ":path": "/v1/completions"}))
    )
    for message in request_body([body]):
        exchange.feed(message)
    model = ServedModel(
        ("ns", "m"), ("chat", "talk"), ("c",), "OpenAI", "vLLM", engine_names={"talk": "chat"}
    )
    with contextlib.suppress(RefusedError):
        made = hand_over(exchange, name, model, QoSClass("c", 1), {}, in_order=False)
        if name == "talk":
            assert made.body is not None
            assert orjson.loads(made.body) == {**orjson.loads(body), "model": "chat"}
        else:
            assert made.body is None
