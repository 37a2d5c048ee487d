"""HTTP/2 frames as bytes (RFC 9113, sections 4 and 6): cut apart and put together, nothing else."""

from collections.abc import Iterator
from struct import Struct
from typing import Final

from tidegate.http2.errors import ConnectionFaultError, ErrorCode

DATA: Final = 0x0
HEADERS: Final = 0x1
PRIORITY: Final = 0x2
RST_STREAM: Final = 0x3
SETTINGS: Final = 0x4
PUSH_PROMISE: Final = 0x5
PING: Final = 0x6
GOAWAY: Final = 0x7
WINDOW_UPDATE: Final = 0x8
CONTINUATION: Final = 0x9

END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
PRIORITY_FLAG: Final = 0x20

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_STREAM: Final = (1 << 31) - 1
MAX_WINDOW: Final = (1 << 31) - 1
LEAST_FRAME_SIZE: Final = 16_384
"""What every peer takes (SETTINGS_MAX_FRAME_SIZE's least value)."""
HEAD_BYTES: Final = 9

_HEAD: Final = Struct(">HBBBI")
_U32: Final = Struct(">I")

Frame = tuple[int, int, int, bytes]
"""Type, flags, stream and payload."""


class FrameReader:
    """Cuts a stream of bytes, however it was chunked, into frames."""

    def __init__(self, max_frame_size: int = LEAST_FRAME_SIZE) -> None:
        self._most = max_frame_size
        self._rest = bytearray()
        self._need = HEAD_BYTES

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames that are complete now.

        Raises:
            ConnectionFaultError: A frame is larger than was allowed; seen before its payload comes.
        """
        if self._rest:
            self._rest += data
            if len(self._rest) < self._need:
                return
            data = bytes(self._rest)
            self._rest.clear()
        at, end = 0, len(data)
        self._need = HEAD_BYTES
        while end - at >= HEAD_BYTES:
            high, low, kind, flags, stream = _HEAD.unpack_from(data, at)
            length = high << 8 | low
            if length > self._most:
                raise ConnectionFaultError(
                    ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} bytes; {self._most} are allowed"
                )
            stop = at + HEAD_BYTES + length
            if stop > end:
                self._need = HEAD_BYTES + length
                break
            yield kind, flags, stream & MAX_STREAM, data[at + HEAD_BYTES : stop]
            at = stop
        if at < end:
            self._rest += data[at:]

    @property
    def held(self) -> int:
        """Bytes of a frame that is not complete."""
        return len(self._rest)


def head(length: int, kind: int, flags: int, stream: int) -> bytes:
    """The nine bytes before a payload."""
    return _HEAD.pack(length >> 8, length & 0xFF, kind, flags, stream)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A whole frame."""
    return head(len(payload), kind, flags, stream) + payload


def header_frames(block: bytes, stream: int, *, end_stream: bool, most: int) -> bytes:
    """HEADERS, and CONTINUATION where the block is larger than a frame may be."""
    first, rest = block[:most], block[most:]
    flags = (END_STREAM if end_stream else 0) | (0 if rest else END_HEADERS)
    parts = [frame(HEADERS, flags, stream, first)]
    while rest:
        piece, rest = rest[:most], rest[most:]
        parts.append(frame(CONTINUATION, 0 if rest else END_HEADERS, stream, piece))
    return b"".join(parts)


def rst_stream(stream: int, code: int) -> bytes:
    """RST_STREAM."""
    return frame(RST_STREAM, 0, stream, _U32.pack(code))


def goaway(last: int, code: int, message: bytes = b"") -> bytes:
    """GOAWAY; `last` is the last stream that will be answered."""
    return frame(GOAWAY, 0, 0, _U32.pack(last) + _U32.pack(code) + message)


def window_update(stream: int, more: int) -> bytes:
    """WINDOW_UPDATE."""
    return frame(WINDOW_UPDATE, 0, stream, _U32.pack(more))


def u32(payload: bytes, at: int = 0) -> int:
    """An unsigned 32-bit number of a payload."""
    value: int = _U32.unpack_from(payload, at)[0]
    return value


def unpad(flags: int, payload: bytes) -> bytes:
    """The payload of DATA or HEADERS without its padding."""
    if not flags & PADDED:
        return payload
    if not payload:
        raise ConnectionFaultError(ErrorCode.FRAME_SIZE_ERROR, "a padded frame without its pad length")
    pad = payload[0]
    if pad >= len(payload):
        raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, "more padding than payload")
    return payload[1 : len(payload) - pad]
