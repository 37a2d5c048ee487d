"""kube-scheduler with Tidegate's extender: what it asks, and what it does with the answers.

Which node a pod gets, and who gives way, `core.place` says. What stands here is kube-scheduler's own
part: the order of pods, whether one fits a node, and whom it would evict by priority alone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from tidegate.core.place import ASSUME_S, GRANT_SLACK_S, Grant, View, feasible, victims
from tidegate.core.types import Pod, Pool, QoSClass


class Cycle(NamedTuple):
    """What came of one look at the pods that wait: those bound now, and UIDs of those to be evicted."""

    bound: list[Pod]
    evicted: list[str]


class Scheduler:
    """Keeps one view a pool, told of every pod that changed."""

    def __init__(
        self,
        pools: Iterable[Pool],
        classes: Mapping[str, QoSClass],
        block_sizes: Mapping[str, Mapping[str, Iterable[int]]],
    ) -> None:
        self._views = {p.name: View(p, classes, block_sizes.get(p.name)) for p in pools}

    def see(self, pool: str, pod: Pod) -> None:
        """A pod was bound or changed."""
        if pod.node is not None:
            self._views[pool].place(pod)

    def forget(self, pool: str, uid: str) -> None:
        """A pod is gone."""
        self._views[pool].drop(uid)

    def cycle(self, waiting: Iterable[tuple[str, Pod]], now: float) -> Cycle:
        """Try every pod that waits (pool, pod) once, the most important first, then the oldest."""
        found = Cycle([], [])
        for view in self._views.values():
            view.expire(now)
        for pool, pod in sorted(waiting, key=lambda w: (-w[1].priority, w[1].age_key)):
            self._one(self._views[pool], pod, now, found)
        return found

    def _one(self, view: View, pod: Pod, now: float, found: Cycle) -> None:
        with view.without(pod.uid):
            fits = [name for name in view.nodes if view.free(name) >= pod.gpus]
        answer = feasible(pod, view, fits, now, limit=1)
        if answer.nodes:
            view.assume(pod, answer.nodes[0], now + ASSUME_S)
            found.bound.append(replace(pod, node=answer.nodes[0], started_s=now))
            return
        proposed = {n: v for n in view.nodes if n not in answer.unresolvable and (v := _lower(view, n, pod))}
        given = victims(pod, view, proposed, now)
        for node, uids in given.nodes.items():
            if pod.uid not in view.grants:
                view.grant(Grant(pod, node, uids, now + view.pool.drain_timeout_s + GRANT_SLACK_S))
            found.evicted.extend(uids)


def _lower(view: View, node: str, pod: Pod) -> tuple[str, ...]:
    """Whom kube-scheduler would evict on a node by priority alone; nobody where that does not help.

    All that is less important goes in thought; then as many are put back as fit, the most important
    and then the oldest first (`SelectVictimsOnNode` of its default preemption).
    """
    here = [view.pods[uid] for uid in view.on_node[node] if uid not in view.assumed | view.grants]
    lower = [p for p in here if p.priority < pod.priority and not p.terminating]
    room = view.nodes[node].gpus - sum(p.gpus for p in here if p not in lower) - pod.gpus
    if room < 0:
        return ()
    gone = []
    for one in sorted(lower, key=lambda p: (-p.priority, p.started_s or 0.0, p.uid)):
        if one.gpus <= room:
            room -= one.gpus
        else:
            gone.append(one.uid)
    return tuple(gone)
