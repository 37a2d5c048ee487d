"""More is asked than there is: who is told apart, and the settings in which it is measured."""

import math

import pytest

from tidegate.core.crowd import FULL, Crowd
from tidegate.sim.contention import CASES, LARGE, Case, run

SHORT = {"replicas": 2, "seconds": 100.0, "warm_up_s": 20.0}


def granted(*senders: tuple[str, float, int], seconds: float = 60.0, replicas: int = 1) -> dict[str, float]:
    """By tenant, seconds of prefill a second that were not beyond its part, in the second half."""
    crowd, had, step_s = Crowd(), dict.fromkeys((s[0] for s in senders), 0.0), 0.1
    for step in range(int(seconds / step_s)):
        for name, per_s, weight in senders:
            kept = not crowd.beyond(name, weight, per_s * step_s, replicas, step * step_s)
            had[name] += per_s * step_s * (kept and step * step_s >= seconds / 2)
    return {name: total / (seconds / 2) for name, total in had.items()}


PARTS = {
    "all fits": ([("a", FULL / 2, 1), ("b", FULL / 4, 1)], {"a": FULL / 2, "b": FULL / 4}),
    "one alone has no bound": ([("a", 3 * FULL, 1)], {"a": 3 * FULL}),
    "a small one keeps all, the large one gets the rest": (
        [("small", FULL / 4, 1), ("large", 5 * FULL, 1)], {"small": FULL / 4, "large": FULL * 3 / 4},
    ),
    "equals get equal parts": ([("a", FULL, 1), ("b", FULL, 1)], {"a": FULL / 2, "b": FULL / 2}),
    "by weight": ([("a", 2 * FULL, 3), ("b", 2 * FULL, 1)], {"a": FULL * 3 / 4, "b": FULL / 4}),
}  # fmt: skip


@pytest.mark.parametrize(("senders", "expected"), PARTS.values(), ids=PARTS)
def test_parts_are_max_min_fair(senders: list[tuple[str, float, int]], expected: dict[str, float]) -> None:
    assert granted(*senders) == pytest.approx(expected, rel=0.1)


def test_more_replicas_are_more_to_share() -> None:
    assert granted(("a", FULL, 1), ("b", FULL, 1), replicas=2) == pytest.approx({"a": FULL, "b": FULL})


def test_invented_names_are_forgotten() -> None:
    crowd = Crowd()
    for number in range(3000):
        crowd.beyond(f"invented-{number}", 1, 1.0, 1, 0.0)
    assert len(crowd._tenants) <= 1000


def test_the_others_are_the_same_with_and_without_the_tenant_that_floods() -> None:
    both, alone = (CASES["tenants"](Case("tenants", "ours", 1, alone=alone))[0] for alone in (False, True))
    assert {s.tenant for s in both.streams} - {s.tenant for s in alone.streams} == {LARGE}
    for one in alone.streams:
        [same] = [s for s in both.streams if s.name == one.name]
        arrivals, others = one.arrivals(1), same.arrivals(1)
        assert [next(arrivals) for _ in range(20)] == [next(others) for _ in range(20)]


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_case_is_the_same_each_time_and_important_ones_are_served_alone(name: str) -> None:
    alone = run(Case(name, "ours", 1, alone=True, **SHORT))
    assert alone.missed["important"] < 0.02
    assert alone.important == 1.0
    first, second = (run(Case(name, "ours", 1, **SHORT)) for _ in range(2))
    assert (first.missed, first.ttft_p99_s, first.judged) == (second.missed, second.ttft_p99_s, second.judged)
    assert first.judged == alone.judged
    assert math.isfinite(first.ttft_p99_s)
