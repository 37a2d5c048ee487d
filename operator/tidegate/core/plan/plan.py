"""`plan`: from what is, to how many replicas each lane gets and which lane serves whom.

Who gives GPUs. Preemption serves reservations only; GPUs that nobody reserved change hands by the
plan: the borrower's lane is lowered (its pods are drained, see `drain`), and the lane above is raised
once the place is free.

Who reclaims. A lane that wants lent GPUs back is raised; kube-scheduler and the extender evict the
borrower's pods; nobody else deletes them. The plan is made from what is seen, so a restart in the
middle changes nothing. For a borrower B that runs b pods, asks for R, and has a place for G < R:

    claimant C       B's pods                plan for B  why
    ---------------  ----------------------  ----------  -----------------------------------------
    raised, unbound  b = R, all run          R           the scheduler chooses and evicts; lowering
                                                         here would delete a second pod
    unbound          b < R, some are going,  R           not lowered before C has what it wanted: if
                     replacements pend                   C goes away, B loses nothing
    bound            b = G, the rest pend    G           what pends would take the GPUs again as soon
                                                         as C lets go of them for a moment
    bound            b > G                   b           only the scheduler takes what runs
    gone             b < R, free blocks      up to R     B's pods that pend find the GPUs idle
    without a claim  b = R, h of them asked  R − h       nobody evicts for C: B hands h pods over, and
                                                         C is raised when they have gone

A lane whose own demand fell is lowered by the plan: it gives up its own pods.
"""

from collections import defaultdict
from collections.abc import Mapping

from tidegate.core import reasons
from tidegate.core.plan.allocate import Allocation, Share, allocate
from tidegate.core.plan.scale import Want, wants
from tidegate.core.plan.types import (
    Calm,
    Decision,
    DecisionKind,
    LaneKey,
    LanePlan,
    Memory,
    Plan,
    Policy,
    Snapshot,
    Unmet,
    Weight,
)
from tidegate.core.plan.weights import weights
from tidegate.core.quota import Ground, Standing, standings
from tidegate.core.types import Pod

_OWN_LIMITS = (reasons.MODEL_MAXIMUM, reasons.BORROW_LIMIT)
"""Refusals after which the lane gives up its own pods: nobody claims them."""


def plan(snapshot: Snapshot, policy: Policy, memory: Memory, now: float) -> Plan:
    """Decide replicas and weights.

    Pure: the same arguments give the same plan, whatever their order. What cannot be computed is
    left as it is, with the reason; nothing is taken away because a fact is missing.

    Args:
        snapshot: what is.
        policy: how to behave where the objects say nothing.
        memory: of the plan before; an empty one after a restart.
        now: Unix seconds.
    """
    pods = _pods_by_pool(snapshot)
    bound = {key: n for by_lane in pods.values() for key, n in by_lane[1].items()}
    asked, calm = wants(snapshot, policy, memory, now, bound)
    asked = {key: want for key, want in asked.items() if want.model.pool in snapshot.pools}
    result = _Result(snapshot, memory)
    if snapshot.incomplete:
        result.hold_all(snapshot.incomplete)
    else:
        result.hold_unknown(asked)
        for name in sorted(snapshot.pools):
            mine = [w for w in asked.values() if w.model.pool == name]
            if mine:
                pool = snapshot.pools[name]
                result.lay(name, allocate(pool, mine, pods[name][0], snapshot.classes, now))
    shares = _weights(snapshot, policy, memory)
    result.tell_weights(shares)
    remembered = memory.calm if snapshot.incomplete else calm
    return result.plan(shares, remembered)


def _pods_by_pool(snapshot: Snapshot) -> dict[str, tuple[list[Pod], dict[LaneKey, int]]]:
    """For each pool: bound pods on its nodes or of its lanes, and how many of each lane may be shared.

    Those on lent GPUs may not: they take no streamed requests (docs/concepts/placement.md).
    """
    pool_of_node: defaultdict[str, list[str]] = defaultdict(list)
    for pool in snapshot.pools.values():
        for node in pool.nodes:
            pool_of_node[node.name].append(pool.name)
    pool_of_lane = {lane.key: m.pool for m in snapshot.models for lane in m.lanes}
    found: defaultdict[str, tuple[list[Pod], dict[LaneKey, int]]] = defaultdict(lambda: ([], {}))
    for pod in snapshot.pods:
        if pod.node is None:
            continue
        home = pool_of_lane.get(pod.lane)  # type: ignore[call-overload]
        for name in {*pool_of_node.get(pod.node, ()), *((home,) if home else ())}:
            found[name][0].append(pod)
    for name, (pods, shared) in found.items():
        stands: dict[str, Standing] = {}
        if name in snapshot.pools:
            home_pool = snapshot.pools[name]
            stands = standings(pods, home_pool.reservations, snapshot.classes, home_pool.capacity)
        for pod in pods:
            stays = not (pod.terminating or pod.draining)
            lent = pod.uid in stands and stands[pod.uid].ground is Ground.LENT
            if stays and not lent and pool_of_lane.get(pod.lane) == name:  # type: ignore[call-overload]
                key = LaneKey(*pod.lane)  # type: ignore[arg-type]
                shared[key] = shared.get(key, 0) + 1
    return found


