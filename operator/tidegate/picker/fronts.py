"""The picker's gRPC: ext_proc and health, on the frames of `tidegate.http2` or on grpcio.

Both say the same; grpcio is the reference that the frames are held against.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Protocol

import grpc
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as pb_grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tidegate.facts.endpoints import joined
from tidegate.http2.grpc import CallError, Status
from tidegate.http2.server import Handler, Server, ServerCall, tls_context
from tidegate.picker.exchange import BrokenStreamError, ProtocolError
from tidegate.picker.service import RecalledError, Service

log = logging.getLogger(__name__)

EXT_PROC_SERVICE: Final = "envoy.service.ext_proc.v3.ExternalProcessor"
HEALTH_SERVICES: Final = ("", "liveness", "readiness", EXT_PROC_SERVICE)

GRPC_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),  # a second picker on the port is an error, not a rival
    ("grpc.max_receive_message_length", 16 << 20),
    # Envoy pings an idle connection; gRPC's default takes that for an attack and hangs up.
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
)


class ServerName(StrEnum):
    """Which gRPC server answers Envoy."""

    FRAMES = "frames"
    GRPCIO = "grpcio"


@dataclass(frozen=True, slots=True)
class Listen:
    """Where to listen. `tls`: files of the certificate and its key, for the ext_proc port."""

    host: str
    ext_proc_port: int
    health_port: int
    tls: tuple[Path, Path] | None = None


class Health:
    """What grpc.health.v1 says: a state for each service."""

    def __init__(self) -> None:
        self._states: dict[str, int] = {}
        self._changed = asyncio.Event()

    def set(self, service: str, serving: bool) -> None:
        """Change a state; who watches hears of it."""
        states = health_pb2.HealthCheckResponse
        self._states[service] = states.SERVING if serving else states.NOT_SERVING
        self._changed.set()
        self._changed = asyncio.Event()

    def check(self, service: str) -> Any:
        """The answer to Check; None where there is no such service."""
        state = self._states.get(service)
        return None if state is None else health_pb2.HealthCheckResponse(status=state)

    async def watch(self, service: str) -> AsyncIterator[Any]:
        """The answers to Watch, which never ends."""
        unknown = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        last: int | None = None
        while True:
            changed, state = self._changed, self._states.get(service, unknown)
            if state != last:
                last = state
                yield health_pb2.HealthCheckResponse(status=state)
            else:
                await changed.wait()


class Front(Protocol):
    """Listens for Envoy and for health checks."""

    async def start(self) -> None:
        """Take the ports and answer. Raises OSError where a port is taken."""
        ...

    async def drain(self, grace_s: float) -> None:
        """Take no new exchanges; those that are under way may take so long."""
        ...

    async def stop(self) -> None:
        """Answer nothing any more."""
        ...


def front(name: ServerName, service: Service, health: Health, where: Listen) -> Front:
    """The front of this name."""
    made = GrpcioFront if name is ServerName.GRPCIO else FramesFront
    return made(service, health, where)


# ── frames ──────────────────────────────────────────────────────────────────────────────────────


def process_handler(service: Service) -> Handler:
    """Pumps the messages of one call into the service."""

    async def process(call: ServerCall) -> None:
        async def read() -> pb.ProcessingRequest | None:
            message = await call.read()
            return None if message is None else pb.ProcessingRequest.FromString(message)

        async def write(reply: pb.ProcessingResponse) -> None:
            await call.write(reply.SerializeToString())

        try:
            await service.serve(read, write)
        except ProtocolError as error:
            log.error("%s", error)  # noqa: TRY400 -- says all; a traceback for each request would not
            raise CallError(Status.FAILED_PRECONDITION, str(error)) from error
        except BrokenStreamError as error:
            log.info("a gRPC stream was ended: %s", error)
            raise CallError(Status.INVALID_ARGUMENT, str(error)) from error
        except RecalledError as error:
            raise CallError(Status.UNAVAILABLE, str(error)) from error
        except DecodeError as error:
            raise CallError(Status.INTERNAL, f"not a ProcessingRequest: {error}") from error

    return process


def health_handlers(health: Health) -> dict[str, Handler]:
    """Check and Watch."""

    async def asked(call: ServerCall) -> str:
        message = await call.read()
        try:
            return str(health_pb2.HealthCheckRequest.FromString(message or b"").service)
        except DecodeError as error:
            raise CallError(Status.INTERNAL, f"not a HealthCheckRequest: {error}") from error

    async def check(call: ServerCall) -> None:
        service = await asked(call)
        answer = health.check(service)
        if answer is None:
            raise CallError(Status.NOT_FOUND, f"there is no service {service[:128]!r}")
        await call.write(answer.SerializeToString())

    async def watch(call: ServerCall) -> None:
        async for answer in health.watch(await asked(call)):
            await call.write(answer.SerializeToString())

    return {"/grpc.health.v1.Health/Check": check, "/grpc.health.v1.Health/Watch": watch}


class FramesFront:
    """On `tidegate.http2`."""

    def __init__(self, service: Service, health: Health, where: Listen) -> None:
        self._where = where
        self._ext_proc = Server({f"/{EXT_PROC_SERVICE}/Process": process_handler(service)})
        self._checks = Server(health_handlers(health))

    async def start(self) -> None:
        """See Front."""
        w = self._where
        tls = tls_context(*map(str, w.tls)) if w.tls else None
        for server, port, own in (
            (self._ext_proc, w.ext_proc_port, tls),
            (self._checks, w.health_port, None),
        ):
            try:
                await server.listen(w.host, port, own)
            except OSError as error:
                await self.drain(0)
                raise OSError(_taken(w.host, port, error)) from error

    async def drain(self, grace_s: float) -> None:
        """See Front."""
        await self._ext_proc.stop(grace_s)

    async def stop(self) -> None:
        """See Front."""
        await self._checks.stop(0)


# ── grpcio ──────────────────────────────────────────────────────────────────────────────────────


class Processor(pb_grpc.ExternalProcessorServicer):  # type: ignore[misc]  # generated, untyped
    """Pumps gRPC streams into the service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def Process(self, _requests: Any, context: Any) -> None:  # noqa: N802 -- gRPC's name
        """Serve one stream: one request."""

        async def read() -> pb.ProcessingRequest | None:
            message = await context.read()
            return None if message is grpc.aio.EOF else message

        try:
            await self._service.serve(read, context.write)
        except ProtocolError as error:
            log.error("%s", error)  # noqa: TRY400 -- says all; a traceback for each request would not
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except BrokenStreamError as error:
            log.info("a gRPC stream was ended: %s", error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except RecalledError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except (grpc.aio.UsageError, grpc.aio.InternalError) as error:
            log.debug("stream ended while writing: %s", error)


class _HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # generated, untyped
    def __init__(self, health: Health) -> None:
        self._health = health

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 -- gRPC's name
        """Answer once."""
        answer = self._health.check(request.service)
        if answer is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service[:128]!r}")
        return answer

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802 -- gRPC's name
        """Answer now, and whenever it changes."""
        async for answer in self._health.watch(request.service):
            await context.write(answer)


