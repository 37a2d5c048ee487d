"""How many replicas each lane wants: demand over what one replica serves, up at once, down calmly."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tidegate.core import reasons
from tidegate.core.plan.types import Ability, Calm, Demand, Lane, LaneKey, Memory, Model, Policy, Snapshot
from tidegate.core.types import Objectives, QoSClass, Reclaim

_ROUND_OFF = 1e-9


@dataclass(frozen=True, slots=True)
class Want:
    """What one lane asks for.

    `need` is what its demand asks for. `target` is how many to find GPUs for, of which the first
    `firm` may displace what is borrowed; the rest only soaks up idle GPUs. `fixed` lanes (paused,
    External) stand as they are. `carriers` are `Always` lanes of its model that carry some of its demand.
    """

    lane: Lane
    model: Model
    qos: QoSClass
    need: int
    target: int
    firm: int
    reason: str
    message: str
    fixed: bool = False
    carriers: frozenset[LaneKey] = frozenset()


def replicas_needed(demand: Demand, ability: Ability, horizon_s: float, policy: Policy) -> float:
    """Replicas that keep up with the arrivals and work off the queue within `horizon_s`.

    Arrivals count by the tighter of two limits: the step time that their tokens take, and the slots
    that their requests in flight hold (Little's law), each filled to the target utilisation.
    """
    time_share = ability.seconds(demand.prompt_tokens_per_s, demand.output_tokens_per_s)
    slot_share = demand.inflight / ability.slots
    steady = max(time_share, slot_share) / policy.target_utilisation
    return steady + backlog_s(demand, ability) / horizon_s


def backlog_s(demand: Demand, ability: Ability) -> float:
    """Replica-seconds of what waits. Its tokens are split as those that arrive; half and half if none do."""
    arriving = demand.prompt_tokens_per_s + demand.output_tokens_per_s
    share = demand.prompt_tokens_per_s / arriving if arriving > 0 else 0.5
    return ability.seconds(demand.queued_tokens * share, demand.queued_tokens * (1 - share))


def horizon_s(objectives: Objectives, start_time_s: float) -> float:
    """Seconds within which a queue is to be worked off.

    The class's objective, but never less than a replica takes to start: one that is ready only
    after the queue is gone was started for nothing.
    """
    aim = objectives.ttft_s if objectives.ttft_s is not None else objectives.completion_s
    return max(start_time_s, aim or 0.0)


def wants(
    snapshot: Snapshot, policy: Policy, memory: Memory, now: float, bound: Mapping[LaneKey, int]
) -> tuple[dict[LaneKey, Want], dict[LaneKey, Calm]]:
    """What every lane of a known class wants, and what hysteresis remembers.

    `bound` counts each lane's pods that are on a node, not going, and not on lent GPUs.
    """
    found: dict[LaneKey, Want] = {}
    calm: dict[LaneKey, Calm] = {}
    for model in snapshot.models:
        spare: dict[LaneKey, int] = {}
        lent: dict[LaneKey, int] = {}
        lanes = [
            (snapshot.classes[x.key.qos_class], x) for x in model.lanes if x.key.qos_class in snapshot.classes
        ]
        lanes.sort(key=lambda pair: (-pair[0].priority, pair[0].name))
        demands = {x.key: _wish(snapshot.demand.get(x.key), q, x, model, policy) for q, x in lanes}
        for qos, lane in lanes:
            spare[lane.key] = _shareable(qos, lane, demands[lane.key][0], bound.get(lane.key, 0))
        for place, (qos, lane) in enumerate(lanes):
            need, soak = demands[lane.key]
            below = [x.key for q, x in lanes[place + 1 :] if q.priority < qos.priority]
            carried, before = 0, dict(lent)
            if policy.share_lanes and lane.pinned is None and not model.external:
                carried = _carry(need - lane.replicas, below, spare, lent)
            want, note = _settle(
                lane, model, qos, (need, max(soak, lent.get(lane.key, 0)), carried), policy, memory, now
            )
            if not _fresh(snapshot.demand.get(lane.key)) and lane.pinned is None and not want.fixed:
                keep = max(lane.replicas, lane.min_replicas)
                text = f"no fresh demand figures: {keep} replicas stay as they are"
                want, note = Want(lane, model, qos, keep, keep, keep, reasons.DEMAND_STALE, text), None
            carriers = frozenset(
                k
                for k in below
                if lent.get(k, 0) > before.get(k, 0)
                and snapshot.classes[k.qos_class].reclaim is Reclaim.ALWAYS
            )
            found[lane.key] = replace(want, carriers=carriers)
            if note is not None:
                calm[lane.key] = note
    return found, calm


def _fresh(demand: Demand | None) -> bool:
    return demand is not None and demand.fresh


def _wish(demand: Demand | None, qos: QoSClass, lane: Lane, model: Model, policy: Policy) -> tuple[int, int]:
    """Replicas needed within the lane's bounds, and how many its backlog could use besides."""
    if lane.pinned is not None:
        return lane.pinned, lane.pinned
    if demand is None or not demand.fresh:
        return lane.replicas, lane.replicas
    ability = model.ability or policy.ability
    if lane.slots is not None:
        ability = replace(ability, slots=lane.slots)
    start = start_time_s(model, policy)
    need = replicas_needed(demand, ability, horizon_s(lane.objectives or qos.objectives, start), policy)
    busy = demand.arrival_rps > 0 or demand.queued_requests > 0 or demand.inflight > 0
    whole = max(math.ceil(need - _ROUND_OFF), 1 if busy else 0)
    soak = 0
    if qos.may_borrow and demand.queued_requests > 0:
        # One more replica pays while the backlog, shared among all, outlasts the start.
        soak = int(backlog_s(demand, ability) / start)
    return _within(lane, whole), _within(lane, max(whole, soak))


def _within(lane: Lane, replicas: int) -> int:
    most = replicas if lane.max_replicas is None else min(replicas, lane.max_replicas)
    return max(most, lane.min_replicas)


def start_time_s(model: Model, policy: Policy) -> float:
    """Seconds that a replica of the model takes to start; never zero."""
    return max(policy.start_time_s if model.start_time_s is None else model.start_time_s, 0.1)


def _shareable(qos: QoSClass, lane: Lane, need: int, bound: int) -> int:
    """Replicas of a lane that a higher class of the same model can count on: those that may be given up.

    Of an `AboveMinimum` class only what it does not need itself. Replicas that still start count:
    a new one would be no sooner.
    """
    usable = min(bound, lane.replicas)
    if qos.reclaim is Reclaim.ALWAYS:
        return usable
    if qos.reclaim is Reclaim.ABOVE_MINIMUM:
        return max(0, usable - max(lane.min_replicas, need))
    return 0


def _carry(missing: int, below: list[LaneKey], spare: dict[LaneKey, int], lent: dict[LaneKey, int]) -> int:
    """Cover missing replicas with those of lower lanes of the same model, lowest class first."""
    carried = 0
    for key in reversed(below):
        take = min(max(missing - carried, 0), spare[key])
        if take:
            spare[key] -= take
            lent[key] = lent.get(key, 0) + take
            carried += take
    return carried


def _settle(
    lane: Lane,
    model: Model,
    qos: QoSClass,
    wish: tuple[int, int, int],
    policy: Policy,
    memory: Memory,
    now: float,
) -> tuple[Want, Calm | None]:
    """Turn a wish (need, soak, carried by other lanes) into a target, delaying every shrinking."""
    need, soak, carried = wish
    if model.paused or model.external:
        reason = reasons.PAUSED if model.paused else reasons.EXTERNAL
        text = f"left at {lane.replicas}; demand asks for {need}"
        return Want(lane, model, qos, need, lane.replicas, lane.replicas, reason, text, fixed=True), None
    if lane.pinned is not None:
        text = f"pinned to {lane.pinned} by spec.scaling.replicas"
        return Want(lane, model, qos, need, need, need, reasons.PINNED, text), None
    own = max(need - carried, min(lane.replicas, need), lane.min_replicas)
    wish_now = max(own, soak if qos.may_borrow else 0)
    target, note = _calm(lane, model, wish_now, memory.calm.get(lane.key), policy, now)
    firm = min(own, target) if qos.may_borrow else target
    why = _why(lane, need, carried, target, wish_now)
    return Want(lane, model, qos, need, target, firm, *why), note


def _calm(
    lane: Lane, model: Model, wish: int, note: Calm | None, policy: Policy, now: float
) -> tuple[int, Calm | None]:
    """Up at once; down to the most that was wanted during the whole delay, once it is over.

    The delay is never shorter than a start: what was taken away too early would cost that much.
    """
    if wish >= lane.replicas:
        return wish, None
    start = start_time_s(model, policy)
    delay = max(
        policy.scale_down_delay_s if model.scale_down_delay_s is None else model.scale_down_delay_s, start
    )
    last = delay if model.scale_to_zero_after_s is None else max(model.scale_to_zero_after_s, start)
    if note is None or note.peak >= lane.replicas:
        note = Calm(now, wish)
    since, peak = note.since_s, max(note.peak, wish)
    waited = now - since
    if peak == 0 and waited >= last:
        return 0, None
    if waited < delay or lane.replicas == 1:
        return lane.replicas, Calm(since, peak)
    if peak == 0:
        return 1, Calm(since, 0)
    return peak, None if peak == wish else Calm(now, wish)


def _why(lane: Lane, need: int, carried: int, target: int, wish: int) -> tuple[str, str]:
    if target > wish:
        return (
            reasons.SCALE_DOWN_DELAYED,
            f"demand asks for {wish} of {lane.replicas} replicas; waits until that has sufficed long enough",
        )
    if carried:
        return (
            reasons.SHARES_LANES,
            f"demand asks for {need} replicas; {carried} of lower classes of this model carry the rest",
        )
    if need == lane.max_replicas:
        return reasons.AT_MAXIMUM, f"demand asks for at least maxReplicas, {need}"
    if need == lane.min_replicas:
        return reasons.AT_MINIMUM, f"demand asks for at most minReplicas, {need}"
    return reasons.MEETS_DEMAND, f"demand asks for {need} replicas"
