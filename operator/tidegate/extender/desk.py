"""Decides on the views, and remembers what it answered."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from tidegate.api.names import LABEL_CLASS
from tidegate.core import reasons
from tidegate.core.place import (
    ASSUME_S,
    GRANT_SLACK_S,
    Feasible,
    Grant,
    Preemption,
    View,
    Why,
    feasible,
    victims,
)
from tidegate.core.types import Pod
from tidegate.extender.gather import Cluster
from tidegate.extender.metrics import Metrics
from tidegate.extender.wire import FilterArgs, PreemptArgs

log = logging.getLogger(__name__)
A = TypeVar("A")

ANSWERED: Final = 1
"""Nodes that an answer names. With one, it is known which node a pod will be on before it is seen
there, so that a burst is decided on exact counts; and kube-scheduler need not score."""
RACE_S: Final = 2.0
"""A pod that was refused this shortly before GPUs came free may have missed it: kube-scheduler's
watch can be ahead of ours."""
QUIET_S: Final = 60.0
"""The same pod's lack of a claim is not told again at info within this time."""

PASSED: Final = Why("NotOurs", "no pod of a pool that is enforced")


@dataclass(slots=True)
class _Refused:
    at_s: float
    retry_s: float | None = None
    deferred: bool = False


class Desk:
    """Answers filter and preempt calls. `wake` is told the UIDs that are worth another look."""

    def __init__(
        self, cluster: Cluster, metrics: Metrics, now: Callable[[], float], wake: Callable[[str], None]
    ) -> None:
        self._cluster, self._metrics, self._now, self._wake = cluster, metrics, now, wake
        self.refused: dict[str, _Refused] = {}
        self._unclaimed: dict[str, float] = {}
        cluster.on_pod = self._pod_changed

    def filter(self, args: FilterArgs) -> Feasible:
        """Where a pod may go; where it will go is assumed from then on."""
        now = self._now()
        found = self._of_pool(args.pod)
        if found is None:
            return self._told("filter", args.pod, Feasible(args.nodes, restricted=False), PASSED)
        view, pod = found
        if pod.qos_class is None:
            why = _no_class(args.pod)
            self.refused[pod.uid] = _Refused(now)
            return self._told("filter", args.pod, Feasible((), {}, dict.fromkeys(args.nodes, why)), why)
        before = view.assumed.get(pod.uid)
        answer = feasible(pod, view, args.nodes, now, limit=ANSWERED, avoid={before.node} if before else ())
        if not answer.restricted:
            return self._told("filter", args.pod, answer, PASSED)
        if not answer.nodes:
            self.refused[pod.uid] = _Refused(now)
            reasons_given = [*answer.failed.values(), *answer.unresolvable.values()]
            return self._told("filter", args.pod, answer, reasons_given[0] if reasons_given else PASSED)
        self.refused.pop(pod.uid, None)
        if pod.uid not in view.grants or view.grants[pod.uid].node != answer.nodes[0]:
            view.assume(pod, answer.nodes[0], now + ASSUME_S)
        return self._told("filter", args.pod, answer, Why("Placed", f"on {answer.nodes[0]}"))

    def preempt(self, args: PreemptArgs) -> Preemption:
        """Whom a pod may push out; the node is held for it from then on."""
        now = self._now()
        found = self._of_pool(args.pod)
        if found is None:
            nodes = {n: v for n, v in args.victims.items() if v}
            return self._told("preempt", args.pod, Preemption(nodes, PASSED, restricted=False), PASSED)
        view, pod = found
        if pod.qos_class is None:
            why = _no_class(args.pod)
            return self._told("preempt", args.pod, Preemption({}, why), why)
        last = self.refused.get(pod.uid)
        # A node that is free but was not offered may be one that the pod cannot use for reasons that
        # only kube-scheduler knows. It is sent back to look once, and believed the second time.
        elsewhere = tuple(args.victims) if last and last.deferred else None
        answer = victims(pod, view, args.victims, now, elsewhere=elsewhere)
        if answer.restricted and answer.nodes:
            self.refused.pop(pod.uid, None)
            self._grant(view, pod, answer, now)
        elif answer.restricted:
            deferred = answer.why.reason == reasons.RESERVATIONS_FIT
            self.refused[pod.uid] = _Refused(now, answer.retry_s, deferred)
        return self._told("preempt", args.pod, answer, answer.why)

    def tick(self) -> None:
        """Let promises end and wake those whose time has come. Called about every half second."""
        now = self._now()
        for name, view in self._cluster.views().items():
            late = view.expire(now)
            if late:
                log.warning("pool %s: %d promised placements were not seen in time", name, len(late))
                self.wake_refused()
            self._metrics.assumed.labels(name).set(len(view.assumed))
            self._metrics.grants.labels(name).set(len(view.grants))
        for uid, refused in self.refused.items():
            if refused.retry_s is not None and refused.retry_s <= now:
                refused.retry_s = None
                self._wake(uid)

    def wake_refused(self) -> None:
        """Something changed that kube-scheduler may not see: let all that were refused try again."""
        for uid in list(self.refused):
            self._wake(uid)

    def _grant(self, view: View, pod: Pod, answer: Preemption, now: float) -> None:
        node, uids = next(iter(answer.nodes.items()))
        if pod.uid in view.grants:
            return
        until = now + view.pool.drain_timeout_s + GRANT_SLACK_S
        for uid in uids:
            self._metrics.preemptions.labels(view.pool.name, view.pods[uid].qos_class or "").inc()
        view.grant(Grant(pod, node, uids, until))

    def _of_pool(self, raw: Mapping[str, Any]) -> tuple[View, Pod] | None:
        """The view and the pod as decisions see them; None when nothing is to be decided."""
        name = self._cluster.pool_of(raw)
        if name is None:
            return None
        view = self._cluster.view(name)
        pod = self._cluster.fact(raw, name)
        labels = raw["metadata"].get("labels") or {}
        if pod is None or not view.pool.enforce or LABEL_CLASS not in labels:
            return None
        return view, pod

    def _pod_changed(self, uid: str, freed: bool) -> None:
        self.refused.pop(uid, None)
        if not freed:
            return
        now = self._now()
        for other, refused in self.refused.items():
            if now - refused.at_s < RACE_S:
                self._wake(other)

    def _told(self, verb: str, pod: Mapping[str, Any], answer: A, why: Why) -> A:
        self._metrics.decisions.labels(verb, why.reason).inc()
        meta = pod["metadata"]
        level = logging.INFO if verb == "preempt" and self._news(meta["uid"], why) else logging.DEBUG
        log.log(
            level, "%s %s/%s: %s: %s", verb, meta.get("namespace", ""), meta["name"], why.reason, why.message
        )
        return answer

    def _news(self, uid: str, why: Why) -> bool:
        """Whether to tell at info: a pod without a claim asks again and again, and is told once a minute."""
        if why.reason != reasons.NO_CLAIM:
            return True
        now = self._now()
        self._unclaimed = {u: at for u, at in self._unclaimed.items() if now - at < QUIET_S}
        return self._unclaimed.setdefault(uid, now) == now


def _no_class(raw: Mapping[str, Any]) -> Why:
    name = (raw["metadata"].get("labels") or {}).get(LABEL_CLASS)
    return Why(
        reasons.CLASS_NOT_FOUND, f"QoSClass {name} (label {LABEL_CLASS}) does not exist; create it or relabel"
    )
