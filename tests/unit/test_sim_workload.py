"""What arrives, and what came of it."""

import itertools
import math
import random
from statistics import fmean, pstdev
from typing import Any

import pytest

from tidegate.core.types import Objectives
from tidegate.sim.records import Record, State, figures, harvest_tokens, judged, quantile
from tidegate.sim.workload import (
    Length,
    Stream,
    chat_arrivals,
    chat_lengths,
    gamma,
    poisson,
    rates,
    replay,
    summary_lengths,
)

M = ("ns", "m")


def taken(times: Any, count: int, seed: int = 1) -> list[float]:
    return list(itertools.islice(times(random.Random(seed)), count))


@pytest.mark.parametrize(
    ("times", "cv"), [(poisson(5.0), 1.0), (gamma(5.0, 3.5), 3.5), (gamma(5.0, 0.5), 0.5)]
)
def test_gaps_have_their_mean_and_spread(times: Any, cv: float) -> None:
    found = taken(times, 60_000)
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert fmean(gaps) == pytest.approx(0.2, rel=0.05)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(cv, rel=0.1)


def test_rates_follow_their_phases_over_and_over() -> None:
    found = [t for t in taken(rates([(10.0, 10.0), (0.0, 5.0), (40.0, 5.0)]), 20_000) if t < 800]
    by_phase = [0, 0, 0]
    for t in found:
        at = t % 20
        by_phase[0 if at < 10 else 1 if at < 15 else 2] += 1
    assert by_phase[1] == 0
    assert by_phase[0] == pytest.approx(4000, rel=0.05)
    assert by_phase[2] == pytest.approx(8000, rel=0.05)


def test_a_trace_is_stretched_and_repeated() -> None:
    found = taken(replay([10.0, 11.0, 14.0], 1.0), 7)
    assert found == pytest.approx([0, 0.5, 2, 3, 3.5, 5, 6])
    whole = taken(replay(chat_arrivals(), 10.0), len(chat_arrivals()))
    assert len(whole) / whole[-1] == pytest.approx(10.0, rel=0.01)


@pytest.mark.parametrize(
    "make",
    [
        lambda: poisson(0),
        lambda: gamma(1, 0),
        lambda: rates([]),
        lambda: rates([(0, 5)]),
        lambda: rates([(1, 0)]),
        lambda: replay([1.0], 1),
        lambda: Stream("s", M, "c", [Length(1, 1)]),
        lambda: Stream("s", M, "c", [Length(1, 1)], times=poisson(1), outstanding=1),
        lambda: Stream("s", M, "c", [], outstanding=1),
    ],
)
def test_what_cannot_be_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"must|need|set one"):
        make()


def test_traces_that_ship() -> None:
    assert len(chat_lengths()) == len(chat_arrivals()) == 19_366
    assert fmean(prompt for prompt, _ in chat_lengths()) == pytest.approx(1154.7, abs=0.1)
    assert max(output for _, output in summary_lengths()) == 1000
    assert len(summary_lengths()) == 28_257


# ── records ─────────────────────────────────────────────────────────────────────────────────────


def record(**fields: Any) -> Record:
    values: dict[str, Any] = {
        **dict.fromkeys(("number", "arrival_s"), 0),
        "stream": "s",
        "qos_class": "c",
        "tenant": "",
        "prompt": 100,
        "output": 11,
    }
    return Record(**(values | fields))


ANSWERED = {"first_s": 0.5, "finish_s": 1.0, "state": State.ANSWERED}


def test_times_of_a_request() -> None:
    one = record(**ANSWERED)
    assert (one.ttft_s, one.tpot_s, one.completion_s) == (0.5, 0.05, 1.0)
    assert record(output=1, first_s=0.5, finish_s=0.5).tpot_s == 0
    assert math.isinf(record().ttft_s)
    assert math.isinf(record(first_s=0.5).tpot_s)
    assert math.isinf(record(first_s=0.5, state=State.LOST).ttft_s)


@pytest.mark.parametrize(
    ("promised", "kept"),
    [
        (Objectives(), True),
        (Objectives(ttft_s=0.5), True),
        (Objectives(ttft_s=0.4), False),
        (Objectives(ttft_s=0.45, per_thousand_prompt_tokens_s=1.0), True),
        (Objectives(tpot_s=0.04), False),
        (Objectives(ttft_s=0.6, completion_s=0.9), False),
    ],
)
def test_all_objectives_count(promised: Objectives, kept: bool) -> None:
    assert record(**ANSWERED).kept(promised) is kept
    assert record(first_s=0.1, state=State.LOST).kept(promised) is False


def test_who_comes_too_late_to_be_judged_is_not() -> None:
    promised = Objectives(completion_s=10.0)
    records = [record(number=t, arrival_s=float(t)) for t in range(0, 40, 5)]
    assert [r.arrival_s for r in judged(records, promised, 10.0, 35.0)] == [10, 15, 20, 25]
    found = figures(records, promised, 10.0, 35.0)
    assert (found.requests, found.answered, found.attainment) == (4, 0, 0.0)
    assert found.to_json()["ttft_s"]["p99"] is None, "infinite"


def test_harvest_is_what_was_computed_in_the_window() -> None:
    whole = record(**(ANSWERED | {"finish_s": 15.0}))
    half_before = record(computed_before=60, **(ANSWERED | {"finish_s": 15.0}))
    before = record(**(ANSWERED | {"finish_s": 5.0}))
    open_ended = record(computed_before=10, computed=40)
    assert harvest_tokens([whole], 10, 20) == 110
    assert harvest_tokens([half_before], 10, 20) == 50
    assert harvest_tokens([before], 10, 20) == 0
    assert harvest_tokens([open_ended], 10, 20) == 30


def test_quantiles_are_of_the_nearest_rank() -> None:
    values = [float(v) for v in range(1, 101)]
    assert [quantile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    assert math.isnan(quantile([], 0.5))
