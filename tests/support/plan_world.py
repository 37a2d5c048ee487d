"""A small world for planner tests: builders, and a scheduler that does what kube-scheduler would."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from tidegate.core.plan import plan
from tidegate.core.plan.types import Demand, Lane, LaneKey, LanePlan, Memory, Model, Plan, Policy, Snapshot
from tidegate.core.quota import Standing, standings
from tidegate.core.types import Node, Objectives, Pod, Pool, QoSClass, Reclaim, Reservation

CLASSES = {
    "interactive": QoSClass("interactive", 1000, Reclaim.NEVER, objectives=Objectives(ttft_s=1.0)),
    "standard": QoSClass("standard", 500, Reclaim.ABOVE_MINIMUM, objectives=Objectives(completion_s=60.0)),
    "batch": QoSClass("batch", 0, Reclaim.ALWAYS, objectives=Objectives(completion_s=86400.0)),
}
POLICY = Policy(scale_down_delay_s=10.0, start_time_s=4.0)


def pool(nodes: int = 4, gpus: int = 4, reserved: Mapping[str, int] | None = None, **more: object) -> Pool:
    made = tuple(Node(f"n{i}", gpus) for i in range(nodes))
    kept = tuple(Reservation(name, name, n) for name, n in (reserved or {}).items())
    return Pool("p", made, kept, **more)  # type: ignore[arg-type]


def lane(model: str, qos: str, gpus: int = 2, **more: object) -> Lane:
    return Lane(LaneKey("ns", model, qos), gpus, **more)  # type: ignore[arg-type]


def model(name: str, *lanes: Lane, **more: object) -> Model:
    return Model("ns", name, "p", lanes, **more)  # type: ignore[arg-type]


def load(replicas: float, queued: int = 0, queued_tokens: float = 0.0) -> Demand:
    """Arrivals that keep this many replicas busy at the target utilisation of POLICY."""
    rate = replicas * POLICY.target_utilisation * POLICY.ability.decode_tokens_per_s
    return Demand(
        arrival_rps=rate / 100, output_tokens_per_s=rate, queued_requests=queued, queued_tokens=queued_tokens
    )


BACKLOG = Demand(queued_requests=1000, queued_tokens=1e6)
QUIET = Demand()


def bound(model: str, qos: str, node: str, n: int = 0, gpus: int = 2, **more: object) -> Pod:
    values = {"created_s": float(n), "started_s": float(n), "ready": True} | more
    return Pod(f"{model}-{qos}-{node}-{n}", f"{model}-{qos}-{n}", "ns", gpus, qos_class=qos, model=model,
               node=node, priority=CLASSES[qos].priority, **values)  # type: ignore[arg-type]  # fmt: skip


@dataclass
class World:
    """Deployments and their pods, driven by plans. One `step` is one controller period."""

    pool: Pool
    models: tuple[Model, ...]
    demand: dict[LaneKey, Demand]
    policy: Policy = POLICY
    drain_s: float = 3.0
    now: float = 0.0
    memory: Memory = field(default_factory=Memory)
    pods: list[Pod] = field(default_factory=list)
    ends: dict[str, float] = field(default_factory=dict)
    history: list[dict[LaneKey, int]] = field(default_factory=list)
    decisions: list = field(default_factory=list)
    preempted: int = 0
    forget: bool = False
    _ids: itertools.count = field(default_factory=itertools.count)

    def snapshot(self) -> Snapshot:
        models = []
        for m in self.models:
            lanes = []
            for x in m.lanes:
                ready = sum(p.lane == x.key and p.ready and not p.terminating for p in self.pods)
                lanes.append(replace(x, ready=ready))
            models.append(replace(m, lanes=tuple(lanes)))
        return Snapshot(CLASSES, {"p": self.pool}, tuple(models), tuple(self.pods), self.demand)

    def step(self, seconds: float = 1.0) -> Plan:
        made = plan(self.snapshot(), self.policy, Memory() if self.forget else self.memory, self.now)
        self.memory = made.memory
        self.decisions += made.decisions
        self.apply(made.lanes)
        self.history.append({k: p.replicas for k, p in made.lanes.items()})
        self.now += seconds
        self._kubelet()
        self._replica_sets()
        self._schedule()
        return made

    def run(self, steps: int) -> Plan:
        for _ in range(steps):
            made = self.step()
        return made

    def replicas(self, name: str, qos: str) -> int:
        return next(x.replicas for m in self.models for x in m.lanes if x.key == LaneKey("ns", name, qos))

    def replicas_by_lane(self) -> dict[LaneKey, int]:
        return {x.key: x.replicas for m in self.models for x in m.lanes}

    def running(self, name: str, qos: str) -> int:
        key = LaneKey("ns", name, qos)
        return sum(p.lane == key and p.node is not None and not p.terminating for p in self.pods)

    def pending(self) -> list[Pod]:
        return [p for p in self.pods if p.node is None]

    def apply(self, lanes: Mapping[LaneKey, LanePlan]) -> None:
        self.models = tuple(
            replace(m, lanes=tuple(
                replace(x, replicas=lanes[x.key].replicas) if lanes[x.key].applied else x for x in m.lanes
            ))
            for m in self.models
        )  # fmt: skip
        # As the controller marks them; the drain itself is over at once here.
        leaving = {(key[0], name) for key, p in lanes.items() for name in p.leaving}
        self.pods = [replace(p, draining=(p.namespace, p.name) in leaving) for p in self.pods]

    def _kubelet(self) -> None:
        self.pods = [
            replace(p, ready=p.node is not None and self.now - (p.started_s or 0) >= self.policy.start_time_s)
            for p in self.pods
            if not (p.terminating and self.ends[p.uid] <= self.now)
        ]

    def _replica_sets(self) -> None:
        for x in (x for m in self.models for x in m.lanes):
            mine = [p for p in self.pods if p.lane == x.key and not p.terminating]
            for _ in range(x.replicas - len(mine)):
                uid = f"{next(self._ids):05d}"
                self.pods.append(
                    Pod(uid, uid, "ns", x.gpus, self.now, x.key.qos_class, x.key.model,
                        priority=CLASSES[x.key.qos_class].priority, lane_minimum=x.min_replicas)
                )  # fmt: skip
            mine.sort(key=lambda p: (p.node is not None, p.ready, not p.draining, -p.created_s))
            self._end(mine[: max(len(mine) - x.replicas, 0)])

    def _end(self, pods: Iterable[Pod]) -> None:
        gone = {p.uid for p in pods}
        self.pods = [p for p in self.pods if not (p.uid in gone and p.node is None)]
        self.pods = [replace(p, terminating=True) if p.uid in gone else p for p in self.pods]
        self.ends |= dict.fromkeys(gone, self.now + self.drain_s)

    def _free(self, node: Node) -> int:
        return node.gpus - sum(p.gpus for p in self.pods if p.node == node.name)

    def _schedule(self) -> None:
        nominated: dict[str, int] = {}
        for pod in sorted(self.pending(), key=lambda p: (-p.priority, p.created_s, p.uid)):
            fits = [n for n in self.pool.nodes if self._free(n) - nominated.get(n.name, 0) >= pod.gpus]
            if fits:
                best = min(fits, key=lambda n: (self._free(n), n.name))
                at = replace(pod, node=best.name, started_s=self.now)
                self.pods = [at if p.uid == pod.uid else p for p in self.pods]
            else:
                self._preempt(pod, nominated)

    def _claims(self, pod: Pod, stands: Mapping[str, Standing], alive: list[Pod]) -> bool:
        """The extender's rule: only a reservation that covers the pod and has room gives pods up."""
        for r in self.pool.reservations:
            used = sum(p.gpus for p in alive if stands[p.uid].reservation == r.name)
            if r.covers(pod.qos_class or "", pod.namespace) and r.gpus - used >= pod.gpus:
                return True
        return False

    def _preempt(self, pod: Pod, nominated: dict[str, int]) -> None:
        alive = [p for p in self.pods if p.node and not p.terminating]
        stands = standings(alive, self.pool.reservations, CLASSES)
        if not self._claims(pod, stands, alive):
            return
        for node in self.pool.nodes:
            here = [p for p in self.pods if p.node == node.name]
            going = sum(p.gpus for p in here if p.terminating)
            may = [p for p in here if not p.terminating and p.priority < pod.priority]
            may = [p for p in may if stands[p.uid].borrowed]
            room = self._free(node) + going - nominated.get(node.name, 0)
            if room + sum(p.gpus for p in may) < pod.gpus:
                continue
            victims: list[Pod] = []
            for victim in sorted(may, key=lambda p: -p.created_s):
                if room + sum(v.gpus for v in victims) < pod.gpus:
                    victims.append(victim)
            self.preempted += len(victims)
            self._end(victims)
            nominated[node.name] = nominated.get(node.name, 0) + pod.gpus
            return
