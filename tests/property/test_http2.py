"""The HTTP/2 connection told anything, in any pieces: the same events, no exception, bounded memory."""

import contextlib
import itertools
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings
from hypothesis import given, settings
from hypothesis import strategies as st

from support.http2 import CALL, begun, block
from support.http2 import data as data_frame
from support.http2 import headers as headers_frame
from support.http2 import settings as settings_frame
from tidegate.http2 import frames
from tidegate.http2.connection import Connection, DataReceived, Event, RequestReceived
from tidegate.http2.grpc import CallError, Unpacker, pack
from tidegate.http2.headers import HeaderReader, leaves_table_alone
from tidegate.http2.settings import Limits

LIMITS = Limits(max_streams=8, calm_burst=400, max_header_bytes=2_048, connection_window=1 << 20)

STREAMS = st.integers(0, 12)
PAYLOADS = st.binary(max_size=40)
FRAMES = st.one_of(
    st.builds(headers_frame, STREAMS, end=st.booleans()),
    st.builds(data_frame, STREAMS, PAYLOADS, end=st.booleans(), pad=st.none() | st.integers(0, 20)),
    st.builds(frames.rst_stream, STREAMS, st.integers(0, 20)),
    st.builds(frames.window_update, STREAMS, st.integers(0, (1 << 31) - 1)),
    st.builds(
        lambda pairs: settings_frame(*pairs),
        st.lists(st.tuples(st.integers(0, 8), st.integers(0, 1 << 32 - 1)), max_size=3),
    ),
    st.builds(frames.frame, st.integers(0, 12), st.integers(0, 255), STREAMS, PAYLOADS),
    st.builds(
        lambda s, at: frames.frame(1, 0, s, block()[:at]) + frames.frame(9, 4, s, block()[at:]),
        STREAMS,
        st.integers(0, 60),
    ),
)
"""Mostly good frames in any order, some with any type, flags and payload."""
SCRIPTS = st.lists(FRAMES, max_size=25).map(b"".join)


def play(connection: Connection, pieces: list[bytes]) -> list[Event]:
    return [event for piece in pieces for event in connection.receive(piece, 0.0)]


def pieces_of(raw: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(raw), *(c % (len(raw) + 1) for c in cuts)})
    return [raw[a:b] for a, b in itertools.pairwise(edges)]


@settings(max_examples=300, deadline=None)
@given(script=SCRIPTS, cuts=st.lists(st.integers(0, 4_000), max_size=30))
def test_events_and_answers_do_not_depend_on_how_bytes_came(script: bytes, cuts: list[int]) -> None:
    raw = frames.PREFACE + settings_frame() + script
    whole, cut = Connection(LIMITS), Connection(LIMITS)
    assert play(whole, [raw]) == play(cut, pieces_of(raw, cuts))
    assert whole.out.take() == cut.out.take()


@settings(max_examples=300, deadline=None)
@given(
    script=SCRIPTS,
    noise=st.lists(st.tuples(st.integers(0, 4_000), st.integers(0, 255)), max_size=8),
    started=st.booleans(),
)
def test_no_bytes_raise_and_none_make_it_hold_much(
    script: bytes, noise: list[tuple[int, int]], started: bool
) -> None:
    raw = bytearray(settings_frame() + script)
    for at, value in noise:
        raw[at % len(raw)] = value
    connection = Connection(LIMITS)
    events = play(connection, [frames.PREFACE if started else b"", bytes(raw)])
    assert sum(isinstance(e, RequestReceived) for e in events) <= len(raw) // 9
    assert len(connection.out.streams) <= LIMITS.max_streams
    assert len(connection.out.take()) <= 200 + 30 * (len(raw) // 9)
    assert connection._reader.held <= LIMITS.max_frame_size + frames.HEAD_BYTES


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_no_header_block_raises_anything_but_its_fault(raw: bytes) -> None:
    connection = begun(LIMITS)
    connection.receive(frames.frame(frames.HEADERS, frames.END_HEADERS, 1, raw), 0.0)
    connection.receive(frames.frame(frames.HEADERS, frames.END_HEADERS, 3, block()), 0.0)
    assert len(connection.out.take()) < 700


HEADER = st.tuples(
    st.sampled_from(["a", "b", "x-long", ":path", "te"]), st.sampled_from(["", "1", "22", "x" * 50])
)


@settings(max_examples=200, deadline=None)
@given(blocks=st.lists(st.tuples(st.lists(HEADER, max_size=4), st.booleans()), max_size=12))
def test_remembered_blocks_mean_what_the_table_says(blocks: list[tuple[list[Any], bool]]) -> None:
    import hpack

    encoder, reader, plain = hpack.Encoder(), HeaderReader(1 << 16), hpack.Decoder()
    for pairs, indexed in blocks:
        kind = hpack.HeaderTuple if indexed else hpack.NeverIndexedHeaderTuple
        raw = encoder.encode([kind(*pair) for pair in pairs])
        size, entries = plain.header_table_size, list(plain.header_table.dynamic_entries)
        expected = [tuple(pair) for pair in plain.decode(raw)]
        assert list(reader.read(raw).headers) == expected
        untouched = (size, entries) == (plain.header_table_size, list(plain.header_table.dynamic_entries))
        assert not leaves_table_alone(raw) or untouched


# ── another implementation as the peer ──────────────────────────────────────────────────────────

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("call"), st.binary(max_size=200)),
        st.tuples(st.just("answer"), st.integers(0, 70_000)),
        st.tuples(st.just("window"), st.integers(1, 50_000)),
        st.tuples(st.just("initial"), st.sampled_from([0, 1, 100, 65_535, 200_000])),
        st.tuples(st.just("frame"), st.sampled_from([16_384, 20_000, 60_000])),
        st.tuples(st.just("table"), st.sampled_from([0, 64, 4_096])),
        st.tuples(st.just("cancel"), st.just(0)),
    ),
    max_size=14,
)


