"""Plans: named cases with their exact reasons."""

from dataclasses import replace

import pytest

from support.plan_world import BACKLOG, CLASSES, POLICY, QUIET, bound, lane, load, model, pool
from tidegate.core import reasons
from tidegate.core.plan import plan
from tidegate.core.plan.types import Calm, Demand, LaneKey, Memory, Snapshot, Weight
from tidegate.core.types import Node, Pod, QoSClass, Reservation

CHAT, S, B = (LaneKey("ns", "a", q) for q in ("interactive", "standard", "batch"))
B2 = LaneKey("ns", "b", "batch")


def seen(pools, models, demand, pods=(), **more):
    return Snapshot(CLASSES, {"p": pools} if pools else {}, tuple(models), tuple(pods), demand, **more)


def planned(snapshot, now=100.0, memory=None, policy=POLICY):
    return plan(snapshot, policy, memory or Memory(), now)


def one(qos="interactive", **more):
    return model("a", lane("a", qos, **more))


WITHIN = pool(reserved={"interactive": 8})
FULL_OF_BATCH = [bound("b", "batch", f"n{i}", n) for i in range(4) for n in range(2)]
BORROWER = model("b", lane("b", "batch", replicas=8))

LANES = {
    "demand raises at once": (WITHIN, one(), load(2.5), 3, reasons.DEMAND_RAISED),
    "a whole number is not rounded up": (WITHIN, one(), load(3.0), 3, reasons.DEMAND_RAISED),
    "floor without demand": (WITHIN, one(min_replicas=2, replicas=2), QUIET, 2, reasons.AT_MINIMUM),
    "maximum": (WITHIN, one(max_replicas=2, replicas=2), load(9), 2, reasons.AT_MAXIMUM),
    "from zero on the first request": (WITHIN, one(), Demand(queued_requests=1), 1, reasons.DEMAND_RAISED),
    "pinned up": (WITHIN, one(pinned=3), QUIET, 3, reasons.DEMAND_RAISED),
    "pinned stays": (WITHIN, one(pinned=3, replicas=3), load(9), 3, reasons.PINNED),
    "pinned down at once": (WITHIN, one(pinned=1, replicas=3), load(9), 1, reasons.PINNED),
    "too large waits": (WITHIN, one(replicas=3), load(1), 3, reasons.SCALE_DOWN_DELAYED),
    "stale keeps": (WITHIN, one(replicas=3), replace(load(1), fresh=False), 3, reasons.DEMAND_STALE),
    "never measured keeps": (WITHIN, one(replicas=3), None, 3, reasons.DEMAND_STALE),
    "stale raises a floor": (WITHIN, one(min_replicas=1), None, 1, reasons.DEMAND_RAISED),
    "batch borrows idle": (WITHIN, one("batch"), BACKLOG, 8, reasons.BORROWS_IDLE),
    "batch without a backlog borrows nothing": (WITHIN, one("batch"), QUIET, 0, reasons.AT_MINIMUM),
    "a short backlog starts one": (
        WITHIN, one("batch"), Demand(queued_requests=1, queued_tokens=10), 1, reasons.BORROWS_IDLE,
    ),
    "in-flight requests hold slots": (WITHIN, one(), Demand(inflight=32), 3, reasons.DEMAND_RAISED),
    "beyond the reservation on unreserved GPUs": (WITHIN, one(), load(6), 6, reasons.DEMAND_RAISED),
    "not on another's reservation": (
        pool(reserved={"interactive": 4, "standard": 8}), one(), load(9), 4, reasons.RESERVED_FOR_OTHERS,
    ),
    "blocks are whole": (pool(gpus=3), one(), load(9), 4, reasons.NO_FREE_BLOCK),
    "no node is large enough": (pool(), one(gpus=8), load(1), 0, reasons.REPLICA_TOO_LARGE),
    "no pool": (None, one(replicas=2), load(9), 2, reasons.POOL_NOT_FOUND),
    "no such class": (WITHIN, one("gold", replicas=2), load(9), 2, reasons.CLASS_NOT_FOUND),
}  # fmt: skip


@pytest.mark.parametrize(("pools", "models", "demand", "replicas", "reason"), LANES.values(), ids=LANES)
def test_one_lane(pools, models, demand, replicas, reason):
    key = models.lanes[0].key
    pods = [bound("a", key.qos_class, f"n{n}") for n in range(models.lanes[0].replicas) if pools and n < 4
            and key.qos_class in CLASSES]  # fmt: skip
    made = planned(seen(pools, [models], {key: demand} if demand else {}, pods))
    assert (made.lanes[key].replicas, made.lanes[key].reason) == (replicas, reason)


