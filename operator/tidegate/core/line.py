"""Who waits: the requests of one class of one model, and whose turn it is.

Tenants share by tokens, with a virtual counter each: who has had the least goes first (VTC, "Fairness
in Serving Large Language Models", OSDI 2024). Who comes back after a pause starts at the least
counter of those who wait, so that no credit is saved up. Within a tenant goes first what must be sent
first to be in time. What cannot be in time any more waits behind what still can, of any tenant, and so
does what has no deadline; both in the order in which they came there.

Each operation costs the logarithm of what waits.
"""

import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tidegate.core.flowtypes import Ask, ModelKey
from tidegate.core.load import Rate

_LOOK: Final = 64
"""So many of those in front are looked at for one whose prompt suits."""
PROMPT_WEIGHT, OUTPUT_WEIGHT = 1, 2
"""What a token counts, as in VTC: one that is generated takes about twice the time of one that is read."""
_REMEMBERED: Final = 1000
"""So many tenants that do not wait are remembered at most: their names may be a client's inventions."""
_PLACES_BY_FREE: Final = 2
"""A tenant may have so many times the free places of a bounded queue; see `Line.crowds`."""
_SHOWN: Final = 20

LineKey = tuple[ModelKey, str]
"""A model, and a class of it."""
Kind = tuple[bool, bool]
"""Whether it is behind those who can still be in time, and whether it is streamed."""
_KINDS: Final[tuple[Kind, ...]] = ((False, False), (False, True), (True, False), (True, True))


@dataclass(slots=True)
class Waiting:
    """A request that waits, `since` when; `due` is when it must be sent at the latest to be in time.

    Times are seconds. `due` is infinite where nothing is promised, or where the promise is lost.
    """

    ask: Ask
    since: float
    due: float = math.inf
    tenant: str = ""
    number: int = 0
    relegated: bool = False

    @property
    def kind(self) -> Kind:
        """Where it stands."""
        return (self.due == math.inf, self.ask.streamed)


class _Dated:
    """Requests of one tenant, the first due first. What leaves from between is left behind as a gap."""

    __slots__ = ("_heap", "_there")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int]] = []
        self._there: dict[int, Waiting] = {}

    def __len__(self) -> int:
        return len(self._there)

    def add(self, one: Waiting) -> None:
        self._there[one.ask.id] = one
        heapq.heappush(self._heap, (one.due, one.number, one.ask.id))

    def drop(self, request: int) -> None:
        del self._there[request]
        if len(self._heap) > 2 * len(self._there) + _LOOK:
            self._heap = [entry for entry in self._heap if entry[2] in self._there]
            heapq.heapify(self._heap)

    def head(self) -> Waiting:
        while self._heap[0][2] not in self._there:
            heapq.heappop(self._heap)
        return self._there[self._heap[0][2]]

    def some(self) -> Iterator[Waiting]:
        """The head, and some that are due soon: the top of the heap."""
        self.head()
        return (self._there[e[2]] for e in itertools.islice(self._heap, _LOOK) if e[2] in self._there)


class _Undated:
    """Requests of one tenant in the order in which they came here."""

    __slots__ = ("_there",)

    def __init__(self) -> None:
        self._there: OrderedDict[int, Waiting] = OrderedDict()

    def __len__(self) -> int:
        return len(self._there)

    def add(self, one: Waiting) -> None:
        self._there[one.ask.id] = one

    def drop(self, request: int) -> None:
        del self._there[request]

    def head(self) -> Waiting:
        return next(iter(self._there.values()))

    def some(self) -> Iterator[Waiting]:
        """The oldest of them."""
        return itertools.islice(self._there.values(), _LOOK)


@dataclass(slots=True)
class Tenant:
    """What a tenant has waiting, and what it has had.

    `served` are weighted tokens by its weight, `floor` what it began with when it last came back: what
    it is given back later does not take it below that. `turn` counts up when it is served, so that of equals
    the one that has waited longer for it goes first.
    """

    name: str
    weight: int = 1
    served: float = 0.0
    floor: float = 0.0
    turn: int = 0
    waiting: int = 0
    queues: dict[Kind, _Dated | _Undated] = field(default_factory=dict)


