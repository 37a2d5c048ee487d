"""Whom a pod may push out, and where."""

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from tidegate.core import reasons
from tidegate.core.place.decide import Cost, Costs, Preemption, Why
from tidegate.core.place.view import View
from tidegate.core.quota import Ground
from tidegate.core.types import Pod, QoSClass, Reclaim

MAX_GRANTS: Final = 64
"""Grants of a pool that may be in flight. Deletes at the API server bound reclaims to about ten a
second anyway, so this is a few seconds' work."""


def victims(
    pod: Pod,
    view: View,
    candidates: Mapping[str, Sequence[str]],
    now: float,
    *,
    elsewhere: Collection[str] | None = None,
    max_grants: int = MAX_GRANTS,
) -> Preemption:
    """The node where pods are given up for this one: at most one, and none without a claim.

    A claim is room in a reservation that covers the pod, counted after all that is placed, assumed
    or granted already. Nothing else preempts: a pod beyond its reservation stands on GPUs that are
    left over, whatever its priority. Only borrowed, reclaimable pods of classes below are given up,
    and only after their class's `minRuntime`, which a claimant whose own class is never reclaimed
    need not wait for. kube-scheduler's proposal for a node is taken where it holds only such pods;
    where it does not (it goes by priority alone), others on that node that free the GPUs are taken.

    Least loss: fewest pods that stand on spare GPUs (these are in nobody's way, so requests that
    cannot be sent again run there), then fewest pods, then the least time that they ran, then the
    node's name. Nothing is
    given up for a pod that has a live grant (its victims are on their way out), nor while a node of
    `elsewhere` could take it free.

    Args:
        pod: the pod that found no place.
        view: its pool.
        candidates: UIDs of the proposed victims by node.
        now: seconds.
        elsewhere: nodes that the pod could stand on if they were free; None means all of the pool.
        max_grants: how many grants may be in flight.
    """
    if not view.pool.enforce or pod.qos_class not in view.classes:
        passed = {n: tuple(v) for n, v in candidates.items() if v}
        return Preemption(passed, Why(reasons.OBSERVED, "the pool only observes"), restricted=False)
    grant = view.grants.get(pod.uid)
    if grant is not None and grant.until_s > now:
        fresh = [u for u in grant.victims if u in view.pods and not view.pods[u].terminating]
        if fresh and grant.node in candidates:
            why = Why(reasons.RECLAIMS, f"{grant.node} was granted before; {len(fresh)} pods have not gone")
            return Preemption({grant.node: tuple(fresh)}, why)
        waits = Why(reasons.BEING_RECLAIMED, f"{grant.node} was granted; its GPUs are coming free")
        return Preemption({}, waits, retry_s=grant.until_s)
    with view.without(pod.uid):
        return _choose(pod, view, candidates, now, view.nodes if elsewhere is None else elsewhere, max_grants)


def _choose(
    pod: Pod,
    view: View,
    candidates: Mapping[str, Sequence[str]],
    now: float,
    elsewhere: Collection[str],
    max_grants: int,
) -> Preemption:
    after = view.after(pod)
    home = after.claim
    if home is None:
        return Preemption({}, _no_claim(pod, view))
    if len(view.grants) >= max_grants:
        return Preemption(
            {}, Why(reasons.BEING_RECLAIMED, f"{len(view.grants)} grants are in flight"), now + 1
        )
    costs = Costs(pod, view, after)
    for node in sorted(elsewhere):
        if node in view.nodes and view.free(node) >= pod.gpus and costs.on(node)[0] is not Cost.FORBIDDEN:
            why = Why(reasons.RESERVATIONS_FIT, f"{node} has {view.free(node)} GPUs free for it")
            return Preemption({}, why, now)
    found, retry = [], []
    for node, proposed in candidates.items():
        if node not in view.nodes:
            continue
        chosen = _on_node(pod, view, node, proposed, now)
        if isinstance(chosen, float):
            retry.append(chosen)
        elif chosen and costs.on(node, _given_up(view, chosen))[0] is not Cost.FORBIDDEN:
            ran = sum(now - (v.started_s if v.started_s is not None else now) for v in chosen)
            found.append((len(chosen) - len(_lent(view, chosen)), len(chosen), ran, node, chosen))
    if not found:
        return Preemption({}, _nobody(pod, candidates), min(retry, default=None))
    spare, *_, node, chosen = min(found, key=lambda f: f[:4])
    if spare and (soon := _lent_soon(pod, view, set(elsewhere) - candidates.keys(), now)):
        text = f"{soon} has lent GPUs for it once what is under way there is done; {node} has spare ones only"
        return Preemption({}, Why(reasons.BEING_RECLAIMED, text), now + 1)
    classes = ", ".join(sorted({v.qos_class or "" for v in chosen}))
    why = Why(
        reasons.RECLAIMS,
        f"class {pod.qos_class} asks back {pod.gpus} GPUs of reservation {home}: {len(chosen)} borrowed"
        f" {'pod' if len(chosen) == 1 else 'pods'} of {classes} given up on {node}",
    )
    return Preemption({node: tuple(v.uid for v in chosen)}, why)