HELD = {
    "paused": ({"paused": True}, {}, {}, reasons.PAUSED, 1),
    "external": ({"external": True}, {}, {}, reasons.EXTERNAL, 1),
    "observe": ({}, {"enforce": False}, {}, reasons.OBSERVED, 4),
}


@pytest.mark.parametrize(
    ("of_model", "of_pool", "of_snapshot", "reason", "replicas"), HELD.values(), ids=HELD
)
def test_what_is_not_applied_says_what_it_would_be(of_model, of_pool, of_snapshot, reason, replicas):
    models = replace(one(replicas=1), **of_model)
    made = planned(seen(pool(**of_pool), [models], {CHAT: load(4)}, **of_snapshot))
    got = made.lanes[CHAT]
    assert (got.applied, got.reason, got.wanted, got.replicas) == (False, reason, 4, replicas)
    assert "4" in got.message
    assert not any(d.applied for d in made.decisions)


def test_an_unknown_budget_keeps_everything():
    models = [one(replicas=3), BORROWER]
    memory = Memory(calm={CHAT: Calm(0.0, 1)})
    snapshot = seen(WITHIN, models, {CHAT: QUIET, B2: QUIET}, incomplete="pods: not listed yet")
    made = planned(snapshot, memory=memory)
    assert {k: (p.replicas, p.reason) for k, p in made.lanes.items()} == {
        CHAT: (3, reasons.BUDGET_UNKNOWN), B2: (8, reasons.BUDGET_UNKNOWN),
    }  # fmt: skip
    assert "pods: not listed yet" in made.lanes[CHAT].message
    assert made.memory.calm == memory.calm


def test_a_full_cluster_says_how_many_gpus_are_missing_for_whom():
    nodes = (Node("gpu-node-1", 8), Node("gpu-node-2", 8), Node("gpu-node-3", 8))
    others = [Pod(f"f{i}", f"f{i}", "x", n, 0.0, node=f"gpu-node-{i}") for i, n in ((1, 8), (2, 5), (3, 4))]
    made = planned(seen(replace(pool(), nodes=nodes), [one(gpus=8)], {CHAT: load(2)}, others))
    (short,) = made.unmet
    assert (short.lane, short.replicas, short.gpus, short.reason) == (CHAT, 2, 16, reasons.NO_FREE_BLOCK)
    assert short.message == (
        "2 replicas (16 GPUs) missing: needs 8 GPUs on one node; largest free block is 4 on gpu-node-3"
    )
    assert [(d.kind, d.object, d.reason) for d in made.decisions] == [
        ("blocked", "ns/a", reasons.NO_FREE_BLOCK)
    ]
    assert not planned(seen(replace(pool(), nodes=nodes), [one(gpus=8)], {CHAT: load(2)}, others),
                       memory=made.memory).decisions, "told once"  # fmt: skip


def test_foreign_pods_count_as_used_and_are_never_displaced():
    foreign = [Pod(f"f{i}", f"f{i}", "x", 4, 0.0, node=f"n{i}") for i in range(3)]
    made = planned(seen(pool(), [one()], {CHAT: load(8)}, foreign))
    assert made.lanes[CHAT].replicas == 2


def test_floors_come_first_by_priority_then_reservations():
    small = pool(nodes=1, reserved={"standard": 2})
    models = [model("a", lane("a", "standard", min_replicas=1), lane("a", "interactive", min_replicas=1),
                    lane("a", "batch", min_replicas=1))]  # fmt: skip
    made = planned(seen(small, models, {CHAT: load(2), S: load(2), B: QUIET}))
    assert {k.qos_class: p.replicas for k, p in made.lanes.items()} == {
        "interactive": 1,
        "standard": 1,
        "batch": 0,
    }
    assert made.lanes[CHAT].reason == reasons.NO_FREE_BLOCK


def test_a_claim_raises_the_claimant_and_keeps_the_borrower():
    made = planned(seen(WITHIN, [one(), BORROWER], {CHAT: load(2), B2: BACKLOG}, FULL_OF_BATCH))
    assert (made.lanes[CHAT].replicas, made.lanes[CHAT].reason) == (2, reasons.RECLAIMS)
    assert (made.lanes[B2].replicas, made.lanes[B2].reason) == (8, reasons.BEING_RECLAIMED)
    assert [(d.kind, d.lane) for d in made.decisions] == [("reclaim", CHAT)]


