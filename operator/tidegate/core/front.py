"""The front: the few replicas of a model that urgent work is packed on.

Batch decodes beside people cost little; batch prefill does, since an engine that has begun a prompt
finishes it first. Spread over all replicas, what people wait for meets a prefill everywhere. Packed
on a front that is as small as their objectives allow, it leaves the others to batch at full width.
The front moves by dispatch: who would wait too long there goes beyond it.
"""

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

SPARE: Final = 0.9
"""Of a replica, beside what the work fills: one more than it, nearly, so that a burst finds one clear."""


class Urgent(NamedTuple):
    """Urgent traffic of a class: arrivals a second, and seconds of prefill of one on an idle replica."""

    per_second: float
    prefill_s: float


class Standing(NamedTuple):
    """An endpoint that may be in the front."""

    address: str
    lane_rank: int
    lent: bool


def size(traffic: Iterable[Urgent], utilisation: float) -> int:
    """Replicas of the front; 0 without traffic.

    Prefill fills `utilisation` of the front's time at most: the rest is for decodes at the pace that
    was promised, and for arrivals that come together.
    """
    busy = sum(each.per_second * each.prefill_s for each in traffic)
    return math.ceil(busy / utilisation + SPARE) if busy > 0 else 0


def members(replicas: int, endpoints: Iterable[Standing]) -> frozenset[str]:
    """Which endpoints are the front: those whose GPUs are not asked back, of the highest classes' lanes."""
    ordered = sorted(endpoints, key=lambda e: (e.lent, e.lane_rank, e.address))
    return frozenset(e.address for e in ordered[:replicas])
