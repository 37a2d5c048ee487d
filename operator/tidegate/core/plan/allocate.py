"""Find whole blocks of GPUs for what lanes want: what stays, floors, reservations, demand, idle.

Counting comes first (`quotas`: who may have how many), then room on a node (`board`). A replica
that runs is kept where it is before a new one is placed. A new one takes the fullest node that
holds it, and only if there is none displaces borrowed pods of lower classes. Nobody is evicted by
this: it says how many replicas have a place, and kube-scheduler and the extender choose the node.
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

    `granted` replicas have a place, `displacing` of them only once borrowed pods are gone;
    `borrowing` of them stand outside of reservations and can be taken back. `bound` pods run now,
    and `displaced` of those were given to others. `refusal` is why it has no more.
    """

    want: Want
    seats: list[Seat]
    bound: int
    granted: int = 0
    displacing: int = 0
    borrowing: int = 0
    displaced: int = 0
    refusal: Refusal | None = None

    def reclaimable(self) -> bool:
        """Whether the next replica could be given up."""
        return reclaimable(self.want, self.granted)

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
    no_block: dict[int, Refusal] = field(default_factory=dict)
    victims: dict[int, Victims] = field(default_factory=dict)


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
            pod = seat.pod
            if not seat.borrowed:
                self._board.keep(seat, firm=True)
                key = LaneKey(pod.namespace, pod.model or "", pod.qos_class or "")
                self._quotas.grant(key, pod.gpus, reclaimable=False, at=seat.at)

    def turn(self, stage: Stage, group: list[Share]) -> None:
        """Grant to the lanes of one class: those that run first, then by share of demand met."""
        this = _Round(stage)
        heap: list[tuple[float, LaneKey, int]] = []
        for at, share in enumerate(group):
            upto = stage.upto(share.want)
            self._seats(this, share, upto)
            if share.granted < upto and not stage.only_seats:
                heap.append((share.granted / upto, share.want.lane.key, at))
        heapq.heapify(heap)
        while heap:
            _, key, at = heapq.heappop(heap)
            share, upto = group[at], stage.upto(group[at].want)
            refusal = self._one(this, share)
            if stage.displaces or share.refusal is None or share.granted >= share.want.firm:
                share.refusal = refusal  # else the stage that could displace knows better why not
            if refusal is None and share.granted < upto:
                heapq.heappush(heap, (share.granted / upto, key, at))

    def _seats(self, this: _Round, share: Share, upto: int) -> None:
        """Keep pods that run. Those that may not be taken need nobody's leave."""
        while share.granted < upto and (seat := share.next_seat) is not None:
            if share.reclaimable():
                gpus = share.want.lane.gpus
                if self._not_allowed(this, share, gpus) is not None:
                    return
            self._keep(share, seat)

    def _keep(self, share: Share, seat: Seat) -> None:
        firm = not share.reclaimable()
        self._board.keep(seat, firm)
        borrows = self._quotas.grant(share.want.lane.key, seat.pod.gpus, not firm, seat.at)
        share.count(seated=True, borrows=borrows)
        self._count_model(share)

    def _count_model(self, share: Share) -> None:
        name = (share.want.model.namespace, share.want.model.name)
        self._of_model[name] = self._of_model.get(name, 0) + 1

    def _not_allowed(self, this: _Round, share: Share, gpus: int) -> Refusal | None:
        """Why the next replica may not be had, whatever is free."""
        model = share.want.model
        have = self._of_model.get((model.namespace, model.name), 0)
        if model.max_replicas is not None and have >= model.max_replicas:
            return reasons.MODEL_MAXIMUM, f"spec.maxReplicas of the model is {model.max_replicas}"
        key = share.want.lane.key
        if self._quotas.home(key, gpus) is not None:
            return None
        if this.stage.at_home:
            return reasons.RESERVED_FOR_OTHERS, f"the reservations of class {key.qos_class} are used up"
        return self._quotas.refuse(key, gpus, share.reclaimable())

    def _one(self, this: _Round, share: Share) -> Refusal | None:
        """Grant one new replica, or say why not."""
        key, gpus = share.want.lane.key, share.want.lane.gpus
        refusal = self._not_allowed(this, share, gpus) or this.no_block.get(gpus)
        if refusal is not None:
            return refusal
        firm = not share.reclaimable()
        at = self._free_node(key, gpus, guarded=firm and self._quotas.home(key, gpus) is None)
        if at is None and this.stage.displaces:
            at = self._displace(this, share)
        if at is None:
            this.no_block[gpus] = self._no_block(this, gpus)
            return this.no_block[gpus]
        self._board.take(at, gpus, firm)
        borrows = self._quotas.grant(key, gpus, not firm, at)
        share.count(seated=False, borrows=borrows)
        self._count_model(share)
        return None

    def _free_node(self, key: LaneKey, gpus: int, guarded: bool) -> int | None:
        for at in self._board.levels(gpus):
            if not (guarded and self._quotas.spoils(key, at, gpus)):
                return at
        return None

    def _displace(self, this: _Round, share: Share) -> int | None:
        """Make a block from borrowed pods of lower classes, on the node where the least is lost."""
        gpus = share.want.lane.gpus
        if gpus not in this.victims:
            this.victims[gpus] = self._board.victims(gpus, share.want.qos, self._classes, self._now)
        found = this.victims[gpus].best()
        if found is None:
            return None
        at, seats = found
        for seat in seats:
            self._give_up(seat)
        share.displacing += 1
        this.no_block.clear()  # what was freed beyond need may hold a smaller block
        return at

    def _give_up(self, seat: Seat) -> None:
        self._board.release(seat)
        pod = seat.pod
        loser = self._shares.get(LaneKey(pod.namespace, pod.model or "", pod.qos_class or ""))
        if loser is not None:
            loser.seats.remove(seat)
            loser.displaced += 1

    def _no_block(self, this: _Round, gpus: int) -> Refusal:
        largest, node = self._board.largest()
        text = f"needs {gpus} GPUs on one node; largest free block is {largest}" + (
            f" on {node}" if node else ""
        )
        young = this.victims[gpus].too_young if gpus in this.victims else 0
        if young:
            text += f"; {young} borrowed pods have not run for their class's minRuntime yet"
        return reasons.NO_FREE_BLOCK, text
