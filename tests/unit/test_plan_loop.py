"""Plans applied again and again, with a scheduler that preempts: does it converge and stay calm?"""

from dataclasses import replace
from itertools import pairwise

import pytest

from support.plan_world import BACKLOG, QUIET, World, lane, load, model, pool
from tidegate.core import reasons
from tidegate.core.plan.types import LaneKey

CHAT = LaneKey("ns", "a", "interactive")
B = LaneKey("ns", "b", "batch")


def world(**more):
    return World(
        pool(reserved={"interactive": 8, "standard": 4}),
        (model("a", lane("a", "interactive", min_replicas=1)), model("b", lane("b", "batch"))),
        {CHAT: load(0.5), B: BACKLOG},
        **more,
    )


def changes(history, key):
    values = [step[key] for step in history]
    return sum(a != b for a, b in pairwise(values))


def test_borrow_rush_reclaim_give_back():
    w = world()
    w.run(5)
    assert (w.running("a", "interactive"), w.running("b", "batch")) == (1, 7)
    w.demand[CHAT] = load(4)
    w.run(10)
    assert (w.running("a", "interactive"), w.running("b", "batch")) == (4, 4)
    assert (w.pending(), w.preempted) == ([], 3), "each evicted once, none waits to steal the GPUs back"
    w.demand[CHAT] = load(0.5)
    w.run(20)
    assert (w.running("a", "interactive"), w.running("b", "batch")) == (1, 7)
    assert w.pending() == []
    assert [d.kind for d in w.decisions if d.kind != "rebalance"] == [
        "scale", "borrow",  # at the start
        "reclaim", "reclaim",  # the claim, and the borrower once it is met
        "scale", "borrow",  # the rush is over
    ]  # fmt: skip
    assert changes(w.history, CHAT) == 2
    assert changes(w.history, B) == 2


WAVES = {
    "faster than the delay: raised once, never lowered": (6, 1, 1),
    "slower: once up and once down a period": (40, 6, 6),
}


@pytest.mark.parametrize(("half", "most_interactive", "most_batch"), WAVES.values(), ids=WAVES)
def test_a_square_wave_makes_no_oscillation(half, most_interactive, most_batch):
    w = world()
    w.run(5)
    for period in range(6):
        w.demand[CHAT] = load(4) if period % 2 == 0 else load(0.5)
        w.run(half)
    assert changes(w.history, CHAT) <= most_interactive
    assert changes(w.history, B) <= most_batch
    assert w.pending() == []


def test_losing_the_memory_takes_nothing_away():
    w = world(forget=True)
    w.demand[CHAT] = load(4)
    w.run(15)
    w.demand[CHAT] = load(0.5)
    w.run(60)
    assert w.running("a", "interactive") == 4
    w.forget = False
    w.run(20)
    assert (w.running("a", "interactive"), w.running("b", "batch")) == (1, 7)


@pytest.mark.parametrize("at", range(12))
def test_a_restart_at_any_step_of_a_reclaim_ends_the_same(at):
    w = world()
    w.run(5)
    w.demand[CHAT] = load(4)
    for step in range(14):
        w.forget = step == at
        w.step()
    assert (w.running("a", "interactive"), w.running("b", "batch")) == (4, 4)
    assert (w.pending(), w.preempted) == ([], 3)


def test_a_rush_that_ends_before_the_victims_are_gone_costs_only_those():
    w = world(drain_s=6.0)
    w.run(5)
    w.demand[CHAT] = load(4)
    w.run(2)
    w.demand[CHAT] = load(0.5)
    w.run(30)
    assert (w.running("a", "interactive"), w.running("b", "batch")) == (1, 7)
    assert w.pending() == []
    assert w.preempted == 3


def test_a_backlog_that_ends_gives_the_gpus_back():
    w = world()
    w.run(5)
    w.demand[B] = QUIET
    w.run(15)
    assert w.running("b", "batch") == 0


def test_two_models_batch_lanes_share_idle_gpus_and_do_not_trade_them():
    w = World(
        pool(), (model("a", lane("a", "batch")), model("b", lane("b", "batch"))),
        {LaneKey("ns", "a", "batch"): BACKLOG, B: BACKLOG},
    )  # fmt: skip
    w.run(10)
    assert (w.running("a", "batch"), w.running("b", "batch")) == (4, 4)
    assert w.preempted == 0
    w.run(30)
    assert changes(w.history, B) == 0