def test_the_floor_of_an_always_class_yields_to_a_reservation_and_not_to_demand_beyond_it():
    floor = model("b", lane("b", "batch", min_replicas=2, replicas=2))
    pods = [bound("b", "batch", "n0", n) for n in range(2)]
    demand = {CHAT: load(2), B2: QUIET}
    claimed = planned(seen(pool(1, reserved={"interactive": 4}), [one(), floor], demand, pods))
    assert (claimed.lanes[CHAT].replicas, claimed.lanes[B2].reason) == (2, reasons.BEING_RECLAIMED)
    beyond = planned(seen(pool(1), [one(), floor], demand, pods))
    assert (beyond.lanes[CHAT].replicas, beyond.lanes[B2].replicas) == (0, 2)


CUT = {
    "victims go, the claimant waits": (1, 8, reasons.BEING_RECLAIMED),
    "the claimant is bound": (2, 6, reasons.RECLAIMED),
}


@pytest.mark.parametrize(("claimants", "replicas", "reason"), CUT.values(), ids=CUT)
def test_the_borrower_is_lowered_when_the_claimant_is_bound(claimants, replicas, reason):
    pods = [replace(p, terminating=True) if claimants == 1 else None for p in FULL_OF_BATCH[:2]]
    pods = [p for p in pods if p] + FULL_OF_BATCH[2:]
    pods += [bound("a", "interactive", "n0", n) for n in range(claimants - (claimants == 1))]
    made = planned(seen(WITHIN, [one(replicas=2), BORROWER], {CHAT: load(2), B2: BACKLOG}, pods))
    assert (made.lanes[B2].replicas, made.lanes[B2].reason) == (replicas, reason)


def test_what_runs_is_never_lowered_for_lack_of_room():
    nodes = tuple(replace(n, gpus=2) for n in WITHIN.nodes)
    made = planned(seen(replace(WITHIN, nodes=nodes), [BORROWER], {B2: BACKLOG}, FULL_OF_BATCH))
    assert made.lanes[B2].replicas == 8


def test_the_youngest_borrowed_pods_that_ran_long_enough_go():
    classes = CLASSES | {"batch": replace(CLASSES["batch"], min_runtime_s=60.0)}
    pods = [bound("b", "batch", "n0", n, started_s=t) for n, t in enumerate((0.0, 90.0))]
    lanes = [one("standard"), model("b", lane("b", "batch", replicas=2))]
    snapshot = Snapshot(classes, {"p": pool(1, reserved={"standard": 4})}, tuple(lanes), tuple(pods),
                        {S: load(2), B2: BACKLOG})  # fmt: skip
    made = planned(snapshot)
    assert made.lanes[S].replicas == 1
    assert "1 borrowed pod has not run for their class's minRuntime yet" in made.unmet[0].message
    later = planned(snapshot, now=200.0)
    assert later.lanes[S].replicas == 2


def test_classes_borrow_only_from_those_above():
    made = planned(seen(pool(reserved={"batch": 8, "standard": 4}), [one("standard")], {S: load(9)}))
    assert made.lanes[S].replicas == 4  # its own 4 GPUs and the 4 that nobody reserved
    above = planned(seen(pool(reserved={"batch": 8, "standard": 4}), [one("batch")], {B: load(9)}))
    assert above.lanes[B].replicas == 8


LIMITS = {
    "maxLend": (Reservation("i", "interactive", 12, max_lend=4), None, 4, reasons.RESERVED_FOR_OTHERS),
    "maxBorrow": (Reservation("b", "batch", 2, max_borrow=4), None, 3, reasons.BORROW_LIMIT),
    "maxReplicas of the model": (Reservation("i", "interactive", 8), 2, 2, reasons.MODEL_MAXIMUM),
}


@pytest.mark.parametrize(("reservation", "most", "replicas", "reason"), LIMITS.values(), ids=LIMITS)
def test_limits(reservation, most, replicas, reason):
    pools = replace(pool(), reservations=(reservation,))
    made = planned(seen(pools, [replace(one("batch"), max_replicas=most)], {B: load(9)}))
    assert made.lanes[B].replicas == replicas
    assert made.unmet[0].reason == reason


def test_a_limit_that_was_lowered_takes_back_what_nobody_else_would():
    pools = replace(pool(), reservations=(Reservation("b", "batch", 0, max_borrow=4),))
    made = planned(seen(pools, [BORROWER], {B2: BACKLOG}, FULL_OF_BATCH))
    assert (made.lanes[B2].replicas, made.lanes[B2].reason) == (2, reasons.BORROW_LIMIT)


