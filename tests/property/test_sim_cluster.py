"""Whatever is asked of a cluster in virtual time: GPUs are never given twice, and no request vanishes."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.core.plan.types import Lane, LaneKey, Model
from tidegate.core.types import Node, Objectives, Pool, QoSClass, Reclaim, Reservation
from tidegate.sim.cluster.run import PlannedFleet
from tidegate.sim.cluster.spec import ClusterSpec, Delays
from tidegate.sim.fleet import Setting
from tidegate.sim.fleet_arms.registry import arm
from tidegate.sim.records import State
from tidegate.sim.workload import Length, Stream, rates

CLASSES = {
    "gold": QoSClass("gold", 1000, objectives=Objectives(ttft_s=1.0, completion_s=60.0)),
    "mid": QoSClass("mid", 500, Reclaim.ABOVE_MINIMUM, objectives=Objectives(completion_s=60.0)),
    "bulk": QoSClass("bulk", 0, Reclaim.ALWAYS, objectives=Objectives(completion_s=86_400.0)),
}
LENGTHS = [Length(800, 300), Length(200, 900)]


@st.composite
def clusters(draw: st.DrawFn) -> ClusterSpec:
    nodes = tuple(Node(f"n{i}", draw(st.integers(1, 4))) for i in range(draw(st.integers(1, 4))))
    capacity, kept = sum(n.gpus for n in nodes), []
    for name in ("gold", "mid"):
        gpus = draw(st.integers(0, capacity - sum(r.gpus for r in kept)))
        kept.append(Reservation(name, name, gpus, max_lend=draw(st.none() | st.integers(0, gpus))))
    gpus = draw(st.integers(1, max(n.gpus for n in nodes)))
    lanes = tuple(
        Lane(
            LaneKey("default", name, name),
            gpus if name == "bulk" else 1,
            min_replicas=draw(st.integers(0, 1)),
            replicas=draw(st.integers(0, 3)),
        )
        for name in CLASSES
    )
    models = [Model("default", x.key.model, "p", (x,), scale_down_delay_s=5.0) for x in lanes]
    least = draw(st.floats(0.0, 5.0))
    delays = Delays(start_s=(least, least + 5.0), metric_age_s=draw(st.floats(0.0, 3.0)))
    drain_s = draw(st.floats(0.5, 6.0))
    return ClusterSpec([Pool("p", nodes, tuple(kept), drain_timeout_s=drain_s)], models, delays=delays)


@settings(max_examples=15, deadline=None)
@given(clusters(), st.integers(1, 1000))
def test_gpus_are_never_given_twice_and_no_request_vanishes(spec: ClusterSpec, seed: int) -> None:
    streams = [
        Stream("bulk", ("default", "bulk"), "bulk", LENGTHS, outstanding=12, streamed=False),
        *(
            Stream(n, ("default", n), n, LENGTHS, times=rates([(0.5, 15), (12.0, 15)]))
            for n in ("gold", "mid")
        ),
    ]
    models = [("default", name) for name in CLASSES]
    fleet = PlannedFleet(Setting(CLASSES, [], streams, 60.0, models=models), spec, arm("ours"), seed)
    run, usage = fleet.run()
    for moment in usage.timeline:
        assert moment.idle >= 0
        assert sum(moment.used.values()) + moment.idle == spec.capacity
        assert all(moment.borrowed[n] <= moment.used[n] for n in CLASSES)
        assert all(moment.ready[key] <= moment.placed[key] for key in moment.placed)
    assert not moment.borrowed["gold"], "nobody above lends to the highest class"
    numbers = [r.number for r in run.records]
    assert len(set(numbers)) == len(numbers)
    for record in run.records:
        assert (record.state is State.ANSWERED) == (record.finish_s is not None)
        assert record.state is not State.LOST or record.stream != "bulk", "a whole answer is asked again"
