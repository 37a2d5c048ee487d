"""Who stands on which GPUs: in a reservation, on unreserved ones, or on borrowed ones.

One definition for everybody: the planner, the extender and the status all ask here.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tidegate.core.types import Pod, QoSClass, Reclaim, Reservation


@dataclass(frozen=True, slots=True)
class Standing:
    """Where one pod stands.

    `reservation` names the one it counts against, or None. `borrowed` means it stands outside
    every reservation of its own and can be taken back for somebody else's.
    """

    reservation: str | None
    reclaimable: bool
    borrowed: bool


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
    pods: Iterable[Pod], reservations: Iterable[Reservation], classes: Mapping[str, QoSClass]
) -> dict[str, Standing]:
    """Say for every pod (by UID) where it stands.

    The oldest pods of a class fill its reservations, in the pool's order, first match with room.
    What is beyond them borrows when it can be given up, and otherwise uses unreserved GPUs.
    Foreign pods (no class, or one that is gone) stand nowhere and are never reclaimable.
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
            if qos and r.covers(qos.name, pod.namespace) and room[r.name] >= pod.gpus:
                home, room[r.name] = r.name, room[r.name] - pod.gpus
                break
        can_go = pod.uid in reclaimable
        result[pod.uid] = Standing(home, can_go, borrowed=home is None and can_go)
    return result
