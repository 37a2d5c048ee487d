"""Kubernetes' part in virtual time: Deployments make pods, the scheduler binds them, they start and end.

Nothing here decides what Tidegate decides: how many replicas a lane has comes from `controller`, where
a pod goes and who gives way from `scheduler`.
"""

import itertools
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from tidegate.core.plan.drain import limit_s
from tidegate.core.plan.types import Lane, LaneKey, Model
from tidegate.core.types import Pod, QoSClass, Reclaim
from tidegate.sim.cluster.scheduler import Scheduler
from tidegate.sim.cluster.spec import ClusterSpec
from tidegate.sim.cluster.usage import Usage, moment
from tidegate.sim.fleet import Fleet, Replica

_LOOK_S: Final = 0.5
"""How often it is seen whether a replica that is going has nothing in flight any more."""


@dataclass(slots=True)
class Notes:
    """Annotations of a pod: since when it is emptied, and that it was found to be empty."""

    marked_s: float | None = None
    released: bool = False


class Kube:
    """The objects of one cluster. Every change goes through a method here, and into `usage`."""

    def __init__(
        self, spec: ClusterSpec, classes: Mapping[str, QoSClass], fleet: Fleet, seed: int, usage: Usage
    ) -> None:
        self.spec, self.classes, self.usage = spec, classes, usage
        self.pods: dict[str, Pod] = {}
        self.notes: dict[str, Notes] = {}
        self.asked: dict[LaneKey, int] = {}
        self.planned: dict[LaneKey, int] = {}
        self.lanes: dict[LaneKey, tuple[Model, Lane]] = {x.key: (m, x) for m in spec.models for x in m.lanes}
        self._fleet = fleet
        self._rng = random.Random(f"{seed}/starts")  # noqa: S311 - a simulation, not a secret
        self._uids, self._numbers = itertools.count(1), dict.fromkeys(self.lanes, 0)
        self._scheduler = Scheduler(spec.pools, classes, _block_sizes(spec))
        self._looks = False

    # ── Deployments ─────────────────────────────────────────────────────────────────────────────

    def scale(self, key: LaneKey, replicas: int) -> None:
        """A lane's Deployment asks for so many; its ReplicaSet makes or deletes pods."""
        self.asked[key] = replicas
        live = [p for p in self.of(key) if not p.terminating]
        if len(live) == replicas:
            return
        for _ in range(replicas - len(live)):
            self._create(key)
        # What is not bound goes first, then what is not ready, the cheapest to delete, the youngest.
        live.sort(key=lambda p: (p.node is not None, p.ready, -self._cheap(p), -p.created_s, p.uid))
        for pod in live[: max(0, len(live) - replicas)]:
            self._delete(pod)
        self.settle()

    def of(self, key: LaneKey) -> list[Pod]:
        """A lane's pods, those that are going too."""
        return [p for p in self.pods.values() if p.lane == key]

    def _cheap(self, pod: Pod) -> int:
        note = self.notes[pod.uid]
        return (note.marked_s is not None) + note.released

    def _create(self, key: LaneKey) -> None:
        lane = self.lanes[key][1]
        uid, number = f"{next(self._uids):06d}", self._numbers[key]
        self._numbers[key] += 1
        self.pods[uid] = Pod(
            uid=uid,
            name=name_of(key, number),
            namespace=key.namespace,
            gpus=lane.gpus,
            created_s=self._fleet.now,
            qos_class=key.qos_class,
            model=key.model,
            priority=self.classes[key.qos_class].priority,
            lane_minimum=lane.min_replicas,
        )
        self.notes[uid] = Notes()

    # ── notes ───────────────────────────────────────────────────────────────────────────────────

    def mark(self, uid: str, now: float | None) -> None:
        """Empty a replica from now on; None: no more."""
        self.notes[uid] = Notes(now)
        self._put(replace(self.pods[uid], draining=now is not None))

    def release(self, uid: str) -> None:
        """A replica was found to be empty."""
        self.notes[uid].released = True

    def stand(self, lent: Iterable[str]) -> None:
        """Tell the picker which replicas stand on lent GPUs, and which are to be sent nothing more."""
        on_lent = frozenset(lent)
        for uid, pod in self.pods.items():
            if pod.ready:
                drains = pod.draining or pod.terminating
                self._fleet.note_replica(pod.name, draining=drains, lent=uid in on_lent)

    # ── pods ────────────────────────────────────────────────────────────────────────────────────

    def begin(self) -> None:
        """What stands at the beginning: scheduled at once, and ready."""
        for key, (_, lane) in self.lanes.items():
            self.planned[key] = lane.replicas
            self.scale(key, lane.replicas)
        self._schedule(started=True)

    def fail(self, name: str) -> None:
        """A replica's engine dies; its container is started again where it is."""
        found = next((p for p in self.pods.values() if p.name == name and p.ready), None)
        if found is not None and not found.terminating:
            self._stop(found)
            self._put(replace(found, ready=False))
            self._start(found.uid, self._start_s())
            self.settle()

    def _put(self, pod: Pod) -> None:
        self.pods[pod.uid] = pod
        self._scheduler.see(self._pool(pod), pod)

    def _pool(self, pod: Pod) -> str:
        return self.lanes[LaneKey(*pod.lane)][0].pool  # type: ignore[arg-type]  # each is of a lane

    def _start_s(self) -> float:
        return self._rng.uniform(*self.spec.delays.start_s)

    def _start(self, uid: str, after_s: float) -> None:
        self._fleet.at(self._fleet.now + after_s, partial(self._ready, uid))

    def _ready(self, uid: str) -> None:
        pod = self.pods.get(uid)
        if pod is None or pod.terminating or pod.ready:
            return
        self._put(replace(pod, ready=True))
        model = (pod.namespace, pod.model or "")
        config, speed = self.spec.engines.get(model), self.spec.speeds.get(model, 1.0)
        self._fleet.add_replica(Replica(pod.name, model, pod.qos_class or "", speed, config))
        self.settle()

    def _delete(self, pod: Pod) -> None:
        """What was never bound is gone at once; the others end as their grace period says."""
        if pod.terminating:
            return
        if pod.node is None:
            self._gone(pod.uid)
            return
        self._put(replace(pod, terminating=True))
        now, stop_s = self._fleet.now, self.spec.delays.stop_s
        if pod.ready:
            self._fleet.note_replica(pod.name, draining=True, lent=False)
            self._fleet.at(now + stop_s, partial(self._end, pod.uid, now + max(stop_s, self._grace_s(pod))))
        else:
            self._fleet.at(now + stop_s, partial(self._gone, pod.uid))

    def _grace_s(self, pod: Pod) -> float:
        """As `render.lane.grace_s` writes it into the pod."""
        qos = self.classes[pod.qos_class or ""]
        if qos.reclaim is Reclaim.NEVER:
            return qos.objectives.completion_s or limit_s(qos.objectives)
        return next(p.drain_timeout_s for p in self.spec.pools if p.name == self._pool(pod))

    def _end(self, uid: str, until_s: float) -> None:
        """A replica that was told to stop does when nothing is in flight there, or is killed."""
        pod, now = self.pods[uid], self._fleet.now
        if now < until_s and self._fleet.in_flight(pod.name):
            self._fleet.at(min(now + _LOOK_S, until_s), partial(self._end, uid, until_s))
            return
        self._stop(pod)
        self._gone(uid)
        self.settle()

    def _stop(self, pod: Pod) -> None:
        lost = self._fleet.remove_replica(pod.name)
        if self.usage.begin_s <= self._fleet.now <= self.usage.end_s:
            self.usage.thrown_away[pod.qos_class or ""] += lost

    def _gone(self, uid: str) -> None:
        pod = self.pods.pop(uid)
        del self.notes[uid]
        self._scheduler.forget(self._pool(pod), uid)
        self.settle()

    # ── scheduling ──────────────────────────────────────────────────────────────────────────────

    def settle(self) -> None:
        """Have the scheduler try what waits, soon."""
        self._note()
        if not self._looks and any(p.node is None for p in self.pods.values()):
            self._looks = True
            self._fleet.at(self._fleet.now + self.spec.delays.schedule_s, self._schedule)

    def _schedule(self, *, started: bool = False) -> None:
        self._looks = False
        now = self._fleet.now
        waiting = [(self._pool(p), p) for p in self.pods.values() if p.node is None]
        found = self._scheduler.cycle(waiting, now)
        for pod in found.bound:
            self._put(pod)
            if started:
                self._ready(pod.uid)
                continue
            self._start(pod.uid, self._start_s())
            if self.usage.begin_s <= now <= self.usage.end_s:
                self.usage.starts[pod.qos_class or ""] += 1
        for uid in found.evicted:
            pod = self.pods[uid]
            if self.usage.begin_s <= now <= self.usage.end_s and not pod.terminating:
                self.usage.evictions[pod.qos_class or ""] += 1
            self._delete(pod)
            self.scale(key := LaneKey(*pod.lane), self.asked[key])  # type: ignore[arg-type]  # as above
        self._note()

    def _note(self) -> None:
        self.usage.add(moment(self._fleet.now, self.spec, self.classes, self.pods.values(), self.planned))


def name_of(key: LaneKey, number: int) -> str:
    """A pod's name, as scenarios name replicas."""
    model = key.model if key.namespace == "default" else f"{key.namespace}/{key.model}"
    return f"{model}-{key.qos_class}-{number}"


def _block_sizes(spec: ClusterSpec) -> dict[str, dict[str, set[int]]]:
    """GPUs of the replicas that each reservation of a pool is for."""
    return {
        pool.name: {
            r.name: {
                x.gpus
                for m in spec.models
                for x in m.lanes
                if m.pool == pool.name and r.covers(x.key.qos_class, m.namespace)
            }
            for r in pool.reservations
        }
        for pool in spec.pools
    }
