"""Entries of Envoy's log, and a book of what is measured, without Envoy."""

from envoy.data.accesslog.v3 import accesslog_pb2
from prometheus_client import CollectorRegistry

from tidegate.core.flow import Ask
from tidegate.core.steptime import LLAMA3_8B_A100
from tidegate.core.types import Objectives
from tidegate.picker.measure.book import Book
from tidegate.picker.measure.exports import Measures
from tidegate.render.measure import NAMESPACE, REQUEST_HEADER

MODEL = ("ns", "m")
CHAT = Objectives(ttft_s=1.0, tpot_s=0.1, window_s=3600.0)
BEGAN = 1_700_000_000


def entry(
    noted: dict[str, str] | None = None,
    *,
    flags: str = "",
    size: int = 0,
    took_s: float = 2.0,
    status: int = 200,
    grpc: tuple[str, str] = ("", ""),
    details: str = "via_upstream",
) -> accesslog_pb2.HTTPAccessLogEntry:
    one = accesslog_pb2.HTTPAccessLogEntry()
    one.request.request_headers[REQUEST_HEADER] = "7-abc"
    common = one.common_properties
    common.start_time.FromSeconds(BEGAN)
    common.time_to_last_upstream_rx_byte.FromMicroseconds(int(took_s * 1e6))
    for key, text in (noted or {}).items():
        common.metadata.filter_metadata[NAMESPACE].fields[key].string_value = text
    if flags:
        setattr(common.response_flags, flags, True)
    one.response.response_code.value = status
    one.response.response_code_details = details
    for where, text in zip(
        (one.response.response_headers, one.response.response_trailers), grpc, strict=True
    ):
        if text:
            where["grpc-status"] = text
    one.response.response_body_bytes = size
    return one


class Stage:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.told: list[tuple[int, int, int]] = []
        measures = Measures()
        self.registry.register(measures)
        self.book = Book(measures, LLAMA3_8B_A100, lambda *what: self.told.append(what))

    def value(self, name: str, **labels: str) -> float:
        found = [
            s.value
            for family in self.registry.collect()
            for s in family.samples
            if s.name == name and labels.items() <= s.labels.items()
        ]
        return sum(found)

    def handed(
        self, number: int = 7, *, streamed: bool = True, tenant: str = "", gpus: int = 1, last: bool = False
    ) -> str:
        ask = Ask(number, MODEL, "high", 100, 50, streamed=streamed, tenant=tenant)
        return self.book.handed(ask, CHAT, 10.0, arrived_s=BEGAN - 0.25, gpus=gpus, last=last)