def _weights(snapshot: Snapshot, policy: Policy, memory: Memory) -> dict[LaneKey, tuple[Weight, ...]]:
    found: dict[LaneKey, tuple[Weight, ...]] = {}
    for model in snapshot.models:
        found |= weights(model, snapshot.classes, snapshot.demand, memory.weights, policy)
    return found


class _Result:
    """Collects what is said of every lane."""

    def __init__(self, snapshot: Snapshot, memory: Memory) -> None:
        self._snapshot, self._memory = snapshot, memory
        self._lanes: dict[LaneKey, LanePlan] = {}
        self._decisions: list[Decision] = []
        self._unmet: list[Unmet] = []

    def plan(self, shares: Mapping[LaneKey, tuple[Weight, ...]], calm: Mapping[LaneKey, Calm]) -> Plan:
        """The whole, in a stable order."""
        blocked = {u.lane: u.reason for u in self._unmet}
        return Plan(
            lanes=dict(sorted(self._lanes.items())),
            weights=dict(sorted(shares.items())),
            decisions=tuple(sorted(self._decisions, key=lambda d: (d.lane, d.kind))),
            unmet=tuple(sorted(self._unmet, key=lambda u: u.lane)),
            memory=Memory(calm=dict(calm), weights=dict(shares), blocked=blocked),
        )

    def hold_all(self, why: str) -> None:
        """Keep every lane as it is."""
        for model in self._snapshot.models:
            for lane in model.lanes:
                text = f"{lane.replicas} replicas stay as they are: {why}"
                self._lanes[lane.key] = LanePlan(lane.replicas, lane.replicas, reasons.BUDGET_UNKNOWN, text)

    def hold_unknown(self, known: Mapping[LaneKey, Want]) -> None:
        """Keep lanes whose pool or class does not exist."""
        for model in self._snapshot.models:
            for lane in model.lanes:
                if lane.key in known:
                    continue
                if lane.key.qos_class not in self._snapshot.classes:
                    reason, what = reasons.CLASS_NOT_FOUND, f"QoSClass {lane.key.qos_class}"
                else:
                    reason, what = reasons.POOL_NOT_FOUND, f"GPUPool {model.pool or '(none given)'}"
                text = f"{lane.replicas} replicas stay as they are: {what} does not exist"
                self._lanes[lane.key] = LanePlan(lane.replicas, lane.replicas, reason, text)

    def lay(self, pool: str, allocation: Allocation) -> None:
        """Say for every lane of a pool how many replicas it gets, and why."""
        enforce = self._snapshot.pools[pool].enforce
        waiting = _highest_waiting(allocation)
        for key, share in allocation.shares.items():
            lane_plan, kind = _decide(share, waiting, enforce)
            self._lanes[key] = lane_plan
            if lane_plan.replicas != share.want.lane.replicas:
                text = f"{share.want.lane.replicas} → {lane_plan.replicas} replicas: {lane_plan.message}"
                self._tell(key, pool, kind, lane_plan.reason, text, lane_plan.applied)
            self._short(key, pool, share, lane_plan.applied)

    def _short(self, key: LaneKey, pool: str, share: Share, applied: bool) -> None:
        missing = share.want.firm - share.granted
        if share.want.fixed or missing <= 0 or share.refusal is None:
            return
        reason, text = share.refusal
        gpus = missing * share.want.lane.gpus
        replicas = "1 replica" if missing == 1 else f"{missing} replicas"
        message = f"{replicas} ({gpus} GPUs) missing: {text}"
        self._unmet.append(Unmet(key, pool, missing, gpus, reason, message))
        if reason != reasons.WAITS_FOR_GPUS and self._memory.blocked.get(key) != reason:
            self._tell(key, pool, "blocked", reason, message, applied)

    def tell_weights(self, shares: Mapping[LaneKey, tuple[Weight, ...]]) -> None:
        """Report shares that changed, once a model; the first ones ever are no change."""
        told: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        for key, now in sorted(shares.items()):
            before = self._memory.weights.get(key)
            if before is not None and before != now:
                text = f"class {key.qos_class}: {_shown(before)} → {_shown(now)}"
                told[key.namespace, key.model].append(text)
        for model in self._snapshot.models:
            if texts := told.get((model.namespace, model.name)):
                key = min(lane.key for lane in model.lanes)
                pool = self._snapshot.pools.get(model.pool)
                applied = not model.paused and (pool is None or pool.enforce)
                name = f"{model.namespace}/{model.name}"
                text, reason = "; ".join(texts), reasons.WEIGHTS_CHANGED
                self._decisions.append(Decision("rebalance", name, reason, text, key, model.pool, applied))

    def _tell(
        self, key: LaneKey, pool: str, kind: DecisionKind, reason: str, message: str, applied: bool
    ) -> None:
        text = f"class {key.qos_class}: {message}"
        name = f"{key.namespace}/{key.model}"
        self._decisions.append(Decision(kind, name, reason, text, key, pool, applied))


