"""CPU of one exchange of Envoy's in our HTTP/2 frames and in the h2 package, side by side.

The bytes are those that Envoy sends for a request with a body of 2 KB; nothing goes over a socket,
and nobody looks into the messages. So this is what HTTP/2 alone costs, in turn, run by run.
`--quick` shows that it runs, and claims nothing.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import h2.config
import h2.connection
import h2.events
from report import record, row

from support.http2 import CALL, block, settings
from tidegate.http2 import frames
from tidegate.http2.connection import Connection, DataReceived
from tidegate.http2.grpc import OK_HEADERS, pack

ENVOY = (*CALL, ("x-envoy-internal", "true"), ("x-forwarded-for", "192.0.2.2"))
ASK = [bytes(337), bytes(2_059), bytes(11)]
ANSWER = [bytes(183), bytes(2_063)]
LATER, LAST = bytes(194), bytes(2)
BATCH = 8
"""Exchanges whose frames come in one read."""


def asked(stream: int) -> bytes:
    head = frames.frame(frames.HEADERS, frames.END_HEADERS, stream, block(ENVOY))
    return head + b"".join(frames.frame(frames.DATA, 0, stream, data) for data in ASK)


def later(stream: int) -> bytes:
    return frames.frame(frames.DATA, 0, stream, LATER)


class Ours:
    def __init__(self) -> None:
        self.http = Connection()
        self.http.receive(frames.PREFACE + settings() + frames.window_update(0, 1 << 30), 0.0)

    def ask(self, raw: bytes, streams: list[int]) -> int:
        self._read(raw)
        for stream in streams:
            self.http.send_headers(stream, OK_HEADERS)
            for answer in ANSWER:
                self.http.send_data(stream, pack(answer))
        return len(self.http.out.take())

    def go_on(self, raw: bytes, streams: list[int]) -> int:
        self._read(raw)
        for stream in streams:
            self.http.send_data(stream, pack(LAST))
        return len(self.http.out.take())

    def end(self, raw: bytes) -> None:
        self.http.receive(raw, 0.0)

    def _read(self, raw: bytes) -> None:
        for event in self.http.receive(raw, 0.0):
            if isinstance(event, DataReceived):
                self.http.consumed(event.stream, len(event.data))


class Theirs:
    def __init__(self) -> None:
        self.http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        self.http.initiate_connection()
        self.http.receive_data(frames.PREFACE + settings() + frames.window_update(0, 1 << 30))

    def ask(self, raw: bytes, streams: list[int]) -> int:
        self._read(raw)
        for stream in streams:
            self.http.send_headers(stream, OK_HEADERS)
            for answer in ANSWER:
                self.http.send_data(stream, pack(answer))
        return len(self.http.data_to_send())

    def go_on(self, raw: bytes, streams: list[int]) -> int:
        self._read(raw)
        for stream in streams:
            self.http.send_data(stream, pack(LAST))
        return len(self.http.data_to_send())

    def end(self, raw: bytes) -> None:
        self.http.receive_data(raw)

    def _read(self, raw: bytes) -> None:
        for event in self.http.receive_data(raw):
            if isinstance(event, h2.events.DataReceived):
                self.http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)


def run(made: Callable[[], Ours | Theirs], exchanges: int) -> float:
    """Microseconds of CPU an exchange."""
    batches = []
    for first in range(1, 2 * exchanges, 2 * BATCH):
        streams = list(range(first, first + 2 * BATCH, 2))
        ends = b"".join(frames.rst_stream(stream, 0) for stream in streams)
        batches.append((b"".join(map(asked, streams)), b"".join(map(later, streams)), ends, streams))
    connection = made()
    began = time.process_time()
    for first_raw, second_raw, ends, streams in batches:
        if not connection.ask(first_raw, streams) or not connection.go_on(second_raw, streams):
            raise RuntimeError("nothing was answered")
        connection.end(ends)
    return (time.process_time() - began) / (len(batches) * BATCH) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short run, claims nothing")
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    runs, exchanges = (1, 200) if args.quick else (args.runs, 2_000)
    ours, theirs = [], []
    for _ in range(runs):
        ours.append(run(Ours, exchanges))
        theirs.append(run(Theirs, exchanges))
    ratio = [b / a for a, b in zip(ours, theirs, strict=True)]
    rows = [
        row("HTTP/2 of an exchange: our frames", ours, "µs", claims=False),
        row("HTTP/2 of an exchange: the h2 package", theirs, "µs", claims=False),
        row("h2 ÷ ours", ratio, "ratio", claims=False),
    ]
    record("http2", rows)


if __name__ == "__main__":
    main()
