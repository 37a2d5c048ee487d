"""SETTINGS (RFC 9113, section 6.5): what this server allows, and what its peer does."""

from dataclasses import dataclass
from struct import Struct
from typing import Final

from tidegate.http2.errors import ConnectionFaultError, ErrorCode
from tidegate.http2.frames import LEAST_FRAME_SIZE, MAX_WINDOW, SETTINGS, frame

HEADER_TABLE_SIZE: Final = 0x1
ENABLE_PUSH: Final = 0x2
MAX_CONCURRENT_STREAMS: Final = 0x3
INITIAL_WINDOW_SIZE: Final = 0x4
MAX_FRAME_SIZE: Final = 0x5
MAX_HEADER_LIST_SIZE: Final = 0x6

DEFAULT_WINDOW: Final = 65_535
_ITEM: Final = Struct(">HI")
_MOST_FRAME_SIZE: Final = (1 << 24) - 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What a peer may do. Sizes are bytes; what it may cost is bounded by all of these together."""

    max_streams: int = 10_000
    """Streams at once on a connection; more are refused, and may be tried on another one."""
    stream_window: int = 256 << 10
    """Bytes of one stream that may wait here unread."""
    connection_window: int = 16 << 20
    """Bytes that may be on their way on a connection."""
    max_frame_size: int = LEAST_FRAME_SIZE
    max_header_bytes: int = 32 << 10
    """Of a request's headers: as they come, and again once decoded."""
    max_continuations: int = 32
    calm_burst: int = 10_000
    """Frames that ask for work and bring nothing (PING, SETTINGS, empty DATA, …) in a burst …"""
    calm_per_s: float = 1_000.0
    """… and steadily. A frame that brings something pays for one of them."""
    resets_per_s: float = 1_000.0
    """Streams that the peer may open and reset steadily; in a burst as many as it may have open."""

    def announced(self) -> bytes:
        """Our SETTINGS frame."""
        pairs = (
            (MAX_CONCURRENT_STREAMS, self.max_streams),
            (INITIAL_WINDOW_SIZE, self.stream_window),
            (MAX_FRAME_SIZE, self.max_frame_size),
            (MAX_HEADER_LIST_SIZE, self.max_header_bytes),
        )
        return frame(SETTINGS, 0, 0, b"".join(_ITEM.pack(*pair) for pair in pairs))


def read(payload: bytes) -> list[tuple[int, int]]:
    """The pairs of a SETTINGS payload, their values checked. Unknown ones are left out."""
    if len(payload) % _ITEM.size:
        raise ConnectionFaultError(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS is not a multiple of six bytes")
    pairs: list[tuple[int, int]] = []
    for name, value in _ITEM.iter_unpack(payload):
        if name == ENABLE_PUSH and value > 1:
            raise ConnectionFaultError(ErrorCode.PROTOCOL_ERROR, f"ENABLE_PUSH is {value}; it is 0 or 1")
        if name == INITIAL_WINDOW_SIZE and value > MAX_WINDOW:
            raise ConnectionFaultError(
                ErrorCode.FLOW_CONTROL_ERROR, f"INITIAL_WINDOW_SIZE {value} is above {MAX_WINDOW}"
            )
        if name == MAX_FRAME_SIZE and not LEAST_FRAME_SIZE <= value <= _MOST_FRAME_SIZE:
            raise ConnectionFaultError(
                ErrorCode.PROTOCOL_ERROR,
                f"MAX_FRAME_SIZE {value} is not within {LEAST_FRAME_SIZE}–{_MOST_FRAME_SIZE}",
            )
        if HEADER_TABLE_SIZE <= name <= MAX_HEADER_LIST_SIZE:
            pairs.append((name, value))
    return pairs
