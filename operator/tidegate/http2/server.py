"""The server on asyncio: sockets, a task for each call, one write for all that a read brought about."""

import asyncio
import contextlib
import logging
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, cast

from tidegate.http2.connection import (
    Connection,
    DataReceived,
    Event,
    RequestReceived,
    StreamReset,
    Terminated,
)
from tidegate.http2.errors import ErrorCode
from tidegate.http2.grpc import (
    MAX_MESSAGE,
    OK_HEADERS,
    CallError,
    Status,
    Unpacker,
    error_headers,
    pack,
    read_call,
    trailers,
)
from tidegate.http2.settings import Limits

log = logging.getLogger(__name__)

_SOFT_QUEUE: Final = 256 << 10
"""Bytes of a call that may wait for its peer before its handler waits too."""
_CONTROL_BACKLOG: Final = 1 << 20
"""Bytes of answers to a peer that reads nothing, beyond which it is hung up on."""
_HELD_BYTES: Final = 256 << 20
"""Of messages that wait unread or are not complete, on one connection."""
_ALIVE_S: Final = 30.0
"""A peer that was silent for this long is asked; silent as long again, it is gone."""
_HEARD_S: Final = 1.0
"""After a reset, so long may a handler go on with what had come before."""
_LAST_CALL_S: Final = 1.0
"""Stopping: how long a peer has to say that it knows."""

Handler = Callable[["ServerCall"], Awaitable[None]]


class ServerCall:
    """One call, as its handler sees it. The handler returns when it is over, or raises CallError."""

    __slots__ = (
        "_inbox",
        "_reader",
        "_room",
        "_unpacker",
        "cancelled",
        "connection",
        "ended",
        "expired",
        "headers_sent",
        "id",
        "owed",
        "started",
        "task",
        "timer",
    )

    def __init__(self, connection: "ServerConnection", number: int) -> None:
        self.connection, self.id = connection, number
        self.ended = False
        """Whether nothing more comes."""
        self.started = self.cancelled = self.expired = False
        self.headers_sent = False
        self.owed = 0
        self.task: asyncio.Task[None] | None = None
        self.timer: asyncio.TimerHandle | None = None
        self._inbox: deque[bytes] | None = None  # only while there is something: calls wait by thousands
        self._unpacker = Unpacker(connection.max_message)
        self._reader: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None

    async def read(self) -> bytes | None:
        """The next message; None once the peer has said its last, or has left."""
        while not self._inbox:
            if self.ended:
                return None
            self._reader = self.connection.loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        message = self._inbox.popleft()
        self.connection.held -= len(message)
        if not self._inbox:
            self._inbox = None
            self._give_back()
        return message

    async def write(self, message: bytes) -> None:
        """Send a message. Waits while a lot waits already; harmless once the peer has left."""
        self.send(message)
        connection = self.connection
        while connection.http.queued(self.id) > _SOFT_QUEUE:
            self._room = connection.loop.create_future()
            connection.stuck.add(self)
            try:
                await self._room
            finally:
                self._room = None
                connection.stuck.discard(self)

    def send(self, message: bytes) -> None:
        """Send a message without waiting."""
        http = self.connection.http
        if not self.headers_sent:
            self.headers_sent = True
            http.send_headers(self.id, OK_HEADERS)
        http.send_data(self.id, pack(message))
        if http.out.size > _SOFT_QUEUE:
            self.connection.flush()  # so that the transport says when it is enough
        else:
            self.connection.flush_soon()

    # ── for its connection ──────────────────────────────────────────────────────────────────────

    def take(self, data: bytes, ended: bool) -> None:
        """Take data of the peer. Raises CallError."""
        self.ended = self.ended or ended
        self.owed += len(data)
        unpacker, connection = self._unpacker, self.connection
        connection.held -= unpacker.held
        try:
            messages = unpacker.feed(data)
        finally:
            connection.held += unpacker.held
        if messages:
            connection.held += sum(map(len, messages))
            if self._inbox is None:
                self._inbox = deque(messages)
            else:
                self._inbox += messages
        elif not self._inbox:
            self._give_back()
        if (messages or ended) and self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _give_back(self) -> None:
        self.connection.http.consumed(self.id, self.owed)
        self.owed = 0

    def wake(self) -> None:
        """Somebody may have made room."""
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def leave(self) -> None:
        """The peer has left: what it said before is still heard, and then the handler must end."""
        self.ended = True
        self.wake()
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
        elif not self._inbox:
            self.cancel()
        if self.timer is not None:
            self.timer.cancel()
        self.timer = self.connection.loop.call_later(_HEARD_S, self.cancel)

    def expire(self) -> None:
        """Its time is over."""
        self.expired = True
        self.cancel()

    def cancel(self) -> None:
        """Make its handler end."""
        if self.started and self.task is not None:
            self.task.cancel()
        else:  # a task that is cancelled before its first step runs none of its code
            self.cancelled = True

    def forget(self) -> None:
        """Give back what it holds."""
        if self.timer is not None:
            self.timer.cancel()
        self.connection.held -= sum(map(len, self._inbox or ())) + self._unpacker.held
        self._inbox = None
        self._unpacker.clear()


