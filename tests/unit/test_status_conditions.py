"""Conditions and status: what they say, and that they stay as they are while nothing changes."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from support.builders import mdep, named, pool, qos
from tidegate.api import names
from tidegate.api.gpupool import GPUPool
from tidegate.api.modeldeployment import ModelDeployment
from tidegate.api.qosclass import QoSClass
from tidegate.controller.apply import Outcome
from tidegate.controller.conditions import Extra, Verdict, changed, conditions
from tidegate.controller.gather import ClassFacts, Facts, ModelFacts, PoolFacts, Problem
from tidegate.controller.pods import LaneView
from tidegate.controller.report import attained
from tidegate.controller.status import class_status, differs, model_status, pool_status
from tidegate.core.plan.types import (
    Demand,
    Lane,
    LaneKey,
    LanePlan,
    Memory,
    Model,
    Plan,
    Snapshot,
    Unmet,
    Weight,
)
from tidegate.core.types import Node, Pool, Reservation
from tidegate.facts.classes import default_class

Object = dict[str, Any]
THEN, NOW = "2026-01-01T00:00:00Z", "2026-01-01T01:00:00Z"


@pytest.mark.parametrize(
    ("state", "ready", "reconciling", "stalled"),
    [
        ("ready", "True", "False", "False"),
        ("working", "Unknown", "True", "False"),
        ("blocked", "False", "False", "False"),
        ("stalled", "False", "False", "True"),
    ],
)
def test_the_three_conditions(state: str, ready: str, reconciling: str, stalled: str) -> None:
    found = conditions(Verdict(state, "Why", "text"), [], [], 3, NOW)
    assert {c["type"]: c["status"] for c in found} == {
        "Ready": ready, "Reconciling": reconciling, "Stalled": stalled,
    }  # fmt: skip
    assert all(c["observedGeneration"] == 3 and c["reason"] for c in found)


def test_time_changes_with_the_status_only() -> None:
    first = conditions(Verdict("ready", "Why", "one"), [Extra("NotEnforced", "N", "x")], [], 1, THEN)
    second = conditions(Verdict("ready", "Other", "two"), [], first, 2, NOW)
    assert [c["lastTransitionTime"] for c in second] == [THEN] * 3
    third = conditions(Verdict("working", "Other", "two"), [], second, 2, NOW)
    assert {c["type"]: c["lastTransitionTime"] for c in third} == {
        "Ready": NOW, "Reconciling": NOW, "Stalled": THEN,
    }  # fmt: skip
    assert [c["type"] for c in changed(first, second)] == ["Ready"]
    assert changed(second, second) == []


def model_facts(**more: Any) -> ModelFacts:
    raw = mdep(
        classes=[{"qosClass": "high", "minReplicas": 1}, {"qosClass": "low"}], parallelism={"tensor": 2}
    )
    raw["metadata"] |= {"generation": 4, "uid": "u"}
    lanes = tuple(Lane(LaneKey("default", "m", c), 2, min_replicas=n) for c, n in (("high", 1), ("low", 0)))
    facts = ModelFacts(
        raw, ModelDeployment.from_object(raw), pool="p", classes=("high", "low"),
        model=Model("default", "m", "p", lanes), largest_node=4,
    )  # fmt: skip
    return replace(facts, **more)


def plan_of(high: int = 1, low: int = 0, unmet: tuple[Unmet, ...] = (), message: str = "why") -> Plan:
    key = LaneKey("default", "m", "high")
    lanes = {
        key: LanePlan(high, high, "MeetsDemand", message),
        key._replace(qos_class="low"): LanePlan(low, low, "AtMinimum", message),
    }
    return Plan(lanes, {key: (Weight("high", 60), Weight("low", 40))}, (), unmet, Memory())


def status_of(
    facts: ModelFacts | None = None,
    plan: Plan | None = None,
    outcome: Outcome | None = None,
    **views: LaneView,
) -> Object:
    lanes = {"high": LaneView(1, 1), "low": LaneView()} | views
    return model_status(facts or model_facts(), plan or plan_of(), outcome or Outcome(), lanes, NOW)


def test_names_that_lead_elsewhere_are_told() -> None:
    facts = model_facts(taken={"m": ("old", "m"), "n": ("old", "x")})
    [found] = [c for c in status_of(facts)["conditions"] if c["type"] == "NamesTaken"]
    assert (found["status"], found["reason"]) == ("True", "ServedElsewhere")
    assert "m (ModelDeployment old/m), n (ModelDeployment old/x)" in found["message"]
    assert not [c for c in status_of()["conditions"] if c["type"] == "NamesTaken"]


def summary(status: Object) -> tuple[str, str]:
    ready = status["conditions"][0]
    return ready["status"], ready["reason"]


SHORT = Unmet(LaneKey("default", "m", "high"), "p", 1, 2, "NoFreeBlock", "needs 2 GPUs on one node")

CASES = {
    "all ready": ({}, ("True", "Ready"), "high 1/1, low 0/0 replicas ready"),
    "starting": ({"high": LaneView(1, 0)}, ("Unknown", "Progressing"), "high 0/1"),
    "rolling": ({"high": LaneView(1, 1, rolling=True)}, ("Unknown", "Progressing"), "high 1/1"),
    "in trouble": (
        {"high": LaneView(1, 0, trouble="pod x: ErrImagePull")},
        ("Unknown", "EngineNotStarting"),
        "high: pod x: ErrImagePull",
    ),
    "invalid": (
        {"facts": model_facts(problem=Problem("InvalidSpec", "spec.x is wrong", final=True))},
        ("False", "InvalidSpec"),
        "spec.x is wrong",
    ),
    "class missing": (
        {"facts": model_facts(lane_problems={"low": Problem("ClassNotFound", "no low")})},
        ("False", "ClassNotFound"),
        "no low",
    ),
    "refused": (
        {"outcome": Outcome(Problem("ApplyFailed", "Service m: no"))},
        ("False", "ApplyFailed"),
        "Service m: no",
    ),
    "paused": ({"facts": model_facts(hands_off="Paused")}, ("True", "Paused"), "planned is high 1, low 0"),
    "observed": ({"facts": model_facts(hands_off="Observed")}, ("True", "Observed"), "mode Observe"),
    "external, none there": (
        {"facts": model_facts(hands_off="External"), "high": LaneView()},
        ("False", "NoEndpoints"),
        "no Ready pod",
    ),
    "too large": (
        {"facts": model_facts(largest_node=1)},
        ("False", "ReplicaTooLarge"),
        "needs 2 GPUs on one node",
    ),
    "below its floor": (
        {"plan": plan_of(1, 0, (SHORT,)), "high": LaneView(1, 0)},
        ("False", "NoFreeBlock"),
        "class high is below its minReplicas: needs 2 GPUs",
    ),
    "wants more than its floor": ({"plan": plan_of(1, 0, (SHORT,))}, ("True", "Ready"), "high 1/1"),
}


@pytest.mark.parametrize(("case", "wanted", "said"), CASES.values(), ids=CASES.keys())
def test_the_summary_of_a_model(case: Object, wanted: tuple[str, str], said: str) -> None:
    status = status_of(**case)
    assert summary(status) == wanted
    assert said in status["conditions"][0]["message"]


def test_a_models_status_has_its_classes() -> None:
    status = status_of()
    assert status["replicas"] == "high 1/1, low 0/0"
    assert status["observedGeneration"] == 4
    assert status["url"] == "http://m.default.svc:8000"
    high = status["classes"][0]
    assert (high["desired"], high["ready"], high["reason"]) == (1, 1, "MeetsDemand")
    assert high["weights"] == [{"lane": "high", "weight": 60}, {"lane": "low", "weight": 40}]


def test_missing_gpus_and_conflicts_are_conditions_of_their_own() -> None:
    outcome = Outcome(conflicts=["Deployment m-high: spec.replicas (applied by other)"])
    found = {c["type"]: c for c in status_of(plan=plan_of(1, 0, (SHORT,)), outcome=outcome)["conditions"]}
    assert found["GPUsMissing"]["message"] == "class high: needs 2 GPUs on one node"
    assert "applied by other" in found["Conflict"]["message"]


def test_noise_writes_nothing() -> None:
    facts = model_facts()
    first = status_of(facts, plan_of(message="3.1 requests/s"))
    written = replace(facts, raw={**facts.raw, "status": first})
    second = status_of(written, plan_of(message="3.2 requests/s"))
    assert not differs(written.raw, second)
    third = status_of(written, plan_of(high=2, message="7.9 requests/s"))
    assert differs(written.raw, third)
    assert third["classes"][0]["message"] == "7.9 requests/s"


def class_facts(name: str, **more: Any) -> ClassFacts:
    raw = named(name, qos())
    return ClassFacts(raw, QoSClass.from_object(raw), **more)


def facts_of(*classes: ClassFacts) -> Facts:
    found = {c.raw["metadata"]["name"]: c for c in classes}
    return Facts(found, {}, {}, Snapshot({}, {}, ()))


def test_two_defaults_are_told_to_both() -> None:
    older = class_facts("a", claims_default=True)
    newer = class_facts("b", claims_default=True, is_default=True, used_by=("ModelDeployment x/y",))
    for found, default in ((older, False), (newer, True)):
        name = found.raw["metadata"]["name"]
        status = class_status(name, found, Outcome(), facts_of(older, newer), NOW)
        told = {c["type"]: c["message"] for c in status["conditions"]}
        assert "(a, b); the newest, b, is it" in told["SeveralDefaults"]
        assert status["default"] is default
        assert summary(status) == ("True", "Ready")


@pytest.mark.parametrize(
    ("created", "wanted"),
    [
        ({"a": "2026-01-01T00:00:00Z", "b": "2026-01-02T00:00:00Z"}, "b"),
        ({"a": "2026-01-02T00:00:00Z", "b": "2026-01-01T00:00:00Z"}, "a"),
        ({"a": "2026-01-01T00:00:00Z", "b": "2026-01-01T00:00:00Z"}, "b"),
        ({}, None),
    ],
)
def test_the_newest_default_wins(created: dict[str, str], wanted: str | None) -> None:
    classes = []
    for name, time in created.items():
        raw = named(name, qos())
        raw["metadata"] |= {
            "creationTimestamp": time,
            "annotations": {names.ANNOTATION_DEFAULT_CLASS: "true"},
        }
        classes.append(QoSClass.from_object(raw))
    assert default_class(classes) == wanted


def test_a_deleted_class_in_use_says_by_whom() -> None:
    found = class_facts("a", holders=("GPUPool p", "ModelDeployment x/y"))
    found.raw["metadata"]["deletionTimestamp"] = THEN
    status = class_status("a", found, Outcome(), facts_of(found), NOW)
    assert summary(status) == ("Unknown", "InUse")
    assert "GPUPool p, ModelDeployment x/y" in status["conditions"][0]["message"]


POOLS = {
    "ready": ({}, 8, ("True", "ReservationsFit")),
    "observing": ({"mode": "Observe"}, 8, ("True", "Observed")),
    "reservations above the pool": ({}, 2, ("False", "ReservationsExceedPool")),
    "no nodes": ({}, 0, ("False", "NoNodes")),
}


@pytest.mark.parametrize(("spec", "gpus", "wanted"), POOLS.values(), ids=POOLS.keys())
def test_the_summary_of_a_pool(spec: Object, gpus: int, wanted: tuple[str, str]) -> None:
    raw = pool(**spec)
    nodes = (Node("n", gpus),) if gpus else ()
    core = Pool("p", nodes, (Reservation("r", "a", 4),))
    matched = tuple({"metadata": {"name": n.name}} for n in nodes)
    found = PoolFacts(raw, GPUPool.from_object(raw), core=core, matched=matched)
    status = pool_status(found, None, facts_of(class_facts("a")), NOW)
    assert summary(status) == wanted


def test_a_reservation_for_no_class_is_said() -> None:
    raw = pool()
    core = Pool("p", (Node("n", 8),), (Reservation("r", "gone", 4),))
    found = PoolFacts(raw, GPUPool.from_object(raw), core=core, matched=({"metadata": {"name": "n"}},))
    status = pool_status(found, None, facts_of(class_facts("a")), NOW)
    assert summary(status) == ("False", "ClassNotFound")
    assert "gone" in status["conditions"][0]["message"]


@pytest.mark.parametrize(
    ("created", "told"),
    [
        pytest.param({"p": "2026-01-02T00:00:00Z", "q": "2026-01-01T00:00:00Z"}, "p", id="the later one"),
        pytest.param({"p": "2026-01-01T00:00:00Z", "q": "2026-01-02T00:00:00Z"}, "q", id="whatever its name"),
        pytest.param({"p": "2026-01-01T00:00:00Z", "q": "2026-01-01T00:00:00Z"}, "q", id="made at once"),
    ],
)
def test_the_later_of_two_pools_on_one_node_is_told(created: dict[str, str], told: str) -> None:
    pools = {}
    for name, time in created.items():
        raw = named(name, pool())
        raw["metadata"]["creationTimestamp"] = time
        matched = tuple({"metadata": {"name": n}} for n in ("shared", f"only-{name}"))
        core = Pool(name, (Node("n", 8),), (Reservation("r", "a", 4),))
        pools[name] = PoolFacts(raw, GPUPool.from_object(raw), core=core, matched=matched)
    facts = replace(facts_of(class_facts("a")), pools=pools)
    for name, found in pools.items():
        said = {c["type"]: c["message"] for c in pool_status(found, None, facts, NOW)["conditions"]}
        assert ("NodesShared" in said) is (name == told)
        if name == told:
            other = next(n for n in pools if n != told)
            assert f"also matches shared of GPUPool {other}:" in said["NodesShared"]


@pytest.mark.parametrize("state", ["ready", "working", "blocked", "stalled"])
def test_a_condition_that_is_false_says_why(state: str) -> None:
    found = conditions(Verdict(state, "Why", "text"), [], [], 3, NOW)
    assert all(c["message"] and c["reason"] == "Why" for c in found)


def test_a_replica_that_no_node_holds_is_stalled_and_not_said_to_miss_gpus() -> None:
    found = model_facts(largest_node=1)
    short = Unmet(LaneKey("default", "m", "high"), "p", 1, 2, "ReservedForOthers", "1 replica missing")
    status = model_status(found, plan_of(unmet=(short,)), Outcome(), {}, NOW)
    by_type = {c["type"]: c for c in status["conditions"]}
    assert by_type.keys() == {"Ready", "Reconciling", "Stalled"}
    assert (by_type["Stalled"]["status"], by_type["Stalled"]["reason"]) == ("True", "ReplicaTooLarge")


def test_what_waits_for_gpus_is_said_to_wait_for_gpus() -> None:
    views = {"high": LaneView(1, 0, waits="pod x waits for GPUs: none open"), "low": LaneView()}
    ready = model_status(model_facts(), plan_of(), Outcome(), views, NOW)["conditions"][0]
    assert (ready["status"], ready["reason"]) == ("Unknown", "WaitsForGPUs")


def test_attainment_is_in_the_status_where_it_is_known() -> None:
    classes = status_of(high=LaneView(1, 1, attained=99))["classes"]
    assert [c.get("attainmentPercent") for c in classes] == [99, None]


@pytest.mark.parametrize(
    ("kept", "judged", "percent"), [(989, 1000, 98), (990, 1000, 99), (0, 3, 0), (0, 0, None)]
)
def test_attainment_is_not_rounded_up(kept: int, judged: int, percent: int | None) -> None:
    found = model_facts()
    demand = {found.key("high"): Demand(kept=kept, judged=judged)}
    snapshot = SimpleNamespace(demand=demand)
    facts: Any = SimpleNamespace(snapshot=snapshot)
    assert attained(facts, found, "high") == percent
    assert attained(facts, found, "low") is None
