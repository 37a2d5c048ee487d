"""Whatever Envoy sends and whenever it goes away, every room that was taken is given back once."""

import asyncio
import contextlib
import itertools
from dataclasses import dataclass
from typing import Any

from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from hypothesis import given, settings
from hypothesis import strategies as st

from support.ext_proc import (
    kinds,
    request_body,
    request_headers,
    response_headers,
    response_trailers,
    streamed,
)
from tidegate.core.flow import Endpoint, Flow, Model, Policy
from tidegate.core.load import EngineReport
from tidegate.core.types import QoSClass
from tidegate.facts.endpoints import ServedModel, World
from tidegate.picker.desk import Desk
from tidegate.picker.exchange import (
    SERVED_KEY,
    SUBSET_KEY,
    SUBSET_NAMESPACE,
    Exchange,
    Phase,
    ProtocolError,
)
from tidegate.picker.identity import Identity
from tidegate.picker.service import Service, Settings

KEY = ("ns", "m")
BODY = b'{"model":"m","prompt":"' + b"x" * 40 + b'","max_tokens":4}'


@dataclass(frozen=True)
class Visit:
    """One request: how its body is cut, how its stream goes on, and after which message it ends."""

    qos_class: str
    cuts: tuple[int, ...]
    trailers: bool
    after: tuple[pb.ProcessingRequest, ...]
    ends_after: int
    cancelled: bool
    """The stream is cancelled, and not just at its end."""
    bad: bool
    buffered: bool
    hint: tuple[str, ...] | None

    def messages(self) -> list[pb.ProcessingRequest]:
        body = b"no JSON" if self.bad else BODY
        edges = sorted({0, len(body), *(c % len(body) for c in self.cuts)})
        chunks = [body[a:b] for a, b in itertools.pairwise(edges)]
        first = request_headers(x_tidegate_qos=self.qos_class)
        if self.buffered:
            chunks = [body]
            first.protocol_config.request_body_mode = ProcessingMode.BUFFERED
        if self.hint is not None:
            first.metadata_context.filter_metadata[SUBSET_NAMESPACE].update({SUBSET_KEY: list(self.hint)})
        whole = [first, *request_body(chunks, trailers=self.trailers)]
        return [*whole, *self.after][: self.ends_after]


def served(address: str) -> pb.ProcessingRequest:
    message = response_headers(200)
    message.metadata_context.filter_metadata["envoy.lb"].update({SERVED_KEY: address})
    return message


def response_body(*, end: bool = False) -> pb.ProcessingRequest:
    return pb.ProcessingRequest(response_body=pb.HttpBody(body=b"token", end_of_stream=end))


AFTER = st.lists(
    st.sampled_from(
        [
            response_headers(200),
            response_headers(503, end=True),
            served("b:1"),
            served("elsewhere:1"),
            response_body(),
            response_body(end=True),
            response_trailers(),
        ]
    ),
    max_size=4,
).map(tuple)
VISITS = st.builds(
    Visit,
    qos_class=st.sampled_from(["high", "low", "none"]),
    cuts=st.lists(st.integers(0, 100), max_size=4).map(tuple),
    trailers=st.booleans(),
    after=AFTER,
    ends_after=st.integers(0, 10),
    cancelled=st.booleans(),
    bad=st.booleans(),
    buffered=st.booleans(),
    hint=st.none() | st.lists(st.sampled_from(["a:1", "b:1", "elsewhere:1"]), max_size=2).map(tuple),
)


def desk_with(slots: int) -> Desk:
    """One model with two classes and two endpoints; time stands still."""
    desk = Desk(Flow(Policy(fallbacks=1)), clock=lambda: 0.0)
    classes = {"high": QoSClass("high", 9), "low": QoSClass("low", 1, queue_max_requests=3)}
    model = ServedModel(KEY, ("m",), ("high", "low"), "OpenAI", "vLLM")
    endpoints = tuple(Endpoint(address, KEY, "low", slots) for address in ("a:1", "b:1"))
    flow_model = Model(KEY, model.classes, startable=False)
    desk.set_world(World(classes, {KEY: model}, {"m": KEY}, endpoints, {KEY: flow_model}))
    for one in endpoints:
        desk.report(one.address, EngineReport(0.0, 0, 0), (0, 0))
    return desk


class NobodyToAsk:
    async def create(self, kind: Any, obj: Any) -> dict[str, Any]:
        raise AssertionError("the gateway is trusted")


async def visit(service: Service, one: Visit, written: list[str]) -> None:
    """Play one stream to its end."""
    queue: asyncio.Queue[pb.ProcessingRequest | None] = asyncio.Queue()

    async def write(reply: pb.ProcessingResponse) -> None:
        written.extend(kinds([reply]))
        await asyncio.sleep(0)

    task = asyncio.create_task(service.serve(queue.get, write))
    for message in one.messages():
        queue.put_nowait(message)
        await asyncio.sleep(0)
    if one.cancelled:
        task.cancel()
    else:
        queue.put_nowait(None)
    with contextlib.suppress(asyncio.CancelledError, ProtocolError):
        await task


@settings(max_examples=150, deadline=None)
@given(visits=st.lists(VISITS, min_size=1, max_size=8), slots=st.integers(1, 3), together=st.booleans())
def test_every_room_is_given_back_once(visits: list[Visit], slots: int, together: bool) -> None:
    async def play() -> tuple[Desk, Service]:
        desk = desk_with(slots)
        service = Service(desk, Identity(NobodyToAsk(), desk.clock), Settings(trust_class_header=True))
        written: list[list[str]] = [[] for _ in visits]
        streams = [visit(service, v, w) for v, w in zip(visits, written, strict=True)]
        if together:
            await asyncio.gather(*streams)
        else:
            for stream in streams:
                await stream
        for one, replies in zip(visits, written, strict=True):
            assert replies.count("immediate_response") <= 1
            assert replies.count("request_headers") <= 1
            # Buffered, the headers are answered before anything is known.
            sent = "request_body" if one.buffered else "request_headers"
            assert not {"immediate_response", sent} <= set(replies)
        return desk, service

    desk, service = asyncio.run(asyncio.wait_for(play(), timeout=60))  # it waits for nobody but itself
    assert desk.flow.held("a:1") == desk.flow.held("b:1") == (0, 0)
    assert list(desk.flow.waiting()) == []
    assert list(desk.flow.in_flight()) == []
    assert desk.flow.bytes == 0
    assert service.receiving == 0
    ended = [
        sample.value
        for family in desk.metrics.requests.collect()
        for sample in family.samples
        if sample.name.endswith("_total")
    ]
    started = sum(bool(v.messages()) for v in visits)
    assert sum(ended) == started


@settings(max_examples=200, deadline=None)
@given(
    body=st.binary(max_size=200_000),
    cuts=st.lists(st.integers(0, 200_000), max_size=6),
    trailers=st.booleans(),
)
def test_a_body_leaves_as_it_came(body: bytes, cuts: list[int], trailers: bool) -> None:
    exchange = Exchange()
    edges = sorted({0, len(body), *(c % (len(body) + 1) for c in cuts)})
    chunks = [body[a:b] for a, b in itertools.pairwise(edges)]
    exchange.feed(request_headers())
    for message in request_body(chunks, trailers=trailers):
        assert exchange.phase is Phase.BODY
        assert exchange.feed(message) == []
    parts = streamed(exchange.send("a:1", headers={}))
    assert b"".join(p.body for p in parts) == body
    assert all(len(p.body) <= 62_000 for p in parts)
    assert [p.end_of_stream for p in parts] == [False] * (len(parts) - 1) + [not trailers]
