"""The GPUs of one pool while a plan is made: blocks on nodes, and who sits on them."""

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from tidegate.core.plan.types import LaneKey
from tidegate.core.quota import Ground, standings
from tidegate.core.types import Pod, Pool, QoSClass, Reclaim


@dataclass(slots=True)
class Seat:
    """A bound pod of the pool. `at` is its node's index, None on a node that offers nothing now.

    `home` is the reservation that it counts in.
    """

    pod: Pod
    at: int | None
    borrowed: bool
    priority: int
    lent: bool = False
    home: str | None = None


@dataclass(slots=True)
class Board:
    """Free GPUs by node, seats by lane, and how much of each node is held for good.

    `free` counts what pods that go hold still; `now` is what nobody holds at this moment. `firm`
    counts GPUs that nobody may take back: foreign pods and pods that are not reclaimable.
    """

    names: list[str]
    size: list[int]
    free: list[int]
    now: list[int]
    firm: list[int]
    seats: dict[LaneKey, list[Seat]] = field(default_factory=lambda: defaultdict(list))
    strays: list[Seat] = field(default_factory=list)
    borrowed: list[Seat] = field(default_factory=list)
    foreign: int = 0
    _by_free: "_Levels" = field(init=False)
    _by_now: "_Levels" = field(init=False)
    _granted: set[str] = field(default_factory=set)

    def index(self) -> None:
        """Order the nodes by what is free on them; call once after the seats are laid out."""
        most = max(self.size, default=0)
        self._by_free, self._by_now = _Levels(self.free, most), _Levels(self.now, most)

    def levels(self, gpus: int, *, now: bool) -> Iterable[int]:
        """One node for each amount of free GPUs (`now`: free already) that holds the block, fullest first."""
        return (self._by_now if now else self._by_free).holding(gpus)

    def largest(self) -> tuple[int, str]:
        """Largest free block and the name of the first node that has it."""
        level, at = self._by_free.largest()
        return level, "" if at is None else self.names[at]

    def take(self, at: int, gpus: int, firm: bool) -> None:
        """Put a new replica on a node that has the room, or will have."""
        self._by_free.set(at, self.free[at] - gpus)
        holds_now = self.now[at] >= gpus
        self._by_now.set(at, self.now[at] - gpus if holds_now else min(self.now[at], self.free[at]))
        if firm:
            self.firm[at] += gpus

    def keep(self, seat: Seat, firm: bool) -> None:
        """Grant a seat to its lane: nothing displaces it any more."""
        self._granted.add(seat.pod.uid)
        if firm and seat.at is not None:
            self.firm[seat.at] += seat.pod.gpus

    def release(self, seat: Seat) -> None:
        """Free a seat that its own lane gives up, or that is displaced."""
        self._granted.add(seat.pod.uid)
        if seat.at is not None:
            self._by_free.set(seat.at, self.free[seat.at] + seat.pod.gpus)

    def alive(self, seat: Seat) -> bool:
        """Whether a seat is neither granted nor released."""
        return seat.pod.uid not in self._granted

    def victims(
        self,
        gpus: int,
        claimant: QoSClass,
        classes: Mapping[str, QoSClass],
        now: float,
        may_go: Callable[[Seat], bool],
    ) -> "Victims":
        """Where a block can be made from borrowed pods of lower classes. Those that drain come first."""
        found = Victims(self, gpus)
        by_node: defaultdict[int, list[Seat]] = defaultdict(list)
        self.borrowed = [s for s in self.borrowed if self.alive(s)]
        for seat in self.borrowed:
            if seat.at is None or seat.priority >= claimant.priority or not may_go(seat):
                continue
            if _ran_enough(seat.pod, claimant, classes, now):
                by_node[seat.at].append(seat)
            else:
                found.too_young += 1
        for at, seats in by_node.items():
            seats.sort(
                key=lambda s: (
                    *(not s.pod.draining, not s.lent, s.priority),
                    *(-(s.pod.started_s or s.pod.created_s), s.pod.uid),
                )
            )
            found.offer(at, seats)
        return found


