"""The proxy's side of one ext_proc stream, over gRPC."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

import grpc
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as pb_grpc
from google.protobuf import struct_pb2

from tidegate.conformance.answer import NAMESPACE, Answer, read

SUBSET_NAMESPACE: Final = "envoy.lb.subset_hint"
SUBSET_KEY: Final = "x-gateway-destination-endpoint-subset"
SERVED_KEY: Final = "x-gateway-destination-endpoint-served"
_CHANNEL: Final = (
    ("grpc.use_local_subchannel_pool", 1),  # a connection of our own, whoever else is in the process
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 16 << 20),
)


class BodyMode(StrEnum):
    """How the proxy sends bodies: Envoy's `request_body_mode`."""

    FULL_DUPLEX = "full-duplex"
    BUFFERED = "buffered"


class _EndedError(Exception):
    """The picker ended the stream."""


_FAILURES: Final = (TimeoutError, _EndedError, grpc.aio.AioRpcError, asyncio.InvalidStateError)
"""gRPC says by InvalidStateError that a stream which was ended is written to."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request as the proxy puts it to the picker.

    Attributes:
        headers: In their order, pseudo-headers too.
        body: Its pieces; None is a request that ends with its headers.
        trailers: Whether trailers end it.
        metadata: Filter metadata by namespace.
        in_value: Whether header values stand in `value` rather than `raw_value`.
    """

    headers: Sequence[tuple[str, str]]
    body: Sequence[bytes] | None = None
    trailers: bool = False
    metadata: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    in_value: bool = False

    @property
    def whole(self) -> bytes:
        """All of its body."""
        return b"".join(self.body or ())


class Picker:
    """A connection to a picker."""

    def __init__(self, channel: grpc.aio.Channel, mode: BodyMode, timeout_s: float) -> None:
        self.channel, self.mode, self.timeout_s = channel, mode, timeout_s
        self._stub = pb_grpc.ExternalProcessorStub(channel)

    def stream(self) -> "Stream":
        """Open a stream: one for each request, as Envoy does."""
        return Stream(self._stub.Process(), self.mode, self.timeout_s)

    async def ask(self, request: Request) -> Answer:
        """Put one request, and end the stream once it is answered."""
        async with self.stream() as stream:
            return await stream.ask(request)


class Stream:
    """One ext_proc stream. Leaving it cancels what is still open."""

    def __init__(self, call: Any, mode: BodyMode, timeout_s: float) -> None:
        self._call, self._mode, self._timeout_s = call, mode, timeout_s
        self._replies: list[pb.ProcessingResponse] = []
        self._first = True

    async def __aenter__(self) -> "Stream":
        return self

    async def __aexit__(self, *_: object) -> None:
        self._call.cancel()

    async def ask(self, request: Request) -> Answer:
        """Send a request and read replies until it is answered, refused or given up."""
        problem = None
        try:
            async with asyncio.timeout(self._timeout_s):
                if self._mode is BodyMode.BUFFERED:
                    await self._buffered(request)
                else:
                    await self._full_duplex(request)
        except _FAILURES as error:
            problem = self._problem(error)
        answer = read(self._replies, request.whole)
        answer.problem = problem
        return answer

    async def send(self, messages: Iterable[pb.ProcessingRequest]) -> None:
        """Send messages, without waiting for anything. Raises grpc.aio.AioRpcError."""
        for message in messages:
            if self._first:
                self._first = False
                _describe(message, self._mode)
            await self._call.write(message)

    async def response(self, messages: Sequence[pb.ProcessingRequest], replies: int | None = None) -> Answer:
        """Send the response's messages; read as many replies, or until a response body's end."""
        self._replies, problem = [], None
        try:
            async with asyncio.timeout(self._timeout_s):
                await self.send(messages)
                while len(self._replies) < (replies or 1 << 30):
                    reply = await self._next()
                    streamed = reply.response_body.response.body_mutation.streamed_response
                    if replies is None and streamed.end_of_stream:
                        break
        except _FAILURES as error:
            problem = self._problem(error)
        answer = read(self._replies)
        answer.problem = problem
        return answer

    async def more(self, wait_s: float = 0.2) -> list[str]:
        """Kinds of replies that come within this time though nothing was asked any more."""
        self._replies = []
        with contextlib.suppress(*_FAILURES):
            async with asyncio.timeout(wait_s):
                while True:
                    await self._next()
        return [str(r.WhichOneof("response")) for r in self._replies]

    async def finish(self) -> str | None:
        """Say that nothing more comes, and wait for the picker to end: None, or what went wrong."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._call.done_writing()
                while await self._call.read() is not grpc.aio.EOF:
                    pass
                code = await self._call.code()
        except (TimeoutError, grpc.aio.AioRpcError) as error:
            return self._problem(error)
        return None if code is grpc.StatusCode.OK else f"the stream ended with {code.name}"

    async def _full_duplex(self, request: Request) -> None:
        """Everything is sent at once; the replies come when the picker has decided."""
        messages = list(request_messages(request))
        async for reply in self._exchange(messages):
            if _is_last(reply, request):
                return

    async def _exchange(self, messages: list[pb.ProcessingRequest]) -> AsyncIterator[pb.ProcessingResponse]:
        sending = asyncio.ensure_future(self.send(messages))
        try:
            while True:
                yield await self._next()
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _buffered(self, request: Request) -> None:
        """Headers, their reply, the whole body, its reply, and so with trailers."""
        whole = None if request.body is None else (request.whole,)
        one = Request(request.headers, whole, request.trailers, request.metadata, request.in_value)
        for message in request_messages(one):
            await self.send([message])
            reply = await self._next()
            if reply.WhichOneof("response") == "immediate_response":
                return

    async def _next(self) -> pb.ProcessingResponse:
        reply = await self._call.read()
        if reply is grpc.aio.EOF:
            raise _EndedError
        self._replies.append(reply)
        return reply

    def _problem(self, error: Exception) -> str:
        got = ", ".join(str(r.WhichOneof("response")) for r in self._replies) or "nothing"
        if isinstance(error, TimeoutError):
            return f"no further reply within {self._timeout_s:g} s; until then came {got}"
        if isinstance(error, grpc.aio.AioRpcError):
            return f"the stream failed: {error.code().name} {error.details()!r}; until then came {got}"
        return f"the stream was ended after {got}"


def connect(
    address: str, *, tls: bool = False, ca: bytes | None = None, server_name: str | None = None
) -> grpc.aio.Channel:
    """A channel to a picker; nothing is sent yet."""
    options: list[tuple[str, Any]] = list(_CHANNEL)
    if server_name:
        options.append(("grpc.ssl_target_name_override", server_name))
    if tls:
        return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca), options=options)
    return grpc.aio.insecure_channel(address, options=options)


def request_messages(request: Request) -> Iterable[pb.ProcessingRequest]:
    """A request as the messages that Envoy sends."""
    first = pb.ProcessingRequest(
        request_headers=_headers(request.headers, request.in_value, end=request.body is None)
    )
    for namespace, values in request.metadata.items():
        first.metadata_context.filter_metadata[namespace].CopyFrom(_struct(values))
    yield first
    pieces = request.body or ()
    for place, piece in enumerate(pieces):
        last = place == len(pieces) - 1 and not request.trailers
        yield pb.ProcessingRequest(request_body=pb.HttpBody(body=piece, end_of_stream=last))
    if request.trailers:
        yield pb.ProcessingRequest(request_trailers=pb.HttpTrailers())


def response_headers(status: int, served: str | None = None, *, end: bool = False) -> pb.ProcessingRequest:
    """The engine's response headers, with the endpoint that gave them."""
    pairs = [(":status", str(status)), ("content-type", "application/json")]
    message = pb.ProcessingRequest(response_headers=_headers(pairs, False, end=end))
    if served is not None:
        message.metadata_context.filter_metadata[NAMESPACE].CopyFrom(_struct({SERVED_KEY: served}))
    return message


