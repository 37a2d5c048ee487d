"""The HTTP/2 connection, told bytes: what it answers, what it holds back, what it does not stand."""

import struct
from collections.abc import Callable

import hpack
import pytest

from support.http2 import CALL, begun, block, codes, cut, data, headers, settings
from tidegate.http2 import frames
from tidegate.http2.connection import Connection, DataReceived, RequestReceived, StreamReset, Terminated
from tidegate.http2.errors import ErrorCode as E
from tidegate.http2.frames import frame
from tidegate.http2.settings import Limits

OK = ((":status", "200"),)


def test_a_call_from_its_first_byte_to_its_last() -> None:
    connection = Connection()
    greeting = cut(connection.out.take())
    assert [f[0] for f in greeting] == [frames.SETTINGS, frames.WINDOW_UPDATE]
    sent = frames.PREFACE + settings() + headers(1) + data(1, b"ask", end=True)
    request, asked = connection.receive(sent, 0.0)
    assert isinstance(request, RequestReceived)
    assert (request.stream, request.request.path, request.ended) == (1, "/x/Echo", False)
    assert asked == DataReceived(1, b"ask", ended=True)
    connection.send_headers(1, OK)
    connection.send_data(1, b"answer")
    connection.end(1, (("grpc-status", "0"),))
    ack, head, body, trailers = cut(connection.out.take())
    assert ack == (frames.SETTINGS, frames.ACK, 0, b"")
    decoder = hpack.Decoder()
    assert decoder.decode(head[3]) == list(OK)
    assert body == (frames.DATA, 0, 1, b"answer")
    assert trailers[:3] == (frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 1)
    assert decoder.decode(trailers[3]) == [("grpc-status", "0")]


def test_an_answer_that_ends_first_tells_the_peer_to_stop() -> None:
    connection = begun()
    connection.receive(headers(1), 0.0)
    connection.end(1, (*OK, ("grpc-status", "0")))
    assert codes(connection) == [("reset", 1, E.NO_ERROR)]
    assert connection.receive(data(1, b"late") + headers(1, end=True), 0.0) == []  # it had not heard
    assert codes(connection) == []


# ── what is wrong ───────────────────────────────────────────────────────────────────────────────


def _priority(stream: int, on: int) -> bytes:
    return frame(frames.PRIORITY, 0, stream, struct.pack(">IB", on, 0))


def _of(*extra: tuple[str, str], without: str = "") -> bytes:
    return headers(1, of=[*(p for p in CALL if p[0] != without), *extra])


