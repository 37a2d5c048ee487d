"""The one summary of an object: an ordered list of small checks, of which the first that speaks wins."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tidegate.controller.apply import Outcome
from tidegate.controller.conditions import Verdict
from tidegate.controller.gather import Facts, ModelFacts, PoolFacts, Problem
from tidegate.controller.pods import LaneView
from tidegate.core import reasons
from tidegate.core.plan.types import LanePlan, Plan, Unmet
from tidegate.facts.pools import problem as reservations_problem


@dataclass(frozen=True, slots=True)
class ModelCase:
    """What a ModelDeployment is judged by; `lanes` and their readiness are by class."""

    found: ModelFacts
    plan: Plan
    outcome: Outcome
    lanes: Mapping[str, LaneView]
    unmet: Sequence[Unmet]

    @property
    def steps(self) -> dict[str, LanePlan]:
        """What each class's lane is planned to have."""
        keys = {c: self.found.key(c) for c in self.found.classes}
        return {c: self.plan.lanes[key] for c, key in keys.items() if key in self.plan.lanes}

    def view(self, qos_class: str) -> LaneView:
        """How a class's lane stands."""
        return self.lanes.get(qos_class, LaneView())


def model_verdict(case: ModelCase) -> Verdict:
    """The summary of a ModelDeployment."""
    return next(v for check in _MODEL_CHECKS if (v := check(case)))


def pool_verdict(found: PoolFacts, facts: Facts) -> Verdict:
    """The summary of a GPUPool."""
    return next(v for check in _POOL_CHECKS if (v := check(found, facts)))


def held(raw: Mapping[str, Any], holders: Iterable[str]) -> Verdict | None:
    """Why an object that somebody deleted is still there."""
    if not raw["metadata"].get("deletionTimestamp"):
        return None
    users = list(holders)
    shown = ", ".join(users[:5]) + (f" and {len(users) - 5} more" if len(users) > 5 else "")
    return Verdict("working", reasons.IN_USE, f"deleted once it is used no more; used by {shown or 'nobody'}")


def of_problem(problem: Problem) -> Verdict:
    """Blocked, or stalled where no retry will help."""
    return Verdict("stalled" if problem.final else "blocked", problem.reason, problem.message)


def _deleting(case: ModelCase) -> Verdict | None:
    waiting = Verdict("working", reasons.DELETING, "waiting until its pods have drained")
    return waiting if case.found.deleting else None


def _broken(case: ModelCase) -> Verdict | None:
    """The object itself, its pool, or the API server's refusal of a child."""
    problem = case.found.problem or case.outcome.problem
    return of_problem(problem) if problem else None


def _lane_broken(case: ModelCase) -> Verdict | None:
    """A class that is missing or not allowed; the other lanes go on."""
    problems = list(case.found.lane_problems.values())
    if not problems:
        return None
    return of_problem(problems[0]._replace(message="; ".join(p.message for p in problems)))


def _external(case: ModelCase) -> Verdict | None:
    if case.found.hands_off != reasons.EXTERNAL:
        return None
    count = max((v.ready for v in case.lanes.values()), default=0)
    if not count:
        return Verdict("blocked", reasons.NO_ENDPOINTS, "no Ready pod matches spec.engine.endpoints.selector")
    return Verdict("ready", reasons.EXTERNAL, f"{count} Ready pods are routed to; none is touched")


def _left_alone(case: ModelCase) -> Verdict | None:
    """Paused, or in a pool that only observes."""
    if not case.found.hands_off:
        return None
    paused = case.found.hands_off == reasons.PAUSED
    why = "scaling.paused is set" if paused else "the pool is in mode Observe"
    would = ", ".join(f"{c} {s.replicas}" for c, s in case.steps.items()) or "nothing"
    return Verdict("ready", case.found.hands_off, f"nothing is changed, since {why}; planned is {would}")


