"""Find whole blocks of GPUs for what lanes want: what stays, floors, reservations, demand, idle.

Counting comes first (`quotas`: who may have how many), then room on a node (`board`). A replica
that runs is kept where it is before a new one is placed. A new one takes the fullest node that
holds it. Where there is none, borrowed pods of lower classes make room, in one of two ways.
Preemption serves reservations only: a replica with a claim (room in a reservation of its class) is
granted at once, and kube-scheduler and the extender evict for it. GPUs that nobody reserved change
hands by the plan: the borrower's lane hands replicas over, that is it is lowered, and the new replica
waits until its place is really free. So no pod waits for what nobody will give.
"""

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from tidegate.core import reasons
from tidegate.core.plan.board import Board, Seat, Victims, lay_out
from tidegate.core.plan.quotas import Quotas, Refusal, block_sizes
from tidegate.core.plan.scale import Want
from tidegate.core.plan.types import LaneKey
from tidegate.core.types import Pod, Pool, QoSClass, Reclaim

_EVERYTHING = 1 << 30


@dataclass(slots=True)
class Share:
    """What one lane got.

    `granted` replicas have a place, `displacing` of them only once borrowed pods are evicted;
    `borrowing` of them stand outside of reservations and can be taken back. `awaited` ones are not
    granted yet: their place is held, and somebody stands there still. `bound` pods run now;
    `displaced` of those are evicted for others, and `handed` (names) are to be drained for others.
    `refusal` is why it has no more.
    """

    want: Want
    seats: list[Seat]
    bound: int
    granted: int = 0
    displacing: int = 0
    borrowing: int = 0
    displaced: int = 0
    awaited: int = 0
    handed: list[str] = field(default_factory=list)
    refusal: Refusal | None = None

    def reclaimable(self) -> bool:
        """Whether the next replica could be given up."""
        return reclaimable(self.want, self.placed)

    @property
    def placed(self) -> int:
        """Replicas that have a place, or will have."""
        return self.granted + self.awaited

    @property
    def next_seat(self) -> Seat | None:
        """The oldest pod that is not granted yet."""
        return self.seats[self.granted - self._new] if self.granted - self._new < len(self.seats) else None

    _new: int = 0

    def count(self, seated: bool, borrows: bool) -> None:
        """One more replica is granted, on a seat of its own or not."""
        self.granted += 1
        self.borrowing += borrows
        self._new += not seated


def reclaimable(want: Want, index: int) -> bool:
    """Whether the lane's replica of this index (0 is the oldest) could be given up."""
    if want.qos.reclaim is Reclaim.ABOVE_MINIMUM:
        return index >= want.lane.min_replicas
    return want.qos.reclaim is Reclaim.ALWAYS


@dataclass(frozen=True, slots=True)
class Stage:
    """One round: how many replicas of a lane it grants, and what it may use for them."""

    upto: Callable[[Want], int]
    at_home: bool = False
    displaces: bool = True
    only_seats: bool = False
    takes_part: Callable[[Want], bool] = lambda _: True


def _solid(want: Want) -> int:
    """Replicas that nobody may take back."""
    if want.qos.reclaim is Reclaim.NEVER:
        return want.target
    return min(want.lane.min_replicas, want.target) if want.qos.reclaim is Reclaim.ABOVE_MINIMUM else 0


def _floor(want: Want) -> int:
    return min(want.lane.min_replicas, want.target)


def _always(want: Want) -> bool:
    return want.qos.reclaim is Reclaim.ALWAYS


STAGES = (
    # What runs and may not be taken is never in question.
    Stage(_solid, only_seats=True),
    # Floors, except those of Always classes, which yield to reservations.
    Stage(_floor, takes_part=lambda w: not _always(w)),
    # Reservations, as far as they are asked for: lent GPUs come back here.
    Stage(lambda w: w.firm, at_home=True),
    Stage(_floor, takes_part=_always),
    # The rest, by priority and then by demand.
    Stage(lambda w: w.firm),
    # Idle GPUs, to lanes that can give them back. Nobody is moved for it.
    Stage(lambda w: w.target, displaces=False),
)


@dataclass(slots=True)
class Allocation:
    """Grants of one pool, and where the GPUs stand after them."""

    shares: dict[LaneKey, Share]
    board: Board


@dataclass(slots=True)
class _Round:
    """One class's turn in one stage: what cannot be found any more is not looked for again."""

    stage: Stage
    no_block: dict[tuple[int, bool, bool, tuple[str, str] | None], Refusal] = field(default_factory=dict)
    victims: dict[tuple[int, bool, bool], Victims] = field(default_factory=dict)


