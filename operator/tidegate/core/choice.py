"""Which request of a line goes, and where to: its head, or to the front a short prompt near it."""

import bisect

from tidegate.core import pick
from tidegate.core.line import Line, Waiting
from tidegate.core.pick import NoRoom
from tidegate.core.room import Room, Turn


def choose(
    room: Room, line: Line, head: Waiting, turn: Turn, now: float, *, gated: bool
) -> tuple[Waiting, str | NoRoom]:
    """Who goes, and where: the head, or to the front a patient one near it that is soon done."""
    ask = head.ask
    need, found = room.need(ask, turn), room.candidates(ask, turn, now, gated=gated)
    if not (gated and turn.front and room.policy.pack.short):
        return head, pick.choose(need, found)
    chosen = pick.choose(need, (c for c in found if not c.front))
    if not isinstance(chosen, NoRoom) or all(c.kept_clear for c in found if c.front):
        return head, chosen
    # One that may go nowhere else goes to the front itself, or a long prompt would wait for ever.
    near = line.near(head, whole_only=turn.passing) if room.behind(ask, turn) else [head]
    shortest = near[0].ask
    ahead = (c for c in room.candidates(shortest, turn, now, gated=gated) if c.front)
    address = pick.choose(room.need(shortest, turn), ahead)
    if isinstance(address, NoRoom):
        return near[0], address
    near = [one for one in near if room.allows(one.ask, address)]
    soon = bisect.bisect_left(near, True, key=lambda one: not room.soon_done(one.ask, address, turn, now))
    return near[max(0, soon - 1)], address
