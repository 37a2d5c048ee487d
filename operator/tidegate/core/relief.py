"""Whom an overloaded engine gives up, so that few are late and none of those that matter more.

In the order of their deadlines, whenever one would be late, the longest so far is given up: that leaves the
fewest late of all that wait (J. M. Moore, "An n Job, One Machine Sequencing Algorithm for Minimizing the
Number of Late Jobs", 1968, with T. J. Hodgson's rule). Of several ranks the lowest is given up first, and
one of a higher rank only where nothing lower is left before it (J. B. Sidney, 1973). Plain values in, plain
values out.
"""

import heapq
from collections.abc import Iterable
from operator import attrgetter
from typing import NamedTuple

_DUE = attrgetter("due_s")


class Claim(NamedTuple):
    """A request that waits: when it is due, how long an engine works on it, and its rank, 0 the highest."""

    id: str
    due_s: float
    work_s: float
    rank: int


def give_up(claims: Iterable[Claim], now: float) -> list[Claim]:
    """Those that are to be served behind all others, so that the others are in time.

    The others are, if they are served by deadline from `now` on and nobody else comes. Times are seconds.
    """
    kept: list[tuple[int, float, str, Claim]] = []
    given: list[Claim] = []
    end_s = now
    for claim in sorted(claims, key=_DUE):
        end_s += claim.work_s
        heapq.heappush(kept, (-claim.rank, -claim.work_s, claim.id, claim))
        while kept and end_s > claim.due_s:
            gone = heapq.heappop(kept)[3]
            end_s -= gone.work_s
            given.append(gone)
    return given