def _lent_soon(pod: Pod, view: View, nodes: Collection[str], now: float) -> str | None:
    """A node that was not proposed only because somebody else's grant is in flight on it.

    kube-scheduler sees the GPUs that were freed there for a less important pod as free, and so
    proposes nobody. Grants end, so this is waited for.
    """
    for node in sorted({g.node for g in view.grants.values()} & set(nodes)):
        chosen = _on_node(pod, view, node, (), now)
        if isinstance(chosen, tuple) and len(_lent(view, chosen)) == len(chosen):
            return node
    return None


def _on_node(
    pod: Pod, view: View, node: str, proposed: Sequence[str], now: float
) -> tuple[Pod, ...] | float | None:
    """Pods to give up on a node; the time when that becomes possible; or None for never."""
    claimant = view.classes[pod.qos_class or ""]
    able = [
        view.pods[u]
        for u in sorted(view.on_node[node])
        if u not in view.assumed
        and u not in view.grants
        and not view.going(u)
        and view.standing(u).borrowed
        and view.classes[view.pods[u].qos_class or ""].priority < claimant.priority
    ]
    ripe = [v for v in able if _ripe_at(v, view, claimant, now) <= now]
    free = view.open(node)
    if free >= pod.gpus:  # enough is free, or on its way: nothing more is given up here
        return None
    lent = _lent(view, ripe)
    if pod.gpus <= free + _gpus(lent):
        return _fewest(lent, proposed, pod.gpus - free)
    if pod.gpus <= free + _gpus(ripe):
        # What the lent ones leave to be freed, the spare ones free; then without what was not needed.
        spare = [v for v in ripe if v not in lent]
        more = _fewest(spare, (), pod.gpus - free - _gpus(lent))
        return (*_fewest(lent, (), pod.gpus - free - _gpus(more)), *more)
    if pod.gpus <= free + _gpus(able):
        return min(at for v in able if (at := _ripe_at(v, view, claimant, now)) > now)
    return None


def _lent(view: View, pods: Sequence[Pod]) -> list[Pod]:
    return [v for v in pods if view.standing(v.uid).ground is Ground.LENT]


def _fewest(able: list[Pod], proposed: Sequence[str], gpus: int) -> tuple[Pod, ...]:
    """Those proposed, where they are able and enough.

    Else the largest first, of these the youngest, until it is enough; then without what was not
    needed.
    """
    if gpus <= 0:
        return ()
    by_uid = {v.uid: v for v in able}
    as_proposed = tuple(by_uid[u] for u in proposed if u in by_uid)
    if as_proposed and len(as_proposed) == len(proposed) and _gpus(as_proposed) >= gpus:
        return as_proposed
    chosen: list[Pod] = []
    for v in sorted(able, key=lambda v: (-v.gpus, -(v.started_s or 0.0), v.uid)):
        if _gpus(chosen) >= gpus:
            break
        chosen.append(v)
    for v in sorted(chosen, key=lambda v: (v.gpus, v.started_s or 0.0)):
        if _gpus(chosen) - v.gpus >= gpus:
            chosen.remove(v)
    return tuple(chosen)


def _ripe_at(v: Pod, view: View, claimant: QoSClass, now: float) -> float:
    """When a borrowed pod may be given up for this claimant."""
    if claimant.reclaim is Reclaim.NEVER:
        return now
    started = v.started_s if v.started_s is not None else now
    return started + view.classes[v.qos_class or ""].min_runtime_s


def _gpus(pods: Collection[Pod]) -> int:
    return sum(p.gpus for p in pods)


def _given_up(view: View, chosen: Sequence[Pod]) -> dict[int, int]:
    lost: dict[int, int] = {}
    for v in chosen:
        priority = view.classes[v.qos_class or ""].priority
        lost[priority] = lost.get(priority, 0) + v.gpus
    return lost


def _no_claim(pod: Pod, view: View) -> Why:
    unmet = view.unmet()
    own = [r for r in view.pool.reservations if r.covers(pod.qos_class or "", pod.namespace)]
    parts = ", ".join(f"{r.name}: {r.gpus} reserved, {unmet[r.name]} unmet" for r in own) or "none"
    return Why(
        reasons.NO_CLAIM,
        f"class {pod.qos_class} has no reservation with room for {pod.gpus} GPUs ({parts}); only that"
        " gives pods up",
    )


def _nobody(pod: Pod, candidates: Mapping[str, Sequence[str]]) -> Why:
    return Why(
        reasons.NOTHING_RECLAIMABLE,
        f"none of {len(candidates)} nodes has borrowed pods of lower classes that would free {pod.gpus}"
        f" GPUs for class {pod.qos_class}",
    )
