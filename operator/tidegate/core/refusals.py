"""What a refused request is told: why, with figures, and when it is worth trying again."""

import math
from dataclasses import dataclass
from typing import Final

from tidegate.core.flowtypes import Ask, Reason, Refused

_RETRY_AFTER_MAX_S: Final = 600
_LATE: Final = 0.1
"""A replica that takes longer than the starts before it is expected within this part of such a start."""


@dataclass(frozen=True, slots=True)
class Standing:
    """How the queue stands that refuses. Times are seconds, `rate` requests/s that leave it.

    `own`: how many of those that wait are the tenant's, None where tenants do not count.
    `comes_in_s`: when a replica is expected, None where nothing is known of that.
    """

    waiting: int
    most: int
    wait_s: float
    rate: float
    held_bytes: int
    most_bytes: int
    own: int | None = None
    comes_in_s: float | None = None


def expected_s(start_s: float | None, under_way_s: float | None) -> float | None:
    """When a replica will be ready that has been starting for so long; None where no start was seen.

    Args:
        start_s: What a start takes.
        under_way_s: For how long the foremost has been starting; None when none is.
    """
    if start_s is None:
        return None
    return max(start_s - (under_way_s or 0.0), _LATE * start_s)


def refused(status: int, reason: Reason, ask: Ask, at: Standing) -> Refused:
    """Refuse a request."""
    estimate = at.waiting / at.rate if at.rate > 0 else at.wait_s
    expected = at.comes_in_s if reason is Reason.NO_ENDPOINT else None
    after = min(_RETRY_AFTER_MAX_S, max(1, math.ceil(estimate if expected is None else expected)))
    name = f"{ask.model[0]}/{ask.model[1]}"
    whose = f", {at.own} of them this tenant's" if at.own is not None else ""
    coming = f", one is expected in {after} s" if expected is not None else ""
    among = " among the endpoints that the gateway names" if ask.subset is not None else ""
    text = {
        Reason.QUEUE_FULL: f"{at.waiting} of {at.most} {ask.qos_class} requests wait for {name}{whose}",
        Reason.WAITED_TOO_LONG: f"no room at {name} for class {ask.qos_class} within {at.wait_s:g} s",
        Reason.MEMORY_FULL: f"the queue holds {at.held_bytes} bytes of {at.most_bytes} allowed",
        Reason.NO_ENDPOINT: f"no replica of {name} is ready{among}{coming}",
    }[reason]
    return Refused(status, reason, f"{text}; try again in {after} s", after)
