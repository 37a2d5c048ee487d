"""The saving against silos: the day, the search, and a small one from end to end."""

import random
from itertools import islice

import pytest

from tidegate.sim.saving import Day, Saving, Tried, least, planned, saving
from tidegate.sim.workload import day_rates

SMALL = Day("m-mid", seconds=60.0, peak_per_s=2.0, cv=1.0)


@pytest.mark.parametrize(("category", "idle"), [("m-mid", 0.338), ("m-small", 0.364)])
def test_a_day_has_no_gap_and_its_share_of_idle_gpus(category: str, idle: float) -> None:
    bins = day_rates(category)
    assert len(bins) == 144
    assert min(bins) > 0.2 * max(bins)
    day = Day(category)
    assert day.idle == pytest.approx(idle, abs=0.001)
    assert day.ceiling == pytest.approx(idle / (1 + idle), abs=0.001)


def test_days_that_do_not_ship_are_refused() -> None:
    with pytest.raises(ValueError, match="m-large"):
        day_rates("m-large")


def test_chat_follows_the_bins_of_the_scaled_day() -> None:
    day = Day("m-mid", seconds=1440.0, peak_per_s=20.0, cv=1.0)
    times = day.chat().times
    assert times is not None
    came = [t for t in islice(times(random.Random(1)), 40_000) if t < day.seconds]
    bins = day_rates("m-mid")
    assert len(came) == pytest.approx(20.0 * 1440 * (1 - day.idle), rel=0.03)
    busiest = bins.index(max(bins))
    near = [t for t in came if abs(t - 10 * busiest - 5) <= 15]
    expected = 20 / max(bins) * 10 * sum(bins[busiest - 1 : busiest + 2])
    assert len(near) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("needed", range(3, 12))
def test_the_search_finds_the_least_and_tries_few(needed: int) -> None:
    tried: list[int] = []

    def kept(replicas: int) -> bool:
        tried.append(replicas)
        return replicas >= needed

    assert least(2, 11, kept) == needed
    assert len(tried) <= 4


@pytest.mark.parametrize(
    ("people", "batch", "kept"),
    [(0.99, float("nan"), True), (0.989, float("nan"), False), (0.995, 0.98, False), (0.995, 1.0, True)],
)
def test_whoever_is_there_must_be_kept(people: float, batch: float, kept: bool) -> None:
    assert Tried(3, people, batch).kept is kept


def test_saving_is_of_both_silos() -> None:
    assert Saving(10, 4, 11, 100, ()).saving == pytest.approx(3 / 14)


def test_a_small_day_from_end_to_end() -> None:
    found = saving(SMALL)
    assert found == saving(SMALL)
    assert found.people <= found.shared <= found.people + found.batch
    by_what = {(what, tried.replicas): tried for what, tried in found.tries}
    assert all(tried.kept == (n >= found.people) for (what, n), tried in by_what.items() if what[0] == "p")


def test_a_pool_much_too_small_keeps_nothing() -> None:
    assert not planned(Day("m-mid", 60.0, 20.0), 2, [Day("m-mid", 60.0, 20.0).chat()]).kept
