"""The controller's pure parts: drift, taints, finalizers, demand, pool figures, borrows and reclaims."""

from typing import Any

import pytest

from tidegate.adapters.metrics import Sample, parse
from tidegate.api import names
from tidegate.controller.apply import finalizer_patch, taint_patch
from tidegate.controller.demand import by_lane
from tidegate.controller.drift import claims, fingerprint, without
from tidegate.controller.history import Decisions, Moves, preemptions
from tidegate.controller.pods import lane_view, trouble
from tidegate.controller.poolreport import report
from tidegate.core.place import View
from tidegate.core.plan.types import Decision, LaneKey
from tidegate.core.types import Node, Pod, Pool, QoSClass, Reclaim, Reservation
from tidegate.facts.demand import COUNTERS, GAUGES, Meter, demands

Object = dict[str, Any]

# ---------------------------------------------------------------------------------- drift

LIVE: Object = {
    "metadata": {
        "name": "d",
        "uid": "u",
        "resourceVersion": "1",
        "annotations": {"deployment.kubernetes.io/revision": "1"},
        "managedFields": [
            {
                "manager": "other",
                "operation": "Apply",
                "fieldsV1": {
                    "f:spec": {
                        "f:replicas": {},
                        "f:ports": {'k:{"port":80,"protocol":"TCP"}': {".": {}, "f:name": {}}},
                        "f:paused": {},
                    }
                },
            },
            {"manager": "kubectl-edit", "operation": "Update", "fieldsV1": {"f:spec": {"f:image": {}}}},
        ],
    },
    "spec": {"replicas": 5, "image": "theirs", "ports": [{"port": 80, "name": "b"}]},
}
WANTED: Object = {
    "metadata": {"name": "d"},
    "spec": {"replicas": 2, "image": "ours", "ports": [{"port": 80, "name": "a"}]},
}


def test_only_what_others_apply_with_another_value_is_claimed() -> None:
    found = claims(LIVE, WANTED)
    assert [str(c) for c in found] == [
        "spec.ports[0].name (applied by other)",
        "spec.replicas (applied by other)",
    ]
    left = without(WANTED, found)
    assert left["spec"] == {"image": "ours", "ports": [{"port": 80}]}
    assert WANTED["spec"]["replicas"] == 2
    agreed = {**WANTED, "spec": LIVE["spec"]}
    assert claims(LIVE, agreed) == []


@pytest.mark.parametrize(
    ("change", "same"),
    [
        pytest.param({"status": {"x": 1}}, True, id="status"),
        pytest.param({"metadata": {**LIVE["metadata"], "resourceVersion": "2"}}, True, id="version"),
        pytest.param({"spec": {**LIVE["spec"], "replicas": 6}}, False, id="spec"),
        pytest.param({"metadata": {**LIVE["metadata"], "labels": {"a": "b"}}}, False, id="labels"),
        pytest.param({"metadata": {**LIVE["metadata"], "uid": "v"}}, False, id="made anew"),
    ],
)
def test_fingerprint_sees_what_a_hand_can_change(change: Object, same: bool) -> None:
    assert (fingerprint({**LIVE, **change}) == fingerprint(LIVE)) is same


# ------------------------------------------------------------------- taints and finalizers

OURS = {"key": names.TAINT_POOL, "value": "p", "effect": "NoSchedule"}
OTHER = {"key": "x", "effect": "NoExecute"}


@pytest.mark.parametrize(
    ("taints", "pool", "wanted"),
    [
        pytest.param([OTHER], "p", [OTHER, OURS], id="added"),
        pytest.param([OURS, OTHER], "p", None, id="there"),
        pytest.param([OTHER, {**OURS, "value": "q"}], "p", [OTHER, OURS], id="of another pool"),
        pytest.param([OURS, OTHER], None, [OTHER], id="removed"),
        pytest.param([{**OURS, "value": "unreadable"}], None, None, id="an unreadable pool keeps its own"),
        pytest.param([OTHER], None, None, id="not ours"),
    ],
)
def test_taints(taints: list[Object], pool: str | None, wanted: list[Object] | None) -> None:
    node = {"metadata": {"name": "n", "resourceVersion": "7"}, "spec": {"taints": taints}}
    patch = taint_patch(node, pool, {"unreadable"})
    assert (patch["spec"]["taints"] if patch else None) == wanted
    assert patch is None or patch["metadata"] == {"resourceVersion": "7"}