def allocate(
    pool: Pool, wants: Iterable[Want], pods: Iterable[Pod], classes: Mapping[str, QoSClass], now: float
) -> Allocation:
    """Grant replicas of one pool, stage by stage, within a stage by priority.

    The order of lanes and pods does not matter. `pods` are those bound to the pool's nodes and
    those of its lanes.
    """
    ordered = sorted(wants, key=lambda w: (-w.qos.priority, w.lane.key))
    keep = {w.lane.key: _EVERYTHING if w.fixed else w.target for w in ordered}
    board = lay_out(pool, pods, keep, classes)
    shares = {w.lane.key: _share(w, board) for w in ordered}
    blocks = block_sizes((w.lane.key, w.lane.gpus) for w in ordered)
    work = _Work(board, Quotas(pool, board, classes, blocks), classes, shares, now)
    work.stand(s for s in shares.values() if s.want.fixed)
    work.strays()
    by_class: dict[tuple[int, str], list[Share]] = {}
    for share in shares.values():
        if not share.want.fixed:
            by_class.setdefault((-share.want.qos.priority, share.want.qos.name), []).append(share)
    for stage in STAGES:
        for group in by_class.values():
            work.turn(stage, [s for s in group if stage.takes_part(s.want)])
    return Allocation(shares, board)


def _share(want: Want, board: Board) -> Share:
    seats = board.seats.get(want.lane.key, [])
    return Share(want, seats, bound=len(seats))


