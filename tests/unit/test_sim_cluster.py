"""A cluster in virtual time: production's planner and placement move replicas under a fleet."""

import itertools
from collections.abc import Sequence

import pytest

from tidegate.core.flow import Flow
from tidegate.core.flowtypes import Ask, Endpoint, ModelKey
from tidegate.core.flowtypes import Model as Served
from tidegate.core.plan.types import Lane, LaneKey, Model
from tidegate.core.types import Node, Objectives, Pod, Pool, QoSClass, Reclaim, Reservation
from tidegate.sim.cluster.metrics import Counted
from tidegate.sim.cluster.run import PlannedFleet
from tidegate.sim.cluster.scheduler import Scheduler
from tidegate.sim.cluster.spec import ClusterSpec, Delays
from tidegate.sim.cluster.usage import Usage
from tidegate.sim.fleet import Fault, Run, Setting
from tidegate.sim.fleet_arms.registry import arm
from tidegate.sim.records import State
from tidegate.sim.workload import Length, Stream, rates

CHAT: ModelKey = ("default", "chat")
BULK: ModelKey = ("default", "bulk")
CLASSES = {
    "gold": QoSClass("gold", 1000, objectives=Objectives(ttft_s=1.0, completion_s=60.0)),
    "bulk": QoSClass("bulk", 0, Reclaim.ALWAYS, objectives=Objectives(completion_s=86_400.0)),
}
DELAYS = Delays(start_s=(10.0, 20.0))
LENGTHS = [Length(800, 100), Length(400, 200), Length(1200, 60)]


def spec(gpus: int = 4, reserved: int = 0, chat: int = 1, bulk: int = 3, **more: object) -> ClusterSpec:
    kept = (Reservation("people", "gold", reserved),) if reserved else ()
    nodes = tuple(Node(f"n{i}", 2) for i in range(gpus // 2))
    models = [
        Model("default", name, "p", (Lane(LaneKey("default", name, qos), 1, replicas=n),))
        for name, qos, n in (("chat", "gold", chat), ("bulk", "bulk", bulk))
    ]
    values: dict[str, object] = {"delays": DELAYS} | more
    return ClusterSpec([Pool("p", nodes, kept, drain_timeout_s=5.0)], models, **values)  # type: ignore[arg-type]


def streams(phases: Sequence[tuple[float, float]], outstanding: int = 60) -> list[Stream]:
    return [
        Stream("chat", CHAT, "gold", LENGTHS, times=rates(phases)),
        Stream("bulk", BULK, "bulk", LENGTHS, outstanding=outstanding, streamed=False),
    ]


def run(
    cluster: ClusterSpec, traffic: list[Stream], seconds: float, seed: int = 1, faults: Sequence[Fault] = ()
) -> tuple[Run, Usage]:
    setting = Setting(CLASSES, [], traffic, seconds, faults=faults, models=[CHAT, BULK])
    return PlannedFleet(setting, cluster, arm("ours"), seed).run()


def ready(usage: Usage, model: str, qos: str, time_s: float) -> int:
    last = [m for m in usage.timeline if m.time_s <= time_s][-1]
    return last.ready.get(LaneKey("default", model, qos), 0)


def test_a_rush_is_given_replicas_after_their_start_time_and_lends_them_back() -> None:
    _, usage = run(spec(reserved=3), streams([(0.3, 60), (8.0, 100), (0.3, 200)]), 360)
    key = LaneKey(*CHAT, "gold")
    planned = next(m.time_s for m in usage.timeline if m.time_s >= 60 and m.planned[key] >= 3)
    served = next(m.time_s for m in usage.timeline if m.time_s >= 60 and m.ready.get(key, 0) >= 3)
    least_s, most_s = DELAYS.start_s
    assert planned < 70
    assert least_s <= served - planned <= most_s + 10, "a start, after an eviction with its grace"
    assert ready(usage, "bulk", "bulk", 155) <= 1
    assert ready(usage, "bulk", "bulk", 355) == 3, "what is idle is lent again"
    assert usage.evictions["bulk"] >= 2
    assert usage.borrowed["bulk"] > 0
    assert usage.borrowed["gold"] == 0


def test_gpus_that_nobody_reserved_change_hands_without_an_eviction() -> None:
    found, usage = run(spec(reserved=0), streams([(1.0, 60), (8.0, 200)]), 260)
    assert ready(usage, "chat", "gold", 255) >= 3
    assert not usage.evictions
    assert not usage.thrown_away["bulk"], "the lane was emptied first"
    assert not any(r.retries for r in found.records)


def test_every_gpu_second_is_somebodys() -> None:
    cluster = spec(reserved=2)
    _, usage = run(cluster, streams([(1.0, 60), (8.0, 60)]), 200)
    assert sum(usage.used.values()) + usage.idle == pytest.approx(cluster.capacity * 200)
    for moment in usage.timeline:
        assert moment.idle >= 0
        assert sum(moment.used.values()) + moment.idle == cluster.capacity
    times = [m.time_s for m in usage.timeline]
    assert all(a < b for a, b in itertools.pairwise(times))


def test_who_is_evicted_loses_what_it_computed_and_is_asked_again() -> None:
    long = [Stream("bulk", BULK, "bulk", [Length(500, 4000)], outstanding=20, streamed=False)]
    chat = [Stream("chat", CHAT, "gold", LENGTHS, times=rates([(0.5, 60), (8.0, 120)]))]
    found, usage = run(spec(reserved=4), [*chat, *long], 180)
    assert usage.evictions["bulk"] >= 1
    assert usage.thrown_away["bulk"] > 0
    again = [r for r in found.records if r.retries]
    assert again
    assert all(r.qos_class == "bulk" for r in again)
    assert not any(r.state is State.LOST for r in found.records)


def test_a_replica_that_dies_is_started_again_where_it_is() -> None:
    fault = Fault("death", "chat-gold-0", 50.0, 51.0)
    _, usage = run(spec(gpus=2, chat=1, bulk=1), streams([(1.0, 60)]), 120, faults=[fault])
    assert ready(usage, "chat", "gold", 49) == 1
    assert ready(usage, "chat", "gold", 55) == 0
    assert ready(usage, "chat", "gold", 75) == 1
    assert all(m.used["gold"] >= 1 for m in usage.timeline), "it keeps its GPU"


@pytest.mark.parametrize("missing", ["chat-gold-7", "nobody"])
def test_a_fault_of_a_replica_that_is_not_there_is_nothing(missing: str) -> None:
    faults = [Fault(kind, missing, 5.0, 6.0) for kind in ("death", "slow", "deaf")]
    assert (
        run(spec(), streams([(1.0, 60)]), 20, faults=faults)[0].records
        == run(spec(), streams([(1.0, 60)]), 20)[0].records
    )


def test_one_seed_gives_the_same_bytes_and_another_does_not() -> None:
    first, again, other = (run(spec(), streams([(1.0, 30), (8.0, 60)]), 90, seed) for seed in (1, 1, 2))
    assert first[0].records == again[0].records
    assert first[1].to_json() == again[1].to_json()
    assert first[1].to_json() != other[1].to_json()


def test_arms_that_part_the_replicas_themselves_are_refused() -> None:
    setting = Setting(CLASSES, [], streams([(1.0, 60)]), 10.0, models=[CHAT, BULK])
    with pytest.raises(ValueError, match="parts the replicas"):
        PlannedFleet(setting, spec(), arm("packing-2"), 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"period_s": 0.0},
        {"metric_age_s": -1.0},
        {"start_s": (5.0, 4.0)},
        {"start_s": (-1.0, 4.0)},
    ],
)
def test_delays_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="delays"):
        Delays(**wrong)  # type: ignore[arg-type]