class _Levels:
    """Nodes ordered by an amount of GPUs; the amounts are the caller's list."""

    def __init__(self, amounts: list[int], most: int) -> None:
        self._amounts = amounts
        self._at: list[list[int]] = [[] for _ in range(most + 1)]
        for at, amount in enumerate(amounts):
            self._at[max(amount, 0)].append(at)

    def set(self, at: int, amount: int) -> None:
        self._amounts[at] = amount
        heapq.heappush(self._at[max(amount, 0)], at)

    def _first(self, level: int) -> int | None:
        """First node, by name, with exactly this much. Entries that are out of date are dropped."""
        heap = self._at[level]
        while heap and max(self._amounts[heap[0]], 0) != level:
            heapq.heappop(heap)
        return heap[0] if heap else None

    def holding(self, gpus: int) -> Iterable[int]:
        for level in range(gpus, len(self._at)):
            at = self._first(level)
            if at is not None:
                yield at

    def largest(self) -> tuple[int, int | None]:
        for level in range(len(self._at) - 1, 0, -1):
            at = self._first(level)
            if at is not None:
                return level, at
        return 0, None


class Victims:
    """Nodes on which a block can be made, least loss first.

    Fewest pods that do not drain already first, then fewest on spare GPUs, then fewest pods, then the
    lowest class, then those that have run for the shortest time; node names break ties.
    """

    def __init__(self, board: Board, gpus: int) -> None:
        """Nothing is offered yet, for blocks of this many GPUs."""
        self.too_young = 0
        self._board, self._gpus = board, gpus
        self._heap: list[tuple[int, int, int, int, float, int, int, list[Seat], list[Seat]]] = []

    def offer(self, at: int, seats: list[Seat]) -> None:
        """Consider one node with the seats on it that may go."""
        free = self._board.free[at]
        chosen = _enough(seats, self._gpus - free)
        if chosen:
            youngest = -max(s.pod.started_s or s.pod.created_s for s in chosen)
            entry = (*_loss(chosen), max(s.priority for s in chosen), youngest, at, free, chosen, seats)
            heapq.heappush(self._heap, entry)

    def best(
        self, allowed: Callable[[int], bool], spared: Callable[[Seat], bool] | None = None
    ) -> tuple[int, list[Seat]] | None:
        """Take the node where the least is lost, with who must go; None when there is none.

        The node is offered again on the next call: it may hold another block. Nodes that are not
        `allowed` are passed over for good; seats that are `spared` only this time, and a node where
        the least loss would be one of those comes after all others.
        """
        board, found = self._board, None
        aside: list[tuple[int, list[Seat]]] = []
        while self._heap and found is None:
            *_, at, free, chosen, seats = heapq.heappop(self._heap)
            if not allowed(at):
                continue
            if free != board.free[at] or not all(board.alive(s) for s in chosen):
                if free != board.free[at] or not all(board.alive(s) for s in seats):
                    self.offer(at, [s for s in seats if board.alive(s)])
            elif spared and any(map(spared, chosen)):
                aside.append((at, seats))
            else:
                found = at, chosen
                # Looked at again, and found changed, when its turn comes.
                heapq.heappush(self._heap, (*_loss(chosen), chosen[0].priority, 0.0, at, -1, chosen, seats))
        for at, seats in aside:
            alive = [s for s in seats if board.alive(s)]
            if found is None and spared:
                others = _enough([s for s in alive if not spared(s)], self._gpus - board.free[at])
                found = (at, others) if others else None
            self.offer(at, alive)
        return found


def _loss(chosen: list[Seat]) -> tuple[int, int, int]:
    return (sum(not s.pod.draining for s in chosen), sum(not s.lent for s in chosen), len(chosen))


def _ran_enough(pod: Pod, claimant: QoSClass, classes: Mapping[str, QoSClass], now: float) -> bool:
    if claimant.reclaim is Reclaim.NEVER:
        return True
    qos = classes.get(pod.qos_class or "")
    return qos is None or now - (pod.started_s or pod.created_s) >= qos.min_runtime_s


