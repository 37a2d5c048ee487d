"""What arrives: streams of requests with their lengths, by seed. Times are seconds, lengths tokens."""

import csv
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from tidegate.core.flowtypes import ModelKey


class Length(NamedTuple):
    """A request's prompt and output, tokens."""

    prompt: int
    output: int


class Arrival(NamedTuple):
    """When a request comes, and what it turns out to be. Policies are not told its output."""

    time_s: float
    length: Length


Times = Callable[[random.Random], Iterator[float]]
"""Seconds of arrivals, growing, for a generator of random numbers; without end."""


@dataclass(frozen=True, slots=True)
class Stream:
    """One kind of traffic.

    Either `times` says when requests come, or `outstanding` how many are always waiting or running.
    `expected_output` is what the picker takes an answer to be until it has ended (a client's
    `max_tokens`, or its own default). `streamed`: see `core.flow.Ask`. `shuffled` False keeps lengths
    in their order: a recorded trace's lengths belong to its times.
    """

    name: str
    model: ModelKey
    qos_class: str
    lengths: Sequence[Length]
    times: Times | None = None
    outstanding: int = 0
    expected_output: int = 256
    streamed: bool = True
    tenant: str = ""
    shuffled: bool = True

    def __post_init__(self) -> None:
        """Refuse a stream in which nothing, or two things, say when requests come."""
        if (self.times is None) == (self.outstanding == 0):
            raise ValueError(f"stream {self.name}: set one of times and outstanding")
        if not self.lengths:
            raise ValueError(f"stream {self.name}: lengths must not be empty")

    def arrivals(self, seed: int) -> Iterator[Arrival]:
        """Arrivals of an open loop; of a closed one all at 0, as many as are ever asked for.

        Lengths are dealt from a pack, shuffled anew each time it is used up.
        """
        rng = random.Random(f"{seed}/{self.name}")  # noqa: S311 - a simulation, not a secret
        times = self.times(rng) if self.times is not None else iter(lambda: 0.0, 1.0)
        pack: list[Length] = []
        for time_s in times:
            if not pack:
                pack = list(self.lengths)
                if self.shuffled:
                    rng.shuffle(pack)
                else:
                    pack.reverse()
            yield Arrival(time_s, pack.pop())


def poisson(per_second: float) -> Times:
    """Arrivals without memory, so many a second on average."""
    return gamma(per_second, 1.0)


def gamma(per_second: float, cv: float) -> Times:
    """Gaps from a gamma distribution with coefficient of variation `cv`: bursts above 1."""
    if per_second <= 0 or cv <= 0:
        raise ValueError(f"per_second and cv must be positive, got {per_second:g} and {cv:g}")
    shape = 1 / cv**2

    def times(rng: random.Random) -> Iterator[float]:
        now = 0.0
        while True:
            now += rng.gammavariate(shape, 1 / (shape * per_second))
            yield now

    return times


def rates(phases: Sequence[tuple[float, float]], cv: float = 1.0) -> Times:
    """Gamma arrivals whose rate follows phases of (requests a second, seconds), over and over.

    Unit gaps are laid along the integrated rate, so that a burst is as bursty at any rate.
    """
    if not phases or any(rate < 0 or seconds <= 0 for rate, seconds in phases):
        raise ValueError("phases need rates of at least 0 and seconds above 0")
    if all(rate == 0 for rate, _ in phases):
        raise ValueError("phases need a rate above 0")
    unit = gamma(1.0, cv)

    def times(rng: random.Random) -> Iterator[float]:
        start_s, done, turn = 0.0, 0.0, 0
        for work in unit(rng):
            rate, seconds = phases[turn % len(phases)]
            while work - done > rate * seconds:
                done += rate * seconds
                start_s += seconds
                turn += 1
                rate, seconds = phases[turn % len(phases)]
            yield start_s + (work - done) / rate

    return times


def replay(arrivals_s: Sequence[float], per_second: float) -> Times:
    """A trace's own arrivals, stretched to this mean rate and repeated."""
    if len(arrivals_s) < 2 or arrivals_s[-1] <= arrivals_s[0]:
        raise ValueError("arrivals need at least two times that grow")
    length_s = (arrivals_s[-1] - arrivals_s[0]) * len(arrivals_s) / (len(arrivals_s) - 1)
    stretch = len(arrivals_s) / length_s / per_second

    def times(_rng: random.Random) -> Iterator[float]:
        turn = 0
        while True:
            for each in arrivals_s:
                yield (turn * length_s + each - arrivals_s[0]) * stretch
            turn += 1

    return times


# ── the traces that ship ────────────────────────────────────────────────────────────────────────


def rows(name: str) -> list[dict[str, str]]:
    """The rows of a CSV of this package's data."""
    text = files("tidegate.sim").joinpath(f"data/{name}").read_text()
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


@cache
def chat_lengths() -> tuple[Length, ...]:
    """Chat of the Azure trace."""
    return _lengths("azure_conv.csv")


@cache
def code_lengths() -> tuple[Length, ...]:
    """Code completion of the Azure trace."""
    return _lengths("azure_code_lengths.csv")


@cache
def summary_lengths(most_output: int = 1000) -> tuple[Length, ...]:
    """Summaries of arXiv papers. Outputs are capped: 4% of the rows hold 39% of the output tokens."""
    return tuple(Length(p, min(o, most_output)) for p, o in _lengths("arxiv_summaries.csv"))


@cache
def day_rates(category: str) -> tuple[float, ...]:
    """Requests a second in the 144 ten-minute bins of a day of ServeGen: `m-mid` or `m-small`.

    Raises:
        ValueError: there is no such category.
    """
    found = [row for row in rows("servegen_days.csv") if row["category"] == category]
    if not found:
        raise ValueError(f"category {category!r} is not in servegen_days.csv")
    return tuple(float(row["requests_per_s"]) for row in found)


@cache
def chat_arrivals() -> tuple[float, ...]:
    """Seconds at which the chat requests came."""
    return tuple(float(row["arrival_s"]) for row in rows("azure_conv.csv"))


def _lengths(name: str) -> tuple[Length, ...]:
    return tuple(
        Length(max(1, int(row["prompt_tokens"])), max(1, int(row["output_tokens"]))) for row in rows(name)
    )