def test_a_rush_uses_the_models_own_batch_replicas_and_moves_no_pod():
    b = LaneKey("ns", "a", "batch")
    lanes = (lane("a", "interactive", min_replicas=1), lane("a", "batch"))
    w = World(pool(reserved={"interactive": 8}), (model("a", *lanes),), {CHAT: load(0.5), b: BACKLOG})
    w.run(8)
    w.demand[CHAT] = load(4)
    w.run(30)
    assert (w.running("a", "interactive"), w.running("a", "batch"), w.preempted) == (1, 7, 0)
    w.demand[b] = QUIET
    w.run(30)
    assert w.running("a", "interactive") + w.running("a", "batch") >= 4, "the carriers stay"


def pinned(w, **replicas):
    """Pin lanes by `model_class`, as `spec.scaling.replicas` does."""
    w.models = tuple(
        replace(m, lanes=tuple(
            replace(x, pinned=replicas.get(f"{m.name}_{x.key.qos_class}", x.pinned)) for x in m.lanes
        ))
        for m in w.models
    )  # fmt: skip


def both(name, **standard):
    return lane(name, "standard", **standard), lane(name, "batch")


def test_pins_beyond_a_reservation_are_served_by_the_plan_and_nobody_waits_in_vain():
    w = World(
        pool(reserved={"interactive": 8, "standard": 4}),
        (
            model("chat", lane("chat", "interactive", min_replicas=1), *both("chat")),
            model("code", lane("code", "interactive"), *both("code", min_replicas=1)),
            model("triton", lane("triton", "standard", gpus=1)),
        ),
        {
            LaneKey("ns", m, c): QUIET
            for m in ("chat", "code", "triton") for c in ("interactive", "standard", "batch")
        } | {LaneKey("ns", "code", "batch"): BACKLOG},
    )  # fmt: skip
    w.run(10)
    assert w.running("code", "batch") >= 5
    pinned(w, chat_interactive=4, chat_standard=2, code_interactive=4)
    last = w.run(30)
    assert w.pending() == []
    # 8 reserved GPUs and the 4 that nobody reserved, in replicas of 2.
    assert w.running("chat", "interactive") + w.running("code", "interactive") == 6
    assert w.running("code", "batch") == 0
    short = [u for u in last.unmet if u.lane.qos_class == "interactive"]
    assert sum(u.replicas for u in short) == 2
    assert {u.reason for u in short} == {reasons.NO_FREE_BLOCK}
    assert len({tuple(sorted(step.items())) for step in w.history[-10:]}) == 1
    assert w.preempted <= 5, "only what the reservations asked back"


def test_what_nobody_reserved_changes_hands_by_lowering_and_is_raised_only_once_free():
    w = World(
        pool(1), (model("a", lane("a", "interactive")), model("b", lane("b", "batch"))),
        {CHAT: QUIET, B: BACKLOG}, drain_s=3.0,
    )  # fmt: skip
    w.run(5)
    assert w.running("b", "batch") == 2
    w.demand[CHAT] = load(1)
    first = w.step()
    assert (first.lanes[B].replicas, first.lanes[B].reason) == (1, reasons.HANDS_OVER)
    assert (first.lanes[CHAT].replicas, first.unmet[0].reason) == (0, reasons.WAITS_FOR_GPUS)
    assert len(first.lanes[B].leaving) == 1
    for _ in range(8):
        w.step()
        assert w.pending() == []
    assert (w.running("a", "interactive"), w.running("b", "batch"), w.preempted) == (1, 1, 0)
    w.demand[CHAT] = QUIET
    w.run(20)
    assert (w.running("b", "batch"), w.pending()) == (2, [])


def test_the_replicas_that_stand_in_the_way_of_a_whole_block_go():
    """Two single GPUs on one node are handed over, not any two of the lane."""
    w = World(
        pool(3, 2), (model("a", lane("a", "interactive", gpus=2)), model("b", lane("b", "batch", gpus=1))),
        {CHAT: QUIET, B: BACKLOG},
    )  # fmt: skip
    w.run(5)
    w.demand[CHAT] = load(1)
    w.run(12)
    assert (w.running("a", "interactive"), w.running("b", "batch"), w.preempted) == (1, 4, 0)
    assert w.pending() == []
