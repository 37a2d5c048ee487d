"""What goes out: frames to write, and data that waits for the peer's windows (RFC 9113, section 5.2)."""

from collections import deque
from dataclasses import dataclass

from tidegate.http2 import frames
from tidegate.http2.errors import ConnectionFaultError, ErrorCode, StreamFaultError
from tidegate.http2.settings import DEFAULT_WINDOW


@dataclass(slots=True)
class Outgoing:
    """The sending half of a stream."""

    id: int
    window: int
    waiting: deque[memoryview] | None = None  # made when it is needed: an empty one takes 760 bytes
    queued: int = 0
    """Bytes that wait."""
    end: bytes | None = None
    """The header block that ends the stream once nothing waits; empty: DATA does."""
    begun: bool = False
    """Whether its headers are on their way."""
    ended: bool = False
    """Whether its end is on its way; nothing can be said any more."""


class Outbox:
    """Frames of all streams of a connection. A window that is closed makes data wait, never fail."""

    def __init__(self) -> None:
        self.window = DEFAULT_WINDOW
        self.initial_window = DEFAULT_WINDOW
        self.max_frame_size = frames.LEAST_FRAME_SIZE
        self.streams: dict[int, Outgoing] = {}
        self._blocked: dict[int, Outgoing] = {}
        self._parts: list[bytes | memoryview] = []
        self._size = 0
        self._held = False
        self.finished: list[int] = []
        """Streams whose end had to wait, and went out since somebody cleared this."""

    @property
    def size(self) -> int:
        """Bytes that `take` would give."""
        return self._size

    def take(self) -> bytes:
        """Everything that is to be written now, as one piece."""
        data = b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        return data

    def control(self, data: bytes) -> None:
        """A frame that no window holds back."""
        self._parts.append(data)
        self._size += len(data)

    def hold(self, held: bool) -> None:
        """While the transport takes no more, data waits as it does for a window."""
        self._held = held
        if not held:
            self._go()

    # ── streams ─────────────────────────────────────────────────────────────────────────────────

    def open(self, stream: int) -> None:
        """Begin a stream."""
        self.streams[stream] = Outgoing(stream, self.initial_window)

    def drop(self, stream: int) -> None:
        """Forget a stream with what waits of it."""
        self.streams.pop(stream, None)
        self._blocked.pop(stream, None)

    def close(self) -> None:
        """Forget every stream: nothing more is said of any."""
        self.streams.clear()
        self._blocked.clear()

    def headers(self, stream: Outgoing, block: bytes) -> None:
        """Send headers before any data."""
        stream.begun = True
        self.control(frames.header_frames(block, stream.id, end_stream=False, most=self.max_frame_size))

    def data(self, stream: Outgoing, data: bytes) -> None:
        """Send data, or let it wait."""
        size = len(data)
        if not stream.waiting and size <= stream.window and size <= self.window and not self._held:
            stream.window -= size
            self.window -= size
            if size <= self.max_frame_size:
                self._parts += (frames.head(size, frames.DATA, 0, stream.id), data)
                self._size += frames.HEAD_BYTES + size
                return
            view = memoryview(data)
            for at in range(0, size, self.max_frame_size):
                self._data_frame(stream, view[at : at + self.max_frame_size])
            return
        if size:
            if stream.waiting is None:
                stream.waiting = deque()
            stream.waiting.append(memoryview(data))
            stream.queued += size
            self._blocked[stream.id] = stream
            self._go_on(stream)

    def finish(self, stream: Outgoing, block: bytes) -> bool:
        """End a stream with trailers, or with an empty block by DATA; whether that went out at once."""
        stream.end = block
        if stream.waiting:
            return False
        self._finish(stream)
        return True

    def _finish(self, stream: Outgoing) -> None:
        block, stream.end, stream.ended = stream.end, None, True
        if block:
            self.control(frames.header_frames(block, stream.id, end_stream=True, most=self.max_frame_size))
        else:
            self.control(frames.head(0, frames.DATA, frames.END_STREAM, stream.id))

    def _data_frame(self, stream: Outgoing, piece: memoryview) -> None:
        self._parts += (frames.head(len(piece), frames.DATA, 0, stream.id), piece)
        self._size += frames.HEAD_BYTES + len(piece)

    # ── windows ─────────────────────────────────────────────────────────────────────────────────

    def widen(self, more: int) -> None:
        """The peer's WINDOW_UPDATE for the connection."""
        self.window += more
        if self.window > frames.MAX_WINDOW:
            raise ConnectionFaultError(ErrorCode.FLOW_CONTROL_ERROR, "the connection's window overflows")
        self._go()

    def widen_stream(self, stream: Outgoing, more: int) -> None:
        """The peer's WINDOW_UPDATE for a stream."""
        stream.window += more
        if stream.window > frames.MAX_WINDOW:
            raise StreamFaultError(stream.id, ErrorCode.FLOW_CONTROL_ERROR, "the stream's window overflows")
        self._go_on(stream)

    def set_initial_window(self, size: int) -> None:
        """The peer's INITIAL_WINDOW_SIZE: it moves the window of every stream, below zero too."""
        change, self.initial_window = size - self.initial_window, size
        for stream in self.streams.values():
            stream.window += change
            if stream.window > frames.MAX_WINDOW:
                raise ConnectionFaultError(ErrorCode.FLOW_CONTROL_ERROR, "a stream's window overflows")
        if change > 0:
            self._go()

    def _go(self) -> None:
        """Send what waits as far as the windows allow, a frame of each stream in turn."""
        turn = list(self._blocked.values()) if not self._held else []
        while turn and self.window > 0:
            turn = [stream for stream in turn if self._step(stream)]

    def _go_on(self, stream: Outgoing) -> None:
        """The same for one stream: no other could have gone before it."""
        while stream.waiting and self.window > 0 and not self._held and self._step(stream):
            pass

    def _step(self, stream: Outgoing) -> bool:
        """One frame of a stream; whether there may be more to send of it."""
        most, waiting = min(stream.window, self.window, self.max_frame_size), stream.waiting
        if most <= 0 or not waiting:
            return False
        first = waiting.popleft()
        piece, rest = first[:most], first[most:]
        if rest:
            waiting.appendleft(rest)
        size = len(piece)
        stream.window -= size
        stream.queued -= size
        self.window -= size
        self._data_frame(stream, piece)
        del self._blocked[stream.id]
        if waiting:
            self._blocked[stream.id] = stream  # behind the others: the next window is theirs
            return True
        if stream.end is not None:
            self._finish(stream)
            self.finished.append(stream.id)
        return False
