"""One request's ext_proc exchange with Envoy, without I/O: feed a message, get messages to write.

Request bodies come and go FULL_DUPLEX_STREAMED: nothing is answered before the whole request is here
and has its endpoint; then the replies go out in the order that Envoy wants: headers, body chunks,
trailers. Of a gRPC stream the first message is enough: what comes later follows it, message by message.
Where Envoy says that it buffers them, headers are answered at once and the body's reply has the
endpoint. Response bodies are passed on as they come, where a gateway sends them at all.

The protocol between gateway and picker is the Endpoint Picker Protocol, proposal 004 of
https://github.com/kubernetes-sigs/gateway-api-inference-extension.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum, auto
from functools import lru_cache
from typing import Final

from envoy.config.core.v3 import base_pb2
from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from google.protobuf.struct_pb2 import Struct

from tidegate.core import subset
from tidegate.http2.grpc import pack
from tidegate.picker.errors import OPENAI, Code, RefusedError, http_status
from tidegate.picker.kservegrpc import Frames, Rewrite, too_large
from tidegate.picker.protocols import Route, route
from tidegate.render.envoy import DESTINATION_HEADER, LOCAL_DETAILS

CHUNK_BYTES: Final = 62_000
"""Envoy resets the stream on body chunks of 64 KiB and more."""
DEFAULT_MAX_BODY: Final = 16 << 20
MESSAGE_BYTES: Final = 64
"""What a message costs in memory beside its payload: without it, empty ones would be free."""
REQUEST_ID: Final = "x-request-id"
ENDPOINT_HEADER: Final = "x-tidegate-endpoint"
SUBSET_NAMESPACE: Final = "envoy.lb.subset_hint"
SUBSET_KEY: Final = "x-gateway-destination-endpoint-subset"
DESTINATION_NAMESPACE: Final = "envoy.lb"
SERVED_KEY: Final = "x-gateway-destination-endpoint-served"

_BUFFERED: Final = processing_mode_pb2.ProcessingMode.BUFFERED
_SHOWN: Final = (processing_mode_pb2.ProcessingMode.STREAMED, _BUFFERED)
"""Modes in which a body is shown, and goes on as it is unless the reply changes it."""
_OVERWRITE: Final = base_pb2.HeaderValueOption.HeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD


class Phase(Enum):
    """How far the exchange is."""

    HEADERS = auto()
    BODY = auto()
    HELD = auto()
    """All of the request is here: `send` or `answer` it."""
    SENT = auto()
    RESPONDING = auto()
    DONE = auto()


class Outcome(Enum):
    """How a request ended; the word is the metric's label."""

    ANSWERED = "answered"
    REFUSED = "refused"
    CANCELLED = "cancelled"
    RECALLED = "recalled"
    LOST = "lost"


class ProtocolError(Exception):
    """Envoy sent what cannot come now: its configuration is not the one that the picker needs."""


class BrokenStreamError(Exception):
    """A gRPC stream cannot go on, and its answer has begun: all that is left is to end it."""


