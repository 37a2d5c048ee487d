"""Placement, case by case."""

from dataclasses import replace

import pytest

from tidegate.core import reasons
from tidegate.core.place import Grant, View, blocks, feasible, shortfalls, victims
from tidegate.core.place.cover import Need
from tidegate.core.types import Node, Pod, Pool, QoSClass, Reclaim, Reservation

CLASSES = {
    "gold": QoSClass("gold", 1000),
    "mid": QoSClass("mid", 500, Reclaim.ABOVE_MINIMUM, min_runtime_s=60),
    "silver": QoSClass("silver", 400),
    "bulk": QoSClass("bulk", 0, Reclaim.ALWAYS, min_runtime_s=120),
}


def pod(name: str, qos: str | None, gpus: int = 1, node: str | None = None, **more: object) -> Pod:
    base = Pod(
        f"uid-{name}",
        name,
        "ns",
        gpus,
        created_s=more.pop("created", 0.0),  # type: ignore[arg-type]
        qos_class=qos,
        model="m",
        node=node,
        started_s=0.0 if node else None,
        priority=CLASSES[qos].priority if qos else 0,
    )
    return replace(base, **more)  # type: ignore[arg-type]


def view(
    nodes: dict[str, int],
    reservations: list[Reservation],
    pods: list[Pod] | None = None,
    sizes: dict[str, list[int]] | None = None,
    enforce: bool = True,
) -> View:
    pool = Pool("p", tuple(Node(n, g) for n, g in nodes.items()), tuple(reservations), enforce=enforce)
    return View.build(pool, CLASSES, pods or [], sizes)


CHAT = Reservation("chat", "gold", 4)


@pytest.mark.parametrize(
    ("gpus", "sizes", "expected"),
    [
        (8, [2], ((2, 4),)),
        (7, [2], ((2, 3),)),  # the last GPU fits no replica
        (7, [4, 1], ((4, 1), (1, 3))),
        (3, [], ((1, 3),)),
        (0, [2], ()),
    ],
)
def test_blocks(gpus: int, sizes: list[int], expected: tuple[tuple[int, int], ...]) -> None:
    assert blocks(gpus, sizes) == expected


@pytest.mark.parametrize(
    ("shapes", "needs", "expected"),
    [
        pytest.param({(1, ()): 8}, [Need("r", 9, ((8, 1),))], {"r": 8}, id="eight single GPUs are no block"),
        pytest.param({(8, ()): 1}, [Need("r", 9, ((8, 1),))], {}, id="one whole node"),
        pytest.param({(0, ((5, 2),)): 1}, [Need("r", 9, ((2, 1),))], {}, id="lower classes give back"),
        pytest.param({(0, ((9, 2),)): 1}, [Need("r", 9, ((2, 1),))], {"r": 2}, id="equals do not"),
        pytest.param(
            {(1, ((5, 1),)): 1},
            [Need("low", 3, ((1, 1),)), Need("high", 9, ((1, 1),))],
            {},
            id="the higher leaves what is open to the lower, which cannot reclaim",
        ),
        pytest.param(
            {(2, ()): 1},
            [Need("low", 3, ((2, 1),)), Need("high", 9, ((2, 1),))],
            {"low": 2},
            id="the higher goes first",
        ),
    ],
)
def test_shortfalls(
    shapes: dict[tuple[int, tuple[tuple[int, int], ...]], int], needs: list[Need], expected: dict[str, int]
) -> None:
    assert shortfalls(shapes, needs) == expected


