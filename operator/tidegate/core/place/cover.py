"""Whether unmet reservations could be served, in blocks that one node can hold.

Nodes with the same shape are interchangeable here, so the work grows with the number of different
shapes (a few dozen), not with that of nodes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Shape = tuple[int, tuple[tuple[int, int], ...]]
"""A node: GPUs that are open, and (priority of the borrowing class, GPUs it could give back)."""


@dataclass(frozen=True, slots=True)
class Need:
    """GPUs that a reservation still waits for, in blocks: (GPUs a block, how many), largest first."""

    reservation: str
    priority: int
    blocks: tuple[tuple[int, int], ...]


def blocks(gpus: int, sizes: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Cut `gpus` into replicas of these sizes, the largest first; what is left over fits no replica."""
    found = []
    for size in sorted({s for s in sizes if s > 0} or {1}, reverse=True):
        count, gpus = divmod(gpus, size)
        if count:
            found.append((size, count))
    return tuple(found)


def shortfalls(shapes: Mapping[Shape, int], needs: Sequence[Need], *, reclaim: bool = True) -> dict[str, int]:
    """GPUs by reservation that could not be given to it, were all asked back at once.

    Reservations of higher priority go first. A block lies on one node, and takes its open GPUs and
    what classes below can give back there; the latter of the highest class first, since open GPUs
    serve everybody. Best fit, so what is called covered is covered; a cleverer packing may exist.

    Args:
        shapes: how many nodes there are of each shape.
        needs: what is waited for.
        reclaim: False counts open GPUs only.
    """
    left = dict(shapes)
    short: dict[str, int] = {}
    for need in sorted(needs, key=lambda n: (-n.priority, n.reservation)):
        priority = need.priority if reclaim else None
        for size, count in need.blocks:
            missing = _serve(left, priority, size, count)
            if missing:
                short[need.reservation] = short.get(need.reservation, 0) + size * missing
    return short


def _serve(left: dict[Shape, int], priority: int | None, size: int, count: int) -> int:
    """Take `count` blocks out of `left`; returns how many found no place."""
    while count:
        fitting = [(_available(s, priority), s) for s in left]
        best = min((f for f in fitting if f[0] >= size), default=None)
        if best is None:
            return count
        available, shape = best
        per_node = available // size
        nodes = min(left[shape], count // per_node)
        take = per_node if nodes else count
        nodes = nodes or 1
        count -= nodes * take
        left[shape] -= nodes
        if not left[shape]:
            del left[shape]
        rest = _without(shape, priority, take * size)
        left[rest] = left.get(rest, 0) + nodes
    return 0


def _available(shape: Shape, priority: int | None) -> int:
    if priority is None:
        return shape[0]
    return shape[0] + sum(gpus for tier, gpus in shape[1] if tier < priority)


def _without(shape: Shape, priority: int | None, gpus: int) -> Shape:
    tiers = dict(shape[1])
    if priority is not None:
        for tier in sorted((t for t in tiers if t < priority), reverse=True):
            taken = min(gpus, tiers[tier])
            gpus -= taken
            tiers[tier] -= taken
    return (shape[0] - gpus, tuple(sorted((t, g) for t, g in tiers.items() if g)))
