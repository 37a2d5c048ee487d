"""Who stands on which GPUs: in a reservation, on unreserved ones, or on borrowed ones.

One definition for everybody: the planner, the extender and the status all ask here.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from tidegate.core.types import Pod, QoSClass, Reclaim, Reservation


class Ground(StrEnum):
    """Whose GPUs a pod stands on."""

    RESERVED = "reserved"
    """On its own reservation's."""
    SPARE = "spare"
    """On GPUs that nobody reserved."""
    LENT = "lent"
    """On GPUs that others reserved and leave idle. Only these are ever asked back."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where one pod stands.

    `reservation` names the one it counts against, or None. `borrowed` means it stands outside
    every reservation of its own and can be taken back for somebody else's. `ground` says whether
    that can come to pass: what stands on spare GPUs is in nobody's way.
    """

    reservation: str | None
    reclaimable: bool
    borrowed: bool
    ground: Ground


def standing(reservation: str | None, reclaimable: bool) -> Standing:
    """Where a pod stands by itself: what borrows is taken to stand on lent GPUs (see `spare_pods`)."""
    if reservation is not None:
        return Standing(reservation, reclaimable, borrowed=False, ground=Ground.RESERVED)
    ground = Ground.LENT if reclaimable else Ground.SPARE
    return Standing(None, reclaimable, borrowed=reclaimable, ground=ground)


def spare_pods(borrowed: Iterable[Pod], spare: int) -> frozenset[str]:
    """UIDs of the borrowed pods that stand on spare GPUs: as many whole pods, in order, as these hold.

    `borrowed` comes highest class first, within a class oldest first: a claimant takes from classes
    below it only, so what is lent must be what the lowest have. The first that does not fit ends
    it, so that no pod is safer than one that comes before it.
    """
    found = set()
    for pod in borrowed:
        spare -= pod.gpus
        if spare < 0:
            break
        found.add(pod.uid)
    return frozenset(found)


def reclaimable_pods(pods: Iterable[Pod], classes: Mapping[str, QoSClass]) -> frozenset[str]:
    """UIDs of the pods that their class allows to be given up.

    `Always`: every one. `AboveMinimum`: those beyond their lane's minReplicas, counted from the
    oldest. Pods that are already going count for nothing.
    """
    seen: defaultdict[tuple[str, str | None, str | None], int] = defaultdict(int)
    found = set()
    for pod in sorted(pods, key=lambda p: p.age_key):
        qos = classes.get(pod.qos_class or "")
        if qos is None or pod.terminating:
            continue
        seen[pod.lane] += 1
        above = seen[pod.lane] > pod.lane_minimum
        if qos.reclaim is Reclaim.ALWAYS or (qos.reclaim is Reclaim.ABOVE_MINIMUM and above):
            found.add(pod.uid)
    return frozenset(found)


def standings(
    pods: Iterable[Pod],
    reservations: Iterable[Reservation],
    classes: Mapping[str, QoSClass],
    capacity: int = 0,
) -> dict[str, Standing]:
    """Say for every pod (by UID) where it stands.

    The oldest pods of a class fill its reservations, in the pool's order, first match with room.
    What is beyond them borrows when it can be given up, and otherwise uses unreserved GPUs.
    Foreign pods (no class, or one that is gone) stand nowhere and are never reclaimable.

    Spare GPUs are the capacity less all reservations, and less what foreign pods and pods that may
    not be taken use beyond their reservations. Borrowed pods fill them as `spare_pods` says; the
    others stand on lent ones. So if every reservation were asked back in full, exactly those on
    lent GPUs would have to go.

    Args:
        pods: Those that stand in the pool. Pods that are going use nothing up.
        reservations: The pool's, in its order.
        classes: QoSClasses by name.
        capacity: GPUs of the pool; without it nothing is spare.
    """
    pods = list(pods)
    ordered = list(reservations)
    room = {r.name: r.gpus for r in ordered}
    reclaimable = reclaimable_pods(pods, classes)
    result: dict[str, Standing] = {}
    for pod in sorted(pods, key=lambda p: p.age_key):
        home = None
        for r in ordered:
            qos = classes.get(pod.qos_class or "")
            if qos and not pod.terminating and r.covers(qos.name, pod.namespace) and room[r.name] >= pod.gpus:
                home, room[r.name] = r.name, room[r.name] - pod.gpus
                break
        result[pod.uid] = standing(home, pod.uid in reclaimable)
    outside = [p for p in pods if result[p.uid].reservation is None and not p.terminating]
    taken = sum(p.gpus for p in outside if not result[p.uid].borrowed)
    borrowed = sorted(
        (p for p in outside if result[p.uid].borrowed),
        key=lambda p: (-classes[p.qos_class or ""].priority, p.qos_class, p.age_key),
    )
    for uid in spare_pods(borrowed, capacity - sum(r.gpus for r in ordered) - taken):
        result[uid] = replace(result[uid], ground=Ground.SPARE)
    return result