class Exchange:
    """The state of one exchange. `headers` are lower-case names with their first value.

    `request_id` is used where the client's gateway gave none.
    """

    def __init__(self, max_body: int = DEFAULT_MAX_BODY, request_id: str = "") -> None:
        self.phase = Phase.HEADERS
        self.headers: dict[str, str] = {}
        self.repeated: set[str] = set()
        """Names of headers that came more than once."""
        self.way: Route = route("", "")
        self.received = 0
        self.status = 0
        """Of the response, once its headers came; or of our own answer. gRPC's are turned into HTTP's."""
        self.request_id = request_id
        self.told: dict[str, str] = {}
        """Headers of the response: what the client is told of its request."""
        self.messages: list[bytes] = []
        """Of a gRPC request: those that are whole and were not sent yet."""
        self.subset: subset.Subset | None = None
        """Where alone the gateway lets it go; None where it says nothing."""
        self.elsewhere = ""
        """The fallback that serves it, as the gateway says; empty where it is the first, or not told."""
        self._named: tuple[str, ...] = ()
        self._buffered = self._shown = False
        self._max_body = max_body
        self._frames = Frames(max_body)
        self._rewrite: Rewrite = bytes
        self._open = True
        self._refused = False
        self._chunks: list[bytes] = []
        self._kept = 0
        """Bytes of the chunks and of the messages, which are counted as they come."""
        self._headers_only = False
        self._trailers = False

    @property
    def done(self) -> bool:
        """Whether nothing more is to be said."""
        return self.phase is Phase.DONE

    @property
    def protocol(self) -> str:
        """The protocol whose error shape the client understands."""
        return self.way.protocol if self.phase is not Phase.HEADERS else OPENAI

    @property
    def held(self) -> int:
        """Bytes of the body that are in memory."""
        return self._kept + len(self._frames)

    @property
    def body(self) -> bytes:
        """What came of the request's body."""
        if len(self._chunks) > 1:
            self._chunks = [b"".join(self._chunks)]
        return self._chunks[0] if self._chunks else b""

    def feed(self, message: pb.ProcessingRequest) -> list[pb.ProcessingResponse]:
        """Take Envoy's next message; returns what to write. Raises ProtocolError, BrokenStreamError."""
        kind = str(message.WhichOneof("request"))
        if self.phase is Phase.DONE:
            return []  # what was on its way when we answered
        replies = self._feed_request(kind, message)
        if replies is None:
            replies = self._feed_response(kind, message)
        if replies is None:
            raise ProtocolError(
                f"ext_proc message {kind} in phase {self.phase.name}: the filter must send headers and"
                " trailers, with request_body_mode FULL_DUPLEX_STREAMED or BUFFERED, and response_body_mode"
                " NONE, STREAMED or FULL_DUPLEX_STREAMED"
            )
        return replies

    def _feed_request(  # noqa: PLR0911 -- a table
        self, kind: str, message: pb.ProcessingRequest
    ) -> list[pb.ProcessingResponse] | None:
        match kind, self.phase:
            case "request_headers", Phase.HEADERS:
                return self._request_headers(message)
            case "request_body", Phase.BODY:
                return self._request_body(message.request_body)
            case "request_body", Phase.HELD if self._open:
                return self._stream_body(message.request_body)
            case "request_body", Phase.SENT | Phase.RESPONDING if self._open:
                return self._pass_on(message.request_body)
            case "request_trailers", _ if self._open and self.phase is not Phase.HEADERS:
                return self._request_trailers()
            case "request_trailers", Phase.SENT if self._buffered:
                return [pb.ProcessingResponse(request_trailers=pb.TrailersResponse())]
        return None

    def _feed_response(self, kind: str, message: pb.ProcessingRequest) -> list[pb.ProcessingResponse] | None:
        match kind, self.phase:
            case "response_headers", Phase.SENT:
                return self._response_headers(message)
            case "response_body", Phase.RESPONDING:
                return self._response_body(message.response_body)
            case "response_trailers", Phase.RESPONDING | Phase.SENT:
                self._grpc_status(message.response_trailers.trailers.headers)
                self.phase = Phase.DONE
                return [pb.ProcessingResponse(response_trailers=pb.TrailersResponse())]
        return None

    def send(
        self,
        *addresses: str,
        headers: Mapping[str, str],
        drop: tuple[str, ...] = (),
        body: bytes | None = None,
        rewrite: Rewrite = bytes,
    ) -> list[pb.ProcessingResponse]:
        """Hand the request over to an endpoint; returns the replies in their order.

        Args:
            addresses: `ip:port`, the endpoint and those to go on to if it does not take it.
            headers: Headers to set beside the destination.
            drop: Headers that the engine must not see.
            body: Another body than the client's.
            rewrite: Of gRPC: what becomes of each message, of those that come later too.

        Raises:
            RefusedError: `rewrite` refuses a message that is here; nothing is sent.
        """
        if self.phase is not Phase.HELD:
            raise ProtocolError(f"nothing to send in phase {self.phase.name}")
        data = self.body if body is None else body
        if self.way.grpc:
            data = b"".join(pack(rewrite(message)) for message in self.messages)
        self.phase, self._chunks, self.messages, self._rewrite = Phase.SENT, [], [], rewrite
        self._kept = 0
        self._named, to = addresses, ",".join(addresses)
        headers = headers if REQUEST_ID in self.headers else {**self._id(), **headers}
        if self._buffered:
            changed = data if body is not None or self.way.grpc else None
            return [self._buffered_reply(to, headers, drop, changed)]
        replies = [self._headers_reply(to, headers, drop)]
        if not self._headers_only:
            replies += self._body_replies(data, end=not self._open and not self._trailers)
        if self._trailers:
            replies.append(pb.ProcessingResponse(request_trailers=pb.TrailersResponse()))
        return replies

    def answer(
        self, status: int, body: bytes, *, reason: str, headers: Mapping[str, str] | None = None
    ) -> list[pb.ProcessingResponse]:
        """Answer in place of an engine. `reason` is one word, for Envoy's access log."""
        [reply] = self._immediate(status, body, reason)
        _set(
            reply.immediate_response.headers,
            {"content-type": "application/json", **self._telling(), **(headers or {})},
        )
        return [reply]

    def refuse(self, no: RefusedError) -> list[pb.ProcessingResponse]:
        """Answer with an error in the client's protocol. Over gRPC that is HTTP 200, and trailers."""
        grpc = self.way.grpc
        self._refused = True
        if not grpc:
            return self.answer(
                no.kind.http, no.body(self.protocol), reason=no.code, headers=no.headers(grpc=False)
            )
        [reply] = self._immediate(200, no.message.encode(errors="replace"), no.code)
        reply.immediate_response.grpc_status.status = no.kind.grpc
        _set(reply.immediate_response.headers, {**self._telling(), **no.headers(grpc=True)})
        self.status = no.kind.http
        return [reply]

    def cut(self, no: RefusedError) -> list[pb.ProcessingResponse]:
        """End a gRPC stream that was sent on. Raises BrokenStreamError where its answer has begun."""
        if self.phase is Phase.SENT:
            return self.refuse(no)
        raise BrokenStreamError(no.message) from no

    def _immediate(self, status: int, body: bytes, reason: str) -> list[pb.ProcessingResponse]:
        if self.phase in (Phase.RESPONDING, Phase.DONE) or (self.phase is Phase.SENT and not self._open):
            raise ProtocolError(f"too late to answer in phase {self.phase.name}")
        self.phase, self.status, self._chunks, self.messages = Phase.DONE, status, [], []
        self._frames, self._kept = Frames(self._max_body), 0
        reply = pb.ProcessingResponse()
        reply.immediate_response.status.code = status
        reply.immediate_response.body = body
        reply.immediate_response.details = f"{LOCAL_DETAILS}_{reason}"
        return [reply]

    def _telling(self) -> dict[str, str]:
        return {**self._id(), **self.told}

    def _id(self) -> dict[str, str]:
        return {REQUEST_ID: self.request_id} if self.request_id else {}

    def outcome(self, dispatched: bool) -> Outcome:
        """How it ended, if it ends now. `dispatched`: an endpoint had been given to it.

        A stream that Envoy truncates and one that the client leaves look alike here; the first
        byte of a good answer makes it answered.
        """
        if not dispatched or self._refused:
            return Outcome.REFUSED if self.status >= 400 else Outcome.CANCELLED
        if self.status >= 500:
            return Outcome.LOST
        return Outcome.ANSWERED if self.status else Outcome.CANCELLED

    def _request_headers(self, first: pb.ProcessingRequest) -> list[pb.ProcessingResponse]:
        message = first.request_headers
        for header in message.headers.headers:
            name = sys.intern(header.key.lower())  # kept while it waits
            if name in self.headers:
                self.repeated.add(name)
            else:
                self.headers[name] = _value(header)
        if first.HasField("metadata_context"):
            self.subset = _subset(first)
        given = self.headers.get
        self.way = route(given(":method", ""), given(":path", ""), given("content-type", ""))
        self.request_id = given(REQUEST_ID, "") or self.request_id
        self._headers_only = message.end_of_stream
        self._open = not message.end_of_stream
        self.phase = Phase.HELD if message.end_of_stream else Phase.BODY
        if (whole(given("content-length", "")) or 0) > self._max_body:
            return self.refuse(too_large(self._max_body))
        # An Envoy that does not say how it sends bodies is taken to be in full duplex.
        if first.HasField("protocol_config"):
            modes = first.protocol_config
            self._shown = modes.response_body_mode in _SHOWN
            self._buffered = modes.request_body_mode == _BUFFERED and not self._headers_only
        return [pb.ProcessingResponse(request_headers=pb.HeadersResponse())] if self._buffered else []

    def _request_body(self, message: pb.HttpBody) -> list[pb.ProcessingResponse]:
        if self.way.grpc and self.way.streams and not self._buffered:
            return self._stream_body(message)
        self.received += len(message.body)
        if self.received > self._max_body:
            return self.refuse(too_large(self._max_body))
        last = message.end_of_stream or self._buffered  # trailers come after a buffered body's reply
        if last:
            self.phase, self._open = Phase.HELD, False
        if self.way.grpc:
            return self._take_messages(message.body, last=last)
        if message.body:
            self._chunks.append(message.body)
            self._kept += len(message.body)
        return []

    def _request_trailers(self) -> list[pb.ProcessingResponse]:
        """They end the body, in place of a last piece of it."""
        self._trailers, self._open = True, False
        if self.phase in (Phase.SENT, Phase.RESPONDING):
            return [pb.ProcessingResponse(request_trailers=pb.TrailersResponse())]
        self.phase = Phase.HELD
        return self._take_messages(b"", last=True) if self.way.grpc else []

    def _stream_body(self, message: pb.HttpBody) -> list[pb.ProcessingResponse]:
        """A gRPC stream before it is sent on: its first whole message says where it goes."""
        self.received += len(message.body)
        refused = self._take_messages(message.body, last=message.end_of_stream)
        if refused:
            return refused
        self._open = not message.end_of_stream
        if self.messages or not self._open:
            self.phase = Phase.HELD
        return []

    def _take_messages(self, data: bytes, *, last: bool) -> list[pb.ProcessingResponse]:
        try:
            self._keep(data)
            if last:
                self._frames.end()
        except RefusedError as no:
            return self.refuse(no)
        return []

    def _keep(self, data: bytes) -> None:
        """Keep the messages that are whole now: of a call one, of a stream as many as a body may hold."""
        most, several = self._max_body + MESSAGE_BYTES, self.way.streams
        for message in self._frames.feed(data):
            self.messages.append(message)
            self._kept += len(message) + MESSAGE_BYTES
            if not several or self.held > most:
                break  # what is left would be refused, whatever it is
        if not several and (self.messages[1:] or (self.messages and len(self._frames))):
            raise RefusedError(Code.INVALID_BODY, "the call has more than one message; send one a call")
        if self.held > most:
            raise too_large(self._max_body)

    def _pass_on(self, message: pb.HttpBody) -> list[pb.ProcessingResponse]:
        """A gRPC stream that was sent on: each further message follows as soon as it is whole."""
        self.received += len(message.body)
        try:
            data = b"".join(pack(self._rewrite(m)) for m in self._frames.feed(message.body))
            if message.end_of_stream:
                self._frames.end()
        except RefusedError as no:
            return self.cut(no)
        self._open = not message.end_of_stream
        return self._body_replies(data, end=message.end_of_stream) if data or message.end_of_stream else []

    def _response_headers(self, first: pb.ProcessingRequest) -> list[pb.ProcessingResponse]:
        message = first.response_headers
        for header in message.headers.headers:
            if header.key == ":status":
                self.status = whole(_value(header)) or 0
        self._grpc_status(message.headers.headers)
        if len(self._named) > 1:
            served = _text(first, DESTINATION_NAMESPACE, SERVED_KEY)
            self.elsewhere = served if served in self._named[1:] else ""
            if self.elsewhere and ENDPOINT_HEADER in self.told:
                self.told[ENDPOINT_HEADER] = self.elsewhere
        self.phase = Phase.DONE if message.end_of_stream else Phase.RESPONDING
        reply = pb.ProcessingResponse(response_headers=pb.HeadersResponse())
        _set(reply.response_headers.response.header_mutation, self._telling())
        return [reply]

    def _response_body(self, message: pb.HttpBody) -> list[pb.ProcessingResponse]:
        if message.end_of_stream:
            self.phase = Phase.DONE
        if self._shown:
            return [pb.ProcessingResponse(response_body=pb.BodyResponse())]
        replies = []
        for piece, last in _pieces(message.body):
            reply = pb.ProcessingResponse()
            chunk = reply.response_body.response.body_mutation.streamed_response
            chunk.body, chunk.end_of_stream = piece, last and message.end_of_stream
            replies.append(reply)
        return replies

    def _grpc_status(self, headers: Iterable[base_pb2.HeaderValue]) -> None:
        """Over gRPC the HTTP status is 200 whatever came of it."""
        if not self.way.grpc:
            return
        for header in headers:
            if header.key == "grpc-status" and (status := whole(_value(header))) is not None:
                self.status = http_status(status)

    def _headers_reply(
        self, address: str, headers: Mapping[str, str], drop: tuple[str, ...]
    ) -> pb.ProcessingResponse:
        reply = pb.ProcessingResponse()
        _to(reply, reply.request_headers.response, address, headers, drop)
        return reply

    def _buffered_reply(
        self, address: str, headers: Mapping[str, str], drop: tuple[str, ...], body: bytes | None
    ) -> pb.ProcessingResponse:
        reply = pb.ProcessingResponse()
        _to(reply, reply.request_body.response, address, headers, drop)
        if body is not None:
            reply.request_body.response.body_mutation.body = body
        return reply

    def _body_replies(self, data: bytes, *, end: bool) -> list[pb.ProcessingResponse]:
        replies = []
        for piece, last in _pieces(data):
            reply = pb.ProcessingResponse()
            chunk = reply.request_body.response.body_mutation.streamed_response
            chunk.body, chunk.end_of_stream = piece, last and end
            replies.append(reply)
        return replies


