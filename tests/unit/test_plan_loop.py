"""Plans applied again and again, with a scheduler that preempts: does it converge and stay calm?"""

from itertools import pairwise

import pytest

from support.plan_world import BACKLOG, QUIET, World, lane, load, model, pool
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