def response_body(pieces: Sequence[bytes]) -> list[pb.ProcessingRequest]:
    """The engine's response body, the last piece of which ends the response."""
    last = len(pieces) - 1
    return [
        pb.ProcessingRequest(response_body=pb.HttpBody(body=piece, end_of_stream=place == last))
        for place, piece in enumerate(pieces)
    ]


def response_trailers() -> pb.ProcessingRequest:
    """The engine's trailers; Envoy sends them where the filter asks for them, empty ones too."""
    return pb.ProcessingRequest(response_trailers=pb.HttpTrailers())


def split(body: bytes, size: int) -> list[bytes]:
    """A body in pieces of so many bytes; an empty one is one empty piece."""
    return [body[at : at + size] for at in range(0, len(body), size)] or [b""]


def _is_last(reply: pb.ProcessingResponse, request: Request) -> bool:
    kind = str(reply.WhichOneof("response"))
    if kind == "immediate_response":
        return True
    if request.body is None:
        return kind == "request_trailers" if request.trailers else kind == "request_headers"
    if request.trailers:
        return kind == "request_trailers"
    mutation = reply.request_body.response.body_mutation
    streamed = mutation.WhichOneof("mutation") == "streamed_response"
    return kind == "request_body" and (not streamed or bool(mutation.streamed_response.end_of_stream))


def _describe(message: pb.ProcessingRequest, mode: BodyMode) -> None:
    """Envoy says in its first message how it sends bodies."""
    modes = pb.ProcessingRequest.DESCRIPTOR.fields_by_name["protocol_config"].message_type
    enum = modes.fields_by_name["request_body_mode"].enum_type
    name = {BodyMode.FULL_DUPLEX: "FULL_DUPLEX_STREAMED", BodyMode.BUFFERED: "BUFFERED"}[mode]
    message.protocol_config.request_body_mode = enum.values_by_name[name].number
    message.protocol_config.response_body_mode = enum.values_by_name["FULL_DUPLEX_STREAMED"].number


def _headers(pairs: Iterable[tuple[str, str]], in_value: bool, *, end: bool) -> pb.HttpHeaders:
    message = pb.HttpHeaders(end_of_stream=end)
    for name, value in pairs:
        header = message.headers.headers.add()
        header.key = name
        if in_value:
            header.value = value
        else:
            header.raw_value = value.encode("latin-1", errors="replace")
    return message


def _struct(values: Mapping[str, Any]) -> struct_pb2.Struct:
    struct = struct_pb2.Struct()
    struct.update(dict(values))
    return struct


def interleaved(pieces: Iterable[bytes]) -> list[bytes]:
    """The same body with empty pieces between, and at the end."""
    return [*itertools.chain.from_iterable((piece, b"") for piece in pieces)]
