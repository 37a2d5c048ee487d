"""What the objects' status says: from facts, plan and outcomes to JSON. Pure; the only bridge core → api."""

from collections.abc import Iterable, Mapping
from typing import Any

from tidegate.api import names
from tidegate.api.enforcement import not_enforced
from tidegate.api.gpupool import FreeBlock, ReservationStatus
from tidegate.api.modeldeployment import ClassStatus, Weight, replicas_line
from tidegate.controller.apply import Outcome
from tidegate.controller.conditions import Extra, Verdict, conditions
from tidegate.controller.gather import ClassFacts, Facts, ModelFacts, PoolFacts
from tidegate.controller.pods import LaneView
from tidegate.controller.poolreport import PoolReport
from tidegate.controller.verdicts import ModelCase, held, model_verdict, pool_verdict
from tidegate.core import reasons
from tidegate.core.plan.types import Plan
from tidegate.render.service import service_name

Object = dict[str, Any]


def model_status(
    found: ModelFacts, plan: Plan, outcome: Outcome, lanes: Mapping[str, LaneView], now: str
) -> Object:
    """Status of a ModelDeployment.

    Args:
        found: The object and what is wrong with it.
        plan: The whole plan.
        outcome: What came of applying its children.
        lanes: By class, what stands in the cluster.
        now: RFC 3339.
    """
    old = found.raw.get("status") or {}
    unmet = [u for u in plan.unmet if found.key(u.lane.qos_class) == u.lane]
    classes = [_class(found, plan, c, lanes.get(c, LaneView())) for c in found.classes]
    verdict = model_verdict(ModelCase(found, plan, outcome, lanes, unmet))
    extras = _enforced(found.obj) + _taken(found)
    if outcome.conflicts:
        text = "left to another field manager: " + "; ".join(sorted(outcome.conflicts))
        extras.append(Extra("Conflict", reasons.FIELD_CONFLICT, text))
    if outcome.unexposed:
        extras.append(Extra("NotExposed", outcome.unexposed.reason, outcome.unexposed.message))
    if unmet and verdict.reason != reasons.REPLICA_TOO_LARGE:
        text = "; ".join(f"class {u.lane.qos_class}: {u.message}" for u in unmet)
        extras.append(Extra("GPUsMissing", unmet[0].reason, text))
    generation = found.raw["metadata"].get("generation", 0)
    status: Object = {
        "observedGeneration": generation,
        "conditions": conditions(verdict, extras, old.get("conditions") or (), generation, now),
        "classes": _steady([c.to_json() for c in classes], old.get("classes") or ()),
        "replicas": replicas_line(classes),
    }
    if found.obj and not found.hands_off and found.model:
        meta = found.obj.metadata
        status["url"] = f"http://{service_name(meta.name)}.{meta.namespace or 'default'}.svc:8000"
    return status


def _taken(found: ModelFacts) -> list[Extra]:
    """Names that lead to an older ModelDeployment. The later one is told, since it made it so."""
    if not found.taken:
        return []
    parts = [f"{name} (ModelDeployment {'/'.join(key)})" for name, key in sorted(found.taken.items())]
    shown = ", ".join(parts[:5]) + (f" and {len(parts) - 5} more" if len(parts) > 5 else "")
    text = (
        f"requests for these names go to an older model: {shown}; choose other names in spec.model.name,"
        " aliases and adapters, or remove them there"
    )
    return [Extra("NamesTaken", reasons.SERVED_ELSEWHERE, text)]


def _class(found: ModelFacts, plan: Plan, name: str, view: LaneView) -> ClassStatus:
    key = found.key(name)
    step = plan.lanes.get(key)
    problem = found.lane_problems.get(name) or found.problem
    reason, message = (step.reason, step.message) if step else ("", "")
    if problem:
        reason, message = problem.reason, problem.message
    elif view.trouble:
        message = f"{message}; {view.trouble}" if message else view.trouble
    weights = [Weight(lane=w.lane, weight=w.weight) for w in plan.weights.get(key, ())]
    return ClassStatus(
        qos_class=name,
        desired=step.replicas if step else view.replicas,
        ready=view.ready,
        weights=weights,
        headroom=view.headroom,
        attainment_percent=view.attained,
        reason=reason,
        message=message[:4000],
    )


def _steady(new: list[Object], old: Iterable[Mapping[str, Any]]) -> list[Object]:
    """Keep a message whose facts are the same: its rates move with every request."""
    before = {c.get("qosClass"): c for c in old}

    def facts(entry: Mapping[str, Any]) -> Object:
        return {key: value for key, value in entry.items() if key != "message"}

    return [
        {**c, "message": known["message"]}
        if (known := before.get(c["qosClass"])) and facts(known) == facts(c) and known.get("message")
        else c
        for c in new
    ]


