"""A pool in figures: who uses which GPUs, and how each reservation stands. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tidegate.core.quota import standings
from tidegate.core.types import Pod, Pool, QoSClass


@dataclass(frozen=True, slots=True)
class ReservationReport:
    """One reservation, in GPUs."""

    name: str
    qos_class: str
    reserved: int
    in_use: int
    borrowed: int
    lent: int
    unmet: int


@dataclass(frozen=True, slots=True)
class PoolReport:
    """One pool, in GPUs. `used` and `borrowed` are by class; `blocks` are (GPUs of a node, most free)."""

    capacity: int
    allocated: int
    foreign: int
    used: Mapping[str, int]
    borrowed: Mapping[str, int]
    reservations: tuple[ReservationReport, ...]
    blocks: tuple[tuple[int, int], ...]
    borrowing: frozenset[str]
    """UIDs of the placed pods that borrow."""

    @property
    def idle(self) -> int:
        """GPUs that nobody uses."""
        return max(0, self.capacity - self.allocated - self.foreign)


def report(pool: Pool, pods: Iterable[Pod], classes: Mapping[str, QoSClass]) -> PoolReport:
    """Count a pool.

    A reservation *lends* what is reserved, not used by its own pods, and used by others: GPUs used
    outside every reservation, less those that nobody reserved. It is counted against reservations
    from the lowest class up, since those are what a borrower may reach last.

    `in_use` is what stands in it by the extender's count: pods that are placed and not going, the
    oldest first. `unmet` is what pods that wait may claim of the rest; whoever waits beyond that has
    no claim.
    """
    pods = list(pods)
    placed = [p for p in pods if p.node]
    stands = standings(placed, pool.reservations, classes)
    used, borrowed = defaultdict[str, int](int), defaultdict[str, int](int)
    in_use, waiting, outside = defaultdict[str, int](int), defaultdict[str, int](int), 0
    for pod in placed:
        stand = stands[pod.uid]
        if pod.qos_class:
            used[pod.qos_class] += pod.gpus
        if pod.terminating:
            continue
        if stand.reservation:
            in_use[stand.reservation] += pod.gpus
        else:
            outside += pod.gpus
            if stand.borrowed and pod.qos_class:
                borrowed[pod.qos_class] += pod.gpus
    for pod in sorted((p for p in pods if not p.node and not p.terminating), key=lambda p: p.age_key):
        for r in pool.reservations:
            room = r.gpus - in_use[r.name] - waiting[r.name]
            if r.covers(pod.qos_class or "", pod.namespace) and room >= pod.gpus:
                waiting[r.name] += pod.gpus
                break
    unreserved = max(0, pool.capacity - sum(r.gpus for r in pool.reservations))
    lent = _lent(pool, classes, in_use, max(0, outside - unreserved))
    by_reservation = _borrowed_by_reservation(pool, placed, {u for u, s in stands.items() if s.borrowed})
    return PoolReport(
        capacity=pool.capacity,
        allocated=sum(used.values()),
        foreign=sum(p.gpus for p in placed if not p.qos_class),
        used=dict(used),
        borrowed=dict(borrowed),
        reservations=tuple(
            ReservationReport(
                r.name,
                r.qos_class,
                r.gpus,
                in_use[r.name],
                by_reservation[r.name],
                lent[r.name],
                waiting[r.name],
            )
            for r in pool.reservations
        ),
        blocks=_blocks(pool, placed),
        borrowing=frozenset(p.uid for p in placed if stands[p.uid].borrowed),
    )


def _lent(
    pool: Pool, classes: Mapping[str, QoSClass], in_use: Mapping[str, int], outside: int
) -> defaultdict[str, int]:
    def rank(name: str) -> int:
        return classes[name].priority if name in classes else 0

    lent: defaultdict[str, int] = defaultdict(int)
    for r in sorted(pool.reservations, key=lambda r: (rank(r.qos_class), r.name)):
        lent[r.name] = min(outside, max(0, r.gpus - in_use[r.name]))
        outside -= lent[r.name]
    return lent


def _borrowed_by_reservation(pool: Pool, placed: Iterable[Pod], borrows: set[str]) -> defaultdict[str, int]:
    """What pods borrow beyond the first reservation that is for their class and namespace."""
    found: defaultdict[str, int] = defaultdict(int)
    for pod in placed:
        home = next((r for r in pool.reservations if r.covers(pod.qos_class or "", pod.namespace)), None)
        if home and pod.uid in borrows:
            found[home.name] += pod.gpus
    return found


def _blocks(pool: Pool, placed: Iterable[Pod]) -> tuple[tuple[int, int], ...]:
    taken: defaultdict[str, int] = defaultdict(int)
    for pod in placed:
        taken[pod.node or ""] += pod.gpus
    largest: dict[int, int] = {}
    for node in pool.nodes:
        if node.gpus:
            free = max(0, node.gpus - taken[node.name])
            largest[node.gpus] = max(largest.get(node.gpus, 0), free)
    return tuple(sorted(largest.items()))
