"""The access-log service: what Envoy sends of answers, batch by batch, into the book."""

import asyncio
from collections.abc import Callable
from typing import Any, Final

import grpc
from envoy.service.accesslog.v3 import als_pb2, als_pb2_grpc

from tidegate.picker.measure.book import Book
from tidegate.picker.measure.record import read

_AT_ONCE: Final = 8
OPTIONS: Final = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 4 << 20),  # batches are 64 KiB
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
)


class AccessLogs(als_pb2_grpc.AccessLogServiceServicer):  # type: ignore[misc]  # generated, untyped
    """Takes in every batch as it comes. Envoy keeps one stream open for each of its workers."""

    def __init__(self, book: Book, clock: Callable[[], float]) -> None:
        self._book, self._clock = book, clock

    async def StreamAccessLogs(  # noqa: N802 -- gRPC's name
        self, _requests: Any, context: Any
    ) -> als_pb2.StreamAccessLogsResponse:
        """Read until Envoy ends the stream."""
        while (message := await context.read()) is not grpc.aio.EOF:
            for number, entry in enumerate(message.http_logs.log_entry, 1):
                self._book.take(read(entry), self._clock())
                if number % _AT_ONCE == 0:
                    await asyncio.sleep(0)  # requests wait for this loop
        return als_pb2.StreamAccessLogsResponse()
