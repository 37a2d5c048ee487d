"""Arms that part the replicas: the oracle without batch, silos, static packing, strict and not quite."""

from collections.abc import Iterable, Sequence

from tidegate.core.flowtypes import Ask
from tidegate.sim.fleet_arms.central import Central
from tidegate.sim.fleet_arms.site import Site
from tidegate.sim.router import Arm

PEOPLE, STANDARD, BATCH = "interactive", "standard", "batch"
"""The classes that lanes are named after, from the most important one."""


class Alone(Central):
    """Oracle A: batch waits for ever, everybody else has all replicas."""

    def among(self, ask: Ask, sites: Sequence[Site], now: float) -> Iterable[Site]:  # noqa: ARG002
        """All replicas, for all but batch."""
        return () if self.is_batch(ask.qos_class) else sites


class Packing(Central):
    """Batch on its lanes at full width, everybody else on the others; they never meet.

    Full width is as many as the KV cache holds by the outputs that are expected, at most all slots.
    """

    def among(self, ask: Ask, sites: Sequence[Site], now: float) -> Iterable[Site]:  # noqa: ARG002
        """The replicas of its part of the fleet."""
        batch = self.is_batch(ask.qos_class)
        mine = (s for s in sites if self.is_batch(s.facts.lane) is batch)
        return (s for s in mine if s.fits(ask)) if batch else mine


class PackingCap(Packing):
    """Static packing, and beside people at most so many batch requests on each of their replicas."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def among(self, ask: Ask, sites: Sequence[Site], now: float) -> Iterable[Site]:
        """For batch its own replicas while they hold it, then people's below the cap."""
        own = list(super().among(ask, sites, now))
        if own or not self.is_batch(ask.qos_class):
            return own
        return [s for s in sites if not self.is_batch(s.facts.lane) and s.batch < self._most and s.fits(ask)]


class Silos(Central):
    """Every class on its own replicas."""

    def among(self, ask: Ask, sites: Sequence[Site], now: float) -> Iterable[Site]:  # noqa: ARG002
        """The replicas of its own lane."""
        mine = (s for s in sites if s.facts.lane == ask.qos_class)
        return (s for s in mine if s.fits(ask)) if self.is_batch(ask.qos_class) else mine


def alone() -> Arm:
    """Interactive alone: what ratios are taken against."""
    return Arm("alone", Alone)


def packing(first: int) -> Arm:
    """People on the first so many replicas, batch on the rest."""
    return Arm(f"packing-{first}", Packing, lanes=lambda replicas: first_lanes(first, replicas))


def packing_cap(first: int, most: int) -> Arm:
    """People on the first so many replicas, with so many batch requests on each; batch on the rest."""
    name = f"packing-{first}-cap-{most}"
    return Arm(name, lambda: PackingCap(most), lanes=lambda replicas: first_lanes(first, replicas))


def first_lanes(first: int, replicas: int) -> list[str]:
    """People's lane for the first so many replicas, batch's for the others.

    Raises:
        ValueError: there are not so many.
    """
    if not 0 <= first <= replicas:
        raise ValueError(f"people on the first {first}: there are only {replicas} replicas")
    return [PEOPLE] * first + [BATCH] * (replicas - first)


def silos(people: int, standard: int, batch: int) -> Arm:
    """So many replicas for each class. `split` finds them in proportion to need."""
    counts = {PEOPLE: people, STANDARD: standard, BATCH: batch}

    def lanes(replicas: int) -> list[str]:
        if sum(counts.values()) != replicas or min(counts.values()) < 0:
            raise ValueError(f"silos: {people} + {standard} + {batch} must be the {replicas} replicas")
        return [name for name, count in counts.items() for _ in range(count)]

    return Arm(f"silos-{people}-{standard}-{batch}", Silos, lanes=lanes)


def split(replicas: int, needs: Sequence[float]) -> list[int]:
    """Whole replicas in proportion to needs: at least one for each need above 0, the largest remainders up.

    Raises:
        ValueError: there are fewer replicas than needs above 0.
    """
    some = [need > 0 for need in needs]
    if sum(some) > replicas or not any(some):
        raise ValueError(f"{replicas} replicas cannot be split among needs {list(needs)}")
    exact = [replicas * need / sum(needs) for need in needs]
    counts = [max(int(share), least) for share, least in zip(exact, some, strict=True)]
    while (spare := replicas - sum(counts)) != 0:
        lacks = [share - count for share, count in zip(exact, counts, strict=True)]
        if spare > 0:
            counts[lacks.index(max(lacks))] += 1
        else:
            most = min((i for i, c in enumerate(counts) if c > 1), key=lambda i: lacks[i])
            counts[most] -= 1
    return counts
