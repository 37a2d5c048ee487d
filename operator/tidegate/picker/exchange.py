"""One request's ext_proc exchange with Envoy, without I/O: feed a message, get messages to write.

Bodies come and go FULL_DUPLEX_STREAMED. Nothing is answered before the whole request is here and
has its endpoint; then the replies go out in the order that Envoy wants: headers, body chunks,
trailers.
"""

import sys
from collections.abc import Mapping
from enum import Enum, auto
from functools import lru_cache
from typing import Final

from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from google.protobuf.struct_pb2 import Struct

from tidegate.picker.protocols import OPENAI, Route, error_body, route
from tidegate.render.envoy import DESTINATION_HEADER, LOCAL_DETAILS

CHUNK_BYTES: Final = 62_000
"""Envoy resets the stream on body chunks of 64 KiB and more."""
DEFAULT_MAX_BODY: Final = 16 << 20

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
    LOST = "lost"


class ProtocolError(Exception):
    """Envoy sent what cannot come now: its configuration is not the one that the picker needs."""


class Exchange:
    """The state of one exchange. `headers` are lower-case names with their first value."""

    def __init__(self, max_body: int = DEFAULT_MAX_BODY) -> None:
        self.phase = Phase.HEADERS
        self.headers: dict[str, str] = {}
        self.way: Route = route("", "")
        self.received = 0
        self.status = 0
        """Of the response, once its headers came; or of our own answer."""
        self._max_body = max_body
        self._chunks: list[bytes] = []
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
    def body(self) -> bytes:
        """What came of the request's body."""
        if len(self._chunks) > 1:
            self._chunks = [b"".join(self._chunks)]
        return self._chunks[0] if self._chunks else b""

    def feed(self, message: pb.ProcessingRequest) -> list[pb.ProcessingResponse]:
        """Take Envoy's next message; returns what to write. Raises ProtocolError."""
        kind = message.WhichOneof("request")
        if self.phase is Phase.DONE:
            return []  # what was on its way when we answered
        match kind, self.phase:
            case "request_headers", Phase.HEADERS:
                return self._request_headers(message.request_headers)
            case "request_body", Phase.BODY:
                return self._request_body(message.request_body)
            case "request_trailers", Phase.BODY:
                self._trailers, self.phase = True, Phase.HELD
                return []
            case "response_headers", Phase.SENT:
                return self._response_headers(message.response_headers)
            case "response_trailers", Phase.RESPONDING | Phase.SENT:
                self.phase = Phase.DONE
                return [pb.ProcessingResponse(response_trailers=pb.TrailersResponse())]
        raise ProtocolError(
            f"ext_proc message {kind} in phase {self.phase.name}: the filter must send headers and trailers,"
            " request_body_mode FULL_DUPLEX_STREAMED and response_body_mode NONE"
        )

    def send(
        self,
        address: str,
        *,
        headers: Mapping[str, str],
        drop: tuple[str, ...] = (),
        body: bytes | None = None,
    ) -> list[pb.ProcessingResponse]:
        """Hand the request over to an endpoint; returns the replies in their order.

        Args:
            address: `ip:port`.
            headers: Headers to set beside the destination.
            drop: Headers that the engine must not see.
            body: Another body than the client's.
        """
        if self.phase is not Phase.HELD:
            raise ProtocolError(f"nothing to send in phase {self.phase.name}")
        data = self.body if body is None else body
        self.phase, self._chunks = Phase.SENT, []
        replies = [self._headers_reply(address, headers, drop)]
        if not self._headers_only:
            replies += self._body_replies(data)
        if self._trailers:
            replies.append(pb.ProcessingResponse(request_trailers=pb.TrailersResponse()))
        return replies

    def answer(
        self, status: int, body: bytes, *, reason: str, headers: Mapping[str, str] | None = None
    ) -> list[pb.ProcessingResponse]:
        """Answer in place of an engine. `reason` is one word, for Envoy's access log."""
        if self.phase in (Phase.SENT, Phase.RESPONDING, Phase.DONE):
            raise ProtocolError(f"too late to answer in phase {self.phase.name}")
        self.phase, self.status, self._chunks = Phase.DONE, status, []
        reply = pb.ProcessingResponse()
        immediate = reply.immediate_response
        immediate.status.code = status
        immediate.body = body
        immediate.details = f"{LOCAL_DETAILS}_{reason}"
        _set(immediate.headers, {"content-type": "application/json", **(headers or {})})
        return [reply]

    def refuse(
        self, status: int, message: str, *, code: str, param: str | None = None, **headers: str
    ) -> list[pb.ProcessingResponse]:
        """Answer with an error in the client's protocol. Header names are given with `_` for `-`."""
        body = error_body(self.protocol, status, message, code=code, param=param)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.answer(status, body, reason=code, headers=named)

    def outcome(self, dispatched: bool) -> Outcome:
        """How it ended, if it ends now. `dispatched`: an endpoint had been given to it.

        A stream that Envoy truncates and one that the client leaves look alike here; the first
        byte of a good answer makes it answered.
        """
        if not dispatched:
            return Outcome.REFUSED if self.status >= 400 else Outcome.CANCELLED
        if self.status >= 500:
            return Outcome.LOST
        return Outcome.ANSWERED if self.status else Outcome.CANCELLED

    def _request_headers(self, message: pb.HttpHeaders) -> list[pb.ProcessingResponse]:
        for header in message.headers.headers:
            value = header.raw_value.decode("latin-1") if header.raw_value else header.value
            self.headers.setdefault(sys.intern(header.key.lower()), value)  # kept while it waits
        self.way = route(self.headers.get(":method", ""), self.headers.get(":path", ""))
        self._headers_only = message.end_of_stream
        self.phase = Phase.HELD if message.end_of_stream else Phase.BODY
        length = self.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_body:
            return self._too_large()
        return []

    def _request_body(self, message: pb.HttpBody) -> list[pb.ProcessingResponse]:
        self.received += len(message.body)
        if self.received > self._max_body:
            return self._too_large()
        if message.body:
            self._chunks.append(message.body)
        if message.end_of_stream:
            self.phase = Phase.HELD
        return []

    def _response_headers(self, message: pb.HttpHeaders) -> list[pb.ProcessingResponse]:
        for header in message.headers.headers:
            if header.key == ":status":
                self.status = int(header.raw_value or header.value)
        self.phase = Phase.DONE if message.end_of_stream else Phase.RESPONDING
        return [pb.ProcessingResponse(response_headers=pb.HeadersResponse())]

    def _too_large(self) -> list[pb.ProcessingResponse]:
        return self.refuse(
            413,
            f"the body is larger than {self._max_body} bytes, which is what this gateway takes",
            code="body_too_large",
        )

    def _headers_reply(
        self, address: str, headers: Mapping[str, str], drop: tuple[str, ...]
    ) -> pb.ProcessingResponse:
        reply = pb.ProcessingResponse()
        common = reply.request_headers.response
        common.clear_route_cache = True
        _set(common.header_mutation, {DESTINATION_HEADER: address, **headers})
        common.header_mutation.remove_headers.extend(drop)
        reply.dynamic_metadata.CopyFrom(_metadata(address))
        return reply

    def _body_replies(self, data: bytes) -> list[pb.ProcessingResponse]:
        starts = range(0, len(data), CHUNK_BYTES) or range(1)
        replies = []
        for start in starts:
            reply = pb.ProcessingResponse()
            chunk = reply.request_body.response.body_mutation.streamed_response
            chunk.body = data[start : start + CHUNK_BYTES]
            chunk.end_of_stream = start == starts[-1] and not self._trailers
            replies.append(reply)
        return replies


@lru_cache(maxsize=4_096)
def _metadata(address: str) -> Struct:
    """The endpoint as `envoy.lb` metadata: not to be changed, it is used again."""
    metadata = Struct()
    metadata.update({"envoy.lb": {DESTINATION_HEADER: address}})
    return metadata


def _set(mutation: pb.HeaderMutation, headers: Mapping[str, str]) -> None:
    for name, value in headers.items():
        option = mutation.set_headers.add()
        option.append_action = _OVERWRITE
        option.header.key = name
        option.header.raw_value = value.encode("latin-1", errors="replace")