def _shown(shares: tuple[Weight, ...]) -> str:
    return ", ".join(f"{w.lane} {w.weight}%" for w in shares) or "no lane"


def _highest_waiting(allocation: Allocation) -> int:
    """Priority of the highest class with replicas that have a place and are not bound yet; −1 for none."""
    found = -1
    for share in allocation.shares.values():
        if not share.want.fixed and share.granted > share.bound:
            found = max(found, share.want.qos.priority)
    return found


def _decide(share: Share, waiting: int, enforce: bool) -> tuple[LanePlan, DecisionKind]:
    """Replicas of one lane with the reason, and the kind of change it is if it is one."""
    want, now = share.want, share.want.lane.replicas
    if want.fixed:
        return LanePlan(now, want.need, want.reason, want.message, applied=False), "scale"
    replicas, (reason, text), kind = _replicas(share, waiting)
    if not enforce:
        text = f"{text} (the pool is in mode Observe)"
        return LanePlan(replicas, want.need, reasons.OBSERVED, text, applied=False), kind
    return LanePlan(replicas, want.need, reason, text, leaving=tuple(sorted(share.handed))), kind


def _replicas(share: Share, waiting: int) -> tuple[int, tuple[str, str], DecisionKind]:
    """The state table of this module."""
    want, now, got = share.want, share.want.lane.replicas, share.granted
    if share.handed:
        return _handed_over(share)
    if got >= now:
        return _raised(share)
    refusal = share.refusal or (reasons.NO_FREE_BLOCK, "no free block of GPUs")
    if want.target <= got:
        held = want.reason in (reasons.PINNED, reasons.DEMAND_STALE)
        why = (want.reason if held else reasons.DEMAND_FELL, want.message)
        return got, why, "scale"
    if refusal[0] in _OWN_LIMITS:
        return got, refusal, "scale"
    return _cut(share, waiting, refusal)


def _handed_over(share: Share) -> tuple[int, tuple[str, str], DecisionKind]:
    """A lane is lowered to what runs without the pods that it hands over; what pends would take them back."""
    want, gone = share.want, len(share.handed)
    kept = max(share.granted, min(want.lane.replicas, want.target, share.bound - gone))
    replicas = "1 replica is" if gone == 1 else f"{gone} replicas are"
    text = f"{replicas} handed over to higher classes, on GPUs that nobody reserved"
    return kept, (reasons.HANDS_OVER, text), "reclaim"


def _cut(share: Share, waiting: int, refusal: tuple[str, str]) -> tuple[int, tuple[str, str], DecisionKind]:
    """What a lane is told that wants what it has, and has a place for less."""
    want, now = share.want, share.want.lane.replicas
    if share.displaced or waiting > want.qos.priority:
        kept = min(now, want.target)
        given = share.displaced or kept - share.granted
        text = f"{given} of {kept} replicas stand on GPUs that a higher class asks back"
        return kept, (reasons.BEING_RECLAIMED, text), "reclaim"
    kept = max(share.granted, min(share.bound, want.target))
    if not want.qos.may_borrow:
        return kept, refusal, "scale"
    return kept, (reasons.RECLAIMED, f"the GPUs of the others went back; {refusal[1]}"), "reclaim"


def _raised(share: Share) -> tuple[int, tuple[str, str], DecisionKind]:
    """What a lane that does not shrink is told."""
    want, got = share.want, share.granted
    up = got - want.lane.replicas
    if share.displacing:
        text = f"{want.message}; {share.displacing} replicas on GPUs that are lent out and asked back"
        return got, (reasons.RECLAIMS, text), "reclaim"
    if up and share.borrowing:
        gpus = share.borrowing * want.lane.gpus
        text = f"{want.message}; {gpus} GPUs outside of its reservations, to be given back when asked"
        return got, (reasons.BORROWS_IDLE, text), "borrow"
    if got < want.firm and share.refusal:
        return got, share.refusal, "scale"
    if up:
        return got, (reasons.DEMAND_RAISED, want.message), "scale"
    if share.borrowing and got > want.firm:
        return got, (reasons.BORROWS_IDLE, f"{want.message}; the rest soaks up idle GPUs"), "scale"
    return got, (want.reason, want.message), "scale"
