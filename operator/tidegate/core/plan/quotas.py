"""Who may have how many GPUs of a pool while a plan is made: reservations, lending, borrowing."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from tidegate.core import reasons
from tidegate.core.plan.board import Board, Seat
from tidegate.core.plan.types import LaneKey
from tidegate.core.types import Pool, QoSClass, Reservation

Refusal = tuple[str, str]
"""Reason and message of why a replica has no place."""


class Quotas:
    """What is used inside and outside of each reservation, as replicas are granted.

    Who runs counts in the reservation where it stands (`core/quota.py`, as for the extender); a new
    replica in the first of its class's reservations with room, which is its claim. Outside of them,
    one that is not reclaimable may use unreserved GPUs only; a reclaimable one may also stand on
    what classes above it leave idle, as far as `maxLend` and `maxBorrow` allow.
    """

    def __init__(
        self, pool: Pool, board: Board, classes: Mapping[str, QoSClass], blocks: Mapping[str, int]
    ) -> None:
        """Begin with nothing granted, and with what stands in reservations counted there.

        Args:
            pool: the pool.
            board: its GPUs; foreign pods are counted already.
            classes: QoSClasses by name.
            blocks: largest replica, in GPUs, of each class's lanes in this pool.
        """
        self._pool, self._board, self._classes, self._blocks = pool, board, classes, blocks
        self._room = {r.name: r.gpus for r in pool.reservations}
        self.unreserved = pool.capacity - board.foreign - sum(self._room.values())
        for seat in (*board.strays, *(s for mine in board.seats.values() for s in mine)):
            if seat.home is not None:
                self._room[seat.home] -= seat.pod.gpus
                # What fills a reservation from outside of the pool's capacity leaves its GPUs to others.
                self.unreserved += seat.pod.gpus if seat.at is None else 0
        self._solid = 0  # granted outside of reservations, not reclaimable
        self._outside: defaultdict[int, int] = defaultdict(int)  # the same and borrowed, by priority
        self._borrowed: defaultdict[str, int] = defaultdict(int)  # by reservation with maxBorrow
        self._levels = sorted({q.priority for q in classes.values()})
        self._covering: dict[tuple[str, str], tuple[Reservation, ...]] = {}
        self._shape = self._histogram()

    def _histogram(self) -> list[int]:
        """How many nodes have how much that is not held for good."""
        counts = [0] * (max(self._board.size, default=0) + 1)
        for size, firm in zip(self._board.size, self._board.firm, strict=True):
            counts[max(size - firm, 0)] += 1
        return counts

    def home(self, key: LaneKey, gpus: int) -> Reservation | None:
        """The reservation that one more replica would count in."""
        for r in self._reservations(key):
            if self._room[r.name] >= gpus:
                return r
        return None

    def _reservations(self, key: LaneKey) -> tuple[Reservation, ...]:
        known = self._covering.get((key.qos_class, key.namespace))
        if known is None:
            known = tuple(r for r in self._pool.reservations if r.covers(key.qos_class, key.namespace))
            self._covering[key.qos_class, key.namespace] = known
        return known

    def refuse(self, key: LaneKey, gpus: int, reclaimable: bool) -> Refusal | None:
        """Why one more replica may not be had outside of its reservations, if so."""
        if reclaimable and (refusal := self._borrow_limit(key, gpus)):
            return refusal
        if not any(self._room.values()):
            return None  # nothing is kept for anybody: what is free decides
        qos = self._classes[key.qos_class]
        if not reclaimable and self._solid + gpus > self.unreserved:
            left = max(self.unreserved - self._solid, 0)
            return reasons.RESERVED_FOR_OTHERS, (
                f"needs {gpus} GPUs beyond the reservations of class {qos.name};"
                f" {left} of pool {self._pool.name} are unreserved and not used"
            )
        for level in self._levels:
            if level > qos.priority:
                break
            used = sum(n for p, n in self._outside.items() if p >= level)
            lendable = self._lendable(level)
            if used + gpus > self.unreserved + lendable:
                return reasons.RESERVED_FOR_OTHERS, (
                    f"needs {gpus} GPUs to borrow; classes above lend {lendable} and"
                    f" {max(self.unreserved, 0)} are unreserved, of which {used} are taken"
                )
        return None

    def _lendable(self, level: int) -> int:
        """Idle GPUs of reservations of classes above this priority: only those can be taken back."""
        total = 0
        for r in self._pool.reservations:
            owner = self._classes.get(r.qos_class)
            if owner is None or owner.priority > level:
                room = self._room[r.name]
                total += room if r.max_lend is None else min(room, r.max_lend)
        return total

    def _borrow_limit(self, key: LaneKey, gpus: int) -> Refusal | None:
        for r in self._reservations(key):
            if r.max_borrow is not None:
                used = self._borrowed[r.name]
                if used + gpus <= r.max_borrow:
                    return None
                return reasons.BORROW_LIMIT, (
                    f"needs {gpus} GPUs more; reservation {r.name} may borrow {r.max_borrow} and has {used}"
                )
        return None

    def spoils(self, key: LaneKey, at: int, gpus: int) -> bool:
        """Whether a replica that nobody may take back, here, would leave a reservation without whole blocks.

        Eight single GPUs on eight nodes do not cover a reservation for replicas of eight.
        """
        before = max(self._board.size[at] - self._board.firm[at], 0)
        for r in self._pool.reservations:
            block = self._blocks.get(r.qos_class, 1)
            if block == 1 or r in self._reservations(key) or self._room[r.name] < block:
                continue
            lost = before // block - max(before - gpus, 0) // block
            if lost and sum(n * (k // block) for k, n in enumerate(self._shape)) - lost < (
                self._room[r.name] // block
            ):
                return True
        return False

    def keep(self, key: LaneKey, seat: Seat, reclaimable: bool) -> bool:
        """Account for a replica that runs, after the board's `keep`. True when it borrows."""
        if seat.at is None:
            return False
        if not reclaimable:
            self._harden(seat.at, seat.pod.gpus)
        return seat.home is None and self._beyond(key, seat.pod.gpus, reclaimable)

    def grant(self, key: LaneKey, gpus: int, reclaimable: bool, at: int) -> bool:
        """Account for a new replica at a node, after the board's `take`. True when it borrows."""
        if not reclaimable:
            self._harden(at, gpus)
        home = self.home(key, gpus)
        if home is not None:
            self._room[home.name] -= gpus
            return False
        return self._beyond(key, gpus, reclaimable)

    def _harden(self, at: int, gpus: int) -> None:
        after = max(self._board.size[at] - self._board.firm[at], 0)
        self._shape[after + gpus if after + gpus < len(self._shape) else -1] -= 1
        self._shape[after] += 1

    def _beyond(self, key: LaneKey, gpus: int, reclaimable: bool) -> bool:
        self._outside[self._classes[key.qos_class].priority] += gpus
        if not reclaimable:
            self._solid += gpus
            return False
        for r in self._reservations(key):
            if r.max_borrow is not None:
                self._borrowed[r.name] += gpus
                break
        return True


def block_sizes(lanes: Iterable[tuple[LaneKey, int]]) -> dict[str, int]:
    """The largest replica, in GPUs, of each class."""
    found: dict[str, int] = {}
    for key, gpus in lanes:
        found[key.qos_class] = max(found.get(key.qos_class, 1), gpus)
    return found