class _Work:
    """The state that the stages share."""

    def __init__(
        self,
        board: Board,
        quotas: Quotas,
        classes: Mapping[str, QoSClass],
        shares: Mapping[LaneKey, Share],
        now: float,
    ) -> None:
        self._board, self._quotas, self._classes, self._now = board, quotas, classes, now
        self._shares = shares
        self._of_model: dict[tuple[str, str], int] = {}

    def stand(self, shares: Iterable[Share]) -> None:
        """Lanes that are not ours to change keep every pod that they have."""
        for share in shares:
            while share.next_seat is not None:
                self._keep(share, share.next_seat)

    def strays(self) -> None:
        """Pods of a class but of no lane here: theirs is what may not be taken, no more."""
        for seat in self._board.strays:
            if not seat.borrowed:
                self._board.keep(seat, firm=True)
                self._quotas.keep(_lane_of(seat), seat, reclaimable=False)

    def turn(self, stage: Stage, group: list[Share]) -> None:
        """Grant to the lanes of one class: those that run first, then by share of demand met."""
        this = _Round(stage)
        heap: list[tuple[float, LaneKey, int]] = []
        for at, share in enumerate(group):
            upto = stage.upto(share.want)
            self._seats(this, share, upto)
            if share.placed < upto and not stage.only_seats:
                heap.append((share.placed / upto, share.want.lane.key, at))
        heapq.heapify(heap)
        while heap:
            _, key, at = heapq.heappop(heap)
            share, upto = group[at], stage.upto(group[at].want)
            refusal = self._one(this, share)
            if not share.awaited and (
                stage.displaces or share.refusal is None or share.granted >= share.want.firm
            ):
                share.refusal = refusal  # else the stage that could displace knows better why not
            if refusal is None and share.placed < upto:
                heapq.heappush(heap, (share.placed / upto, key, at))

    def _seats(self, this: _Round, share: Share, upto: int) -> None:
        """Keep pods that run. Those that may not be taken need nobody's leave."""
        while share.placed < upto and (seat := share.next_seat) is not None:
            at_home = seat.home is not None
            if share.reclaimable() and self._not_allowed(this, share, seat.pod.gpus, at_home) is not None:
                return
            self._keep(share, seat)

    def _keep(self, share: Share, seat: Seat) -> None:
        firm = not share.reclaimable()
        self._board.keep(seat, firm)
        borrows = self._quotas.keep(share.want.lane.key, seat, not firm)
        share.count(seated=True, borrows=borrows)
        self._count_model(share)

    def _count_model(self, share: Share) -> None:
        name = (share.want.model.namespace, share.want.model.name)
        self._of_model[name] = self._of_model.get(name, 0) + 1

    def _not_allowed(self, this: _Round, share: Share, gpus: int, at_home: bool) -> Refusal | None:
        """Why the next replica may not be had, whatever is free."""
        model = share.want.model
        have = self._of_model.get((model.namespace, model.name), 0)
        if model.max_replicas is not None and have >= model.max_replicas:
            return reasons.MODEL_MAXIMUM, f"spec.maxReplicas of the model is {model.max_replicas}"
        key = share.want.lane.key
        largest = max(self._board.size, default=0)
        if 0 < largest < gpus:
            text = f"a replica needs {gpus} GPUs on one node; the largest node has {largest}"
            return reasons.REPLICA_TOO_LARGE, text
        if at_home:
            return None
        if this.stage.at_home:
            return reasons.RESERVED_FOR_OTHERS, f"the reservations of class {key.qos_class} are used up"
        return self._quotas.refuse(key, gpus, share.reclaimable())

    def _one(self, this: _Round, share: Share) -> Refusal | None:
        """Grant one new replica, or hold a place for it, or say why not."""
        key, gpus = share.want.lane.key, share.want.lane.gpus
        claim = self._quotas.home(key, gpus) is not None
        firm = not share.reclaimable()
        kind = (gpus, firm and not claim, claim)
        # Without a claim the replicas of its own model are spared, so another model may find what it did not.
        looked = (*kind, None if claim else (share.want.model.namespace, share.want.model.name))
        refusal = self._not_allowed(this, share, gpus, claim) or this.no_block.get(looked)
        if refusal is None and not this.stage.displaces and share.handed:
            refusal = reasons.HANDS_OVER, "it hands GPUs over to higher classes"
        if refusal is not None:
            return refusal
        allowed = self._allowed(key, gpus, guarded=kind[1])
        at, ready = self._free_node(gpus, allowed, now=True), True
        if at is None:
            # What the lane asks for already waits for its place rather than going and coming again.
            at, ready = (
                self._free_node(gpus, allowed, now=False),
                claim or share.granted < share.want.lane.replicas,
            )
        if at is None and this.stage.displaces and (claim or share.want.reason != reasons.DEMAND_STALE):
            at, ready = self._displace(this, share, kind, allowed), claim
        if at is None:
            this.no_block[looked] = self._no_block(this, kind)
            return this.no_block[looked]
        self._board.take(at, gpus, firm)
        borrows = self._quotas.grant(key, gpus, not firm, at)
        if ready:
            share.count(seated=False, borrows=borrows)
        else:
            share.awaited += 1
            text = "the GPUs for it are being emptied; it starts when they are free"
            share.refusal = reasons.WAITS_FOR_GPUS, text
        self._count_model(share)
        return None

    def _allowed(self, key: LaneKey, gpus: int, guarded: bool) -> Callable[[int], bool]:
        return lambda at: not (guarded and self._quotas.spoils(key, at, gpus))

    def _free_node(self, gpus: int, allowed: Callable[[int], bool], *, now: bool) -> int | None:
        return next((at for at in self._board.levels(gpus, now=now) if allowed(at)), None)

    def _displace(
        self, this: _Round, share: Share, kind: tuple[int, bool, bool], allowed: Callable[[int], bool]
    ) -> int | None:
        """Make a block from borrowed pods of lower classes, on the node where the least is lost."""
        gpus, _, claim = kind
        if kind not in this.victims:
            may_go = (lambda _: True) if claim else self._can_hand_over
            this.victims[kind] = self._board.victims(gpus, share.want.qos, self._classes, self._now, may_go)
        carriers = share.want.carriers

        def carries(seat: Seat) -> bool:
            return not seat.lent and _lane_of(seat) in carriers

        # What carries its demand serves it as it is: to move that here would cost a start for nothing.
        spared = carries if carriers and not claim else None
        found = this.victims[kind].best(allowed, spared)
        if found is None:
            return None
        at, seats = found
        for seat in seats:
            self._give_up(seat, evicted=claim)
        share.displacing += claim
        this.no_block.clear()  # what was freed beyond need may hold a smaller block
        return at

    def _can_hand_over(self, seat: Seat) -> bool:
        """Only a lane that a plan may lower does."""
        lane = self._shares.get(_lane_of(seat))
        return lane is not None and not lane.want.fixed

    def _give_up(self, seat: Seat, *, evicted: bool) -> None:
        self._board.release(seat)
        loser = self._shares.get(_lane_of(seat))
        if loser is None:
            return
        loser.seats.remove(seat)
        if evicted:
            loser.displaced += 1
        else:
            loser.handed.append(seat.pod.name)

    def _no_block(self, this: _Round, kind: tuple[int, bool, bool]) -> Refusal:
        gpus = kind[0]
        largest, node = self._board.largest()
        if kind[1] and largest >= gpus:
            return reasons.RESERVED_FOR_OTHERS, (
                f"needs {gpus} GPUs on one node for good; wherever they are free a reservation of others"
                f" would be left without whole blocks (largest free block is {largest} on {node})"
            )
        text = f"needs {gpus} GPUs on one node; largest free block is {largest}" + (
            f" on {node}" if node else ""
        )
        young = this.victims[kind].too_young if kind in this.victims else 0
        if young:
            who = "1 borrowed pod has" if young == 1 else f"{young} borrowed pods have"
            text += f"; {who} not run for their class's minRuntime yet"
        return reasons.NO_FREE_BLOCK, text


def _lane_of(seat: Seat) -> LaneKey:
    return LaneKey(seat.pod.namespace, seat.pod.model or "", seat.pod.qos_class or "")