def _too_large(case: ModelCase) -> Verdict | None:
    """A replica that no node could hold, however empty."""
    obj, pool = case.found.obj, case.found.largest_node
    if obj is None or not pool or obj.gpus_per_replica <= pool:
        return None
    text = (
        f"a replica needs {obj.gpus_per_replica} GPUs on one node (spec.parallelism); "
        f"the largest node of GPUPool {case.found.pool} has {pool}"
    )
    return Verdict("stalled", reasons.REPLICA_TOO_LARGE, text)


def _floor_unmet(case: ModelCase) -> Verdict | None:
    """A lane is below its minReplicas and there is no GPU for it."""
    floors = {x.key.qos_class: x.min_replicas for x in case.found.model.lanes} if case.found.model else {}
    for short in case.unmet:
        name = short.lane.qos_class
        if case.view(name).ready < floors.get(name, 0):
            text = f"class {name} is below its minReplicas: {short.message}"
            state = "working" if short.reason == reasons.WAITS_FOR_GPUS else "blocked"
            return Verdict(state, short.reason, text)
    return None


def _unfinished(case: ModelCase) -> Verdict | None:
    late = [c for c, s in case.steps.items() if case.view(c).ready != s.replicas or case.view(c).rolling]
    if not late:
        return None
    trouble = "; ".join(f"{c}: {case.view(c).trouble}" for c in late if case.view(c).trouble)
    waits = "; ".join(f"{c}: {case.view(c).waits}" for c in late if case.view(c).waits)
    reason = reasons.WAITS_FOR_GPUS if waits else reasons.PROGRESSING
    reason = reasons.ENGINE_NOT_STARTING if trouble else reason
    why = trouble or waits
    return Verdict("working", reason, f"{_line(case)}; {why}" if why else _line(case))


def _ready(case: ModelCase) -> Verdict:
    return Verdict("ready", reasons.READY, _line(case))


def _line(case: ModelCase) -> str:
    return (
        ", ".join(f"{c} {case.view(c).ready}/{s.replicas}" for c, s in case.steps.items()) + " replicas ready"
    )


_MODEL_CHECKS: Final[tuple[Callable[[ModelCase], Verdict | None], ...]] = (
    _deleting,
    _broken,
    _lane_broken,
    _external,
    _left_alone,
    _too_large,
    _floor_unmet,
    _unfinished,
    _ready,
)


def _pool_broken(found: PoolFacts, _: Facts) -> Verdict | None:
    return of_problem(found.problem) if found.problem else None


def _pool_held(found: PoolFacts, _: Facts) -> Verdict | None:
    return held(found.raw, found.holders)


def _no_nodes(found: PoolFacts, _: Facts) -> Verdict | None:
    if found.matched:
        return None
    return Verdict("blocked", reasons.NO_NODES, "spec.nodeSelector matches no node")


def _excess(found: PoolFacts, _: Facts) -> Verdict | None:
    excess = reservations_problem(found.core) if found.core else None
    return Verdict("blocked", *excess) if excess else None


def _reserved_for_nobody(found: PoolFacts, facts: Facts) -> Verdict | None:
    wanted = {r.qos_class for r in found.core.reservations} if found.core else set()
    missing = sorted(wanted - facts.classes.keys())
    text = f"spec.reservations name QoSClasses that do not exist: {', '.join(missing)}"
    return Verdict("blocked", reasons.CLASS_NOT_FOUND, text) if missing else None


def _pool_ready(found: PoolFacts, _: Facts) -> Verdict:
    pool = found.core
    capacity, reserved = (pool.capacity, sum(r.gpus for r in pool.reservations)) if pool else (0, 0)
    text = f"{capacity} GPUs on {len(found.matched)} nodes, {reserved} of them reserved"
    if not found.enforced:
        return Verdict("ready", reasons.OBSERVED, f"{text}; mode Observe: nothing is changed")
    return Verdict("ready", reasons.RESERVATIONS_FIT, text)


_POOL_CHECKS: Final[tuple[Callable[[PoolFacts, Facts], Verdict | None], ...]] = (
    _pool_broken,
    _pool_held,
    _no_nodes,
    _excess,
    _reserved_for_nobody,
    _pool_ready,
)
