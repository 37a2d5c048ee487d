"""Where a pod may be placed."""

from collections.abc import Collection
from heapq import nsmallest

from tidegate.core import reasons
from tidegate.core.place.cover import Shape
from tidegate.core.place.decide import Cost, Costs, Feasible, Why
from tidegate.core.place.view import View
from tidegate.core.types import Pod

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
    outside = {
        n: Why(reasons.POOL_NOT_FOUND, f"{n} is not in GPUPool {view.pool.name}")
        for n in candidates
        if n not in view.nodes
    }
    inside = [n for n in candidates if n in view.nodes]
    limits = view.borrow_limit(pod)
    more = after.borrows(pod.gpus)
    if more > 0 and limits is not None and limits[0] + more > limits[1]:
        why = Why(
            reasons.BORROW_LIMIT,
            f"class {pod.qos_class} borrows {limits[0]} GPUs and may borrow {limits[1]} (maxBorrow);"
            f" the pod would make it {more} more",
        )
        # Giving lower pods up would not lower what this class borrows.
        return Feasible((), {}, outside | dict.fromkeys(inside, why))
    costs, failed = Costs(pod, view, after), {}
    passed: dict[Cost, list[str]] = {Cost.NOTHING: [], Cost.BELOW: []}
    known: dict[Shape, tuple[Cost, Why]] = {}
    for node in inside:
        shape = view.shape(node)
        if shape[0] < pod.gpus:
            failed[node] = _too_small(pod, view, node)
            continue
        if shape not in known or after.flips:  # with flips, nodes of one shape may differ
            known[shape] = costs.on(node)
        cost, why = known[shape]
        if cost is Cost.FORBIDDEN:
            failed[node] = why
        else:
            passed[cost].append(node)
    chosen = passed[Cost.NOTHING] or passed[Cost.BELOW]
    return Feasible(_ranked(pod, view, chosen, avoid, limit), failed, outside)


def _too_small(pod: Pod, view: View, node: str) -> Why:
    held = ", ".join(sorted(g.pod.name for g in view.grants.values() if g.node == node))
    promised = f" ({held} was promised some)" if held else ""
    return Why(
        reasons.NO_FREE_BLOCK,
        f"{node} has {view.open(node)} of {view.nodes[node].gpus} GPUs open{promised}; {pod.qos_class} asks"
        f" for {pod.gpus}",
    )


def _ranked(pod: Pod, view: View, nodes: list[str], avoid: Collection[str], limit: int) -> tuple[str, ...]:
    mates = [p for p in view.pods.values() if p.lane == pod.lane] if pod.model else []
    on_node = {p.node for p in mates}
    domains = {view.nodes[p.node].domain for p in mates if p.node in view.nodes} - {""}

    def key(node: str) -> tuple[bool, bool, int, bool, bool, str]:
        return (
            node in avoid,
            view.empty(node),
            view.open(node),
            node in on_node,
            view.nodes[node].domain in domains,
            node,
        )

    return tuple(nsmallest(limit, nodes, key=key))