BROKEN: dict[str, tuple[bytes, E]] = {
    "HEADERS on stream 0": (headers(0), E.PROTOCOL_ERROR),
    "HEADERS on an even stream": (headers(2), E.PROTOCOL_ERROR),
    "a stream older than the last": (headers(5) + headers(3), E.PROTOCOL_ERROR),
    "DATA on stream 0": (data(0), E.PROTOCOL_ERROR),
    "DATA on an idle stream": (data(1, b"x"), E.PROTOCOL_ERROR),
    "RST_STREAM on an idle stream": (frames.rst_stream(1, 0), E.PROTOCOL_ERROR),
    "RST_STREAM of three bytes": (headers(1) + frame(frames.RST_STREAM, 0, 1, b"123"), E.FRAME_SIZE_ERROR),
    "WINDOW_UPDATE on an idle stream": (frames.window_update(1, 1), E.PROTOCOL_ERROR),
    "WINDOW_UPDATE by nothing": (frames.window_update(0, 0), E.PROTOCOL_ERROR),
    "WINDOW_UPDATE of three bytes": (frame(frames.WINDOW_UPDATE, 0, 0, b"123"), E.FRAME_SIZE_ERROR),
    "a connection's window too wide": (frames.window_update(0, (1 << 31) - 1), E.FLOW_CONTROL_ERROR),
    "PUSH_PROMISE": (frame(frames.PUSH_PROMISE, 4, 1, bytes(4)), E.PROTOCOL_ERROR),
    "PING on a stream": (frame(frames.PING, 0, 1, bytes(8)), E.PROTOCOL_ERROR),
    "PING of seven bytes": (frame(frames.PING, 0, 0, bytes(7)), E.FRAME_SIZE_ERROR),
    "SETTINGS on a stream": (frame(frames.SETTINGS, 0, 1), E.PROTOCOL_ERROR),
    "SETTINGS of five bytes": (frame(frames.SETTINGS, 0, 0, bytes(5)), E.FRAME_SIZE_ERROR),
    "SETTINGS with ACK and payload": (frame(frames.SETTINGS, 1, 0, bytes(6)), E.FRAME_SIZE_ERROR),
    "ENABLE_PUSH 2": (settings((2, 2)), E.PROTOCOL_ERROR),
    "a window of 2^31": (settings((4, 1 << 31)), E.FLOW_CONTROL_ERROR),
    "a frame size too small": (settings((5, 16_383)), E.PROTOCOL_ERROR),
    "a frame size too large": (settings((5, 1 << 24)), E.PROTOCOL_ERROR),
    "GOAWAY on a stream": (frame(frames.GOAWAY, 0, 1, bytes(8)), E.PROTOCOL_ERROR),
    "GOAWAY of seven bytes": (frame(frames.GOAWAY, 0, 0, bytes(7)), E.FRAME_SIZE_ERROR),
    "PRIORITY on stream 0": (_priority(0, 1), E.PROTOCOL_ERROR),
    "CONTINUATION of nothing": (frame(frames.CONTINUATION, 4, 1, b""), E.PROTOCOL_ERROR),
    "a header block interrupted": (frame(frames.HEADERS, 0, 1, b"\x82") + settings(), E.PROTOCOL_ERROR),
    "a header block gone on elsewhere": (
        frame(frames.HEADERS, 0, 1, b"\x82") + frame(frames.CONTINUATION, 4, 3, b""),
        E.PROTOCOL_ERROR,
    ),
    "a frame too large": (frames.head(16_385, frames.DATA, 0, 1), E.FRAME_SIZE_ERROR),
    "more padding than payload": (headers(1) + frame(frames.DATA, 8, 1, b"\x05abcd"), E.PROTOCOL_ERROR),
    "a padded frame without pad length": (headers(1) + frame(frames.DATA, 8, 1), E.FRAME_SIZE_ERROR),
    "HPACK that points nowhere": (frame(frames.HEADERS, 4, 1, b"\xff\x7f"), E.COMPRESSION_ERROR),
    "HPACK cut short": (frame(frames.HEADERS, 4, 1, b"\x40\x7f"), E.COMPRESSION_ERROR),
    "HPACK's table too large": (frame(frames.HEADERS, 4, 1, b"\x3f\xe1\xff\x03"), E.COMPRESSION_ERROR),
    "DATA after both have ended": (headers(1, end=True) + b"END" + data(1, b"x"), E.STREAM_CLOSED),
    "HEADERS after both have ended": (headers(1, end=True) + b"END" + headers(1), E.STREAM_CLOSED),
}
RESET: dict[str, tuple[bytes, E]] = {
    "WINDOW_UPDATE by nothing": (headers(1) + frames.window_update(1, 0), E.PROTOCOL_ERROR),
    "a window too wide": (headers(1) + frames.window_update(1, (1 << 31) - 1), E.FLOW_CONTROL_ERROR),
    "DATA after its end": (headers(1, end=True) + data(1, b"x"), E.STREAM_CLOSED),
    "HEADERS after its end": (headers(1, end=True) + headers(1), E.STREAM_CLOSED),
    "HEADERS in the middle": (headers(1) + headers(1), E.PROTOCOL_ERROR),
    "PRIORITY of four bytes": (frame(frames.PRIORITY, 0, 1, bytes(4)), E.FRAME_SIZE_ERROR),
    "PRIORITY on itself": (_priority(1, 1), E.PROTOCOL_ERROR),
    "content-length too small": (_of(("content-length", "2")) + data(1, b"abc"), E.PROTOCOL_ERROR),
    "content-length too large": (
        _of(("content-length", "4")) + data(1, b"abc", end=True),
        E.PROTOCOL_ERROR,
    ),
    "content-length of nothing": (
        headers(1, end=True, of=[*CALL, ("content-length", "1")]),
        E.PROTOCOL_ERROR,
    ),
    "content-length that is no number": (_of(("content-length", "a")), E.PROTOCOL_ERROR),
    "an upper-case name": (_of(("X-Up", "1")), E.PROTOCOL_ERROR),
    "a space in a name": (_of(("a b", "1")), E.PROTOCOL_ERROR),
    "a line feed in a value": (_of(("a", "b\nc")), E.PROTOCOL_ERROR),
    "a space before a value": (_of(("a", " b")), E.PROTOCOL_ERROR),
    "connection": (_of(("connection", "close")), E.PROTOCOL_ERROR),
    "te that is not trailers": (_of(("te", "gzip"), without="te"), E.PROTOCOL_ERROR),
    "no path": (_of(without=":path"), E.PROTOCOL_ERROR),
    "no method": (_of(without=":method"), E.PROTOCOL_ERROR),
    "two paths": (headers(1, of=[(":path", "/"), *CALL]), E.PROTOCOL_ERROR),
    "a pseudo-header after others": (_of((":path", "/"), without=":path"), E.PROTOCOL_ERROR),
    "a response's pseudo-header": (headers(1, of=[(":status", "200"), *CALL]), E.PROTOCOL_ERROR),
    "a pseudo-header in trailers": (headers(1) + headers(1, end=True, of=[(":path", "/")]), E.PROTOCOL_ERROR),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_connection_is_told_why_and_ends(name: str) -> None:
    sent, code = BROKEN[name]
    connection = begun()
    before, _, after = sent.partition(b"END")
    events = connection.receive(before, 0.0)
    if after:
        connection.end(1, OK)
        events = connection.receive(after, 0.0)
    assert isinstance(events[-1], Terminated)
    assert events[-1].code == code
    assert [(kind, c) for kind, _, c in codes(connection)][-1] == ("goaway", code)
    assert connection.receive(headers(101), 0.0) == []  # and hears no more
    assert connection.out.take() == b""


@pytest.mark.parametrize("name", RESET)
def test_a_broken_stream_is_reset_and_the_others_go_on(name: str) -> None:
    sent, code = RESET[name]
    connection = begun()
    events = connection.receive(sent, 0.0)
    assert not any(isinstance(e, Terminated) for e in events)
    assert codes(connection) == [("reset", 1, code)]
    if any(isinstance(e, RequestReceived) for e in events):
        assert events[-1] == StreamReset(1, code)
    [other] = connection.receive(headers(3), 0.0)
    assert isinstance(other, RequestReceived)


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.1\r\n\r\n", frames.PREFACE + frame(frames.PING, 0, 0, bytes(8))]
)
def test_what_is_not_http2_is_hung_up_on(sent: bytes) -> None:
    connection = Connection()
    [end] = connection.receive(sent, 0.0)
    assert isinstance(end, Terminated)
    assert end.code == E.PROTOCOL_ERROR


