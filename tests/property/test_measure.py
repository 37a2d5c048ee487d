"""Whatever an engine's bytes make of Envoy's log, reading it raises nothing and stays within bounds."""

from envoy.service.accesslog.v3 import als_pb2
from hypothesis import given
from hypothesis import strategies as st

from support.book import Stage, entry
from tidegate.picker.measure.record import MOST_TOKENS, read
from tidegate.render.measure import REQUEST_HEADER

NUMBER = st.integers(-5, 10**20).map(str) | st.just("")
ANYTHING = st.text(st.characters(max_codepoint=0x7FF), max_size=80)
TEXT = st.lists(NUMBER, max_size=4).map(":".join) | ANYTHING


@given(
    noted=st.dictionaries(st.sampled_from(["first", "seen", "end", "more"]), TEXT),
    flags=st.sampled_from(["", "upstream_remote_reset", "downstream_remote_reset"]),
    size=st.integers(0, 2**63 - 1),
    took_s=st.floats(0, 1e8),
    status=st.integers(0, 2**32 - 1),
    known=st.booleans(),
)
def test_no_entry_raises_and_every_count_is_within_bounds(
    noted: dict[str, str], flags: str, size: int, took_s: float, status: int, known: bool
) -> None:
    stage = Stage()
    name = stage.handed(tenant="t")
    one = entry(noted, flags=flags, size=size, took_s=took_s, status=status)
    if known:
        one.request.request_headers[REQUEST_HEADER] = name
    found = read(one)
    assert found is not None
    assert found.output_tokens is None or 0 <= found.output_tokens <= MOST_TOKENS
    assert found.first_s is None or found.first_s >= found.started_s
    stage.book.take(found, 12.0)
    stage.book.sweep(1e9)
    assert stage.value("tidegate_measurements_total") == 1


@given(st.binary(max_size=400))
def test_no_bytes_that_are_a_batch_raise(data: bytes) -> None:
    message = als_pb2.StreamAccessLogsMessage()
    try:
        message.ParseFromString(data)
    except Exception:  # gRPC refuses those before they reach us
        return
    book = Stage().book
    for found in message.http_logs.log_entry:
        book.take(read(found), 1.0)