def _enough(seats: list[Seat], missing: int) -> list[Seat] | None:
    """The first seats that free what is missing, without any that turn out not to be needed."""
    chosen: list[Seat] = []
    for seat in seats:
        if missing <= 0:
            break
        chosen.append(seat)
        missing -= seat.pod.gpus
    if missing > 0:
        return None
    for seat in list(chosen):
        if seat.pod.gpus <= -missing:
            chosen.remove(seat)
            missing += seat.pod.gpus
    return chosen


def lay_out(
    pool: Pool, pods: Iterable[Pod], lanes: Mapping[LaneKey, int], classes: Mapping[str, QoSClass]
) -> Board:
    """Put the bound pods of a pool on its nodes.

    A lane's pod that is going counts as free, though not now: what is planned for its place waits. A foreign
    pod counts until it is gone. A pod on a node that offers nothing (cordoned, not Ready) keeps its
    seat, and costs nothing of what the pool can allocate.

    Args:
        pool: the pool.
        pods: bound pods of its nodes and of its lanes.
        lanes: the lanes planned for, by what they should keep at most (seats beyond are released).
        classes: QoSClasses by name.
    """
    nodes = sorted(pool.nodes, key=lambda n: n.name)
    board = Board(
        names=[n.name for n in nodes],
        size=[n.gpus for n in nodes],
        free=[n.gpus for n in nodes],
        now=[n.gpus for n in nodes],
        firm=[0] * len(nodes),
    )
    place = {n.name: at for at, n in enumerate(nodes)}
    ours: list[tuple[Pod, QoSClass, int | None]] = []
    for pod in sorted(pods, key=lambda p: p.age_key):
        at = place.get(pod.node or "")
        if at is not None and board.size[at] == 0:
            at = None
        qos = classes.get(pod.qos_class or "")
        if qos is not None:
            if not pod.terminating:
                ours.append((pod, qos, at))
            elif at is not None:
                board.now[at] -= pod.gpus
        elif at is not None:
            board.free[at] -= pod.gpus
            board.now[at] -= pod.gpus
            board.firm[at] += pod.gpus
            board.foreign += pod.gpus
    seats = [Seat(pod, at, False, qos.priority) for pod, qos, at in ours]
    _stand(seats, pool, board, classes)
    for seat in seats:
        key = LaneKey(seat.pod.namespace, seat.pod.model or "", seat.pod.qos_class or "")
        (board.seats[key] if key in lanes else board.strays).append(seat)
        if seat.at is not None:
            board.free[seat.at] -= seat.pod.gpus
            board.now[seat.at] -= seat.pod.gpus
    board.index()
    for key, most in lanes.items():
        _trim(board, key, most)
    staying = [s for s in seats if board.alive(s)]
    if len(staying) < len(seats):
        _stand(staying, pool, board, classes)
    board.borrowed = [s for s in staying if s.borrowed]
    for mine in board.seats.values():
        mine.sort(key=lambda s: (s.home is None, s.pod.draining, not s.pod.ready, s.lent, s.pod.age_key))
    return board


def _stand(seats: Iterable[Seat], pool: Pool, board: Board, classes: Mapping[str, QoSClass]) -> None:
    """Say of every seat where it stands if these are all."""
    seats = list(seats)
    room = pool.capacity - board.foreign
    stands = standings((s.pod for s in seats), pool.reservations, classes, room)
    for seat in seats:
        stand = stands[seat.pod.uid]
        seat.borrowed, seat.home, seat.lent = stand.borrowed, stand.reservation, stand.ground is Ground.LENT


def _trim(board: Board, key: LaneKey, most: int) -> None:
    """Release what a lane gives up of itself, in the order of `drain`: unready, lent, spare, youngest."""
    seats = board.seats.get(key)
    if not seats:
        return
    seats.sort(key=lambda s: (not s.pod.ready, s.pod.draining, s.lent, s.borrowed, s.pod.age_key))
    for seat in seats[most:]:
        board.release(seat)
    del seats[most:]
