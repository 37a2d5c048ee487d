"""What the operator did and why: the last decisions, and counts of borrows, reclaims and rebalances."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from tidegate.controller.poolreport import PoolReport
from tidegate.core import reasons
from tidegate.core.plan.types import Decision, LaneKey
from tidegate.core.types import Pod

KEPT: Final = 500
LOWERED_S: Final = 600.0
"""How long after its lane was lowered for a reclaim a pod that goes is counted as reclaimed: a drain."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of /debug/decisions. `time` is Unix seconds."""

    time: float
    kind: str
    object: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Move:
    """GPUs that were borrowed by a pod, or taken back from it."""

    kind: str
    pool: str
    qos_class: str
    pod: Pod
    reason: str
    message: str


class Decisions:
    """The last decisions, newest last."""

    def __init__(self) -> None:
        self._entries: deque[Entry] = deque(maxlen=KEPT)

    def add(self, time: float, kind: str, obj: str, reason: str, message: str) -> None:
        """Note one."""
        self._entries.append(Entry(time, kind, obj, reason, message))

    def to_json(self) -> list[dict[str, Any]]:
        """As `/debug/decisions` shows them."""
        return [asdict(e) for e in self._entries]


class Moves:
    """Finds borrows and reclaims by comparing what one round saw with the next.

    A borrow is a placed pod seen for the first time on borrowed GPUs. A reclaim is a borrowed pod that
    went because its GPUs were asked back: preempted, or its lane lowered by the plan for that.
    """

    def __init__(self) -> None:
        self._borrowing: dict[str, tuple[str, Pod]] = {}
        self._lowered: dict[LaneKey, tuple[float, int]] = {}
        self._primed = False

    def lowered(self, now: float, decisions: Iterable[Decision], fewer: Mapping[LaneKey, int]) -> None:
        """Note lanes that the plan lowered to give GPUs back, by how many replicas."""
        for decision in decisions:
            if decision.kind == "reclaim" and fewer.get(decision.lane, 0) > 0:
                _, before = self._lowered.get(decision.lane, (now, 0))
                self._lowered[decision.lane] = (now, before + fewer[decision.lane])

    def observe(
        self,
        now: float,
        reports: Mapping[str, PoolReport],
        pods: Iterable[Pod],
        preempted: Mapping[str, str],
    ) -> list[Move]:
        """Compare with the last round.

        Args:
            now: Unix seconds.
            reports: By pool.
            pods: All pods with GPUs.
            preempted: UIDs of pods that kube-scheduler preempts or has preempted, with its words.
        """
        alive = {p.uid: p for p in pods}
        moves = list(self._reclaims(now, alive, preempted))
        for pool, found in sorted(reports.items()):
            for uid in sorted(found.borrowing & alive.keys()):
                if uid not in self._borrowing and uid not in preempted:
                    pod = alive[uid]
                    self._borrowing[uid] = (pool, pod)
                    if self._primed:  # after a start, what borrows already is not news
                        moves.append(_borrow(pool, pod, found))
        self._primed = True
        return moves

    def _reclaims(self, now: float, alive: Mapping[str, Pod], preempted: Mapping[str, str]) -> Iterator[Move]:
        for uid, (pool, pod) in list(self._borrowing.items()):
            current = alive.get(uid)
            if current and not current.terminating and uid not in preempted:
                continue
            del self._borrowing[uid]
            lane = LaneKey(pod.namespace, pod.model or "", pod.qos_class or "")
            since, left = self._lowered.get(lane, (0.0, 0))
            if uid in preempted:
                text = f"{pod.name} gives back {pod.gpus} GPUs: {preempted[uid]}"
                yield Move("reclaim", pool, lane.qos_class, pod, reasons.RECLAIMED, text)
            elif left > 0 and now - since <= LOWERED_S:
                self._lowered[lane] = (since, left - 1)
                text = f"{pod.name} gives back {pod.gpus} GPUs: its lane was lowered for a reservation"
                yield Move("reclaim", pool, lane.qos_class, pod, reasons.RECLAIMED, text)


def _borrow(pool: str, pod: Pod, report: PoolReport) -> Move:
    lenders = ", ".join(f"{r.name} {r.lent}" for r in report.reservations if r.lent) or "none"
    text = (
        f"{pod.name} borrows {pod.gpus} GPUs on {pod.node}; {pod.qos_class} borrows "
        f"{report.borrowed.get(pod.qos_class or '', 0)} in all, lent by reservations: {lenders}"
    )
    return Move("borrow", pool, pod.qos_class or "", pod, reasons.BORROWS_IDLE, text)


def preemptions(pods: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """UIDs of raw pods that kube-scheduler gave up, with the message of their condition."""
    found = {}
    for raw in pods:
        for condition in (raw.get("status") or {}).get("conditions") or ():
            if (
                condition.get("type") == "DisruptionTarget"
                and condition.get("status") == "True"
                and condition.get("reason") == "PreemptionByScheduler"
            ):
                found[raw["metadata"]["uid"]] = condition.get("message") or "preempted by kube-scheduler"
    return found
