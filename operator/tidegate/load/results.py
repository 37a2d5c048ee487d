"""What the client saw: one record a request, and figures made from them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ANSWERED, REFUSED, LOST = "answered", "refused", "lost"


@dataclass(slots=True)
class Record:
    """One request. Times are seconds from the start of the run; None where it never came.

    `scheduled_s` is when it was due (open loop) or when room came (closed loop): TTFT counts from
    there. A refusal is a 4xx with a reason; a 5xx, a truncated stream and a timeout are lost.
    """

    stream: str
    qos_class: str
    model: str
    prompt_tokens: int
    output_tokens: int
    scheduled_s: float
    sent_s: float = 0.0
    first_token_s: float | None = None
    end_s: float | None = None
    outcome: str = LOST
    status: int = 0
    detail: str = ""
    tokens: int = 0
    """Output tokens that arrived; a response that is not streamed has them all at its end."""
    tokens_in_window: int = 0
    """Those of them that arrived before the run's end."""

    @property
    def ttft_s(self) -> float:
        """Time to first token; infinite when none came."""
        return math.inf if self.first_token_s is None else self.first_token_s - self.scheduled_s


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile; `values` need not be sorted. NaN when there are none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summarise(records: Iterable[Record], window_s: float) -> dict[str, dict[str, float]]:
    """Per class: TTFT, counts, and output tokens a second that arrived inside the window.

    Refused and lost requests stay in the percentiles, as infinite, when they were streamed; a
    response that is not streamed has no first token, its TTFT is when it came.
    """
    by_class: dict[str, list[Record]] = {}
    for record in records:
        by_class.setdefault(record.qos_class, []).append(record)
    return {name: _figures(found, window_s) for name, found in sorted(by_class.items())}


def _figures(records: Sequence[Record], window_s: float) -> dict[str, float]:
    ttft = [r.ttft_s for r in records]
    counts = {o: sum(r.outcome == o for r in records) for o in (ANSWERED, REFUSED, LOST)}
    return {
        "ttft_p50_s": percentile(ttft, 0.50),
        "ttft_p99_s": percentile(ttft, 0.99),
        "requests_sent": len(records),
        **counts,
        "tokens_per_s": sum(r.tokens_in_window for r in records) / window_s,
    }