def test_metrics_say_what_the_queue_itself_knows() -> None:
    flow = Flow()
    counted = Counted(flow)
    counted.set_world(
        CLASSES,
        {CHAT: Served(CHAT, ("gold",), startable=True)},
        [Endpoint("a", CHAT, "gold", slots=2)],
        0.0,
    )
    lane = LaneKey(*CHAT, "gold")
    for number in range(5):
        assert counted.admit(Ask(number, CHAT, "gold", 100, 50), 1.0) is None
    sent = counted.dispatch(20.0)
    counted.finish(sent[0].ask.id, 21.0)
    waiting = list(flow.waiting())
    counted.finish(waiting[0].id, 21.0)
    assert counted.gauges["tidegate_queue_requests", lane] == len(list(flow.waiting())) == len(waiting) - 1
    assert counted.gauges["tidegate_queue_tokens", lane] == sum(a.tokens for a in flow.waiting())
    assert counted.gauges["tidegate_inflight_requests", lane] == len(list(flow.in_flight())) == len(sent) - 1
    assert counted.counters["tidegate_arrivals_total", lane] == 5
    assert counted.counters["tidegate_prompt_tokens_total", lane] == 500
    gone = counted.expire(100.0)
    assert gone
    assert counted.gauges["tidegate_queue_requests", lane] == 0


# ── the scheduler ───────────────────────────────────────────────────────────────────────────────


def pod(uid: str, qos: str, node: str | None = None, started_s: float | None = None, gpus: int = 1) -> Pod:
    return Pod(
        uid, uid, "default", gpus, float(started_s or 0), qos, "m", node, started_s,
        priority=CLASSES[qos].priority,
    )  # fmt: skip


def scheduler(reserved: int, *there: Pod) -> Scheduler:
    pool = Pool("p", (Node("n0", 2), Node("n1", 2)), (Reservation("people", "gold", reserved),))
    made = Scheduler([pool], CLASSES, {})
    for one in there:
        made.see("p", one)
    return made


def test_a_claim_evicts_one_and_is_bound_when_that_is_gone() -> None:
    borrowers = [pod(f"b{i}", "bulk", f"n{i // 2}", 10.0 + i) for i in range(4)]
    made = scheduler(2, *borrowers)
    asks = pod("g", "gold")
    first = made.cycle([("p", asks)], 100.0)
    assert (first.bound, len(first.evicted)) == ([], 1)
    assert made.cycle([("p", asks)], 101.0).bound == [], "its GPU is not free yet"
    victim = next(b for b in borrowers if b.uid == first.evicted[0])
    made.forget("p", victim.uid)
    bound = made.cycle([("p", asks)], 102.0).bound
    assert [(b.uid, b.node, b.started_s) for b in bound] == [("g", victim.node, 102.0)]


def test_a_place_that_was_granted_is_nobody_elses() -> None:
    borrowers = [pod(f"b{i}", "bulk", f"n{i // 2}", 10.0 + i) for i in range(4)]
    made = scheduler(2, *borrowers)
    asks, late = pod("g", "gold"), pod("z", "bulk")
    gone = made.cycle([("p", asks)], 100.0).evicted[0]
    made.forget("p", gone)
    bound = made.cycle([("p", late), ("p", asks)], 101.0).bound
    assert [b.uid for b in bound] == ["g"]


def test_without_a_claim_nobody_is_evicted() -> None:
    made = scheduler(0, *(pod(f"b{i}", "bulk", f"n{i // 2}", 10.0) for i in range(4)))
    assert made.cycle([("p", pod("g", "gold"))], 100.0) == ([], [])
