"""A server's side of one HTTP/2 connection, without I/O (RFC 9113).

Feed bytes and get events; ask for what is to be written. The time is told. What a peer may make
this side hold or do is bounded (`Limits`): beyond it the stream is refused or the connection ends.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tidegate.http2 import frames, settings
from tidegate.http2.allowance import Allowance
from tidegate.http2.errors import ConnectionFaultError, ErrorCode, StreamFaultError
from tidegate.http2.headers import HeaderReader, Headers, HeaderWriter, Request, bad_trailers
from tidegate.http2.outbox import Outbox
from tidegate.http2.settings import DEFAULT_WINDOW, Limits

_RECENT: Final = 1_000
"""Of streams that have ended at least so many are remembered, to tell late frames from wrong ones."""
_DRAIN_PING: Final = b"tidegate"


@dataclass(slots=True)
class RequestReceived:
    """A stream began. `ended`: nothing else comes on it."""

    stream: int
    request: Request
    ended: bool


@dataclass(slots=True)
class DataReceived:
    """Data of a stream; `consumed` must be told once it was read."""

    stream: int
    data: bytes
    ended: bool


@dataclass(slots=True)
class StreamReset:
    """A stream is over before its end, by the peer or because of what it did."""

    stream: int
    code: int


@dataclass(slots=True)
class Terminated:
    """The connection is over: write what is to be written, then close it. Nothing comes after this."""

    code: int
    message: str


Event = RequestReceived | DataReceived | StreamReset | Terminated


@dataclass(slots=True)
class _Incoming:
    """The receiving half of a stream."""

    window: int
    owed: int = 0
    """Bytes that were read, and not yet given back to the peer's window."""
    ended: bool = False
    declared: int | None = None
    """What content-length promised of the rest."""


@dataclass(slots=True)
class _Block:
    """A header block whose CONTINUATION is still to come."""

    stream: int
    end_stream: bool
    parts: list[bytes]
    size: int