def _to(
    reply: pb.ProcessingResponse,
    common: pb.CommonResponse,
    address: str,
    headers: Mapping[str, str],
    drop: tuple[str, ...],
) -> None:
    """Say where to in both ways that gateways read: a header, and dynamic metadata."""
    common.clear_route_cache = True
    _set(common.header_mutation, {DESTINATION_HEADER: address, **headers})
    common.header_mutation.remove_headers.extend(drop)
    reply.dynamic_metadata.CopyFrom(_metadata(address))


def _pieces(data: bytes) -> Iterator[tuple[bytes, bool]]:
    """A body in pieces that Envoy takes, and whether each is the last; an empty one is one empty piece."""
    starts = range(0, len(data), CHUNK_BYTES) or range(1)
    for start in starts:
        yield data[start : start + CHUNK_BYTES], start == starts[-1]


def _subset(message: pb.ProcessingRequest) -> subset.Subset | None:
    """The gateway's subset hint; None where there is none. One that cannot be read allows nothing."""
    spaces = message.metadata_context.filter_metadata
    if SUBSET_NAMESPACE not in spaces or SUBSET_KEY not in spaces[SUBSET_NAMESPACE].fields:
        return None
    value = spaces[SUBSET_NAMESPACE].fields[SUBSET_KEY]
    if value.WhichOneof("kind") == "list_value":
        return subset.read([v.string_value for v in value.list_value.values])
    return subset.read(value.string_value)


def _text(message: pb.ProcessingRequest, namespace: str, key: str) -> str:
    spaces = message.metadata_context.filter_metadata
    fields = spaces[namespace].fields if namespace in spaces else {}
    return str(fields[key].string_value) if key in fields else ""


def whole(text: str) -> int | None:
    """A whole number as headers have it, None for what is none, or is beyond all bounds."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 15 else None


def _value(header: base_pb2.HeaderValue) -> str:
    return str(header.raw_value.decode("latin-1") if header.raw_value else header.value)


@lru_cache(maxsize=4_096)
def _metadata(address: str) -> Struct:
    """The endpoint as `envoy.lb` metadata: not to be changed, it is used again."""
    metadata = Struct()
    metadata.update({DESTINATION_NAMESPACE: {DESTINATION_HEADER: address}})
    return metadata


def _set(mutation: pb.HeaderMutation, headers: Mapping[str, str]) -> None:
    for name, value in headers.items():
        option = mutation.set_headers.add()
        option.append_action = _OVERWRITE
        option.header.key = name
        option.header.raw_value = value.encode("latin-1", errors="replace")