def test_reservations_count_the_namespaces_that_they_select():
    r = Reservation("i", "interactive", 16, namespaces=frozenset({"other"}))
    made = planned(seen(replace(pool(), reservations=(r,)), [one()], {CHAT: load(2)}))
    assert (made.lanes[CHAT].replicas, made.unmet[0].reason) == (0, reasons.RESERVED_FOR_OTHERS)


def test_a_reservation_for_whole_nodes_is_not_eaten_in_pieces():
    big = LaneKey("ns", "big", "standard")
    nodes = tuple(Node(f"m{i}", 8) for i in range(3))
    pools = replace(pool(reserved={"standard": 8}), nodes=nodes)
    others = [Pod(f"x{i}", f"x{i}", "x", 5, 0.0, node=f"m{i}") for i in range(2)]
    models = [model("big", lane("big", "standard", gpus=8)), one(gpus=4)]
    made = planned(seen(pools, models, {CHAT: load(1), big: QUIET}, others))
    assert made.lanes[CHAT].replicas == 0, (
        "6 GPUs are unreserved, but 4 on one node only on the last whole one"
    )
    models = [model("big", lane("big", "standard", gpus=2)), one(gpus=4)]
    made = planned(seen(pools, models, {CHAT: load(1), big: QUIET}, others))
    assert made.lanes[CHAT].replicas == 1, "8 GPUs for replicas of 2 are still there"


def test_replicas_of_lower_classes_of_the_model_carry_a_rush_first():
    lanes = model("a", lane("a", "interactive", replicas=1), lane("a", "batch", replicas=3))
    pods = [bound("a", "interactive", "n0"), *(bound("a", "batch", f"n{i}") for i in (1, 2, 3))]
    shared = planned(seen(WITHIN, [lanes], {CHAT: load(3), B: BACKLOG}, pods))
    assert (shared.lanes[CHAT].replicas, shared.lanes[CHAT].wanted, shared.lanes[CHAT].reason) == (
        1, 3, reasons.SHARES_LANES,
    )  # fmt: skip
    quiet = planned(
        seen(WITHIN, [lanes], {CHAT: load(3), B: QUIET}, pods), memory=Memory(calm={B: Calm(0, 0)})
    )
    assert quiet.lanes[B].replicas == 2, "two carry the rush, one is not needed"
    apart = planned(
        seen(WITHIN, [lanes], {CHAT: load(3), B: BACKLOG}, pods), policy=replace(POLICY, share_lanes=False)
    )
    assert apart.lanes[CHAT].replicas == 3


def test_a_full_pool_moves_no_replica_from_one_lane_of_a_model_to_another():
    """They serve the higher class where they are: to move one would cost a start in the middle of a rush."""
    chat = model("a", lane("a", "interactive", replicas=2), lane("a", "batch", replicas=6))
    other = model("b", lane("b", "batch", replicas=0))
    pods = [bound("a", "interactive", "n0", n) for n in range(2)]
    pods += [bound("a", "batch", f"n{1 + n // 2}", n) for n in range(6)]
    demand = {CHAT: load(12), B: BACKLOG, B._replace(model="b"): QUIET}
    full = planned(seen(pool(), [chat, other], demand, pods))
    assert (full.lanes[CHAT].replicas, full.lanes[B].replicas, full.lanes[B].leaving) == (2, 6, ())
    assert [(u.lane, u.replicas) for u in full.unmet] == [(CHAT, 4)], "of twelve six are carried"
    # What another model borrows is still handed over, and no more than that.
    other = model("b", lane("b", "batch", replicas=2))
    mixed = [*pods[:-2], *(bound("b", "batch", "n3", n) for n in range(2))]
    chat = replace(chat, lanes=(chat.lanes[0], replace(chat.lanes[1], replicas=4)))
    found = planned(seen(pool(), [chat, other], demand | {B._replace(model="b"): BACKLOG}, mixed))
    assert found.lanes[B._replace(model="b")].reason == reasons.HANDS_OVER
    assert (found.lanes[B].replicas, found.lanes[B].leaving) == (4, ())