class Peer:
    """h2 as a client; it raises where we break the protocol."""

    def __init__(self) -> None:
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self.h2.initiate_connection()
        self.ours = Connection(Limits(stream_window=65_535, max_streams=100))
        self.asked: dict[int, bytes] = {}
        self.heard: dict[int, bytes] = {}
        self.got: dict[int, bytes] = {}
        self.wanted: dict[int, bytes] = {}
        self.live: list[int] = []
        self.ended: set[int] = set()
        self.exchange()

    def exchange(self) -> None:
        """Pass bytes both ways until nobody has any."""
        while True:
            there = self.h2.data_to_send()
            for event in self.ours.receive(there, 0.0):
                if isinstance(event, DataReceived):
                    self.heard[event.stream] = self.heard.get(event.stream, b"") + event.data
                    self.ours.consumed(event.stream, len(event.data))
            back = self.ours.out.take()
            for event in self.h2.receive_data(back):
                if isinstance(event, h2.events.DataReceived):
                    self.got[event.stream_id] = self.got.get(event.stream_id, b"") + event.data
                elif isinstance(event, h2.events.StreamEnded):
                    self.ended.add(event.stream_id)
                assert not isinstance(event, h2.events.ConnectionTerminated)
            if not there and not back:
                return

    def act(self, kind: str, value: Any) -> None:
        if kind == "call":
            stream = self.h2.get_next_available_stream_id()
            self.h2.send_headers(stream, CALL)
            self.h2.send_data(stream, value, end_stream=True)
            self.asked[stream] = value
            self.live.append(stream)
        elif kind == "window" and self.live:
            self.h2.increment_flow_control_window(value)
            self.h2.increment_flow_control_window(value, self.live[-1])
        elif kind == "answer" and self.live:
            stream, data = self.live[-1], bytes([value % 251]) * value
            if stream not in self.wanted:
                self.ours.send_headers(stream, ((":status", "200"),))
            self.wanted[stream] = self.wanted.get(stream, b"") + data
            self.ours.send_data(stream, data)
        elif kind == "cancel" and self.live:
            stream = self.live.pop()
            self.h2.reset_stream(stream, 8)
            self.wanted.pop(stream, None)
        elif kind in ("initial", "frame", "table"):
            codes = h2.settings.SettingCodes
            code = {
                "initial": codes.INITIAL_WINDOW_SIZE,
                "frame": codes.MAX_FRAME_SIZE,
                "table": codes.HEADER_TABLE_SIZE,
            }
            self.h2.update_settings({code[kind]: value})
        self.exchange()


@settings(max_examples=150, deadline=None)
@given(actions=ACTIONS)
def test_another_implementation_agrees(actions: list[tuple[str, Any]]) -> None:
    peer = Peer()
    for kind, value in actions:
        peer.act(kind, value)
    for stream in list(peer.live):  # now let everything through, and end it
        if stream not in peer.wanted:
            peer.ours.send_headers(stream, ((":status", "200"),))
        peer.ours.end(stream, (("grpc-status", "0"),))
    peer.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1 << 22})
    peer.h2.increment_flow_control_window(1 << 22)
    peer.exchange()
    assert {s: peer.heard.get(s) for s in peer.live} == {s: peer.asked[s] for s in peer.live}
    for stream in peer.live:
        assert peer.got.get(stream, b"") == peer.wanted.get(stream, b"")
        assert stream in peer.ended
    assert not peer.ours._streams.keys() & set(peer.live)


# ── gRPC's own frames ───────────────────────────────────────────────────────────────────────────


@settings(max_examples=200, deadline=None)
@given(
    messages=st.lists(st.binary(max_size=300), max_size=8), cuts=st.lists(st.integers(0, 3_000), max_size=20)
)
def test_messages_do_not_depend_on_how_bytes_came(messages: list[bytes], cuts: list[int]) -> None:
    unpacker = Unpacker()
    found = [m for piece in pieces_of(b"".join(map(pack, messages)), cuts) for m in unpacker.feed(piece)]
    assert found == messages
    assert unpacker.held == 0


@settings(max_examples=200, deadline=None)
@given(pieces=st.lists(st.binary(max_size=50), max_size=10))
def test_no_message_raises_anything_but_its_status(pieces: list[bytes]) -> None:
    unpacker = Unpacker(most=60)
    with contextlib.suppress(CallError):
        for piece in pieces:
            unpacker.feed(piece)
            assert unpacker.held <= 65
