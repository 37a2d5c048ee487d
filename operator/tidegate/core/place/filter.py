"""Where a pod may be placed."""

from collections.abc import Collection
from heapq import nsmallest

from tidegate.core import reasons
from tidegate.core.place.decide import Cost, Costs, Feasible, Why
from tidegate.core.place.view import View
from tidegate.core.types import Pod

Group = tuple[int, list[str]]
"""Nodes that have the same number of GPUs open."""
SHORT_LIST = 32
"""Nodes that are returned at most: merging long lists in kube-scheduler cost more than ranking
here (0.72 of its own speed with all of 1,000 nodes, 1.06 with 32)."""


def feasible(
    pod: Pod,
    view: View,
    candidates: Collection[str],
    now: float,
    *,
    limit: int = SHORT_LIST,
    avoid: Collection[str] = (),
) -> Feasible:
    """Nodes that a pod may be placed on, ranked.

    A pod may be placed where no reservation of others becomes less coverable by it: by open GPUs
    and by those that lower classes borrowed, in blocks of that reservation's replicas. So

    - a pod that is not reclaimable and is beyond its reservation stands on unreserved GPUs only;
    - a reclaimable one may stand on any idle GPU reserved by a class above it, which can take it
      back, and on none reserved by its own priority or below, which could not;
    - `maxLend` keeps open GPUs of a reservation from everybody who is not in a reservation, and
      `maxBorrow` bounds what is borrowed under a reservation;
    - a pod inside its own reservation comes before what is kept from lending, and before the
      reservations of lower classes when the pool is short of GPUs or of blocks.

    A pod with a live grant is always accepted on the granted node. Rank: nodes that cost nobody
    anything, partly used ones first and of these the fullest, then those without (and in domains
    without) a replica of the same lane, then by name; nodes in `avoid` last.

    Args:
        pod: the pod that is to be placed.
        view: its pool.
        candidates: names of nodes that it fits on by kube-scheduler's own filters.
        now: seconds; grants that ended before are void.
        limit: how many nodes are returned at most.
        avoid: nodes that were answered for it before and where it was not bound.
    """
    if not view.pool.enforce or pod.qos_class not in view.classes:
        return Feasible(tuple(candidates), restricted=False)
    grant = view.grants.get(pod.uid)
    if grant is not None and grant.until_s > now and grant.node in candidates:
        return Feasible((grant.node,))
    with view.without(pod.uid):
        return _judge(pod, view, candidates, limit, avoid)


def _judge(pod: Pod, view: View, candidates: Collection[str], limit: int, avoid: Collection[str]) -> Feasible:
    after = view.after(pod)
    groups, unknown = view.by_shape(candidates)
    outside = dict.fromkeys(
        unknown, Why(reasons.POOL_NOT_FOUND, f"the node is not in GPUPool {view.pool.name}")
    )
    limits = view.borrow_limit(pod)
    more = after.borrows(pod.gpus)
    if more > 0 and limits is not None and limits[0] + more > limits[1]:
        why = Why(
            reasons.BORROW_LIMIT,
            f"class {pod.qos_class} borrows {limits[0]} GPUs and may borrow {limits[1]} (maxBorrow);"
            f" the pod would make it {more} more",
        )
        # Giving lower pods up would not lower what this class borrows.
        inside = (n for nodes in groups.values() for n in nodes)
        return Feasible((), {}, outside | dict.fromkeys(inside, why))
    costs, failed = Costs(pod, view, after), dict[str, Why]()
    passed: dict[Cost, list[Group]] = {Cost.NOTHING: [], Cost.BELOW: []}
    # What flips makes a node differ from others of its shape.
    flipped = {node for node, _, _ in after.flips}
    for shape, nodes in groups.items():
        if shape[0] < pod.gpus:
            failed |= _too_small(pod, view, nodes)
            continue
        alike = [n for n in nodes if n not in flipped] if flipped else nodes
        for part in (alike, *([n] for n in nodes if n in flipped)):
            if part:
                cost, why = costs.on(part[0])
                if cost is Cost.FORBIDDEN:
                    failed |= dict.fromkeys(part, why)
                else:
                    passed[cost].append((shape[0], part))
    chosen = passed[Cost.NOTHING] or passed[Cost.BELOW]
    return Feasible(_ranked(pod, view, chosen, avoid, limit), failed, outside)


def _too_small(pod: Pod, view: View, nodes: list[str]) -> dict[str, Why]:
    """Why not on nodes of one shape. Equal nodes share a text: kube-scheduler shows each text once."""
    held: dict[str, list[str]] = {}
    for grant in view.grants.values():
        held.setdefault(grant.node, []).append(grant.pod.name)
    known: dict[tuple[int, str], Why] = {}
    found = {}
    for node in nodes:
        size, names = view.nodes[node].gpus, ", ".join(sorted(held.get(node, ())))
        if (size, names) not in known:
            promised = f" ({names} was promised some)" if names else ""
            known[size, names] = Why(
                reasons.NO_FREE_BLOCK,
                f"{view.open(node)} of the node's {size} GPUs are open{promised}; {pod.qos_class} asks for"
                f" {pod.gpus}",
            )
        found[node] = known[size, names]
    return found


def _ranked(pod: Pod, view: View, groups: list[Group], avoid: Collection[str], limit: int) -> tuple[str, ...]:
    """The best nodes. Only those are compared one by one that are level in what comes first."""
    levels: dict[tuple[bool, bool, int], list[str]] = {}
    for free, nodes in groups:
        late = [n for n in nodes if n in avoid] if avoid else []
        early = [n for n in nodes if n not in avoid] if avoid else nodes
        for last, part in ((False, early), (True, late)):
            bare = view.empties.intersection(part)
            levels.setdefault((last, False, free), []).extend(n for n in part if n not in bare)
            levels.setdefault((last, True, free), []).extend(bare)
    mates = view.lane_nodes(pod)
    domains = {view.nodes[n].domain for n in mates} - {""}

    def key(node: str) -> tuple[bool, bool, str]:
        return (node in mates, view.nodes[node].domain in domains, node)

    chosen: list[str] = []
    for level in sorted(levels):
        if len(chosen) < limit:
            chosen += nsmallest(limit - len(chosen), levels[level], key=key)
    return tuple(chosen)