def test_going_down_takes_the_peak_of_the_delay_and_zero_its_own():
    models = one(replicas=5)
    pods = [bound("a", "interactive", f"n{n}") for n in range(4)] + [bound("a", "interactive", "n0", 1)]
    made = planned(seen(WITHIN, [models], {CHAT: load(2)}, pods), now=0.0)
    made = planned(seen(WITHIN, [models], {CHAT: load(3)}, pods), now=5.0, memory=made.memory)
    assert made.memory.calm[CHAT] == Calm(0.0, 3)
    made = planned(seen(WITHIN, [models], {CHAT: load(1)}, pods), now=10.0, memory=made.memory)
    assert (made.lanes[CHAT].replicas, made.lanes[CHAT].reason) == (3, reasons.DEMAND_FELL)
    patient = replace(one(replicas=2), scale_to_zero_after_s=30.0)
    memory = Memory(calm={CHAT: Calm(0.0, 0)})
    assert (
        planned(seen(WITHIN, [patient], {CHAT: QUIET}, pods[:2]), now=20.0, memory=memory)
        .lanes[CHAT]
        .replicas
        == 1
    )
    assert (
        planned(seen(WITHIN, [patient], {CHAT: QUIET}, pods[:2]), now=31.0, memory=memory)
        .lanes[CHAT]
        .replicas
        == 0
    )


def test_a_peak_that_the_lane_is_down_to_already_is_forgotten():
    pods = [bound("a", "interactive", "n0")]
    memory = planned(
        seen(WITHIN, [one(replicas=1)], {CHAT: QUIET}, pods), 5.0, Memory({CHAT: Calm(0, 1)})
    ).memory
    assert memory.calm[CHAT] == Calm(5.0, 0)
    assert (
        planned(seen(WITHIN, [one(replicas=1)], {CHAT: QUIET}, pods), 15.0, memory).lanes[CHAT].replicas == 0
    )


def test_no_delay_is_shorter_than_a_start():
    slow = replace(one(replicas=2), start_time_s=90.0, scale_down_delay_s=1.0)
    memory = Memory(calm={CHAT: Calm(0.0, 1)})
    pods = [bound("a", "interactive", "n0", n) for n in range(2)]
    assert (
        planned(seen(WITHIN, [slow], {CHAT: load(1)}, pods), now=89.0, memory=memory).lanes[CHAT].replicas
        == 2
    )
    assert (
        planned(seen(WITHIN, [slow], {CHAT: load(1)}, pods), now=90.0, memory=memory).lanes[CHAT].replicas
        == 1
    )


def test_a_cordoned_node_keeps_what_it_runs_and_takes_no_more():
    nodes = (Node("n0", 0), Node("n1", 4))
    pods = [bound("a", "interactive", "n0", n) for n in range(2)]
    made = planned(seen(replace(pool(), nodes=nodes), [one(replicas=2)], {CHAT: load(9)}, pods))
    assert made.lanes[CHAT].replicas == 4


WEIGHTS = {
    "own lane alone": ({CHAT: (2, 1.0)}, CHAT, {"interactive": 100}),
    "a lane with nothing ready is left out": ({CHAT: (2, 1.0), B: (0, 0.0)}, CHAT, {"interactive": 100}),
    "a higher class uses all by their size": (
        {CHAT: (1, 1.0), B: (3, 1.0)}, CHAT, {"interactive": 25, "batch": 75},
    ),
    "a lower class keeps off a busy lane": ({CHAT: (4, 4.5), B: (1, 1.0)}, B, {"batch": 100}),
    "a lower class finds room above the headroom": (
        {CHAT: (5, 0.0), B: (5, 0.0)}, B, {"batch": 55, "interactive": 45},
    ),
    "nothing ready at all": ({CHAT: (0, 1.0)}, CHAT, {}),
    "overload falls back to lanes that it may use": ({CHAT: (1, 9.0), B: (1, 9.0)}, B, {"batch": 100}),
    "no room and no lane of its own": ({CHAT: (1, 9.0), B: (0, 9.0)}, B, {}),
}  # fmt: skip


