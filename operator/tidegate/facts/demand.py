"""Demand from what pickers count: rates over a sliding window, and what waits and runs now. Pure."""

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from tidegate.core.plan.types import Demand, LaneKey

WINDOW_PERIODS: Final = 5
"""Rates are taken over this many periods: short enough for a rush, long enough for a few requests."""
LEAST_WINDOW_S: Final = 5.0
"""And over no less than this."""

COUNTERS: Final = ("tidegate_arrivals_total", "tidegate_prompt_tokens_total", "tidegate_output_tokens_total")
GAUGES: Final = (
    "tidegate_queue_requests",
    "tidegate_queue_tokens",
    "tidegate_inflight_requests",
    "tidegate_attainment_kept_requests",
    "tidegate_attainment_judged_requests",
)

Values = dict[tuple[str, LaneKey], float]
"""By metric and lane, summed over the other labels."""


def window_s(period_s: float) -> float:
    """Seconds over which rates are taken by who asks once a period."""
    return max(WINDOW_PERIODS * period_s, LEAST_WINDOW_S)


@dataclass(slots=True)
class Meter:
    """Rates of one picker's counters over a sliding window; gauges as last seen.

    A counter that fell has begun again at zero (its picker was restarted): what it shows now is
    what came since. The increase before the restart that was not seen is lost.
    """

    window_s: float
    history: deque[tuple[float, Values]] = field(default_factory=deque)
    gauges: Values = field(default_factory=dict)
    _total: Values = field(default_factory=dict)
    _last: Values = field(default_factory=dict)

    def observe(self, now: float, counters: Values, gauges: Values) -> None:
        """Take in what COUNTERS and GAUGES say at a time."""
        self.gauges = gauges
        for key, value in counters.items():
            # A counter first seen in a later scrape began at zero; in the first one it is unknown.
            before = self._last.get(key, 0.0 if self.history else value)
            increase = value - before if value >= before else value
            self._total[key] = self._total.get(key, 0.0) + increase
        self._last = counters
        self.history.append((now, dict(self._total)))
        while len(self.history) > 2 and now - self.history[1][0] >= self.window_s:
            self.history.popleft()

    def age_s(self, now: float) -> float:
        """Seconds since the last scrape."""
        return now - self.history[-1][0] if self.history else float("inf")

    def values(self) -> Values:
        """Counters as rates per second, and gauges."""
        if len(self.history) < 2:
            return dict(self.gauges)
        (start, before), (end, after) = self.history[0], self.history[-1]
        span = max(end - start, 1e-9)
        return {k: (v - before.get(k, 0.0)) / span for k, v in after.items()} | self.gauges


def demands(values: Values, *, fresh: bool) -> dict[LaneKey, Demand]:
    """Turn rates and gauges by metric into one Demand a lane."""
    lanes = sorted({lane for _, lane in values})

    def value(metric: str, lane: LaneKey) -> float:
        return values.get((metric, lane), 0.0)

    return {
        lane: Demand(
            arrival_rps=value(COUNTERS[0], lane),
            prompt_tokens_per_s=value(COUNTERS[1], lane),
            output_tokens_per_s=value(COUNTERS[2], lane),
            queued_requests=round(value(GAUGES[0], lane)),
            queued_tokens=value(GAUGES[1], lane),
            inflight=round(value(GAUGES[2], lane)),
            kept=round(value(GAUGES[3], lane)),
            judged=round(value(GAUGES[4], lane)),
            fresh=fresh,
        )
        for lane in lanes
    }
