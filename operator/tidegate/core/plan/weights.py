"""Which lane serves whom: shares of each class of a model over the lanes, by the room each has."""

from collections.abc import Iterable, Mapping

from tidegate.core.plan.scale import replicas_needed
from tidegate.core.plan.types import Demand, Lane, LaneKey, Model, Policy, Weight
from tidegate.core.types import QoSClass

_AGES = 1e18
"""A horizon so long that only what arrives counts, not what waits."""


def weights(
    model: Model,
    classes: Mapping[str, QoSClass],
    demand: Mapping[LaneKey, Demand],
    before: Mapping[LaneKey, tuple[Weight, ...]],
    policy: Policy,
) -> dict[LaneKey, tuple[Weight, ...]]:
    """Integer shares that sum to 100 for every class, or nothing where no lane may serve it now.

    The highest class chooses first: it may use its own lane and all below, each by its ready
    replicas. A lower class finds what is left; of a lane above it, less the headroom kept for that
    lane's own class. A lane with nothing ready is left out. Shares that moved by no more than one
    step stay as they were, so that noise writes nothing.
    """
    lanes = [x for x in model.lanes if x.key.qos_class in classes]
    lanes.sort(key=lambda x: (-classes[x.key.qos_class].priority, x.key.qos_class))
    left = {x.key: float(x.ready) for x in lanes if x.ready > 0}
    found: dict[LaneKey, tuple[Weight, ...]] = {}
    for place, own in enumerate(lanes):
        room = _room(lanes, place, left, policy)
        total = sum(room.values())
        if total <= 0:
            # Nothing is left within objectives: what may be used is shared by its size.
            room = {x.key: float(x.ready) for x in lanes[place:] if x.ready > 0}
            total = sum(room.values())
        shares = _rounded({k: v / total for k, v in room.items()}, policy.weight_step) if total else ()
        found[own.key] = _steady(before.get(own.key, ()), shares, policy.weight_step)
        load = replicas_needed(demand.get(own.key, Demand()), model.ability or policy.ability, _AGES, policy)
        for key, part in room.items():
            left[key] = max(left[key] - load * part / total, 0.0)
    return found


def _room(
    lanes: list[Lane], place: int, left: Mapping[LaneKey, float], policy: Policy
) -> dict[LaneKey, float]:
    """Replicas' worth of room that the class at `place` of the lanes (highest first) finds in each."""
    room = {}
    for at, lane in enumerate(lanes):
        if lane.key in left:
            kept = policy.headroom * lane.ready if at < place else 0.0
            room[lane.key] = left[lane.key] - kept
    return {k: v for k, v in room.items() if v > 0}


def _rounded(shares: Mapping[LaneKey, float], step: int) -> tuple[Weight, ...]:
    """Multiples of `step` that sum to 100, by largest remainder; lanes that round to 0 are left out."""
    units = 100 // step
    whole = {k: int(v * units) for k, v in shares.items()}
    by_remainder = sorted(shares, key=lambda k: (whole[k] - shares[k] * units, k))
    for key in by_remainder[: units - sum(whole.values())]:
        whole[key] += 1
    sizes = [(k.qos_class, n * step) for k, n in sorted(whole.items()) if n > 0]
    return tuple(
        Weight(lane, size + (100 - units * step) * (at == 0)) for at, (lane, size) in enumerate(sizes)
    )


def _steady(before: Iterable[Weight], now: tuple[Weight, ...], step: int) -> tuple[Weight, ...]:
    """The shares from before, where the lanes are the same and none moved by more than one step."""
    old = tuple(before)
    same = [w.lane for w in old] == [w.lane for w in now]
    return (
        old if same and all(abs(a.weight - b.weight) <= step for a, b in zip(old, now, strict=True)) else now
    )