def class_status(name: str, found: ClassFacts, outcome: Outcome, facts: Facts, now: str) -> Object:
    """Status of a QoSClass."""
    old = found.raw.get("status") or {}
    generation = found.raw["metadata"].get("generation", 0)
    extras = _enforced(found.obj)
    claimants = sorted(n for n, c in facts.classes.items() if c.claims_default)
    if found.claims_default and len(claimants) > 1:
        default = next((n for n, c in facts.classes.items() if c.is_default), "none")
        text = (
            f"{len(claimants)} classes are annotated as the default ({', '.join(claimants)}); the newest, "
            f"{default}, is it. Remove {names.ANNOTATION_DEFAULT_CLASS} from the others"
        )
        extras.append(Extra("SeveralDefaults", reasons.SEVERAL_DEFAULTS, text))
    if outcome.conflicts:
        text = "left to another field manager: " + "; ".join(sorted(outcome.conflicts))
        extras.append(Extra("Conflict", reasons.FIELD_CONFLICT, text))
    problem = found.problem or outcome.problem
    priority = found.obj.spec.priority if found.obj else 0
    being_deleted = held(found.raw, found.holders)
    if problem:
        verdict = Verdict("stalled" if problem.final else "blocked", problem.reason, problem.message)
    else:
        text = f"PriorityClass {names.priority_class_name(name)} has value {priority}"
        verdict = being_deleted or Verdict("ready", reasons.READY, text)
    return {
        "observedGeneration": generation,
        "conditions": conditions(verdict, extras, old.get("conditions") or (), generation, now),
        "usedBy": len(found.used_by),
        "default": found.is_default,
    }


def pool_status(found: PoolFacts, report: PoolReport | None, facts: Facts, now: str) -> Object:
    """Status of a GPUPool."""
    old = found.raw.get("status") or {}
    generation = found.raw["metadata"].get("generation", 0)
    verdict, extras = pool_verdict(found, facts), _enforced(found.obj) + _shared(found, facts)
    status: Object = {
        "observedGeneration": generation,
        "conditions": conditions(verdict, extras, old.get("conditions") or (), generation, now),
    }
    if report is not None:
        status |= {
            "nodes": len(found.matched),
            "capacity": report.capacity,
            "allocated": report.allocated,
            "foreign": report.foreign,
            "reservations": [
                ReservationStatus(
                    name=r.name,
                    qos_class=r.qos_class,
                    reserved=r.reserved,
                    in_use=r.in_use,
                    borrowed=r.borrowed,
                    lent=r.lent,
                    unmet=r.unmet,
                ).to_json()
                for r in report.reservations
            ],
            "freeBlocks": [FreeBlock(node_gpus=n, largest_free=f).to_json() for n, f in report.blocks[:32]],
        }
    return status


def _shared(found: PoolFacts, facts: Facts) -> list[Extra]:
    """Nodes that an older pool selects too. The later pool is told, since it made it so."""
    mine = {n["metadata"]["name"] for n in found.matched}
    parts = []
    for name, other in sorted(facts.pools.items()):
        both = sorted(mine & {n["metadata"]["name"] for n in other.matched})
        if both and _age(other.raw) < _age(found.raw):
            shown = ", ".join(both[:5]) + (f" and {len(both) - 5} more" if len(both) > 5 else "")
            parts.append(f"{shown} of GPUPool {name}")
    if not parts:
        return []
    text = (
        f"spec.nodeSelector also matches {'; '.join(parts)}: their GPUs are counted in both pools, so that"
        " neither can keep its reservations; select other nodes"
    )
    return [Extra("NodesShared", reasons.NODES_SHARED, text)]


def _age(raw: Mapping[str, Any]) -> tuple[str, str]:
    return (raw["metadata"].get("creationTimestamp") or "", raw["metadata"]["name"])


def _enforced(obj: Any) -> list[Extra]:
    fields = not_enforced(obj) if obj else []
    if not fields:
        return []
    text = f"accepted, but nothing acts on it yet: {', '.join(fields)}"
    return [Extra("NotEnforced", reasons.NOT_ENFORCED, text)]


def differs(raw: Mapping[str, Any], wanted: Object) -> bool:
    """Whether the status must be written."""
    old = raw.get("status") or {}
    return any(old.get(key) != value for key, value in wanted.items()) or (
        "url" in old and "url" not in wanted
    )
