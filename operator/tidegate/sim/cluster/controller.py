"""The controller's round in virtual time: gather, production's plan and drain, apply."""

from collections.abc import Mapping
from dataclasses import replace

from tidegate.core.plan import plan
from tidegate.core.plan.drain import Replica, drain, limit_s
from tidegate.core.plan.types import Demand, Lane, LaneKey, LanePlan, Memory, Snapshot
from tidegate.core.quota import Ground, standings
from tidegate.core.types import Pod
from tidegate.facts.demand import Meter, Values, demands, window_s
from tidegate.sim.cluster.kube import Kube
from tidegate.sim.fleet import Fleet


class Controller:
    """Plans once a period from what it last heard, and moves Deployments and notes on pods."""

    def __init__(self, kube: Kube, fleet: Fleet) -> None:
        self._kube, self._fleet = kube, fleet
        self._meter = Meter(window_s(kube.spec.delays.period_s))
        self._memory = Memory()

    def hear(self, asked_s: float, counters: Values, gauges: Values) -> None:
        """A picker's metrics have come; a round is made with them. One look tells no rate yet."""
        self._meter.observe(asked_s, counters, gauges)
        if len(self._meter.history) > 1:
            self.round(self._fleet.now)

    def round(self, now: float) -> None:
        """One round, in the steps of `controller.loop`."""
        kube = self._kube
        # 1. Look.
        grounds = self._grounds()
        snapshot = self._gather()
        # 2. Decide.
        made = plan(snapshot, kube.spec.policy, self._memory, now)
        self._memory = made.memory
        # 3. Apply.
        kube.planned |= {key: step.replicas for key, step in made.lanes.items() if step.applied}
        for key, step in made.lanes.items():
            if step.applied:
                self._apply(key, step, grounds, now)
        kube.stand(uid for uid, ground in grounds.items() if ground is Ground.LENT)
        kube.settle()

    def _grounds(self) -> dict[str, Ground]:
        """Whose GPUs every placed pod stands on, by UID."""
        kube = self._kube
        found: dict[str, Ground] = {}
        for pool in kube.spec.pools:
            names = {n.name for n in pool.nodes}
            there = [p for p in kube.pods.values() if p.node in names and not p.terminating]
            stands = standings(there, pool.reservations, kube.classes, pool.capacity)
            found |= {uid: stand.ground for uid, stand in stands.items()}
        return found

    def _gather(self) -> Snapshot:
        kube = self._kube
        models = tuple(replace(m, lanes=tuple(self._lane(x) for x in m.lanes)) for m in kube.spec.models)
        demand = dict.fromkeys(kube.lanes, Demand()) | demands(self._meter.values(), fresh=True)
        pools = {p.name: p for p in kube.spec.pools}
        return Snapshot(kube.classes, pools, models, tuple(kube.pods.values()), demand)

    def _lane(self, lane: Lane) -> Lane:
        kube, key = self._kube, lane.key
        ready = sum(p.ready and not p.terminating for p in kube.of(key))
        config = kube.spec.engines.get((key.namespace, key.model), self._fleet.setting.config)
        return replace(lane, replicas=kube.planned[key], ready=ready, slots=lane.slots or config.max_num_seqs)

    def _apply(self, key: LaneKey, step: LanePlan, grounds: Mapping[str, Ground], now: float) -> None:
        """As `controller.podnotes`: the Deployment is lowered only by replicas that are empty."""
        kube, lane = self._kube, self._kube.lanes[key][1]
        staying = {p.name: p for p in kube.of(key) if not p.terminating}
        seen = [self._replica(p, grounds.get(p.uid), asked=p.name in step.leaving) for p in staying.values()]
        limit = limit_s(lane.objectives or kube.classes[key.qos_class].objectives)
        decided = drain(step.replicas, kube.asked[key], seen, limit, now)
        for name in decided.mark:
            kube.mark(staying[name].uid, now)
        for name in decided.unmark:
            kube.mark(staying[name].uid, None)
        for name in decided.release:
            kube.release(staying[name].uid)
        kube.scale(key, decided.replicas)

    def _replica(self, pod: Pod, ground: Ground | None, *, asked: bool) -> Replica:
        note = self._kube.notes[pod.uid]
        running = self._fleet.in_flight(pod.name) if pod.ready else None
        return Replica(
            name=pod.name,
            ready=pod.ready,
            created_s=pod.created_s,
            ground=ground or Ground.RESERVED,
            in_flight=running,
            marked_s=note.marked_s,
            empty=note.marked_s is not None and running == 0,
            released=note.released,
            asked=asked,
        )
