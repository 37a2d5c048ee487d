"""A lane that shrinks empties its replicas before they go: what streams from them is not cut.

The controller marks the replicas that are to go, the picker sends nothing more there, and only when
nothing is in flight on one is the lane's Deployment lowered by it. A ReplicaSet deletes what is not
ready first and then by deletion cost, so that those marked go and no others. All of the state is in
the pods' annotations.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from tidegate.core.quota import Ground
from tidegate.core.types import Objectives

LIMIT_S: Final = 600.0
"""Longest drain. Whoever claims the GPUs meanwhile preempts them as always, so waiting costs nobody
his reservation; the grace period of lanes that are never reclaimed is as long."""

_ORDER: Final = {Ground.LENT: 0, Ground.SPARE: 1, Ground.RESERVED: 2}


@dataclass(frozen=True, slots=True)
class Replica:
    """A pod of a lane that is not going. Times in Unix seconds.

    `in_flight` is None where nobody knows. `marked_s` is since when it is being emptied, None when
    it is not; `empty` that the picker knows of the mark and has nothing there any more. `released`:
    it was found to be empty, or out of time, before, and is the cheapest to delete. `asked`: another
    lane's replica is planned for its place.
    """

    name: str
    ready: bool
    created_s: float
    ground: Ground = Ground.RESERVED
    in_flight: int | None = None
    marked_s: float | None = None
    empty: bool = False
    released: bool = False
    asked: bool = False


@dataclass(frozen=True, slots=True)
class Drain:
    """What to write for a lane: its Deployment's replicas, and marks by the names of pods."""

    replicas: int
    mark: tuple[str, ...] = ()
    release: tuple[str, ...] = ()
    unmark: tuple[str, ...] = ()


def limit_s(objectives: Objectives) -> float:
    """Seconds after which a replica goes whatever runs there.

    The class's completion objective, at most ten minutes, for every class alike.
    """
    return min(objectives.completion_s or LIMIT_S, LIMIT_S)


def drain(target: int, current: int, replicas: Iterable[Replica], limit: float, now: float) -> Drain:
    """Say how far a lane may be lowered now, and which of its replicas are emptied next.

    Who goes: what is not ready (at once: nothing runs there), whose place is asked for, what is marked
    already, then lent before spare before reserved, fewest in flight, the youngest; names break ties.
    Marks that are needed no more are taken off, and nothing was lost.

    Args:
        target: replicas that the plan wants.
        current: replicas that the Deployment asks for.
        replicas: its pods that are not going.
        limit: seconds that a replica may take to become empty.
        now: Unix seconds.
    """
    live = sorted(replicas, key=_goes_first)
    marked = [r for r in live if r.marked_s is not None]
    surplus = max(0, len(live) - target)
    if target >= current:
        # Lowered already, or raised again: only what was released may still be on its way out.
        going = {r.name for r in [r for r in live if r.released][:surplus]}
        return Drain(target, unmark=tuple(r.name for r in marked if r.name not in going))
    leaving = live[:surplus]
    names = {r.name for r in leaving}
    free = sum(not r.ready or r.released for r in leaving)
    ready = [r for r in leaving if r.ready]
    return Drain(
        replicas=max(target, min(current, len(live) - free)),
        mark=tuple(r.name for r in ready if r.marked_s is None),
        release=tuple(r.name for r in ready if not r.released and _done(r, limit, now)),
        unmark=tuple(r.name for r in marked if r.name not in names),
    )


def _goes_first(r: Replica) -> tuple[bool, bool, bool, bool, int, float, float, str]:
    running = float("inf") if r.in_flight is None else r.in_flight
    unmarked = r.marked_s is None
    return (r.ready, not r.released, not r.asked, unmarked, _ORDER[r.ground], running, -r.created_s, r.name)


def _done(r: Replica, limit: float, now: float) -> bool:
    return r.marked_s is not None and (r.empty or now - r.marked_s >= limit)