# ── what is allowed ─────────────────────────────────────────────────────────────────────────────


def test_padding_priority_and_continuation() -> None:
    connection, whole = begun(), block()
    sent = (
        frame(
            frames.HEADERS, frames.PADDED | frames.PRIORITY_FLAG, 1, b"\x03" + bytes(5) + whole[:9] + bytes(3)
        )
        + frame(frames.CONTINUATION, 0, 1, whole[9:20])
        + frame(frames.CONTINUATION, 0, 1)
        + frame(frames.CONTINUATION, frames.END_HEADERS, 1, whole[20:])
        + data(1, b"a", pad=200)
        + data(1, b"b", pad=0, end=True)
    )
    request, first, second = connection.receive(sent, 0.0)
    assert isinstance(request, RequestReceived)
    assert request.request.headers == CALL
    assert (first, second) == (DataReceived(1, b"a", ended=False), DataReceived(1, b"b", ended=True))


def test_trailers_end_a_request_and_unknown_frames_are_passed_over() -> None:
    connection = begun()
    sent = headers(1) + frame(0xFE, 0xFF, 1, b"?") + headers(1, end=True, of=[("x", "y")])
    assert connection.receive(sent, 0.0)[1:] == [DataReceived(1, b"", ended=True)]


def test_ping_and_settings_are_acknowledged() -> None:
    connection = begun()
    connection.receive(frame(frames.PING, 0, 0, b"12345678") + settings((1, 0), (0x99, 7)), 0.0)
    assert cut(connection.out.take()) == [
        (frames.PING, frames.ACK, 0, b"12345678"),
        (frames.SETTINGS, frames.ACK, 0, b""),
    ]


def test_headers_need_no_table_whatever_the_peer_makes_of_its_size() -> None:
    connection = begun(None, (1, 0))
    connection.receive(headers(1) + settings((1, 100)) + headers(3), 0.0)
    decoder = hpack.Decoder()
    decoder.header_table_size = 0
    for stream in (1, 3):
        connection.send_headers(stream, (*OK, ("x", "y" * 40_000)))
    parts = [f for f in cut(connection.out.take()) if f[0] in (frames.HEADERS, frames.CONTINUATION)]
    assert [f[2] for f in parts] == [1, 1, 1, 3, 3, 3]
    for three in (parts[:3], parts[3:]):
        assert [f[1] & frames.END_HEADERS for f in three] == [0, 0, frames.END_HEADERS]
        found = decoder.decode(b"".join(f[3] for f in three))
        assert found == [(":status", "200"), ("x", "y" * 40_000)]


# ── windows ─────────────────────────────────────────────────────────────────────────────────────


