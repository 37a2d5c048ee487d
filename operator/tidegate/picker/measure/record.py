"""One line of Envoy's access log, read and bounded. Pure: a message in, a Record or None out.

What the engine's bytes say ends up in here as text; nothing of it is believed beyond its bounds.
"""

import math
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final

from envoy.data.accesslog.v3 import accesslog_pb2

from tidegate.picker.errors import http_status
from tidegate.render.measure import (
    GRPC_STATUS,
    KEY_END,
    KEY_FIRST,
    KEY_SEEN,
    NAMESPACE,
    REQUEST_HEADER,
)

MOST_TOKENS: Final = 10_000_000
"""More than any context holds: who claims more is not believed."""
_SOME_TOKENS: Final = 1000
_PER_BYTE: Final = 4
"""An answer of so many bytes has no more output tokens, hidden ones included."""
_MOST_TEXT: Final = 64
_LONGEST_S: Final = 7 * 86400.0

_LOST: Final = frozenset(
    {
        "upstream_connection_termination",
        "upstream_remote_reset",
        "upstream_connection_failure",
        "upstream_protocol_error",
        "no_healthy_upstream",
        "local_reset",
    }
)
_BY_ENGINE: Final = "via_upstream"
"""Response code details of an answer that is the engine's own, and no word of Envoy or the picker."""
_LEFT: Final = frozenset({"downstream_connection_termination", "downstream_remote_reset"})


class End(Enum):
    """How an answer ended."""

    WHOLE = auto()
    LEFT = auto()
    """The client went."""
    LOST = auto()
    """The engine went."""


class Source(Enum):
    """Where a count of tokens is from; the word is the metric's label."""

    USAGE = "usage"
    """The engine's own account."""
    EVENTS = "events"
    """Events of the stream that carried tokens; of one that broke, by the bytes that came."""
    ESTIMATE = "estimate"


@dataclass(frozen=True, slots=True)
class Record:
    """What passed. Times are Unix seconds; None is what was not seen.

    `status` is HTTP's, over gRPC what `http_status` makes of its own. `by_engine`: the engine
    said it, and so it is not tried again.
    """

    request: str
    status: int
    end: End
    started_s: float
    first_s: float | None = None
    ended_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    source: Source = Source.ESTIMATE
    by_engine: bool = False


def read(entry: accesslog_pb2.HTTPAccessLogEntry) -> Record | None:
    """Read an entry; None where it names no request, or not when it began."""
    request = entry.request.request_headers.get(REQUEST_HEADER, "")
    common = entry.common_properties
    if not request or len(request) > _MOST_TEXT or not common.HasField("start_time"):
        return None
    started_s = common.start_time.seconds + common.start_time.nanos / 1e9
    if not 0 < started_s < 1e11:
        return None
    noted = _noted(common)
    end = _end(common.response_flags)
    prompt, output, source = _tokens(noted, entry.response.response_body_bytes, end)
    return Record(
        request=request,
        status=_status(entry.response),
        end=end,
        started_s=started_s,
        first_s=_first(noted, started_s),
        ended_s=_ended(common, started_s),
        prompt_tokens=prompt,
        output_tokens=output,
        source=source,
        by_engine=entry.response.response_code_details == _BY_ENGINE,
    )


def unix_s(text: str) -> float | None:
    """A header's Unix time in seconds, None where it is none."""
    whole, _, fraction = text.partition(".")
    if not (text.isascii() and whole.isdecimal() and len(whole) <= 11 and len(text) <= _MOST_TEXT):
        return None
    if fraction and not fraction.isdecimal():
        return None
    return float(text) or None


def _status(response: accesslog_pb2.HTTPResponseProperties) -> int:
    for headers in (response.response_trailers, response.response_headers):
        status = _number(headers.get(GRPC_STATUS, ""), 1 << 31)
        if status is not None:
            return http_status(status)
    return int(response.response_code.value)


def _noted(common: accesslog_pb2.AccessLogCommon) -> dict[str, str]:
    """What the filter left, the texts of it that are short."""
    if NAMESPACE not in common.metadata.filter_metadata:
        return {}
    fields = common.metadata.filter_metadata[NAMESPACE].fields
    return {key: text for key, value in fields.items() if len(text := value.string_value) <= _MOST_TEXT}


def _first(noted: dict[str, str], started_s: float) -> float | None:
    number = _number(noted.get(KEY_FIRST, ""), 10**17)
    if number is None:
        return None
    first_s = number / 1e6
    # Before its beginning, by more than clocks are set right: the clock jumped.
    return max(first_s, started_s) if -0.01 <= first_s - started_s <= _LONGEST_S else None


def _ended(common: accesslog_pb2.AccessLogCommon, started_s: float) -> float | None:
    for name in ("time_to_last_upstream_rx_byte", "time_to_last_downstream_tx_byte", "duration"):
        if common.HasField(name):
            took: Any = getattr(common, name)
            seconds = took.seconds + took.nanos / 1e9
            return started_s + seconds if 0 <= seconds <= _LONGEST_S else None
    return None


def _end(flags: accesslog_pb2.ResponseFlags) -> End:
    found = {field.name for field, _ in flags.ListFields()}
    if not found:
        return End.WHOLE
    return End.LOST if found & _LOST else End.LEFT if found & _LEFT else End.WHOLE


def _tokens(noted: dict[str, str], size: int, end: End) -> tuple[int | None, int | None, Source]:
    """Prompt and output tokens, and where they are from."""
    prompt, _, more = noted.get(KEY_END, "").partition(":")
    output, _, counted = more.partition(":")
    made = _number(output, MOST_TOKENS)
    if made is not None and made <= _SOME_TOKENS + _PER_BYTE * size:
        return _number(prompt, MOST_TOKENS), made, Source.USAGE
    events = _number(counted, MOST_TOKENS)
    if events is None and KEY_SEEN in noted:
        count, _, length = noted[KEY_SEEN].partition(":")
        events, by = _number(count, MOST_TOKENS), _number(length, 1 << 50)
        if events is not None and by:
            events = min(MOST_TOKENS, math.floor(events * max(1.0, size / by)))
    if events == 0 and KEY_FIRST in noted:
        events = None  # a token came: that none was counted is the filter's not knowing
    if events is None and end is not End.WHOLE and KEY_FIRST in noted:
        events = 1  # it broke before the filter had counted: that a token came is all that is known
    return None, events, Source.ESTIMATE if events is None else Source.EVENTS


def _number(text: str, most: int) -> int | None:
    """A plain decimal number up to `most`, else None."""
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        return None
    value = int(text)
    return value if value <= most else None