class Connection:
    """The state of one connection."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = lim = limits or Limits()
        self.out = Outbox()
        self.out.control(lim.announced())
        self._window, self._owed = DEFAULT_WINDOW, 0
        self._give_back(lim.connection_window - DEFAULT_WINDOW)
        self.terminated = False
        self.ready = False
        """Whether the peer has said its preface and SETTINGS."""
        self._preface = b""
        self._reader = frames.FrameReader(lim.max_frame_size)
        self._headers, self._writer = HeaderReader(lim.max_header_bytes), HeaderWriter()
        self._block: _Block | None = None
        self._streams: dict[int, _Incoming] = {}
        self._last = 0
        self._ended: dict[int, ErrorCode | None] = {}
        self._ended_before: dict[int, ErrorCode | None] = {}
        self._final: int | None = None
        """The last stream that is answered, once GOAWAY has said so."""
        self._calm = Allowance(lim.calm_burst, lim.calm_per_s)
        self._resets = Allowance(max(1_000, lim.max_streams), lim.resets_per_s)
        self._now = 0.0
        self._events: list[Event] = []
        self._handlers: dict[int, Callable[[int, int, bytes], None]] = {
            frames.DATA: self._on_data,
            frames.HEADERS: self._on_headers,
            frames.PRIORITY: self._on_priority,
            frames.RST_STREAM: self._on_rst_stream,
            frames.SETTINGS: self._on_settings,
            frames.PUSH_PROMISE: self._on_push_promise,
            frames.PING: self._on_ping,
            frames.GOAWAY: self._on_goaway,
            frames.WINDOW_UPDATE: self._on_window_update,
            frames.CONTINUATION: self._on_continuation,
        }

    # ── in ──────────────────────────────────────────────────────────────────────────────────────

    def receive(self, data: bytes, now: float) -> list[Event]:
        """Take bytes as they come; returns what they mean. Never raises.

        Args:
            data: Any part of what the peer sent.
            now: Seconds of any clock that does not go back.
        """
        if self.terminated:
            return []
        self._now, self._events = now, []
        try:
            if len(self._preface) < len(frames.PREFACE):
                data = self._begin(data)
            for kind, flags, stream, payload in self._reader.feed(data):
                self._take(kind, flags, stream, payload)
        except ConnectionFaultError as fault:
            self.terminate(fault.code, fault.message)
        if self.out.finished:
            self._close_finished()
        return self._events

    def _begin(self, data: bytes) -> bytes:
        """Take the preface off; returns what follows it."""
        whole = self._preface + data
        self._preface = whole[: len(frames.PREFACE)]
        if not frames.PREFACE.startswith(self._preface):
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "this port speaks HTTP/2 only")
        return whole[len(frames.PREFACE) :]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if not self.ready:
            if kind != frames.SETTINGS or flags & frames.ACK:
                raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "the first frame is not SETTINGS")
            self.ready = True
        if self._block is not None and (kind != frames.CONTINUATION or stream != self._block.stream):
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "a header block was interrupted")
        handler = self._handlers.get(kind)
        if handler is None:
            self._spend("frames of unknown types")
            return
        try:
            handler(flags, stream, payload)
        except StreamFaultError as fault:
            self._fail_stream(fault.stream, fault.code)

    def _fail_stream(self, stream: int, code: ErrorCode) -> None:
        known = stream in self._streams
        if not self._resets.take(self._now):
            raise ConnectionFaultError(ErrorCode.ENHANCE_YOUR_CALM, "too many streams that fail")
        self._close(stream, code)
        self.out.control(frames.rst_stream(stream, code))
        if known:
            self._events.append(StreamReset(stream, code))

    def _spend(self, what: str, cost: float = 1.0) -> None:
        """A frame that asks for work and brings nothing."""
        if not self._calm.take(self._now, cost):
            raise ConnectionFaultError(ErrorCode.ENHANCE_YOUR_CALM, f"too many {what}")

    # ── frames of streams ───────────────────────────────────────────────────────────────────────

    def _on_data(self, flags: int, stream: int, payload: bytes) -> None:
        size = len(payload)
        if not stream:
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "DATA on stream 0")
        self._window -= size
        if self._window < 0:
            raise ConnectionFaultError(ErrorCode.FLOW_CONTROL_ERROR, "more than the connection's window")
        self._owed += size
        if self._owed * 2 >= self.limits.connection_window:
            self._give_back(self._owed)
            self._owed = 0
        incoming = self._streams.get(stream)
        if incoming is None or incoming.ended:
            self._late(stream, "DATA")
            return
        incoming.window -= size
        if incoming.window < 0:
            raise StreamFaultError(stream, ErrorCode.FLOW_CONTROL_ERROR, "more than the stream's window")
        data = frames.unpad(flags, payload) if flags & frames.PADDED else payload
        ended = bool(flags & frames.END_STREAM)
        if data:
            self._calm.give()
        elif not ended:
            self._spend("empty DATA frames")
        if incoming.declared is not None:
            incoming.declared -= len(data)
            if incoming.declared < 0 or (ended and incoming.declared):
                raise StreamFaultError(stream, ErrorCode.PROTOCOL_ERROR, "content-length does not fit")
        if size > len(data):
            self.consumed(stream, size - len(data))
        self._events.append(DataReceived(stream, data, ended))
        if ended:
            self._end_incoming(stream, incoming)

    def _on_headers(self, flags: int, stream: int, payload: bytes) -> None:
        if not stream % 2:
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, f"HEADERS on stream {stream}")
        block = frames.unpad(flags, payload)
        if flags & frames.PRIORITY_FLAG:
            if len(block) < 5:
                raise ConnectionFaultError(ErrorCode.FRAME_SIZE_ERROR, "HEADERS without its priority")
            depends, block = frames.u32(block) & frames.MAX_STREAM, block[5:]
            if depends == stream:
                raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "a stream that depends on itself")
        end_stream = bool(flags & frames.END_STREAM)
        if flags & frames.END_HEADERS:
            self._on_block(stream, block, end_stream)
        else:
            self._block = _Block(stream, end_stream, [block], len(block))

    def _on_continuation(self, flags: int, stream: int, payload: bytes) -> None:
        block = self._block
        if block is None:
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "CONTINUATION of nothing")
        block.parts.append(payload)
        block.size += len(payload)
        if block.size > self.limits.max_header_bytes or len(block.parts) > self.limits.max_continuations:
            raise ConnectionFaultError(ErrorCode.ENHANCE_YOUR_CALM, "a header block too large")
        if flags & frames.END_HEADERS:
            self._block = None
            self._on_block(stream, b"".join(block.parts), block.end_stream)

    def _on_block(self, stream: int, block: bytes, ended: bool) -> None:
        request = self._headers.read(block)  # always: HPACK's table must follow
        incoming = self._streams.get(stream)
        if incoming is not None and not incoming.ended:
            self._on_trailers(stream, incoming, request, ended)
            return
        if stream <= self._last:
            self._late(stream, "HEADERS")
            return
        self._last = stream
        if self._final is not None and stream > self._final:
            self._close(stream, ErrorCode.REFUSED_STREAM)
            return
        if request.malformed:
            raise StreamFaultError(stream, ErrorCode.PROTOCOL_ERROR, request.malformed)
        if len(self._streams) >= self.limits.max_streams:
            raise StreamFaultError(stream, ErrorCode.REFUSED_STREAM, "too many streams")
        declared = self._declared(stream, request)
        if ended and declared:
            raise StreamFaultError(stream, ErrorCode.PROTOCOL_ERROR, "content-length without content")
        self._streams[stream] = incoming = _Incoming(self.limits.stream_window, declared=declared)
        self.out.open(stream)
        self._calm.give()
        self._events.append(RequestReceived(stream, request, ended))
        if ended:
            self._end_incoming(stream, incoming)

    def _declared(self, stream: int, request: Request) -> int | None:
        length = request.get("content-length")
        if not length:
            return None
        if not (length.isascii() and length.isdecimal() and len(length) < 19):
            raise StreamFaultError(stream, ErrorCode.PROTOCOL_ERROR, "content-length is no number")
        return int(length)

    def _on_trailers(self, stream: int, incoming: _Incoming, request: Request, ended: bool) -> None:
        if not ended:
            raise StreamFaultError(stream, ErrorCode.PROTOCOL_ERROR, "HEADERS in the middle of a stream")
        if bad := bad_trailers(request) or (incoming.declared and "content-length does not fit"):
            raise StreamFaultError(stream, ErrorCode.PROTOCOL_ERROR, bad)
        self._events.append(DataReceived(stream, b"", ended=True))
        self._end_incoming(stream, incoming)

    def _late(self, stream: int, what: str) -> None:
        """A frame of a stream that is closed, or that its peer had closed. Raises where it is wrong."""
        if stream > self._last:
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, f"{what} on stream {stream}, which is idle")
        if stream in self._streams:
            raise StreamFaultError(stream, ErrorCode.STREAM_CLOSED, f"{what} after the end of the stream")
        known = stream in self._ended or stream in self._ended_before
        if not known and what == "HEADERS":
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, f"stream {stream} is older than the last")
        code = self._ended.get(stream, self._ended_before.get(stream))
        if known and code is not None:  # we reset it, and the peer had not heard of that yet
            self._spend(f"{what} on streams that were reset")
            return
        raise ConnectionFaultError(ErrorCode.STREAM_CLOSED, f"{what} on stream {stream}, which is closed")

    def _on_priority(self, _flags: int, stream: int, payload: bytes) -> None:
        if not stream:
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "PRIORITY on stream 0")
        if len(payload) != 5:
            raise StreamFaultError(stream, ErrorCode.FRAME_SIZE_ERROR, "PRIORITY is not five bytes")
        if frames.u32(payload) & frames.MAX_STREAM == stream:
            raise StreamFaultError(stream, ErrorCode.PROTOCOL_ERROR, "a stream that depends on itself")
        self._spend("PRIORITY frames")

    def _on_rst_stream(self, _flags: int, stream: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFaultError(ErrorCode.FRAME_SIZE_ERROR, "RST_STREAM is not four bytes")
        if not stream or stream > self._last:
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, f"RST_STREAM on stream {stream}")
        outgoing = self.out.streams.get(stream)
        if outgoing is None:
            self._spend("RST_STREAM frames")
            return
        # Envoy resets every exchange in the end. What wears a server out is a reset before any answer.
        if not outgoing.begun and not self._resets.take(self._now):
            raise ConnectionFaultError(ErrorCode.ENHANCE_YOUR_CALM, "too many streams opened and reset")
        self._close(stream, None)
        self._events.append(StreamReset(stream, frames.u32(payload)))

    # ── frames of the connection ────────────────────────────────────────────────────────────────

    def _on_settings(self, flags: int, stream: int, payload: bytes) -> None:
        if stream:
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "SETTINGS on a stream")
        if flags & frames.ACK:
            if payload:
                raise ConnectionFaultError(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS with ACK and payload")
            self._spend("acknowledged SETTINGS")
            return
        self._spend("SETTINGS frames", 1 + len(payload) / 60 + len(self._streams) / 100)
        pairs = settings.read(payload)
        # First the ACK: a peer counts by its new windows from there on.
        self.out.control(frames.frame(frames.SETTINGS, frames.ACK, 0))
        for name, value in pairs:
            if name == settings.INITIAL_WINDOW_SIZE:
                self.out.set_initial_window(value)
            elif name == settings.MAX_FRAME_SIZE:
                self.out.max_frame_size = value
        # HEADER_TABLE_SIZE needs nothing: our blocks use no table.

    def _on_push_promise(self, _flags: int, _stream: int, _payload: bytes) -> None:
        raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "a client cannot push")

    def _on_ping(self, flags: int, stream: int, payload: bytes) -> None:
        if stream:
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "PING on a stream")
        if len(payload) != 8:
            raise ConnectionFaultError(ErrorCode.FRAME_SIZE_ERROR, "PING is not eight bytes")
        self._spend("PINGs")
        if not flags & frames.ACK:
            self.out.control(frames.frame(frames.PING, frames.ACK, 0, payload))
        elif payload == _DRAIN_PING:
            self.finish_drain()

    def _on_goaway(self, _flags: int, stream: int, payload: bytes) -> None:
        if stream:
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "GOAWAY on a stream")
        if len(payload) < 8:
            raise ConnectionFaultError(ErrorCode.FRAME_SIZE_ERROR, "GOAWAY is shorter than eight bytes")
        self._spend("GOAWAY frames")  # its streams go on; it will hang up when they have ended

    def _on_window_update(self, _flags: int, stream: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionFaultError(ErrorCode.FRAME_SIZE_ERROR, "WINDOW_UPDATE is not four bytes")
        more = frames.u32(payload) & frames.MAX_WINDOW
        self._spend("WINDOW_UPDATE frames")
        if not stream:
            if not more:
                raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE by nothing")
            self.out.widen(more)
            return
        if stream > self._last:
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, f"WINDOW_UPDATE on idle stream {stream}")
        outgoing = self.out.streams.get(stream)
        if outgoing is not None:
            if not more:
                raise StreamFaultError(stream, ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE by nothing")
            self.out.widen_stream(outgoing, more)

    # ── out ─────────────────────────────────────────────────────────────────────────────────────

    def consumed(self, stream: int, size: int) -> None:
        """So much of a stream's data was read: the peer may send as much again."""
        incoming = self._streams.get(stream)
        if incoming is None or incoming.ended:
            return
        incoming.owed += size
        if incoming.owed * 2 >= self.limits.stream_window:
            self.out.control(frames.window_update(stream, incoming.owed))
            incoming.window += incoming.owed
            incoming.owed = 0

    def send_headers(self, stream: int, headers: Headers) -> None:
        """Begin the answer. On a stream that is over this and the next three do nothing."""
        outgoing = self.out.streams.get(stream)
        if outgoing is not None:
            self.out.headers(outgoing, self._writer.write(headers))

    def send_data(self, stream: int, data: bytes) -> int:
        """Send data; returns how much waits for the stream's window now, in bytes."""
        outgoing = self.out.streams.get(stream)
        if outgoing is None or outgoing.ended or outgoing.end is not None:
            return 0
        self._calm.give(2 + (len(data) >> 11))  # each frame may bring two WINDOW_UPDATEs
        self.out.data(outgoing, data)
        return outgoing.queued

    def end(self, stream: int, trailers: Headers = ()) -> None:
        """End the answer, once what waits has gone out. What the peer had still to say is not wanted."""
        outgoing = self.out.streams.get(stream)
        if outgoing is None or outgoing.ended or outgoing.end is not None:
            return
        if self.out.finish(outgoing, self._writer.write(trailers) if trailers else b""):
            self._close_outgoing(stream)

    def reset(self, stream: int, code: ErrorCode) -> None:
        """Break a stream off."""
        if stream in self._streams:
            self._close(stream, code)
            self.out.control(frames.rst_stream(stream, code))

    def queued(self, stream: int) -> int:
        """Bytes of a stream that wait for its window."""
        outgoing = self.out.streams.get(stream)
        return outgoing.queued if outgoing is not None else 0

    def hold(self, held: bool) -> None:
        """Whether the transport takes no more: then data waits here, as it does for a window."""
        self.out.hold(held)
        self._close_finished()

    def ping(self, payload: bytes) -> None:
        """Ask whether the peer is there; any byte of it is an answer."""
        self.out.control(frames.frame(frames.PING, 0, 0, payload))

    def drain(self) -> None:
        """Say that no new streams are wanted. Those that are on their way are still taken: the peer
        is asked by PING when it has heard, and from then on new ones are refused.
        """
        if not self.terminated and self._final is None:
            self._final = frames.MAX_STREAM
            self.out.control(frames.goaway(frames.MAX_STREAM, ErrorCode.NO_ERROR))
            self.ping(_DRAIN_PING)

    def finish_drain(self) -> None:
        """From here on new streams are refused."""
        if self._final == frames.MAX_STREAM:
            self._final = self._last
            self.out.control(frames.goaway(self._last, ErrorCode.NO_ERROR))

    @property
    def drained(self) -> bool:
        """Whether the peer knows that no new streams are wanted, and all the others have ended."""
        return self._final not in (None, frames.MAX_STREAM) and not self._streams

    def terminate(self, code: ErrorCode, message: str) -> None:
        """End the connection with a reason."""
        if not self.terminated:
            self.terminated = True
            self.out.control(frames.goaway(self._last, code, message.encode()[:512]))
            self._streams.clear()
            self.out.close()
            self._events.append(Terminated(code, message))

    # ── ends ────────────────────────────────────────────────────────────────────────────────────

    def _end_incoming(self, stream: int, incoming: _Incoming) -> None:
        incoming.ended = True
        outgoing = self.out.streams.get(stream)
        if outgoing is not None and outgoing.ended:
            self._close(stream, None)

    def _close_outgoing(self, stream: int) -> None:
        incoming = self._streams.get(stream)
        if incoming is not None and incoming.ended:
            self._close(stream, None)
        elif incoming is not None:  # it may stop sending (RFC 9113, 8.1)
            self._close(stream, ErrorCode.NO_ERROR)
            self.out.control(frames.rst_stream(stream, ErrorCode.NO_ERROR))

    def _close_finished(self) -> None:
        for stream in self.out.finished:
            self._close_outgoing(stream)
        self.out.finished.clear()

    def _close(self, stream: int, code: ErrorCode | None) -> None:
        """Forget a stream but for how it ended: our code, or None where the peer knows that it has."""
        self._streams.pop(stream, None)
        self.out.drop(stream)
        if len(self._ended) >= _RECENT:
            self._ended_before, self._ended = self._ended, {}
        self._ended[stream] = code

    def _give_back(self, size: int) -> None:
        self.out.control(frames.window_update(0, size))
        self._window += size