def _sent(connection: Connection) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for kind, _, stream, payload in cut(connection.out.take()):
        if kind == frames.DATA:
            found[stream] = found.get(stream, b"") + payload
    return found


def test_a_closed_window_makes_data_wait_and_its_end_too() -> None:
    connection = begun(None, (4, 10))
    connection.receive(headers(1, end=True), 0.0)
    connection.send_headers(1, OK)
    assert connection.send_data(1, b"0123456789abcdef") == 6
    assert connection.send_data(1, b"ghij") == 10
    connection.end(1, (("grpc-status", "0"),))
    assert _sent(connection) == {1: b"0123456789"}
    connection.receive(frames.window_update(1, 4), 0.0)
    assert _sent(connection) == {1: b"abcd"}
    connection.receive(settings((4, 0)), 0.0)  # now it is ten below zero …
    connection.receive(frames.window_update(1, 15), 0.0)  # … and five above
    assert _sent(connection) == {1: b"efghi"}
    connection.receive(settings((4, 100)), 0.0)
    ack, rest, end = cut(connection.out.take())
    assert ack[:2] == (frames.SETTINGS, frames.ACK)  # first: only then the peer counts by its new window
    assert rest == (frames.DATA, 0, 1, b"j")
    assert end[:3] == (frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 1)


def test_streams_share_the_connection_s_window_in_turn() -> None:
    connection = begun(Limits(), (4, 1 << 20))
    connection.receive(b"".join(headers(n) for n in (1, 3, 5)), 0.0)
    for stream in (1, 3, 5):
        connection.send_data(stream, bytes([stream]) * 60_000)
    first = _sent(connection)
    assert sum(map(len, first.values())) == 65_535
    for _ in range(3):
        connection.receive(frames.window_update(0, 16_384), 0.0)
    more = _sent(connection)
    assert len(more) >= 2
    connection.receive(frames.window_update(0, 1 << 20), 0.0)
    rest = _sent(connection)
    for stream in (1, 3, 5):
        whole = first.get(stream, b"") + more.get(stream, b"") + rest.get(stream, b"")
        assert whole == bytes([stream]) * 60_000


def test_frames_are_no_larger_than_the_peer_takes() -> None:
    connection = begun(None, (4, 1 << 20))
    connection.receive(headers(1), 0.0)
    connection.send_data(1, bytes(50_000))
    assert [len(f[3]) for f in cut(connection.out.take())] == [16_384, 16_384, 16_384, 848]
    connection.receive(settings((5, 40_000)) + frames.window_update(0, 1 << 20), 0.0)
    connection.send_data(1, bytes(50_000))
    assert [len(f[3]) for f in cut(connection.out.take()) if f[0] == frames.DATA] == [40_000, 10_000]


def test_while_the_transport_takes_no_more_data_waits() -> None:
    connection = begun()
    connection.receive(headers(1, end=True), 0.0)
    connection.hold(True)
    connection.send_data(1, b"x")
    connection.end(1, (("grpc-status", "0"),))
    assert connection.out.take() == b""
    connection.hold(False)
    assert [f[0] for f in cut(connection.out.take())] == [frames.DATA, frames.HEADERS]
    [end] = connection.receive(data(1), 0.0)  # the stream is closed, and that is known
    assert isinstance(end, Terminated)


def test_what_is_not_read_gives_no_window_back() -> None:
    lim = Limits(stream_window=1_000)
    connection = begun(lim)
    connection.receive(headers(1) + data(1, bytes(600)), 0.0)
    assert connection.out.take() == b""
    connection.consumed(1, 600)
    assert cut(connection.out.take()) == [(frames.WINDOW_UPDATE, 0, 1, struct.pack(">I", 600))]
    connection.receive(data(1, bytes(1_000)), 0.0)
    connection.receive(data(1, b"x"), 0.0)
    assert codes(connection) == [("reset", 1, E.FLOW_CONTROL_ERROR)]


def test_the_connection_s_window_is_given_back_whoever_reads() -> None:
    connection = begun(Limits(connection_window=100_000, stream_window=1 << 20))
    connection.receive(headers(1), 0.0)
    for _ in range(4):
        connection.receive(data(1, bytes(15_000)), 0.0)
    assert cut(connection.out.take()) == [(frames.WINDOW_UPDATE, 0, 0, struct.pack(">I", 60_000))]
    [end] = [e for _ in range(7) for e in connection.receive(data(1, bytes(16_000)), 0.0)][-1:]
    assert isinstance(end, DataReceived)  # 7 × 16,000 fit, for half was given back again


# ── floods ──────────────────────────────────────────────────────────────────────────────────────