@pytest.mark.parametrize(("lanes", "of", "shares"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights(lanes, of, shares):
    made = model("a", *(lane("a", k.qos_class, ready=n, replicas=n) for k, (n, _) in lanes.items()))
    got = planned(seen(pool(), [made], {k: load(x) for k, (_, x) in lanes.items()})).weights[of]
    assert {w.lane: w.weight for w in got} == shares


def test_weights_stay_through_noise_and_move_with_demand():
    made = model("a", lane("a", "interactive", ready=4, replicas=4), lane("a", "batch", ready=4, replicas=4))
    before = planned(seen(pool(), [made], {CHAT: load(0), B: load(1)}))
    nudged = planned(seen(pool(), [made], {CHAT: load(0.4), B: load(1)}), memory=before.memory)
    assert nudged.weights == before.weights
    moved = planned(seen(pool(), [made], {CHAT: load(7), B: load(1)}), memory=before.memory)
    assert moved.weights[B] == (Weight("batch", 100),)
    assert ("rebalance", reasons.WEIGHTS_CHANGED) in [(d.kind, d.reason) for d in moved.decisions]


def test_memory_survives_json():
    memory = Memory(
        {CHAT: Calm(1.5, 2)}, {CHAT: (Weight("batch", 40), Weight("interactive", 60))}, {B: "NoFreeBlock"}
    )
    assert Memory.from_json(memory.to_json()) == memory
    assert Memory.from_json({}) == Memory()


def test_every_reason_is_one_camel_case_word():
    words = [v for k, v in vars(reasons).items() if k.isupper()]
    assert len(set(words)) == len(words) > 20
    assert all(w.isalnum() and w[0].isupper() for w in words)


def test_two_classes_of_one_priority_do_not_displace_one_another():
    classes = CLASSES | {"bulk": QoSClass("bulk", 0, CLASSES["batch"].reclaim)}
    bulk = LaneKey("ns", "a", "bulk")
    models = (model("a", lane("a", "bulk")), BORROWER)
    made = planned(
        Snapshot(classes, {"p": pool()}, models, tuple(FULL_OF_BATCH), {bulk: BACKLOG, B2: BACKLOG})
    )
    assert (made.lanes[bulk].replicas, made.lanes[B2].replicas) == (0, 8)


SOAKING = [bound("a", "batch", f"n{i}", n) for i in range(4) for n in range(2)]
IN_FLIGHT = {
    "all slots are in use and nothing waits": ({}, Demand(inflight=128), 8),
    "half of them": ({}, Demand(inflight=64), 6),
    "fewer slots hold fewer requests": ({"slots": 8}, Demand(inflight=32), 6),
    "what waits comes to it": ({}, Demand(inflight=64, queued_requests=200, queued_tokens=1e6), 8),
    "nothing is left": ({}, QUIET, 0),
}


@pytest.mark.parametrize(("more", "demand", "replicas"), IN_FLIGHT.values(), ids=IN_FLIGHT)
def test_a_soaking_lane_keeps_what_its_requests_in_flight_need(more, demand, replicas):
    """Lowered further, the slots that remain would not hold what runs."""
    models = [one("batch", replicas=8, max_replicas=8, **more)]
    calm = Memory(calm={B: Calm(0.0, replicas)})
    made = planned(seen(WITHIN, models, {B: demand}, SOAKING), now=1000.0, memory=calm)
    slots = more.get("slots", POLICY.ability.slots)
    assert made.lanes[B].replicas == replicas
    assert made.lanes[B].replicas * slots >= demand.inflight


def test_replicas_on_lent_gpus_carry_nobody_elses_demand():
    """They take no streams, so the lane that people wait for grows by itself."""
    chat = model("a", lane("a", "interactive"), lane("a", "batch", replicas=8, max_replicas=8))
    demand = {CHAT: load(2.0), B: BACKLOG}
    lent = planned(seen(pool(reserved={"interactive": 16}), [chat], demand, SOAKING))
    spare = planned(seen(pool(reserved={"interactive": 8}), [chat], demand, SOAKING))
    assert lent.lanes[CHAT].replicas == 2
    assert spare.lanes[CHAT].replicas == 0
    assert spare.lanes[CHAT].reason == reasons.SHARES_LANES


def test_weights_that_change_for_several_classes_are_told_once_a_model():
    before = {CHAT: (Weight("interactive", 100),), S._replace(model="a"): (Weight("interactive", 100),)}
    lanes = model(
        "a", lane("a", "interactive", replicas=1, ready=1), lane("a", "standard", replicas=1, ready=1)
    )
    snapshot = Snapshot(
        CLASSES, {"p": pool()}, (lanes,), (), {CHAT: load(0.5), S._replace(model="a"): load(0.9)}
    )
    made = plan(snapshot, POLICY, Memory(weights=before), 0.0)
    told = [d for d in made.decisions if d.kind == "rebalance"]
    assert len(told) == 1
    assert "class standard: interactive 100%" in told[0].message


def test_observe_says_once_what_would_be():
    made = planned(seen(pool(enforce=False), [one()], {CHAT: load(1)}))
    (told,) = (d for d in made.decisions if d.kind == "scale")
    assert not told.applied
    assert "would" not in told.message  # who tells it puts "would:" before it
    assert "mode Observe" in told.message
