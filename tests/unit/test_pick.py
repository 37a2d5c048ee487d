"""Which endpoint is picked, and how much is kept free."""

from typing import Any

import pytest

from tidegate.core.pick import Candidate, Need, NoRoom, Place, Traffic, allot, choose, headroom, slots_needed

HIGH = Need("high", 0, 100, 100, urgent=True)
ADAPTED = Need("high", 0, 100, 100, urgent=True, spill_s=0.3, adapter="sql")
SOON = Need("high", 0, 100, 100, urgent=True, spill_s=0.3)
LOW = Need("low", 2, 3000, 256)


def at(address: str, **fields: Any) -> Candidate:
    defaults: dict[str, Any] = {"lane": "low", "lane_rank": 2, "slots": 16, "used": 0, "kv_tokens": 65_536}
    return Candidate(address=address, **(defaults | fields))


def own(address: str, **fields: Any) -> Candidate:
    return at(address, lane="high", lane_rank=0, **fields)


CASES: list[tuple[str, Need, list[Candidate], str | NoRoom]] = [
    ("nothing there", LOW, [], NoRoom.NO_ENDPOINT),
    ("none ready", LOW, [at("a", ready=False)], NoRoom.NOT_READY),
    ("all going", LOW, [at("a", draining=True)], NoRoom.DRAINING),
    ("the furthest reason is told", LOW, [at("a", ready=False), at("b", used=16)], NoRoom.NO_SLOT),
    ("slots are full", LOW, [at("a", used=16)], NoRoom.NO_SLOT),
    ("a slot is kept for others", LOW, [at("a", used=14, keep_slots=2)], NoRoom.NO_SLOT),
    ("one slot beyond the kept", LOW, [at("a", used=13, keep_slots=2)], "a"),
    ("KV is full", LOW, [at("a", kv_used=63_000)], NoRoom.NO_KV),
    ("KV is kept for others", LOW, [at("a", kv_used=60_000, keep_tokens=3_000)], NoRoom.NO_KV),
    ("an engine that tells no KV", LOW, [at("a", kv_tokens=None, kv_used=10**9)], "a"),
    ("a huge request counts as half the cache", Need("low", 2, 10**6, 1), [at("a", kv_used=32_000)], "a"),
    ("a huge request waits for that half", Need("low", 2, 10**6, 1), [at("a", kv_used=33_000)], NoRoom.NO_KV),
    ("low stays in its own lane", LOW, [own("a"), at("b", used=15, kv_used=50_000)], "b"),
    ("low uses a higher lane when its own is full", LOW, [own("a"), at("b", used=16)], "a"),
    (
        "low goes to the less important of the lanes above",
        LOW,
        [own("a"), at("b", lane="mid", lane_rank=1)],
        "b",
    ),
    ("low takes the emptier of its lanes", LOW, [at("a", kv_used=9_000), at("b", kv_used=8_000)], "b"),
    ("high goes where its first token is soonest", HIGH, [own("a", ttft_s=0.3), at("b", ttft_s=0.2)], "b"),
    ("high prefers its lane when that is equal", HIGH, [at("a"), own("b")], "b"),
    (
        "an adapter that is loaded goes first",
        ADAPTED,
        [at("a", ttft_s=0.1), at("b", ttft_s=0.2, has_adapter=True)],
        "b",
    ),
    ("but not beyond the front", ADAPTED, [at("a", front=True), at("b", has_adapter=True)], "a"),
    ("nor without room", ADAPTED, [at("a"), at("b", has_adapter=True, used=16)], "a"),
    ("low too", Need("low", 2, 9, 9, adapter="sql"), [at("a"), at("b", has_adapter=True, kv_used=9)], "b"),
    (
        "low stays in its lane",
        Need("low", 2, 9, 9, adapter="sql"),
        [at("a"), own("b", has_adapter=True)],
        "a",
    ),
    ("who wants no adapter does not mind", SOON, [at("a"), at("b", has_adapter=True)], "a"),
    ("high stays on the front", SOON, [at("a", ttft_s=0.1), at("b", ttft_s=0.2, front=True)], "b"),
    ("and spills when it waits there", SOON, [at("a", ttft_s=0.1), at("b", ttft_s=0.4, front=True)], "a"),
    ("to the soonest of all", SOON, [at("a", ttft_s=0.5), at("b", ttft_s=0.4, front=True)], "b"),
    (
        "nor where it slows others, if it is soon served elsewhere",
        SOON,
        [at("a", ttft_s=0.1, front=True, credit_s=-1), at("b", ttft_s=0.2, front=True)],
        "b",
    ),
    (
        "but sooner than late",
        SOON,
        [at("a", ttft_s=0.4, front=True, credit_s=-1), at("b", ttft_s=0.5, front=True)],
        "a",
    ),
    ("low keeps behind the front", LOW, [at("a", front=True), at("b", kv_used=50_000)], "b"),
    ("low keeps off what is kept clear", LOW, [at("a", kept_clear=True)], NoRoom.KEPT_CLEAR),
    ("low keeps off where it slows others", LOW, [at("a", credit_s=0.2, margin_s=0.3)], NoRoom.WOULD_SLOW),
    ("low goes where they are ahead", LOW, [at("a", credit_s=0.4, margin_s=0.3)], "a"),
    ("none of that holds high up", HIGH, [at("a", kept_clear=True, credit_s=0, margin_s=1)], "a"),
    ("ties go to the lowest address", LOW, [at("b"), at("a")], "a"),
]