class ServerConnection(asyncio.Protocol):
    """One connection of a server."""

    def __init__(self, server: "Server") -> None:
        self.server, self.loop = server, asyncio.get_running_loop()
        self.max_message = server.max_message
        self.http = Connection(server.limits)
        self.calls: dict[int, ServerCall] = {}
        self.held = 0
        """Bytes of messages that are not read yet."""
        self.stuck: set[ServerCall] = set()
        """Calls that wait until less of them waits."""
        self._transport: asyncio.Transport | None = None
        self._paused = self._flushing = self._heard = self._asked = False
        self._pulse: asyncio.TimerHandle | None = None

    # ── asyncio's side ──────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        self._transport = transport = cast("asyncio.Transport", transport)
        tls = transport.get_extra_info("ssl_object")
        full = self.server.stopping or len(self.server.connections) >= self.server.max_connections
        if full or (tls is not None and tls.selected_alpn_protocol() not in ("h2", None)):
            transport.abort()
            return
        self.server.connections.add(self)
        self._pulse = self.loop.call_later(_ALIVE_S, self._check)
        self.flush()

    def data_received(self, data: bytes) -> None:
        """Feed what came; what it brings about is written together."""
        self._heard = True
        for event in self.http.receive(data, self.loop.time()):
            self._on(event)
        if self.http.out.size:
            self.flush_soon()
        if self.stuck:
            self._wake_stuck()
        self._end_if_drained()

    def eof_received(self) -> None:
        """The peer writes no more: as good as gone."""

    def connection_lost(self, exc: Exception | None) -> None:
        """End every call."""
        del exc
        if self._pulse is not None:
            self._pulse.cancel()
        self._transport = None
        self.http.terminate(ErrorCode.NO_ERROR, "the connection was lost")
        for call in list(self.calls.values()):
            call.leave()
        self.server.gone(self)

    def pause_writing(self) -> None:
        """The socket takes no more: data waits, as it does for a window."""
        self._paused = True
        self.http.hold(True)

    def resume_writing(self) -> None:
        """It takes more."""
        self._paused = False
        self.http.hold(False)
        self._wake_stuck()
        self.flush()
        self._end_if_drained()

    # ── events ──────────────────────────────────────────────────────────────────────────────────

    def _on(self, event: Event) -> None:
        if isinstance(event, DataReceived):  # most are
            call = self.calls.get(event.stream)
            if call is not None:
                self._feed(call, event.data, event.ended)
        elif isinstance(event, RequestReceived):
            self._open(event)
        elif isinstance(event, StreamReset):
            call = self.calls.get(event.stream)
            if call is not None:
                call.leave()
        else:
            self._end(event)

    def _end(self, event: Terminated) -> None:
        log.warning("connection ended: %s (%s)", event.message, ErrorCode(event.code).name)
        for call in list(self.calls.values()):
            call.leave()
        self.hang_up()

    def _open(self, event: RequestReceived) -> None:
        number, asked = event.stream, read_call(event.request)
        if asked.refusal:
            self.http.end(number, asked.refusal)
            return
        handler = self.server.methods.get(asked.method)
        if handler is None:
            self._refuse(number, Status.UNIMPLEMENTED, f"there is no method {asked.method}")
            return
        if len(self.calls) >= self.server.limits.max_streams:  # handlers of streams that were reset count
            self.http.reset(number, ErrorCode.REFUSED_STREAM)
            return
        call = ServerCall(self, number)
        call.ended = event.ended
        self.calls[number] = call
        if asked.timeout_s is not None:
            call.timer = self.loop.call_later(asked.timeout_s, call.expire)
        call.task = self.loop.create_task(self._run(call, handler))

    def _feed(self, call: ServerCall, data: bytes, ended: bool) -> None:
        if call.ended:  # it was broken off here, and its status still waits for a window
            return
        try:
            call.take(data, ended)
        except CallError as error:
            self._break(call, error.status, error.message)
        if self.held > _HELD_BYTES:
            self._break(call, Status.RESOURCE_EXHAUSTED, "too many messages wait on this connection")

    def _break(self, call: ServerCall, status: Status, message: str) -> None:
        """End a call with a status, whatever its handler is doing."""
        self._finish(call, status, message)
        call.forget()
        call.ended = True
        call.cancel()

    async def _run(self, call: ServerCall, handler: Handler) -> None:
        status, message = Status.CANCELLED, "the call was cancelled"
        call.started = True
        try:
            if not call.cancelled:
                await handler(call)
                status, message = Status.OK, ""
        except CallError as error:
            status, message = error.status, error.message
        except asyncio.CancelledError:
            pass
        except Exception:
            log.exception("a call failed")
            status, message = Status.INTERNAL, "the server failed"
        finally:
            if call.expired and status is Status.CANCELLED:
                status, message = Status.DEADLINE_EXCEEDED, "grpc-timeout is over"
            self.calls.pop(call.id, None)
            call.forget()
            self._finish(call, status, message)

    def _finish(self, call: ServerCall, status: Status, message: str) -> None:
        if call.headers_sent:
            self.http.end(call.id, trailers(status, message))
            self.flush_soon()
        else:
            call.headers_sent = True
            self._refuse(call.id, status, message)
        self._end_if_drained()

    def _refuse(self, number: int, status: Status, message: str) -> None:
        """Answer with nothing but a status."""
        self.http.end(number, error_headers(status, message))
        self.flush_soon()

    # ── writing ─────────────────────────────────────────────────────────────────────────────────

    def flush_soon(self) -> None:
        """Write once everybody who was woken by the same read has said his."""
        if not self._flushing:
            self._flushing = True
            self.loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write what there is."""
        self._flushing = False
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if not self._paused:
            if self.http.out.size:
                transport.write(self.http.out.take())
        elif self.http.out.size > _CONTROL_BACKLOG:
            log.warning("a peer that reads nothing is hung up on")
            transport.abort()

    def _wake_stuck(self) -> None:
        for call in self.stuck:
            call.wake()

    # ── ends ────────────────────────────────────────────────────────────────────────────────────

    def drain(self) -> None:
        """Take no new calls, and hang up once the others have ended."""
        self.http.drain()
        self.loop.call_later(_LAST_CALL_S, self._finish_drain)
        self.flush()

    def _finish_drain(self) -> None:
        self.http.finish_drain()
        self.flush_soon()
        self._end_if_drained()

    def _end_if_drained(self) -> None:
        if self.http.drained and not self.calls and not self._paused:
            self.hang_up()

    def hang_up(self) -> None:
        """Close once what there is to say is written, and soon in any case."""
        self.flush()
        if self._transport is not None:
            self._transport.close()
            self.loop.call_later(_LAST_CALL_S, self._transport.abort)

    def _check(self) -> None:
        """Ask a silent peer whether it is there; hang up on one that does not answer."""
        if self._transport is None:
            return
        if not self._heard and (self._asked or not self.http.ready):
            log.warning("a peer that was silent for %.0f s is hung up on", 2 * _ALIVE_S)
            self._transport.abort()
            return
        self._asked = not self._heard
        if self._asked:
            self.http.ping(b"are you?")
            self.flush_soon()
        self._heard = False
        self._pulse = self.loop.call_later(_ALIVE_S, self._check)


class Server:
    """Serves calls of gRPC on one port or several."""

    def __init__(
        self,
        methods: Mapping[str, Handler],
        limits: Limits | None = None,
        *,
        max_message: int = MAX_MESSAGE,
        max_connections: int = 1_000,
    ) -> None:
        """Nothing listens yet.

        Args:
            methods: Handlers by path, such as `/grpc.health.v1.Health/Check`.
            limits: What a peer may do.
            max_message: Largest message, bytes.
            max_connections: Beyond it new ones are closed.
        """
        self.methods, self.limits = methods, limits or Limits()
        self.max_message, self.max_connections = max_message, max_connections
        self.connections: set[ServerConnection] = set()
        self.stopping = False
        self._listeners: list[asyncio.Server] = []
        self._empty = asyncio.Event()

    async def listen(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> int:
        """Take a port; returns it. Raises OSError where somebody else has it.

        Args:
            host: Name or address.
            port: 0 for any.
            tls: With it only TLS is spoken; its ALPN should say h2.
        """
        listener = await asyncio.get_running_loop().create_server(
            lambda: ServerConnection(self), host, port, ssl=tls
        )
        self._listeners.append(listener)
        found: int = listener.sockets[0].getsockname()[1]
        return found

    def gone(self, connection: ServerConnection) -> None:
        """A connection was lost."""
        self.connections.discard(connection)
        if not self.connections:
            self._empty.set()

    async def stop(self, grace_s: float) -> None:
        """Take no new calls; those that are under way may take so long, and then are cancelled."""
        self.stopping = True
        for listener in self._listeners:
            listener.close()
        for connection in list(self.connections):
            connection.drain()
        if self.connections:
            self._empty.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), grace_s)
        tasks = []
        for connection in list(self.connections):
            for call in list(connection.calls.values()):
                call.cancel()
                tasks.append(call.task)
        await asyncio.gather(*(task for task in tasks if task is not None), return_exceptions=True)
        for connection in list(self.connections):
            connection.hang_up()


def tls_context(certificate: str, key: str) -> ssl.SSLContext:
    """What `listen` takes, from PEM files. Raises OSError or ssl.SSLError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2"])
    return context
