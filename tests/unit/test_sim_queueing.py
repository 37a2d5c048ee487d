"""The engines against queueing theory, where its formulas hold: one request at a time, M/G/1.

Service times are drawn from finite distributions, whose moments are exact. Each case runs several
seeds; the formula must lie in the 99% confidence interval of their means.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

import pytest

from tidegate.sim.arms import Fcfs, Static
from tidegate.sim.drive import Arrival, drive
from tidegate.sim.sarathi import Job, Sarathi
from tidegate.sim.serve import Promised, serve
from tidegate.sim.types import EngineConfig, Policy, Request

SEEDS = range(1, 9)
T99 = 3.499  # Student's t, 7 degrees of freedom, 99% two-sided
TICK_S = 0.01  # one prompt token


@dataclass(frozen=True)
class Load:
    """A class of requests: the share of the engine that it takes, and its service times in ticks."""

    share: float
    ticks: Sequence[int]

    @property
    def first_s(self) -> float:
        """E[S], seconds."""
        return TICK_S * mean(self.ticks)

    @property
    def second(self) -> float:
        """E[S²], seconds squared."""
        return TICK_S**2 * mean(t * t for t in self.ticks)

    @property
    def per_s(self) -> float:
        """Arrivals a second."""
        return self.share / self.first_s


CONSTANT = (16,)
SPREAD = tuple(range(1, 32))
TAILED = (2,) * 9 + (22,)


def cobham(loads: Sequence[Load]) -> list[float]:
    """Mean waits without preemption, seconds, first class first (A. Cobham, 1954).

    With one class this is Pollaczek and Khinchine's λE[S²]/2(1 − ρ).
    """
    residual_s = sum(x.per_s * x.second for x in loads) / 2
    above = [sum(x.share for x in loads[:k]) for k in range(len(loads) + 1)]
    return [residual_s / ((1 - above[k]) * (1 - above[k + 1])) for k in range(len(loads))]


def preemptive_resume(loads: Sequence[Load]) -> list[float]:
    """Mean times in the system, seconds (L. Kleinrock, Queueing Systems II, 3.41)."""
    times = []
    for k, load in enumerate(loads):
        above = sum(x.share for x in loads[:k])
        residual_s = sum(x.per_s * x.second for x in loads[: k + 1]) / 2
        times.append(load.first_s / (1 - above) + residual_s / ((1 - above) * (1 - above - load.share)))
    return times


def arrivals(loads: Sequence[Load], count: int, seed: int) -> list[Promised]:
    """Poisson arrivals of all classes; a request's ticks are its prompt, its class its priority."""
    rng = random.Random(seed)
    rates = [x.per_s for x in loads]
    now, made = 0.0, []
    for i in range(count):
        now += rng.expovariate(sum(rates))
        (k,) = rng.choices(range(len(loads)), rates)
        made.append(Promised(now, Request(str(i), rng.choice(loads[k].ticks), 1, k)))
    return made


def ticks(
    prefill: int, decodes: int, decode_context: int, prefill_context: int, prefill_pairs: float
) -> float:
    return TICK_S * prefill


class ByPriority:
    """The lower priority value first."""

    def key(self, job: Job) -> float:
        return job.priority


def vllm(todo: list[Promised], policy: Policy = Policy.FCFS) -> list[float]:
    """Times in the system on vLLM's model with one slot and a budget for any prompt."""
    config = EngineConfig(max_num_seqs=1, max_num_batched_tokens=10**6, policy=policy, async_scheduling=False)
    outcomes = drive(config, [Arrival(a.time_s, a.request) for a in todo], ticks).outcomes
    return [outcomes[a.request.id].finish_s - a.time_s for a in todo]


def vllm_priority(todo: list[Promised]) -> list[float]:
    return vllm(todo, Policy.PRIORITY)


def sarathi(todo: list[Promised], order=None) -> list[float]:
    """Times in the system on Sarathi's model with a chunk of one token."""
    served = serve(Sarathi(order or Fcfs(), Static(1)), todo, ticks)
    return [x.outcome.finish_s - x.outcome.arrival_s for x in served]


def sarathi_priority(todo: list[Promised]) -> list[float]:
    return sarathi(todo, ByPriority())


def measured(
    run: Callable[[list[Promised]], list[float]], loads: Sequence[Load], count: int
) -> list[list[float]]:
    """By class, the mean time in the system of each seed, the first tenth left out, seconds."""
    means: list[list[float]] = [[] for _ in loads]
    for seed in SEEDS:
        todo = arrivals(loads, count, seed)
        times = run(todo)
        settled = list(zip(todo, times, strict=True))[count // 10 :]
        for k, found in enumerate(means):
            found.append(mean(t for a, t in settled if a.request.priority == k))
    return means


def assert_within(samples: list[float], expected: float, grain_s: float = 0.0) -> None:
    """The expected mean lies in the samples' confidence interval, give or take `grain_s`."""
    half = T99 * stdev(samples) / sqrt(len(samples))
    middle = mean(samples)
    assert half < 0.15 * expected, "the interval is too wide to say anything"
    assert middle - half - grain_s <= expected <= middle + half + grain_s, (middle, half, expected)


@pytest.mark.parametrize("run", [vllm, sarathi])
@pytest.mark.parametrize("service", [CONSTANT, SPREAD, TAILED], ids=["constant", "spread", "tailed"])
def test_fcfs_waits_as_pollaczek_and_khinchine_say(run, service):
    load = Load(0.5, service)
    (times,) = measured(run, [load], 6000 if run is vllm else 48_000 // round(mean(service)))
    assert_within([t - load.first_s for t in times], cobham([load])[0])


@pytest.mark.parametrize(
    "loads",
    [
        pytest.param([Load(0.3, CONSTANT), Load(0.4, SPREAD)], id="two classes"),
        pytest.param(
            [Load(0.2, SPREAD), Load(0.2, CONSTANT), Load(0.15, TAILED)], id="three, the last tailed"
        ),
    ],
)
def test_priority_without_preemption_waits_as_cobham_says(loads):
    times = measured(vllm_priority, loads, 8000)
    for load, expected_s, samples in zip(loads, cobham(loads), times, strict=True):
        assert_within([t - load.first_s for t in samples], expected_s)


@pytest.mark.parametrize(
    "loads",
    [
        pytest.param([Load(0.3, CONSTANT), Load(0.4, SPREAD)], id="two classes"),
        pytest.param([Load(0.2, SPREAD), Load(0.3, TAILED)], id="the lower tailed"),
    ],
)
def test_priority_between_chunks_takes_as_long_as_preemptive_resume_says(loads):
    times = measured(sarathi_priority, loads, 4000)
    for expected_s, samples in zip(preemptive_resume(loads), times, strict=True):
        # Preemption waits for the chunk that runs: one tick at most.
        assert_within(samples, expected_s, grain_s=TICK_S)


def test_the_formulas_agree_where_they_must():
    one = Load(0.5, (100,))
    assert cobham([one]) == [pytest.approx(0.5)], "M/D/1 at one half waits half a service"
    (time_s,) = preemptive_resume([one])
    assert time_s == pytest.approx(one.first_s + cobham([one])[0])