FILTER = {
    "batch borrows reserved idle GPUs": (
        view({"a": 4}, [CHAT]), pod("x", "bulk"), ("a",), None,
    ),
    "a class never reclaimed does not": (
        view({"a": 4}, [CHAT]), pod("x", "silver"), (), reasons.RESERVED_FOR_OTHERS,
    ),
    "it may stand on unreserved GPUs": (
        view({"a": 4, "b": 1}, [CHAT], sizes={"chat": [4]}), pod("x", "silver"), ("b",), None,
    ),
    "it may count on GPUs that batch gives back": (
        view({"a": 4, "b": 4}, [CHAT], [pod(f"b{i}", "bulk", node="b") for i in range(4)]),
        pod("x", "silver"), ("a",), None,
    ),
    "but not on blocks that are broken": (
        view({"a": 2, "b": 2}, [Reservation("chat", "gold", 2)], sizes={"chat": [2]}, pods=[
            pod("s", "silver", node="a")]),
        pod("x", "silver", created=1.0), ("a",), None,
    ),
    "nobody borrows from below": (
        view({"a": 4}, [Reservation("b", "bulk", 4)]), pod("x", "mid"), (), reasons.RESERVED_FOR_OTHERS,
    ),
    "maxLend keeps GPUs open": (
        view({"a": 4}, [Reservation("chat", "gold", 4, max_lend=1)], [pod("b", "bulk", node="a")]),
        pod("x", "bulk", created=1.0), (), reasons.RESERVED_FOR_OTHERS,
    ),
    "maxBorrow bounds": (
        view({"a": 4}, [CHAT, Reservation("b", "bulk", 0, max_borrow=1)], [pod("b", "bulk", node="a")]),
        pod("x", "bulk", created=1.0), (), reasons.BORROW_LIMIT,
    ),
    "the owner takes its own": (
        view({"a": 4}, [CHAT]), pod("x", "gold", 4), ("a",), None,
    ),
    "the owner comes before what maxLend keeps": (
        view({"a": 2}, [Reservation("chat", "gold", 1, max_lend=0), Reservation("s", "silver", 1)],
             [pod("b", "bulk", node="a")]),
        pod("x", "silver"), ("a",), None,
    ),
    "when the pool is short the higher class goes first": (
        view({"a": 4}, [CHAT, Reservation("s", "silver", 4)]), pod("x", "silver"), (),
        reasons.RESERVED_FOR_OTHERS,
    ),
    "and it is not held up by the lower": (
        view({"a": 4}, [CHAT, Reservation("s", "silver", 4)]), pod("x", "gold"), ("a",), None,
    ),
    "a foreign pod passes": (view({"a": 4}, [CHAT]), pod("x", None), ("a",), None),
    "an observing pool blocks nothing": (
        view({"a": 4}, [CHAT], enforce=False), pod("x", "silver"), ("a",), None,
    ),
    "a node outside the pool is none": (
        view({"a": 4}, []), pod("x", "gold"), (), reasons.POOL_NOT_FOUND,
    ),
    "what is held already is not free": (
        view({"a": 4}, [CHAT], [pod("g", "gold", 4, node="a")]), pod("x", "gold"), (), reasons.NO_FREE_BLOCK,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FILTER)
def test_filter(case: str) -> None:
    seen, asked, expected, reason = FILTER[case]
    candidates = ["elsewhere"] if reason == reasons.POOL_NOT_FOUND else list(seen.nodes)
    answer = feasible(asked, seen, candidates, 1000.0)
    assert answer.nodes == expected
    if reason:
        assert {w.reason for w in (answer.failed | answer.unresolvable).values()} == {reason}


def test_a_refusal_names_class_and_figures() -> None:
    answer = feasible(pod("x", "silver", 2), view({"a": 4}, [CHAT]), ["a"], 0.0)
    assert answer.failed["a"].message == (
        "class silver asks for 2 GPUs, but class gold has 4 GPUs reserved (chat), 4 of them not in use yet,"
        " and 2 could not be given back to it"
    )
    full = view({"a": 4}, [CHAT], [pod("g", "gold", 3, node="a")])
    assert feasible(pod("x", "gold", 2), full, ["a"], 0.0).failed["a"].message == (
        "1 of the node's 4 GPUs are open; gold asks for 2"
    )


def test_rank_packs_and_keeps_replicas_apart_where_it_costs_nothing() -> None:
    seen = view(
        {"empty": 4, "fuller": 4, "mate": 4, "other": 4},
        [],
        [
            pod("f", None, 3, node="fuller"),
            pod("m", "gold", 2, node="mate"),
            pod("o", None, 2, node="other"),
        ],
    )
    answer = feasible(pod("x", "gold"), seen, list(seen.nodes), 0.0)
    assert answer.nodes == ("fuller", "other", "mate", "empty")
    assert feasible(pod("x", "gold"), seen, list(seen.nodes), 0.0, limit=1).nodes == ("fuller",)
    assert feasible(pod("x", "gold"), seen, list(seen.nodes), 0.0, avoid={"fuller"}).nodes[0] == "other"


FULL = [pod(f"b{i}", "bulk", node="a", started_s=float(i)) for i in range(4)]
PREEMPT = {
    "the owner asks back, as proposed": (
        view({"a": 4}, [CHAT], FULL), pod("x", "gold", 2), {"a": ["uid-b2", "uid-b3"]},
        {"a": ("uid-b2", "uid-b3")}, reasons.RECLAIMS,
    ),
    "fewest pods, then youngest, then name": (
        view({"a": 4, "b": 4, "c": 4}, [CHAT], [
            *FULL, pod("c", "bulk", 4, node="b", started_s=5.0),
            pod("d", "bulk", 4, node="c", started_s=9.0)]),
        pod("x", "gold", 2), {"a": ["uid-b2", "uid-b3"], "b": ["uid-c"], "c": ["uid-d"]},
        {"c": ("uid-d",)}, reasons.RECLAIMS,
    ),
    "no claim without a reservation": (
        view({"a": 4}, [], FULL), pod("x", "gold"), {"a": ["uid-b3"]}, {}, reasons.NO_CLAIM,
    ),
    "no claim beyond it": (
        view({"a": 8}, [CHAT], [*FULL, pod("g", "gold", 4, node="a")]), pod("x", "gold", created=9.0),
        {"a": ["uid-b3"]}, {}, reasons.NO_CLAIM,
    ),
    "no claim beyond it for an older pod either": (
        view({"a": 8}, [CHAT], [*FULL, pod("g", "gold", 4, node="a", created=5.0)]), pod("x", "gold"),
        {"a": ["uid-b3"]}, {}, reasons.NO_CLAIM,
    ),
    "lent before spare, though more of them and longer running": (
        view({"a": 2, "b": 2}, [Reservation("chat", "gold", 2)], [
            pod("old", "bulk", 2, node="a", created=1.0, started_s=9.0),
            pod("l1", "bulk", node="b", created=2.0), pod("l2", "bulk", node="b", created=3.0)]),
        pod("x", "gold", 2), {"a": ["uid-old"], "b": ["uid-l1", "uid-l2"]},
        {"b": ("uid-l1", "uid-l2")}, reasons.RECLAIMS,
    ),
    "lent before spare on one node, whatever is proposed": (
        view({"a": 2}, [Reservation("chat", "gold", 1)], [
            pod("old", "bulk", node="a", created=1.0, started_s=9.0),
            pod("young", "bulk", node="a", created=2.0)]),
        pod("x", "gold"), {"a": ["uid-old"]}, {"a": ("uid-young",)}, reasons.RECLAIMS,
    ),
    "a spare one where lent ones are too small": (
        view({"a": 3, "b": 1}, [Reservation("chat", "gold", 2)], [
            pod("s1", "bulk", node="a", created=1.0), pod("s2", "bulk", node="a", created=2.0, started_s=9.0),
            pod("l1", "bulk", node="a", created=3.0), pod("l2", "bulk", node="b", created=4.0)]),
        pod("x", "gold", 2), {"a": ["uid-s1", "uid-s2"]}, {"a": ("uid-l1", "uid-s2")}, reasons.RECLAIMS,
    ),
    "what is not borrowed stays": (
        view({"a": 4}, [CHAT, Reservation("b", "bulk", 4)], FULL), pod("x", "gold"), {"a": ["uid-b3"]}, {},
        reasons.NOTHING_RECLAIMABLE,
    ),
    "foreign pods stay": (
        view({"a": 4}, [CHAT], [pod("f", None, 4, node="a")]), pod("x", "gold"), {"a": ["uid-f"]}, {},
        reasons.NOTHING_RECLAIMABLE,
    ),
    "others on the node go where the proposal may not": (
        view({"a": 4}, [CHAT, Reservation("b", "bulk", 2)], [
            pod("own", "bulk", 2, node="a"), pod("loan", "mid", 2, node="a")]),
        pod("x", "gold", 2), {"a": ["uid-own"]}, {"a": ("uid-loan",)}, reasons.RECLAIMS,
    ),
    "never while another node is free": (
        view({"a": 4, "b": 4}, [CHAT], FULL), pod("x", "gold", 2), {"a": ["uid-b2", "uid-b3"]}, {},
        reasons.RESERVATIONS_FIT,
    ),
    "an observing pool passes proposals on": (
        view({"a": 4}, [CHAT], FULL, enforce=False), pod("x", "silver"), {"a": ["uid-b3"], "b": []},
        {"a": ("uid-b3",)}, reasons.OBSERVED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PREEMPT)
def test_preempt(case: str) -> None:
    seen, asked, proposed, expected, reason = PREEMPT[case]
    answer = victims(asked, seen, proposed, 1000.0)
    assert (answer.nodes, answer.why.reason) == (expected, reason)


def test_min_runtime_holds_except_for_classes_that_are_never_reclaimed() -> None:
    seen = view({"a": 4}, [Reservation("m", "mid", 4)], FULL)
    early = victims(pod("x", "mid"), seen, {"a": ["uid-b3"]}, 100.0)
    assert early.nodes == {}
    assert early.retry_s == 120.0  # b0 started at 0 and may go after 120 s
    assert victims(pod("x", "mid"), seen, {"a": ["uid-b3"]}, 123.5).nodes == {"a": ("uid-b3",)}
    never = view({"a": 4}, [CHAT], FULL)
    assert victims(pod("x", "gold"), never, {"a": ["uid-b3"]}, 100.0).nodes == {"a": ("uid-b3",)}


def test_a_grant_is_kept_and_nothing_more_is_given_up_for_it() -> None:
    seen = view({"a": 4}, [CHAT], FULL)
    x, y = pod("x", "gold", 2, created=5.0), pod("y", "gold", 2, created=6.0)
    seen.grant(Grant(x, "a", ("uid-b2", "uid-b3"), 60.0))
    assert seen.unmet() == {"chat": 2}
    # The scheduler did not hear the answer: it is the same the second time.
    assert victims(x, seen, {"a": ["uid-b1"]}, 1.0).nodes == {"a": ("uid-b2", "uid-b3")}
    # Another claimant gets others, and batch does not slip in.
    assert victims(y, seen, {"a": ["uid-b2", "uid-b3"]}, 1.0).nodes == {"a": ("uid-b1", "uid-b0")}
    for uid in ("b2", "b3"):
        seen.place(replace(next(p for p in FULL if p.name == uid), terminating=True))
    assert victims(x, seen, {"a": ["uid-b1"]}, 1.0).why.reason == reasons.BEING_RECLAIMED
    for uid in ("b2", "b3"):
        seen.drop(f"uid-{uid}")
    assert feasible(pod("late", "bulk", created=9.0), seen, ["a"], 1.0).nodes == ()
    assert feasible(x, seen, ["a"], 1.0).nodes == ("a",)
    seen.place(replace(x, node="a", started_s=2.0))
    assert not seen.grants
    assert seen.open("a") == 0


def test_a_grant_that_comes_to_nothing_ends() -> None:
    seen = view({"a": 4}, [CHAT], FULL)
    seen.grant(Grant(pod("x", "gold", 2), "a", ("uid-b2", "uid-b3"), 60.0))
    assert seen.expire(59.9) == []
    assert seen.expire(60.0) == ["uid-x"]
    assert seen.unmet() == {"chat": 4}
    assert seen.standing("uid-b2").borrowed


def test_grants_in_flight_are_bounded() -> None:
    seen = view({"a": 4}, [CHAT], FULL)
    seen.grant(Grant(pod("x", "gold"), "a", ("uid-b3",), 60.0))
    answer = victims(pod("y", "gold", created=1.0), seen, {"a": ["uid-b2"]}, 0.0, max_grants=1)
    assert (answer.nodes, answer.why.reason, answer.retry_s) == ({}, reasons.BEING_RECLAIMED, 1.0)


def test_an_assumed_placement_counts_until_it_is_seen_or_expires() -> None:
    seen = view({"a": 2}, [])
    x = pod("x", "gold", 2)
    seen.assume(x, "a", 30.0)
    assert feasible(pod("y", "gold", created=1.0), seen, ["a"], 0.0).nodes == ()
    assert feasible(x, seen, ["a"], 0.0).nodes == ("a",), "the pod itself may come again"
    seen.expire(30.0)
    assert feasible(pod("y", "gold", created=1.0), seen, ["a"], 0.0).nodes == ("a",)