CALM = Limits(max_streams=100, calm_burst=200, calm_per_s=10, resets_per_s=10, max_header_bytes=4_096)
FLOODS: dict[str, Callable[[int], bytes]] = {
    "PING": lambda _: frame(frames.PING, 0, 0, bytes(8)),
    "SETTINGS": lambda _: settings((4, 1)),
    "empty DATA": lambda i: headers(1) if i == 0 else data(1),
    "padding only": lambda i: headers(1) if i == 0 else data(1, b"", pad=20),
    "PRIORITY": lambda _: _priority(1, 3),
    "WINDOW_UPDATE": lambda _: frames.window_update(0, 1),
    "unknown frames": lambda _: frame(0x77, 0, 0),
    "rapid reset": lambda i: headers(2 * i + 1) + frames.rst_stream(2 * i + 1, 8),
    "streams that are refused": lambda i: headers(2 * i + 1),
    "streams that are malformed": lambda i: headers(2 * i + 1, of=[(":path", "/")]),
    "RST_STREAM of what is over": lambda i: (headers(1) if i == 0 else b"") + frames.rst_stream(1, 8),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_ends_its_connection(name: str) -> None:
    connection, sent, written = begun(CALM), 0, 0
    while not connection.terminated:
        connection.receive(FLOODS[name](sent), 0.0)
        written += len(connection.out.take())
        sent += 1
        assert sent < 3_000, "nobody stopped it"
    assert written < 100_000
    assert len(connection.out.streams) <= CALM.max_streams


@pytest.mark.parametrize("name", ["PING", "WINDOW_UPDATE", "rapid reset"])
def test_what_is_no_flood_goes_on(name: str) -> None:
    connection = begun(CALM)
    for i in range(3_000):
        connection.receive(FLOODS[name](i), i / 5)
        connection.out.take()
    assert not connection.terminated


def test_envoy_s_way_to_end_every_exchange_is_no_flood() -> None:
    connection = begun(CALM)
    for i in range(3_000):
        stream = 2 * i + 1
        connection.receive(headers(stream) + data(stream, b"x"), 0.0)
        connection.send_headers(stream, OK)
        connection.send_data(stream, b"y")
        connection.receive(frames.rst_stream(stream, 0), 0.0)
        connection.out.take()
    assert not connection.terminated


BOMBS = {
    "a block of many CONTINUATIONs": frame(frames.HEADERS, 0, 1) + frame(frames.CONTINUATION, 0, 1) * 100,
    "a block too large": frame(frames.HEADERS, 0, 1, bytes(4_000))
    + frame(frames.CONTINUATION, 0, 1, bytes(4_000)),
    "a block that unpacks to much": frame(
        frames.HEADERS, 4, 1, b"\x40\x01a\x7f\xe1\x0e" + b"b" * 1_984 + b"\xbe" * 10_000
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_header_bomb_ends_its_connection(name: str) -> None:
    connection = begun(CALM)
    events = connection.receive(BOMBS[name], 0.0)
    assert isinstance(events[-1], Terminated)
    assert events[-1].code == E.ENHANCE_YOUR_CALM


def test_no_more_streams_than_allowed() -> None:
    connection = begun(CALM)
    connection.receive(b"".join(headers(2 * i + 1) for i in range(100)), 0.0)
    assert connection.receive(headers(201), 0.0) == []
    assert codes(connection) == [("reset", 201, E.REFUSED_STREAM)]
    connection.receive(frames.rst_stream(1, 8), 0.0)
    assert len(connection.receive(headers(203), 0.0)) == 1


# ── the end ─────────────────────────────────────────────────────────────────────────────────────


def test_a_drain_takes_what_is_on_its_way_and_refuses_the_rest() -> None:
    connection = begun()
    connection.receive(headers(1), 0.0)
    connection.drain()
    goaway, ping = cut(connection.out.take())
    assert goaway[3] == struct.pack(">II", (1 << 31) - 1, 0)
    assert len(connection.receive(headers(3), 0.0)) == 1  # sent before it had heard
    connection.receive(frame(frames.PING, frames.ACK, 0, ping[3]), 0.0)
    assert codes(connection) == [("goaway", 3, 0)]
    assert connection.receive(headers(5), 0.0) == []
    assert not connection.drained
    for stream in (1, 3):
        connection.end(stream, OK)
    assert connection.drained


def test_a_peer_s_goaway_lets_its_streams_go_on() -> None:
    connection = begun()
    connection.receive(headers(1) + frames.goaway(0, 0), 0.0)
    connection.send_data(1, b"x")
    assert _sent(connection) == {1: b"x"}
    assert not connection.terminated