class _Order:
    """Tenants that have something of one kind, the one that was served least first.

    Entries that are not true any more are left behind and passed over.
    """

    __slots__ = ("_heap", "_kind", "_there")

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._heap: list[tuple[float, int, str]] = []
        self._there: dict[str, Tenant] = {}

    def put(self, tenant: Tenant) -> None:
        """It has something of this kind, or was served."""
        self._there[tenant.name] = tenant
        if len(self._heap) > 2 * len(self._there) + _LOOK:
            self._heap = [(t.served, t.turn, t.name) for t in self._there.values()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (tenant.served, tenant.turn, tenant.name))

    def drop(self, tenant: Tenant) -> None:
        """It has nothing of this kind any more."""
        del self._there[tenant.name]

    def first(self) -> Tenant | None:
        """Whose turn it is."""
        while self._heap:
            served, turn, name = self._heap[0]
            tenant = self._there.get(name)
            if tenant is not None and (tenant.served, tenant.turn) == (served, turn):
                return tenant
            heapq.heappop(self._heap)
        return None


class Line:
    """The requests of one (model, class) that wait, and how fast they leave."""

    __slots__ = (
        "_floor",
        "_heads",
        "_idle",
        "_near",
        "_numbers",
        "_orders",
        "_turns",
        "all",
        "drained",
        "relegated",
        "sent_s",
        "streamed",
        "tenants",
    )

    def __init__(self) -> None:
        self.all: OrderedDict[int, Waiting] = OrderedDict()
        """Everybody, the oldest first."""
        self.tenants: dict[str, Tenant] = {}
        self.drained = Rate(30.0)
        self.sent_s = -math.inf
        """When the last of them was sent."""
        self.streamed = 0
        self.relegated = 0
        """How many were sent behind the others, ever."""
        self._orders = {kind: _Order(kind) for kind in _KINDS}
        self._numbers, self._turns = itertools.count(), itertools.count(1)
        self._floor = 0.0
        self._idle: OrderedDict[str, None] = OrderedDict()
        # What `head` and `near` found, until somebody comes, goes, steps back or is charged for.
        self._heads: dict[bool, Waiting | None] = {}
        self._near: dict[tuple[int, bool], list[Waiting]] = {}

    def __len__(self) -> int:
        return len(self.all)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self.all.values())

    @property
    def tenants_waiting(self) -> int:
        """How many have something here."""
        return len(self.tenants) - len(self._idle)

    # ── who comes and goes ──────────────────────────────────────────────────────────────────────

    def crowds(self, tenant: str, most: int) -> bool:
        """Whether a tenant already has all the places that it may have of a queue of `most`.

        Twice as many as are free (dynamic thresholds: Choudhury and Hahne, 1998): alone two thirds of
        the queue, and of k who flood it each 2 of 2k + 1 parts. Whoever has nothing there finds a
        place, and nobody is pushed out for it.
        """
        known = self.tenants.get(tenant)
        return known is not None and known.waiting >= _PLACES_BY_FREE * (most - len(self.all))

    def add(self, ask: Ask, now: float, tenant: str = "", weight: int = 1, due: float = math.inf) -> Waiting:
        """Queue it."""
        self._changed()
        one = Waiting(ask, now, due, tenant, next(self._numbers))
        whose = self.tenants.get(tenant)
        if whose is None:
            whose = self.tenants[tenant] = Tenant(tenant)
        whose.weight = weight
        if not whose.waiting:
            self._idle.pop(tenant, None)
            whose.floor = self.least()
            whose.served = max(whose.served, whose.floor)
        self.all[ask.id] = one
        self.streamed += ask.streamed
        whose.waiting += 1
        self._put(whose, one)
        return one

    def pop(self, request: int) -> Waiting:
        """Take it out."""
        self._changed()
        one = self.all.pop(request)
        whose = self.tenants[one.tenant]
        self._take(whose, one)
        whose.waiting -= 1
        self.streamed -= one.ask.streamed
        if not whose.waiting:
            self._idle[one.tenant] = None
            if len(self._idle) > _REMEMBERED:
                del self.tenants[self._idle.popitem(last=False)[0]]
        if not self.all:
            self._floor = max(self._floor, whose.served)
        return one

    def relegate(self, one: Waiting) -> None:
        """Put one that cannot be in time behind all that still can."""
        self._changed()
        whose = self.tenants[one.tenant]
        self._take(whose, one)
        one.due, one.relegated = math.inf, True
        self.relegated += 1
        self._put(whose, one)

    def relegate_late(self, head: Waiting, now: float) -> list[Waiting]:
        """The same for `head`, which is late, and for all that are late in its queue."""
        self._changed()
        whose, kind = self.tenants[head.tenant], head.kind
        queue, late = whose.queues[kind], []
        while queue and (one := queue.head()).due < now:
            queue.drop(one.ask.id)
            late.append(one)
        if not queue:
            self._close(whose, kind)
        self.relegated += len(late)
        for one in late:
            one.due, one.relegated = math.inf, True
            self._put(whose, one)
        return late

    def charge(self, tenant: str, tokens: float) -> None:
        """Count weighted tokens to a tenant; negative ones give back what was not used."""
        whose = self.tenants.get(tenant)
        if whose is None:
            return
        self._changed()
        whose.served = max(whose.floor, whose.served + tokens / whose.weight)
        if tokens > 0:
            whose.turn = next(self._turns)
        for kind in whose.queues:
            self._orders[kind].put(whose)

    def least(self) -> float:
        """What the tenant that waits and was served least has had; where nobody waits, who waited last."""
        first = (tenant.served for order in self._orders.values() if (tenant := order.first()))
        return min(first, default=self._floor)

    # ── whose turn it is ────────────────────────────────────────────────────────────────────────

    def oldest(self) -> Waiting | None:
        """Who waits longest."""
        return next(iter(self.all.values()), None)

    def head(self, *, whole_only: bool = False) -> Waiting | None:
        """Whose turn it is."""
        if whole_only not in self._heads:
            self._heads[whole_only] = self._find_head(whole_only=whole_only)
        return self._heads[whole_only]

    def near(self, head: Waiting, *, whole_only: bool = False) -> Sequence[Waiting]:
        """Those of its tenant that stand about where `head` does, the shortest prompt first."""
        found = self._near.get((head.ask.id, whole_only))
        if found is None:
            found = self._near[head.ask.id, whole_only] = self._find_near(head, whole_only=whole_only)
        return found

    def describe(self, now: float) -> dict[str, Any]:
        """The line as JSON values; of the tenants those that have the most waiting."""
        oldest, head = self.oldest(), self.head()
        waiting = (t for t in self.tenants.values() if t.waiting)
        crowd = heapq.nlargest(_SHOWN, waiting, key=lambda t: t.waiting)
        least = self.least()
        return {
            "waiting": len(self.all),
            "streamed": self.streamed,
            "oldest_s": round(now - oldest.since, 3) if oldest else 0.0,
            "drained_per_s": round(self.drained.value(now), 3),
            "first_due_in_s": round(head.due - now, 3) if head and head.due < math.inf else None,
            "relegated": self.relegated,
            "tenants": {
                t.name: {"waiting": t.waiting, "weight": t.weight, "tokens_ahead": round(t.served - least)}
                for t in crowd
                if t.name
            },
        }

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _changed(self) -> None:
        self._heads.clear()
        self._near.clear()

    def _find_head(self, *, whole_only: bool) -> Waiting | None:
        for late in (False, True):
            kinds = ((late, False),) if whole_only else ((late, False), (late, True))
            firsts = [(t, t.queues[kind].head()) for kind in kinds if (t := self._orders[kind].first())]
            if firsts:
                return min(firsts, key=_turn)[1] if len(firsts) > 1 else firsts[0][1]
        return None

    def _find_near(self, head: Waiting, *, whole_only: bool) -> list[Waiting]:
        queues = self.tenants[head.tenant].queues
        late = head.kind[0]
        kinds = ((late, False),) if whole_only else ((late, False), (late, True))
        near = itertools.chain.from_iterable(queues[kind].some() for kind in kinds if kind in queues)
        return sorted(near, key=lambda one: (one.ask.prompt_tokens, one.ask.id))

    def _put(self, whose: Tenant, one: Waiting) -> None:
        queue = whose.queues.get(one.kind)
        if queue is None:
            queue = whose.queues[one.kind] = _Undated() if one.kind[0] else _Dated()
            self._orders[one.kind].put(whose)
        queue.add(one)

    def _take(self, whose: Tenant, one: Waiting) -> None:
        queue = whose.queues[one.kind]
        queue.drop(one.ask.id)
        if not queue:
            self._close(whose, one.kind)

    def _close(self, whose: Tenant, kind: Kind) -> None:
        """A tenant has nothing of this kind any more."""
        del whose.queues[kind]
        self._orders[kind].drop(whose)


def _turn(first: tuple[Tenant, Waiting]) -> tuple[float, int, float, float, int]:
    tenant, one = first
    return (tenant.served, tenant.turn, one.due, one.since, one.ask.id)