@pytest.mark.parametrize(
    ("need", "candidates", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_choose(need: Need, candidates: list[Candidate], expected: str | NoRoom) -> None:
    assert choose(need, candidates) == expected
    assert choose(need, candidates[::-1]) == expected


@pytest.mark.parametrize(
    ("rate", "service_s", "lower", "expected"),
    [
        pytest.param(0.0, 10.0, 64, 2, id="never fewer than two"),
        pytest.param(2.0, 11.0, 64, 2, id="the calm of the demo"),
        pytest.param(6.0, 11.0, 24, 7, id="its rush: 2.75 arrivals until one ends, and their spread"),
        pytest.param(1.0, 10.0, 0, 18, id="nothing lower could end: a whole service time"),
    ],
)
def test_slots_needed(rate: float, service_s: float, lower: int, expected: int) -> None:
    assert slots_needed(rate, service_s, lower) == expected


@pytest.mark.parametrize(
    ("needed", "places", "expected"),
    [
        pytest.param(
            3, [Place("a", "low", 16), Place("b", "high", 16)], {"a": 0, "b": 3}, id="on its own lane"
        ),
        pytest.param(
            3, [Place("a", "high", 16), Place("b", "high", 16)], {"a": 2, "b": 1}, id="spread over own"
        ),
        pytest.param(
            5, [Place("a", "low", 8), Place("b", "high", 4)], {"a": 3, "b": 2}, id="the rest elsewhere"
        ),
        pytest.param(
            9, [Place("a", "low", 2), Place("b", "high", 2)], {"a": 1, "b": 1}, id="at most half of each"
        ),
        pytest.param(2, [Place("a", "high", 1)], {"a": 0}, id="one slot is not kept"),
        pytest.param(2, [], {}, id="nowhere"),
    ],
)
def test_allot(needed: int, places: list[Place], expected: dict[str, int]) -> None:
    assert allot(needed, "high", places) == expected
    assert allot(needed, "high", places[::-1]) == expected


def traffic(name: str, rank: int, rate: float, *, recent: bool = True) -> Traffic:
    return Traffic(name, rank, rate, tokens=1000.0, recent=recent)


def test_headroom_adds_up_downwards_and_leaves_a_slot() -> None:
    places = [Place("a", "high", 4), Place("b", "low", 4)]
    seen = [traffic("high", 0, 1.0), traffic("mid", 1, 1.0), traffic("low", 2, 5.0)]
    kept = headroom(seen, places, {0: 1.0, 1: 1.0, 2: 1.0}, {})
    assert kept[0] == {"a": (0, 0), "b": (0, 0)}
    assert kept[1] == {"a": (2, 2000), "b": (0, 0)}
    assert kept[2] == {"a": (3, 3000), "b": (1, 1000)}


@pytest.mark.parametrize(
    "seen",
    [
        pytest.param([traffic("high", 0, 9.0, recent=False), traffic("low", 2, 1.0)], id="lent when quiet"),
        pytest.param([traffic("high", 0, 9.0)], id="nobody below"),
        pytest.param([], id="nobody"),
    ],
)
def test_no_headroom(seen: list[Traffic]) -> None:
    kept = headroom(seen, [Place("a", "high", 16)], {t.rank: 1.0 for t in seen}, {})
    assert all(by == {"a": (0, 0)} for by in kept.values())
