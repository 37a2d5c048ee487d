"""A client's side of HTTP/2, as raw as a test needs it."""

import struct
from collections.abc import Iterable

import hpack

from tidegate.http2 import frames
from tidegate.http2.connection import Connection
from tidegate.http2.settings import Limits

CALL = (
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/x/Echo"),
    (":authority", "t"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
)


def settings(*pairs: tuple[int, int], ack: bool = False) -> bytes:
    payload = b"".join(struct.pack(">HI", *pair) for pair in pairs)
    return frames.frame(frames.SETTINGS, frames.ACK if ack else 0, 0, payload)


def block(headers: Iterable[tuple[str, str]] = CALL) -> bytes:
    """A header block that uses no table, so it means the same anywhere."""
    pairs = [hpack.NeverIndexedHeaderTuple(*pair) for pair in headers]
    return bytes(hpack.Encoder().encode(pairs, huffman=False))


def headers(stream: int, *, end: bool = False, of: Iterable[tuple[str, str]] = CALL) -> bytes:
    flags = frames.END_HEADERS | (frames.END_STREAM if end else 0)
    return frames.frame(frames.HEADERS, flags, stream, block(of))


def data(stream: int, payload: bytes = b"", *, end: bool = False, pad: int | None = None) -> bytes:
    flags = frames.END_STREAM if end else 0
    if pad is not None:
        flags, payload = flags | frames.PADDED, bytes([pad]) + payload + bytes(pad)
    return frames.frame(frames.DATA, flags, stream, payload)


def cut(raw: bytes) -> list[frames.Frame]:
    """The frames of what a server wrote."""
    return list(frames.FrameReader(1 << 24).feed(raw))


def begun(limits: Limits | None = None, *pairs: tuple[int, int]) -> Connection:
    """A connection that was greeted, its own greeting taken away."""
    connection = Connection(limits)
    assert connection.receive(frames.PREFACE + settings(*pairs), 0.0) == []
    connection.out.take()
    return connection


def codes(connection: Connection) -> list[tuple[str, int, int]]:
    """RST_STREAM and GOAWAY of what is to be written: (kind, stream, code)."""
    found = []
    for kind, _, stream, payload in cut(connection.out.take()):
        if kind == frames.RST_STREAM:
            found.append(("reset", stream, frames.u32(payload)))
        elif kind == frames.GOAWAY:
            found.append(("goaway", frames.u32(payload), frames.u32(payload, 4)))
    return found
