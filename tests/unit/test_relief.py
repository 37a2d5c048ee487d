"""Who is given up: hand-made cases, the fewest by brute force, and what an engine does with it."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.core.relief import Claim, give_up
from tidegate.core.steptime import LLAMA3_8B_A100 as FIT
from tidegate.sim.arms import Static
from tidegate.sim.promise import Promise
from tidegate.sim.relieved import Early, Relieved
from tidegate.sim.serve import Promised, serve
from tidegate.sim.types import Request
from tidegate.sim.wave import Wave, arrivals, classes, named, run

claims = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6), st.integers(0, 1)), max_size=7).map(
    lambda rows: [Claim(str(i), float(due), float(work), rank) for i, (due, work, rank) in enumerate(rows)]
)


def late(order: list[Claim]) -> bool:
    """Whether anybody is late, served by deadline from 0 on."""
    by_due = sorted(order, key=lambda c: c.due_s)
    ends = itertools.accumulate(c.work_s for c in by_due)
    return any(end > claim.due_s for end, claim in zip(ends, by_due, strict=True))


CASES = {
    "all fit": ([Claim("a", 2, 2, 0), Claim("b", 5, 3, 0)], []),
    "the longest goes": ([Claim("a", 5, 4, 0), Claim("b", 6, 1, 0), Claim("c", 6, 2, 0)], ["a"]),
    "the lowest rank goes, though it is shorter": ([Claim("a", 5, 4, 0), Claim("b", 6, 3, 1)], ["b"]),
    "two short ones for an important one": (
        [Claim("a", 3, 1, 1), Claim("b", 3, 1, 1), Claim("c", 4, 4, 0)], ["a", "b"],
    ),
    "one that cannot be in time at all": ([Claim("a", 1, 2, 0), Claim("b", 3, 3, 0)], ["a"]),
}  # fmt: skip


@pytest.mark.parametrize(("waiting", "gone"), CASES.values(), ids=CASES)
def test_hand_made_cases(waiting: list[Claim], gone: list[str]) -> None:
    assert sorted(claim.id for claim in give_up(waiting, 0.0)) == gone


def test_times_are_from_now_on() -> None:
    assert give_up([Claim("a", 12, 2, 0)], 10.0) == []
    assert give_up([Claim("a", 12, 2, 0)], 10.5) != []


@given(claims)
def test_the_others_are_in_time_and_the_important_go_only_if_they_are_too_many(waiting: list[Claim]) -> None:
    given_up = give_up(waiting, 0.0)
    assert not late([c for c in waiting if c not in given_up])
    if any(c.rank == 0 for c in given_up):
        assert late([c for c in waiting if c.rank == 0])


@given(claims)
def test_of_one_rank_the_fewest_go(waiting: list[Claim]) -> None:
    equal = [c._replace(rank=0) for c in waiting]
    most = max(
        n for n in range(len(equal) + 1) if any(not late([*s]) for s in itertools.combinations(equal, n))
    )
    assert len(give_up(equal, 0.0)) == len(equal) - most


# ── an engine that asks ─────────────────────────────────────────────────────────────────────────


def served(rows: list[tuple[int, int]], deadline_s: float) -> list[bool]:
    """Whether each of (prompt, priority) that come at once has its first token in time."""
    promise = Promise("soon", ttft_s=deadline_s)
    coming = [Promised(0.0, Request(str(i), p, 2, priority), promise) for i, (p, priority) in enumerate(rows)]
    engine = Relieved(Early((1.0, 1.0)), Static(2048), FIT, tokens=2048)
    return [promise.kept(each.outcome) for each in serve(engine, coming)]


def test_an_engine_serves_the_short_instead_of_the_long_and_the_important_before_all() -> None:
    # A prompt of 8,000 takes 0.8 s, four of 2,000 as long together.
    assert served([(8000, 1), *[(2000, 1)] * 4], 1.1) == [False, True, True, True, True]
    assert served([(8000, 0), *[(2000, 1)] * 4], 1.1)[0]
    assert all(served([(8000, 1), *[(2000, 1)] * 4], 2.5))


def test_who_was_given_up_is_taken_back_where_there_is_time() -> None:
    promise = Promise("soon", finish_s=100.0)
    engine = Relieved(Early((1.0, 1.0)), Static(2048), FIT, tokens=2048, work=60.0, period_s=0.1)
    for number in range(3):
        engine.add(Request(str(number), 8000, 1, priority=1), 0.0, promise)
    engine.schedule(0.0)
    assert engine.relegated == 1, "taken to be 60 times as slow, one of three is too much"
    engine._token_s /= 60
    engine.schedule(1.0)
    assert not any(job.key[0] for _, job in engine._prompts)


def test_nobody_of_the_highest_rank_is_given_up_before_its_own_deadline_is_past() -> None:
    promise = Promise("soon", finish_s=100.0)
    for now, given_up in ((5.0, 0), (100.0, 1)):
        engine = Relieved(Early((0.01, 1.0)), Static(2048), FIT, tokens=2048)
        engine.add(Request("0", 8000, 1), 0.0, promise)
        engine.schedule(now)
        assert engine.relegated == given_up


def test_a_fifth_of_each_class_is_important_and_all_arms_are_judged_by_the_same_arrivals() -> None:
    wave = Wave("relief", 1, hours=0.5)
    coming = list(arrivals(wave))
    assert {named(one) for one in coming} == set(classes())
    for promise in ("ttft-6s", "finish-600s", "finish-1800s"):
        mine = [one for one in coming if one.promise.name == promise]
        important = [one for one in mine if one.request.priority == 0]
        assert len(important) / len(mine) == pytest.approx(0.2, abs=0.02)
    found = run(wave)
    assert (found.requests, found.important) == (len(coming), -(-len(coming) // 5))
    assert found.overall == 0.0, "half an hour of it fits"
    with pytest.raises(ValueError, match="no arm is named"):
        run(Wave("nobody", 1, hours=0.5))
