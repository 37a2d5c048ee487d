"""The gate: QoServe's workload on one replica, and how many of each class are late.

Poisson arrivals, lengths of the Azure code trace shuffled, one of three deadlines with equal
chance. Deterministic by seed. Everything that arrives is served to its end and judged.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tidegate.sim.arms import Arm
from tidegate.sim.promise import Promise
from tidegate.sim.serve import Promised, serve
from tidegate.sim.types import Request
from tidegate.sim.workload import code_lengths as trace_lengths

PROMPT_SCALE = 1.22
"""QoServe's prompts were a week of the trace; × 1.22 the hour has their median and 90th percentile."""

PROMISES = (
    Promise("ttft-6s", ttft_s=6.0, token_s=0.05),
    Promise("finish-600s", finish_s=600.0, token_s=0.4),
    Promise("finish-1800s", finish_s=1800.0, token_s=0.4),
)
"""QoServe's three classes. The first is judged by its first token alone."""

Lengths = Sequence[tuple[int, int]]
"""(prompt, output) tokens of requests."""


@dataclass(frozen=True, slots=True)
class Phase:
    """So many requests a second, on average, for so many seconds."""

    per_second: float
    seconds: float

    def __post_init__(self) -> None:
        """Refuse a phase in which nothing would come."""
        if self.per_second <= 0 or self.seconds <= 0:
            raise ValueError(f"per_second and seconds must be positive, got {self}")


@dataclass(frozen=True, slots=True)
class Missed:
    """Shares of requests that were late, 0 to 1: of all, and of each class."""

    requests: int
    overall: float
    by_class: dict[str, float]

    @property
    def worst(self) -> float:
        """The share of the class that fares worst."""
        return max(self.by_class.values())


def code_lengths(scale: float = PROMPT_SCALE) -> Lengths:
    """Lengths of the Azure code trace, prompts times `scale`."""
    return [(max(1, round(scale * prompt)), output) for prompt, output in trace_lengths()]


def constant(per_second: float, requests: int) -> list[Phase]:
    """One phase, long enough for so many requests on average."""
    return [Phase(per_second, requests / per_second)]


def square_wave(
    low: float = 2.0, high: float = 5.0, each_s: float = 900.0, total_s: float = 14_400.0
) -> list[Phase]:
    """QoServe's wave: phases of `each_s` seconds, low first, in turn, for `total_s`."""
    return [Phase((low, high)[i % 2], each_s) for i in range(round(total_s / each_s))]


def workload(
    phases: Sequence[Phase], lengths: Lengths, seed: int, promises: Sequence[Promise] = PROMISES
) -> Iterator[Promised]:
    """Poisson arrivals over the phases, in order of time, each with one of the promises.

    Lengths are dealt from a shuffled pack, which is shuffled anew when it is used up: whatever the
    seed, every pack has the trace's mean.
    """
    rng = random.Random(seed)  # noqa: S311
    pack: list[tuple[int, int]] = []
    end_s, count = 0.0, 0
    for phase in phases:
        # A Poisson process has no memory: each phase starts its own.
        now = end_s + rng.expovariate(phase.per_second)
        end_s += phase.seconds
        while now < end_s:
            if not pack:
                pack = list(lengths)
                rng.shuffle(pack)
            prompt, output = pack.pop()
            yield Promised(now, Request(str(count), prompt, output), rng.choice(promises))
            count += 1
            now += rng.expovariate(phase.per_second)


def missed(arm: Arm, arrivals: Iterator[Promised]) -> Missed:
    """Run an arm on the workload and count who was late.

    Raises:
        ValueError: nothing arrives.
    """
    late: dict[str, list[bool]] = {}
    for each in serve(arm.engine(), arrivals):
        promise = each.arrival.promise
        late.setdefault(promise.name, []).append(not promise.kept(each.outcome))
    if not late:
        raise ValueError("nothing arrived: longer phases or higher rates are needed")
    everyone = [flag for flags in late.values() for flag in flags]
    return Missed(
        requests=len(everyone),
        overall=sum(everyone) / len(everyone),
        by_class={name: sum(flags) / len(flags) for name, flags in sorted(late.items())},
    )


def crossing(
    share: Callable[[float], float], start: float, step: float = 0.1, allowed: float = 0.01
) -> float:
    """Where `share(x)` crosses what is allowed, interpolated between two points `step` apart.

    With `share` the worst class's misses at a rate this is the goodput. Walks up or down from
    `start`; more load is taken to miss more.

    Raises:
        ValueError: nothing above 0 is allowed.
    """
    x, y = start, share(start)
    direction = 1 if y <= allowed else -1
    while True:
        beyond = round(x + direction * step, 9)
        if beyond <= 0:
            raise ValueError(f"a share of {y:.3f} is missed even at {x:g}, {allowed:.3f} is allowed")
        other = share(beyond)
        if (other <= allowed) != (y <= allowed):
            return x + (beyond - x) * (allowed - y) / (other - y)
        x, y = beyond, other