@pytest.mark.parametrize(
    ("present", "deleting", "hold", "wanted"),
    [
        pytest.param(["a"], False, True, ["a", names.FINALIZER], id="added"),
        pytest.param([names.FINALIZER], False, True, None, id="there"),
        pytest.param(["a", names.FINALIZER], False, False, ["a"], id="removed"),
        pytest.param([names.FINALIZER], True, True, None, id="holds a deletion"),
        pytest.param(["a"], True, True, None, id="too late to add"),
        pytest.param([], False, False, None, id="not needed"),
    ],
)
def test_finalizers(present: list[str], deleting: bool, hold: bool, wanted: list[str] | None) -> None:
    meta: Object = {"name": "q", "resourceVersion": "7", "finalizers": present}
    if deleting:
        meta["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    patch = finalizer_patch({"metadata": meta}, hold=hold)
    assert (patch["metadata"]["finalizers"] if patch else None) == wanted


# --------------------------------------------------------------------------------- demand

LABELS = {"namespace": "ns", "model": "m", "qos_class": "batch"}
LANE = LaneKey("ns", "m", "batch")


def scrape(arrivals: float, queued: float = 0.0) -> list[Sample]:
    return [
        Sample("tidegate_arrivals_total", LABELS, arrivals),
        Sample("tidegate_queue_requests", LABELS, queued),
        Sample("tidegate_inflight_requests", {**LABELS, "lane": "a"}, 1),
        Sample("tidegate_inflight_requests", {**LABELS, "lane": "b"}, 2),
    ]


@pytest.mark.parametrize(
    ("counts", "rate"),
    [
        pytest.param([(0, 100), (1, 110), (2, 120)], 10.0, id="steady"),
        pytest.param([(0, 100), (1, 110), (2, 4)], 7.0, id="restarted: begins at zero"),
        pytest.param([(0, 0), (10, 1000), (11, 1010), (15, 1050)], 10.0, id="what is old is forgotten"),
        pytest.param([(0, 5)], 0.0, id="one look knows no rate"),
    ],
)
def test_rates(counts: list[tuple[float, float]], rate: float) -> None:
    meter = Meter(5.0)
    for now, count in counts:
        samples = scrape(count, queued=3)
        meter.observe(now, by_lane(samples, COUNTERS), by_lane(samples, GAUGES))
    found = demands(meter.values(), fresh=True)[LANE]
    assert found.arrival_rps == pytest.approx(rate)
    assert (found.queued_requests, found.inflight, found.fresh) == (3, 3, True)


def test_a_counter_first_seen_later_began_at_zero() -> None:
    meter = Meter(5.0)
    meter.observe(0.0, {}, {})
    meter.observe(1.0, by_lane(scrape(8), COUNTERS), {})
    assert demands(meter.values(), fresh=True)[LANE].arrival_rps == pytest.approx(8)
    assert meter.age_s(4.0) == 3.0


def test_text_format_is_read_and_filtered() -> None:
    ours = '# HELP a b\n# TYPE tidegate_x counter\ntidegate_x_total{a="1"} 2\n'
    text = f"{ours}# TYPE python_gc gauge\npython_gc 5\n"
    assert parse(text, "tidegate_") == [Sample("tidegate_x_total", {"a": "1"}, 2.0)]


# ------------------------------------------------------------------------- pools and moves

CLASSES = {"high": QoSClass("high", 900), "low": QoSClass("low", 1, Reclaim.ALWAYS)}
POOL = Pool(
    "p",
    (Node("n0", 4), Node("n1", 4), Node("n2", 0)),
    (Reservation("chat", "high", 6), Reservation("bulk", "low", 0)),
)


def pod(uid: str, qos_class: str | None, node: str | None, gpus: int = 2, **more: Any) -> Pod:
    created = float(uid.strip("abcdefghijklmnopqrstuvwxyz") or 0)
    return Pod(uid, uid, "ns", gpus, created, qos_class=qos_class, model="m", node=node, **more)


def test_a_pool_in_figures() -> None:
    pods = [pod("a1", "high", "n0"), pod("b2", "low", "n0"), pod("b3", "low", "n1"), pod("f4", None, "n1", 1),
            pod("a5", "high", None)]  # fmt: skip
    found = report(POOL, pods, CLASSES)
    assert (found.capacity, found.allocated, found.foreign, found.idle) == (8, 6, 1, 1)
    assert (found.used, found.borrowed) == ({"high": 2, "low": 4}, {"low": 4})
    chat, bulk = found.reservations
    assert (chat.reserved, chat.in_use, chat.lent, chat.unmet, chat.borrowed) == (6, 2, 3, 2, 0)
    assert (bulk.reserved, bulk.borrowed) == (0, 4)
    assert found.blocks == ((4, 1),)
    assert found.borrowing == {"b2", "b3"}


def moves(seen: list[tuple[list[Pod], dict[str, str]]], lowered: bool = False) -> list[tuple[str, str]]:
    finder, found = Moves(), []
    finder.observe(0.0, {}, [], {})
    for step, (pods, preempted) in enumerate(seen):
        if lowered and step == 1:
            lane = LaneKey("ns", "m", "low")
            finder.lowered(1.0, [Decision("reclaim", "ns/m", "R", "text", lane, "p")], {lane: 1})
        found += finder.observe(float(step), {"p": report(POOL, pods, CLASSES)}, pods, preempted)
    return [(m.kind, m.pod.uid) for m in found]


@pytest.mark.parametrize(
    ("seen", "lowered", "wanted"),
    [
        pytest.param([([pod("b1", "low", "n0")], {})] * 3, False, [("borrow", "b1")], id="told once"),
        pytest.param([([pod("b1", "low", None)], {})], False, [], id="not placed yet"),
        pytest.param([([pod("a1", "high", "n0")], {})], False, [], id="within its reservation"),
        pytest.param(
            [([pod("b1", "low", "n0")], {}), ([pod("b1", "low", "n0")], {"b1": "x"}), ([], {})],
            False, [("borrow", "b1"), ("reclaim", "b1")], id="preempted",
        ),
        pytest.param(
            [([pod("b1", "low", "n0"), pod("b2", "low", "n1")], {}), ([], {})],
            True, [("borrow", "b1"), ("borrow", "b2"), ("reclaim", "b1")], id="lowered by one",
        ),
        pytest.param([([pod("b1", "low", "n0")], {}), ([], {})], False, [("borrow", "b1")], id="went itself"),
    ],
)  # fmt: skip
def test_moves(seen: Any, lowered: bool, wanted: list[tuple[str, str]]) -> None:
    assert moves(seen, lowered) == wanted


def test_what_borrows_at_the_start_is_no_news() -> None:
    pods = [pod("b1", "low", "n0")]
    assert Moves().observe(0.0, {"p": report(POOL, pods, CLASSES)}, pods, {}) == []


def test_preemptions_are_read_from_the_pods_condition() -> None:
    condition = {
        "type": "DisruptionTarget",
        "status": "True",
        "reason": "PreemptionByScheduler",
        "message": "m",
    }
    evicted = {**condition, "reason": "EvictionByEvictionAPI"}
    pods = [
        {"metadata": {"uid": "a"}, "status": {"conditions": [condition]}},
        {"metadata": {"uid": "b"}, "status": {"conditions": [evicted]}},
        {"metadata": {"uid": "c"}},
    ]
    assert preemptions(pods) == {"a": "m"}


def test_decisions_keep_the_last() -> None:
    kept = Decisions()
    for number in range(600):
        kept.add(float(number), "scale", "ns/m", "R", "text")
    found = kept.to_json()
    assert len(found) == 500
    assert found[-1] == {"time": 599.0, "kind": "scale", "object": "ns/m", "reason": "R", "message": "text"}


# -------------------------------------------------------------------------------- lanes


def test_lane_view_and_its_trouble() -> None:
    deployment = {
        "metadata": {"generation": 2},
        "spec": {"replicas": 2},
        "status": {"observedGeneration": 2, "readyReplicas": 1, "updatedReplicas": 2},
    }
    view = lane_view(deployment, [], 3)
    assert (view.replicas, view.ready, view.rolling, view.headroom) == (2, 1, False, 3)
    assert lane_view({**deployment, "metadata": {"generation": 3}}, []).rolling
    waiting = {"reason": "ErrImagePull", "message": "unknown image"}
    failing = {"metadata": {"name": "p"}, "status": {"containerStatuses": [{"state": {"waiting": waiting}}]}}
    assert trouble(deployment, [failing]) == "pod p: ErrImagePull: unknown image"
    unplaced = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/4 nodes"}
    assert trouble(deployment, [{"metadata": {"name": "p"}, "status": {"conditions": [unplaced]}}]) == (
        "pod p has no place: 0/4 nodes"
    )


def test_a_pool_counts_a_reservation_as_the_extender_does():
    """What waits takes nobody's place, and what goes uses nothing up; a claim is room beside what stands."""

    def pod(uid, created, **more):
        values = {"node": "n0", "qos_class": "gold", "model": "m"} | more
        return Pod(uid, uid, "ns", 2, float(created), **values)

    pool = Pool("p", (Node("n0", 16),), (Reservation("r", "gold", 6),))
    pods = [pod("waits-first", 0, node=None), pod("goes", 1, terminating=True), pod("a", 2), pod("b", 3),
            pod("waits-last", 4, node=None)]  # fmt: skip
    classes = {"gold": QoSClass("gold", 1000)}
    view = View(pool, classes)
    for p in pods:
        if p.node:
            view.place(p)
    (found,) = report(pool, pods, classes).reservations
    assert (found.in_use, found.unmet) == (4, 2)
    assert found.reserved - found.in_use == view.unmet()["r"] == 2
    view.place(pod("c", 5))
    (found,) = report(pool, [*pods, pod("c", 5)], classes).reservations
    assert (found.in_use, found.unmet, view.after(pods[0]).claim) == (6, 0, None)


def test_a_pod_that_waits_for_gpus_is_no_trouble_of_its_engine() -> None:
    def pod(text: str) -> Object:
        unplaced = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": text}
        return {"metadata": {"name": "p"}, "status": {"conditions": [unplaced]}}

    deployment: Object = {"metadata": {"generation": 1}, "spec": {"replicas": 1}, "status": {}}
    for text in (
        "0/4 nodes are available: 4 Insufficient nvidia.com/gpu.",
        "4 tidegate: NoFreeBlock: 0 open",
    ):
        view = lane_view(deployment, iter([pod(text)]))
        assert (view.trouble, view.waits) == ("", f"pod p waits for GPUs: {text}")
    other = lane_view(deployment, [pod("0/4 nodes: untolerated taint")])
    assert (bool(other.trouble), other.waits) == (True, "")


def test_attainment_of_several_pickers_adds_up() -> None:
    lane = LaneKey("ns", "m", "high")
    values = {(GAUGES[3], lane): 9.0 + 90.0, (GAUGES[4], lane): 10.0 + 90.0}
    [demand] = demands(values, fresh=True).values()
    assert (demand.kept, demand.judged) == (99, 100)
