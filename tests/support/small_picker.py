"""A small endpoint picker that keeps every rule, and can be told to break one.

Written for the suite's own tests, apart from the picker that ships: it shares no code with it.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as pb_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

POOL = ("10.9.0.1:8000", "10.9.0.2:8000", "[fd00::9]:8000")
_KEY = "x-gateway-destination-endpoint"
_ROOM = 40
"""Requests that it takes at once."""


@dataclass
class Heard:
    """What came of one request."""

    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    headers_only: bool = False
    trailers: bool = False
    buffered: bool = False
    hint: Any = None
    hinted: bool = False


class SmallPicker(pb_grpc.ExternalProcessorServicer):
    """Answers like a picker should, less its `fault`."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self._turn = 0
        self._aborts = 0
        self._busy = 0
        self._last = b""

    async def Process(self, _requests: Any, context: Any) -> None:  # noqa: N802 -- gRPC's name
        heard = Heard()
        self._busy += 1
        try:
            await self._serve(heard, context)
        except asyncio.CancelledError:
            self._aborts += 1
            raise
        finally:
            self._busy -= 1

    async def _serve(self, heard: Heard, context: Any) -> None:
        if self.fault == "dies of aborted streams" and self._aborts > 10:
            await context.abort(grpc.StatusCode.INTERNAL, "cannot go on")
        if not await self._hear(heard, context):
            return
        for reply in self._decide(heard):
            await context.write(reply)
        while (message := await context.read()) is not grpc.aio.EOF:
            for reply in self._respond(message):
                await context.write(reply)
        if self.fault == "ends badly":
            await context.abort(grpc.StatusCode.UNKNOWN, "EOF")

    async def _hear(self, heard: Heard, context: Any) -> bool:
        while (message := await context.read()) is not grpc.aio.EOF:
            match message.WhichOneof("request"):
                case "request_headers":
                    self._hear_headers(heard, message)
                    if heard.headers_only:
                        return self.fault != "is silent on GET"
                    if heard.buffered:
                        await context.write(pb.ProcessingResponse(request_headers=pb.HeadersResponse()))
                case "request_body":
                    heard.body += message.request_body.body
                    if self.fault == "stops at an empty piece" and not message.request_body.body:
                        return True
                    if message.request_body.end_of_stream:
                        return True
                    if heard.buffered:
                        for reply in self._decide(heard):
                            await context.write(reply)
                case "request_trailers":
                    heard.trailers = True
                    if heard.buffered:
                        await context.write(pb.ProcessingResponse(request_trailers=pb.TrailersResponse()))
                        return False
                    return True
        return False

    def _hear_headers(self, heard: Heard, message: pb.ProcessingRequest) -> None:
        most = 20 if self.fault == "reads twenty headers" else None
        for header in message.request_headers.headers.headers[:most]:
            raw = header.raw_value.decode("latin-1")
            heard.headers.append(
                (header.key, raw if self.fault == "reads raw values" else raw or header.value)
            )
        heard.headers_only = message.request_headers.end_of_stream
        heard.buffered = message.protocol_config.request_body_mode == 2
        spaces = message.metadata_context.filter_metadata
        space = "envoy.lb.subset_hint" if self.fault != "reads any namespace" else "envoy.lb"
        key = f"{_KEY}-subset"
        if space in spaces and key in spaces[space].fields:
            heard.hinted, value = True, spaces[space].fields[key]
            kind = value.WhichOneof("kind")
            heard.hint = {"list_value": list(value.list_value), "string_value": value.string_value}.get(kind)
        header = dict(heard.headers).get(key)
        if self.fault == "obeys a client's subset" and header:
            heard.hinted, heard.hint = True, [header]

    def _allowed(self, heard: Heard) -> list[str]:
        if not heard.hinted or self.fault == "ignores hints":
            return list(POOL)
        hint = heard.hint
        if isinstance(hint, str):
            if self.fault == "reads no text":
                return list(POOL)
            hint = [part.strip() for part in hint.split(",")]
        if not isinstance(hint, list):
            return list(POOL) if self.fault == "takes a bad hint for none" else []
        if not hint and self.fault == "takes an empty hint for none":
            return list(POOL)
        if self.fault == "wants the whole hint" and not set(hint) <= set(POOL):
            return []
        return [one for one in POOL if one in hint]

    def _decide(self, heard: Heard) -> list[pb.ProcessingResponse]:
        if self._busy > _ROOM:
            headers = {} if self.fault == "gives no Retry-After" else {"retry-after": "1"}
            return [_no(500 if self.fault == "sheds with 500" else 429, headers)]
        if not dict(heard.headers).get(":path", "").startswith("/v1/"):
            return [_no(404)]
        allowed = self._allowed(heard)
        if not allowed:
            return [_no(404 if self.fault == "says 404 for 503" else 503)]
        self._turn += 1
        first = self._turn % len(allowed)
        chosen = [*allowed[first:], *allowed[:first]]
        if self.fault == "falls back outside the hint":
            chosen = [chosen[0], *(one for one in POOL if one != chosen[0])]
        text = ",".join(chosen)
        if self.fault == "obeys a client's destination":
            text = dict(heard.headers).get(_KEY, text)
        if self.fault == "names a stranger" and not heard.hinted:
            text = "10.9.9.9:8000"
        text = {"names no port": chosen[0].rpartition(":")[0], "repeats itself": f"{text},{text}"}.get(
            self.fault, text
        )
        return self._replies(heard, text)

    def _replies(self, heard: Heard, text: str) -> list[pb.ProcessingResponse]:
        first = pb.ProcessingResponse()
        where = first.request_headers if heard.headers_only or not heard.buffered else first.request_body
        common = where.response
        if self.fault != "sets no header":
            option = common.header_mutation.set_headers.add()
            option.header.key, option.header.raw_value = _KEY, text.encode()
            actions = base_pb2.HeaderValueOption.HeaderAppendAction
            option.append_action = actions.OVERWRITE_IF_EXISTS_OR_ADD
            if self.fault == "appends the header":
                option.append_action = actions.APPEND_IF_EXISTS_OR_ADD
        if self.fault != "sets no metadata":
            told = "10.9.0.7:1" if self.fault == "contradicts itself" else text
            first.dynamic_metadata.update({"envoy.lb": {_KEY: told}})
        if heard.buffered or (heard.headers_only and self.fault != "gives a GET a body"):
            return [first]
        sent = self._sent(heard)
        body = [self._piece(sent, at, size) for at, size in _cuts(len(sent), self.fault)]
        body[-1].request_body.response.body_mutation.streamed_response.end_of_stream = (
            not heard.trailers or self.fault == "ends before the trailers"
        )
        trailers = [pb.ProcessingResponse(request_trailers=pb.TrailersResponse())] if heard.trailers else []
        if self.fault == "answers bodies first":
            return [*body[:-1], first, body[-1], *trailers] if body[:-1] else [body[-1], first, *trailers]
        return [first, *body, *trailers]

    def _sent(self, heard: Heard) -> bytes:
        before, self._last = self._last, heard.body
        if self.fault == "mixes bodies" and before:
            heard.body = before
        return heard.body[:-1] if self.fault == "loses a byte" else heard.body

    def _piece(self, sent: bytes, at: int, size: int) -> pb.ProcessingResponse:
        piece = pb.ProcessingResponse()
        if self.fault == "takes bodies for text":
            sent = sent.decode(errors="replace").encode()
        piece.request_body.response.body_mutation.streamed_response.body = sent[at : at + size]
        return piece

    def _respond(self, message: pb.ProcessingRequest) -> list[pb.ProcessingResponse]:
        match message.WhichOneof("request"):
            case "response_headers":
                told = message.metadata_context.filter_metadata
                if "envoy.lb" in told and self.fault in (
                    "trusts what was served",
                    "fails on what was served",
                ):
                    pool = POOL if self.fault == "trusts what was served" else ()
                    pool.index(told["envoy.lb"][f"{_KEY}-served"])
                if self.fault != "is silent on responses":
                    return [pb.ProcessingResponse(response_headers=pb.HeadersResponse())]
            case "response_body":
                return self._response_body(message.response_body)
            case "response_trailers" if self.fault != "is silent on trailers":
                return [pb.ProcessingResponse(response_trailers=pb.TrailersResponse())]
        return []

    def _response_body(self, body: pb.HttpBody) -> list[pb.ProcessingResponse]:
        reply = pb.ProcessingResponse()
        streamed = reply.response_body.response.body_mutation.streamed_response
        streamed.body, streamed.end_of_stream = body.body, body.end_of_stream
        if self.fault == "holds tokens back" and not body.end_of_stream:
            self._held = getattr(self, "_held", b"") + body.body
            return []
        if self.fault == "holds tokens back":
            streamed.body = self._held + body.body
            self._held = b""
        if self.fault == "cuts responses":
            streamed.body = body.body[:1000]
        return [reply]


def _cuts(size: int, fault: str) -> list[tuple[int, int]]:
    most = 1 << 20 if fault == "sends large pieces" else 60_000
    return [(at, most) for at in range(0, size, most)] or [(0, most)]


def _no(status: int, headers: dict[str, str] | None = None) -> pb.ProcessingResponse:
    reply = pb.ProcessingResponse()
    reply.immediate_response.status.code = status
    for name, value in (headers or {}).items():
        option = reply.immediate_response.headers.set_headers.add()
        option.header.key, option.header.raw_value = name, value.encode()
    return reply


@asynccontextmanager
async def serving(servicer: Any, *, unhealthy: tuple[str, ...] = ()) -> AsyncIterator[str]:
    """Serve on a free port of loopback, with health checks beside; yields `host:port`."""
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    pb_grpc.add_ExternalProcessorServicer_to_server(servicer, server)
    checks = health.aio.HealthServicer()
    states = health_pb2.HealthCheckResponse
    for name in ("liveness", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor"):
        await checks.set(name, states.NOT_SERVING if name in unhealthy else states.SERVING)
    if "every name" in unhealthy:
        await checks.set("conformance.no.such.Service", states.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