class GrpcioFront:
    """On grpcio."""

    def __init__(self, service: Service, health: Health, where: Listen) -> None:
        self._where = where
        self._ext_proc = grpc.aio.server(options=GRPC_OPTIONS)
        pb_grpc.add_ExternalProcessorServicer_to_server(Processor(service), self._ext_proc)
        self._checks = grpc.aio.server(options=GRPC_OPTIONS)
        health_pb2_grpc.add_HealthServicer_to_server(_HealthServicer(health), self._checks)

    async def start(self) -> None:
        """See Front."""
        w = self._where
        for server, port, tls in (
            (self._ext_proc, w.ext_proc_port, w.tls),
            (self._checks, w.health_port, None),
        ):
            listen(server, w.host, port, tls)
        await self._checks.start()
        await self._ext_proc.start()

    async def drain(self, grace_s: float) -> None:
        """See Front."""
        await self._ext_proc.stop(grace_s)

    async def stop(self) -> None:
        """See Front."""
        await self._checks.stop(0)


def listen(server: grpc.aio.Server, host: str, port: int, tls: tuple[Path, Path] | None = None) -> None:
    """Have a grpcio server take a port. Raises OSError where it is taken."""
    address = joined(host, port)
    try:
        if tls is None:
            server.add_insecure_port(address)
        else:
            server.add_secure_port(address, _credentials(*tls))
    except RuntimeError as error:
        raise OSError(_taken(host, port, error)) from error


def _credentials(certificate: Path, key: Path) -> grpc.ServerCredentials:
    return grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])


def _taken(host: str, port: int, error: Exception) -> str:
    return f"cannot listen on {joined(host, port)}: is another picker running there? ({error})"
