"""The gate's workload and how its figures are reckoned."""

import itertools
from statistics import mean

import pytest

from tidegate.core.steptime import LLAMA3_8B_A100
from tidegate.sim.arms import gate_arms
from tidegate.sim.gate import (
    PROMISES,
    Missed,
    Phase,
    code_lengths,
    constant,
    crossing,
    missed,
    square_wave,
    workload,
)
from tidegate.sim.promise import Promise

LENGTHS = code_lengths()
ARMS = gate_arms(LLAMA3_8B_A100)


def test_prompts_have_the_median_and_tail_of_the_published_trace():
    prompts = sorted(prompt for prompt, _ in LENGTHS)
    assert len(prompts) == 8819
    assert prompts[len(prompts) // 2] == pytest.approx(1800, rel=0.02)
    assert prompts[int(0.9 * len(prompts))] == pytest.approx(6300, rel=0.02)


def test_every_pack_deals_the_whole_trace_shuffled():
    arrivals = itertools.islice(workload(constant(10.0, 20_000), LENGTHS, 3), len(LENGTHS))
    dealt = [(a.request.prompt_tokens, a.request.output_tokens) for a in arrivals]
    assert dealt not in (LENGTHS, LENGTHS[::-1])
    assert sorted(dealt) == sorted(LENGTHS)


def test_a_seed_is_a_workload():
    phases = constant(5.0, 200)
    one, same, other = (list(workload(phases, LENGTHS, seed)) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_arrivals_are_poisson_and_classes_equally_likely():
    arrivals = list(workload(constant(4.0, 30_000), LENGTHS, 5))
    gaps = [b.time_s - a.time_s for a, b in itertools.pairwise(arrivals)]
    assert mean(gaps) == pytest.approx(0.25, rel=0.02)
    # An exponential gap's second moment is twice its mean's square.
    assert mean(g * g for g in gaps) == pytest.approx(2 * 0.25**2, rel=0.05)
    for promise in PROMISES:
        assert mean(a.promise == promise for a in arrivals) == pytest.approx(1 / 3, abs=0.01)
    alike = mean(a.promise == b.promise for a, b in itertools.pairwise(arrivals))
    assert alike == pytest.approx(1 / 3, abs=0.01), "a class says nothing of the next one's"


def test_the_square_wave_starts_low_and_ends_high():
    phases = square_wave()
    assert [p.per_second for p in phases[:3]] == [2.0, 5.0, 2.0]
    assert (len(phases), phases[-1].per_second, sum(p.seconds for p in phases)) == (16, 5.0, 14_400.0)
    counts = [0] * 16
    for arrival in workload(phases, LENGTHS, 1):
        counts[int(arrival.time_s // 900)] += 1
    assert mean(counts[::2]) == pytest.approx(1800, rel=0.03)
    assert mean(counts[1::2]) == pytest.approx(4500, rel=0.03)


@pytest.mark.parametrize("start", [0.5, 2.0, 2.3, 4.0])
def test_the_crossing_does_not_depend_on_where_the_search_starts(start):
    # 0 up to 2, then a line: 1% is crossed at 2.1.
    assert crossing(lambda rate: max(0.0, (rate - 2.0) / 10), start, 0.1) == pytest.approx(2.1)


def test_a_crossing_between_two_points_is_interpolated():
    shares = {1.0: 0.0, 1.5: 0.04}
    assert crossing(shares.__getitem__, 1.0, 0.5) == pytest.approx(1.125)


def test_a_load_that_always_misses_is_an_error():
    with pytest.raises(ValueError, match=r"is missed even at 0\.1"):
        crossing(lambda rate: 0.5, 0.3)


def test_the_worst_class_is_judged():
    assert Missed(9, 0.1, {"a": 0.02, "b": 0.3}).worst == 0.3


def test_a_phase_without_arrivals_is_refused():
    with pytest.raises(ValueError, match="must be positive"):
        Phase(0.0, 10.0)
    with pytest.raises(ValueError, match="nothing arrived"):
        missed(ARMS["EDF-256"], iter(()))


@pytest.mark.parametrize("name", ARMS)
def test_a_light_load_misses_nothing_and_a_run_repeats_itself(name):
    def run() -> Missed:
        # People's deadline is loosened: a large chunk may take 6 s from somebody by chance.
        promises = (Promise("soon", ttft_s=12.0, token_s=0.05), *PROMISES[1:])
        return missed(ARMS[name], workload(constant(0.5, 150), LENGTHS, 1, promises))

    assert run() == run()
    assert run().overall == 0.0


def test_what_the_gate_is_about_shows_in_a_short_overload():
    """FCFS loses people to the backlog, EDF keeps them at the cost of nobody yet."""
    phases = [Phase(5.0, 300.0)]
    shares = {n: missed(ARMS[n], workload(phases, LENGTHS, 1)).by_class for n in ("FCFS-256", "EDF-256")}
    assert shares["FCFS-256"]["ttft-6s"] > 0.8
    assert max(shares["EDF-256"].values()) < 0.01
