"""The queue: who waits, who goes, who is refused, and what it says to them."""

import itertools
from typing import Any

import pytest

from tidegate.core.flow import (
    Ask,
    Dispatch,
    Ended,
    Endpoint,
    Flow,
    Model,
    Policy,
    Reason,
)
from tidegate.core.flowtypes import Pack
from tidegate.core.load import EngineReport, Mean, Rate
from tidegate.core.types import Objectives, QoSClass

M, N = ("ns", "m"), ("ns", "n")
CLASSES = {
    "high": QoSClass(
        "high", 100, objectives=Objectives(ttft_s=1.0), queue_max_requests=5, queue_max_wait_s=5
    ),
    "low": QoSClass("low", 0, queue_max_requests=10, queue_max_wait_s=30),
}
IDS = itertools.count(1)


def ask(qos: str = "low", model: tuple[str, str] = M, **fields: Any) -> Ask:
    return Ask(next(IDS), model, qos, **({"prompt_tokens": 100, "output_tokens": 50, "size": 10} | fields))


def place(address: str = "a:1", model: tuple[str, str] = M, **fields: Any) -> Endpoint:
    return Endpoint(address, model, **({"lane": "low", "slots": 2} | fields))


def flow_of(*endpoints: Endpoint, startable: bool = False, **policy: Any) -> Flow:
    """A flow that has known its models for long, and whose endpoints have all reported that they are idle.

    Nothing is packed, which `test_flow_pack.py` is about.
    """
    flow = Flow(Policy(**({"pack": Pack(front=False)} | policy)))
    models = {key: Model(key, ("high", "low"), startable) for key in (M, N)}
    flow.set_world(CLASSES, models, endpoints, -100.0)
    for e in endpoints:
        flow.report(e.address, EngineReport(0.0, 0, 0, 0.0, 65_536), 0, 0)
    return flow


def sent(dispatches: list[Dispatch]) -> list[int]:
    return [d.ask.id for d in dispatches]


def fill(flow: Flow, count: int, qos: str = "low", now: float = 0.0) -> list[Ask]:
    asks = [ask(qos) for _ in range(count)]
    for one in asks:
        assert flow.admit(one, now) is None
    return asks


def test_binds_late_and_in_arrival_order() -> None:
    flow = flow_of(place())
    asks = fill(flow, 4)
    assert sent(flow.dispatch(0.0)) == [a.id for a in asks[:2]]
    assert flow.dispatch(0.0) == []
    assert flow.finish(asks[1].id, 1.0) is Ended.DISPATCHED
    assert sent(flow.dispatch(1.0)) == [asks[2].id]


def test_higher_classes_first_and_nothing_overtakes_a_blocked_one() -> None:
    flow = flow_of(place(slots=1), qos=True)
    [running] = fill(flow, 1)
    flow.dispatch(0.0)
    [low] = fill(flow, 1, "low", 0.1)
    [high] = fill(flow, 1, "high", 0.2)
    big = ask("high", prompt_tokens=60_000)
    assert flow.admit(big, 0.3) is None
    flow.finish(running.id, 1.0)
    assert sent(flow.dispatch(1.0)) == [high.id]
    flow.finish(high.id, 2.0)
    assert sent(flow.dispatch(2.0)) == [big.id]
    flow.finish(big.id, 3.0)
    assert sent(flow.dispatch(3.0)) == [low.id]


def test_fifo_is_one_queue_in_arrival_order_without_headroom() -> None:
    flow = flow_of(place(slots=1), qos=False)
    order = [ask("low"), ask("high"), ask("low"), ask("high")]
    for index, one in enumerate(order):
        assert flow.admit(one, float(index)) is None
    served = []
    for moment in range(4):
        [dispatch] = flow.dispatch(10.0 + moment)
        served.append(dispatch.ask.id)
        flow.finish(dispatch.ask.id, 10.5 + moment)
    assert served == [a.id for a in order]


def test_fifo_refuses_nobody_that_qos_would() -> None:
    flow = flow_of(place(slots=1), qos=False)
    assert all(flow.admit(ask("high"), 0.0) is None for _ in range(50))
    assert flow.expire(100.0) == []


def test_the_oldest_goes_first_between_models_and_a_blocked_one_stops_no_other() -> None:
    flow = flow_of(place("a:1", slots=1), place("b:1", N, slots=1))
    first, second, third = ask(model=M), ask(model=M), ask(model=N)
    for moment, one in enumerate((first, second, third)):
        flow.admit(one, float(moment))
    assert sent(flow.dispatch(3.0)) == [first.id, third.id]


def test_headroom_is_kept_while_a_higher_class_is_about_and_lent_when_it_is_quiet() -> None:
    flow = flow_of(place("a:1", slots=8, lane="high"))
    [high] = fill(flow, 1, "high")
    flow.dispatch(0.0)
    flow.finish(high.id, 0.5)
    lows = fill(flow, 10, "low", 1.0)
    assert sent(flow.dispatch(1.0)) == [a.id for a in lows[:6]]  # two stay free
    [urgent] = fill(flow, 1, "high", 1.1)
    assert sent(flow.dispatch(1.1)) == [urgent.id]
    flow.finish(urgent.id, 1.2)
    flow.report("a:1", EngineReport(30.0, 6, 0, 0.0, 65_536), 6, 900)
    assert len(flow.dispatch(30.0)) == 2  # quiet for longer than it is remembered


def test_a_model_just_met_keeps_headroom_before_anybody_came() -> None:
    flow = Flow()
    flow.set_world(CLASSES, {M: Model(M, ("high", "low"))}, [place(slots=8)], 0.0)
    flow.report("a:1", EngineReport(0.0, 0, 0, 0.0, 65_536), 0, 0)
    fill(flow, 8)
    assert len(flow.dispatch(0.0)) == 6


@pytest.mark.parametrize(
    ("startable", "endpoints", "expected"),
    [
        pytest.param(False, [], Reason.NO_ENDPOINT, id="nothing there and nothing coming"),
        pytest.param(True, [], None, id="a replica may come: wait"),
        pytest.param(False, [place(ready=False)], Reason.NO_ENDPOINT, id="not ready, nothing coming"),
        pytest.param(False, [place()], None, id="ready"),
        pytest.param(False, [place(draining=True)], Reason.NO_ENDPOINT, id="only one that goes"),
    ],
)
def test_admission_without_replicas(
    startable: bool, endpoints: list[Endpoint], expected: Reason | None
) -> None:
    refused = flow_of(*endpoints, startable=startable).admit(ask(), 0.0)
    assert (refused.reason if refused else None) == expected
    assert refused is None or refused.status == 503


def test_a_full_queue_is_refused_with_the_time_it_takes_to_drain() -> None:
    flow = flow_of(place(slots=1))
    [current] = fill(flow, 1)
    flow.dispatch(0.0)
    for second in range(1, 61):  # one a second leaves
        [following] = fill(flow, 1, now=float(second))
        flow.finish(current.id, float(second))
        flow.dispatch(float(second))
        current = following
    fill(flow, 10, now=60.0)
    refused = flow.admit(ask(), 60.0)
    assert refused is not None
    assert (refused.status, refused.reason) == (429, Reason.QUEUE_FULL)
    assert 10 <= refused.retry_after_s <= 14
    assert "10 of 10 low requests wait for ns/m" in refused.message


def test_queued_bytes_are_bounded_over_all_queues() -> None:
    flow = flow_of(place(slots=1), startable=True, max_bytes=100)
    assert flow.admit(ask(size=60), 0.0) is None
    refused = flow.admit(ask(model=N, size=60), 0.0)
    assert refused is not None
    assert (refused.status, refused.reason) == (429, Reason.MEMORY_FULL)
    flow.dispatch(0.0)
    assert flow.bytes == 0
    assert flow.admit(ask(size=100), 0.0) is None


def test_waiting_ends_at_the_class_s_limit() -> None:
    flow = flow_of(place(slots=1))
    fill(flow, 1)
    flow.dispatch(0.0)
    [low] = fill(flow, 1, "low", 1.0)
    [high] = fill(flow, 1, "high", 1.0)
    assert flow.next_expiry() == 6.0
    assert flow.expire(5.9) == []
    [(gone, refused)] = flow.expire(6.0)
    assert (gone, refused.status, refused.reason) == (high, 429, Reason.WAITED_TOO_LONG)
    assert [a for a, _ in flow.expire(31.0)] == [low]
    assert flow.next_expiry() is None
    assert flow.finish(low.id, 31.0) is None


def test_what_waits_is_refused_when_its_model_goes() -> None:
    flow = flow_of(startable=True)
    [one] = fill(flow, 1)
    flow.set_world(CLASSES, {}, (), 1.0)
    assert [(a, r.status) for a, r in flow.expire(1.0)] == [(one, 503)]


def test_room_is_given_back_once() -> None:
    flow = flow_of(place())
    [queued, *_] = fill(flow, 3)
    flow.dispatch(0.0)
    assert flow.held("a:1") == (2, 300)
    assert flow.finish(queued.id, 1.0) is Ended.DISPATCHED
    assert flow.finish(queued.id, 1.0) is None
    assert flow.held("a:1") == (1, 150)


def test_an_endpoint_that_goes_is_forgotten_once_it_is_empty() -> None:
    flow = flow_of(place("a:1"), place("b:1"))
    asks = fill(flow, 3)
    flow.dispatch(0.0)
    flow.set_world(CLASSES, flow.models, [place("b:1")], 1.0)
    gone = {a.id for a, _ in flow.in_flight()}
    assert gone == {a.id for a in asks}
    for one in asks:
        flow.finish(one.id, 2.0)
    assert [e["address"] for e in flow.snapshot(2.0)["endpoints"]] == ["b:1"]


# ── what engines say ────────────────────────────────────────────────────────────────────────────


def test_nothing_is_sent_before_the_first_report_or_its_grace() -> None:
    flow = Flow()
    flow.set_world(CLASSES, {M: Model(M, ("low",))}, [place(slots=4)], 0.0)
    fill(flow, 4)
    assert flow.dispatch(1.9) == []
    assert len(flow.dispatch(2.0)) == 3  # an engine without metrics: a quarter is left alone


def test_what_an_earlier_picker_sent_counts() -> None:
    flow = flow_of(place(slots=4))
    flow.report("a:1", EngineReport(0.0, running=2, waiting=1, kv_usage=0.1, kv_tokens=65_536), 0, 0)
    fill(flow, 4)
    assert len(flow.dispatch(0.0)) == 1
    flow.report("a:1", EngineReport(1.0, running=2, waiting=0, kv_usage=0.1, kv_tokens=65_536), 1, 150)
    assert len(flow.dispatch(1.0)) == 2


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        pytest.param(0, 0, id="one that was sent meanwhile"),
        pytest.param(3, 0, id="ones that ended meanwhile"),
    ],
)
def test_requests_on_their_way_are_not_taken_for_others(before: int, expected: int) -> None:
    flow = flow_of(place(slots=4))
    fill(flow, 1)
    flow.dispatch(0.0)
    flow.report("a:1", EngineReport(0.0, running=max(1, before), waiting=0), before, 0)
    assert flow.snapshot(0.0)["endpoints"][0]["foreign_requests"] == expected


def test_stale_reports_make_it_careful() -> None:
    flow = flow_of(place(slots=8))
    fill(flow, 8, now=6.0)
    assert len(flow.dispatch(6.0)) == 6


def test_kv_that_the_engine_holds_beyond_ours_counts() -> None:
    flow = flow_of(place(slots=4))
    flow.report("a:1", EngineReport(0.0, 0, 0, kv_usage=0.999, kv_tokens=65_536), 0, 0)
    fill(flow, 1)
    assert flow.dispatch(0.0) == []


def test_rates_and_means_forget() -> None:
    rate, mean = Rate(10.0), Mean(0.5)
    for second in range(100):
        rate.add(float(second))
    assert rate.value(99.0) == pytest.approx(1.0, rel=0.06)
    assert rate.value(199.0) < 0.001
    assert mean.value(7.0) == 7.0
    mean.add(4.0)
    mean.add(8.0)
    assert mean.value(0.0) == 6.0


def test_the_snapshot_is_json() -> None:
    import orjson

    flow = flow_of(place(), place("b:1", N))
    fill(flow, 3, "high")
    flow.dispatch(0.0)
    state = orjson.loads(orjson.dumps(flow.snapshot(1.0)))
    assert state["queues"] == [
        {
            "namespace": "ns",
            "model": "m",
            "qos_class": "high",
            "waiting": 1,
            "streamed": 0,
            "oldest_s": 1.0,
            "drained_per_s": pytest.approx(0.065, abs=0.01),
            "first_due_in_s": pytest.approx(-0.023, abs=0.01),
            "relegated": 0,
            "tenants": {},
            "owed_gpu_s": None,
        }
    ]
    assert {e["address"] for e in state["endpoints"]} == {"a:1", "b:1"}


# ── replicas whose GPUs may be asked back ───────────────────────────────────────────────────────


def queued(flow: Flow, *kinds: str, now: float = 0.0) -> list[Ask]:
    """Requests in this order: the class, and `~` behind it for a streamed one."""
    asks = [ask(kind.removesuffix("~"), streamed=kind.endswith("~")) for kind in kinds]
    for one in asks:
        assert flow.admit(one, now) is None
    return asks


SAFE, LENT = place("safe:1"), place("lent:1", lent=True)
WHERE = {
    "a stream waits for a safe replica": ([SAFE, LENT], ["low~"] * 3, "safe safe -"),
    "whole ones go anywhere": ([SAFE, LENT], ["low"] * 5, "any any any any -"),
    "whole ones pass a stream that waits, and onto lent ones only": (
        [SAFE, LENT], ["low~", "low~", "low~", "low", "low", "low"], "safe safe - lent lent -",
    ),
    "even when the stream is of a higher class": (
        [SAFE, LENT], ["high~", "high~", "high~", "low", "low"], "safe safe - lent lent",
    ),
    "a stream takes a lent one where there is no other": ([LENT], ["low~"] * 3, "lent lent -"),
    "or where no other is ready": (
        [LENT, place("safe:1", ready=False)], ["low~", "low~", "low"], "lent lent -",
    ),
    "without lent ones nothing passes": (
        [SAFE], ["low~", "low~", "low~", "low"], "safe safe - -",
    ),
    "nothing at all on a replica that drains": (
        [place("safe:1", draining=True)], ["low~", "low"], "- -",
    ),
}  # fmt: skip


@pytest.mark.parametrize("qos", [True, False], ids=["qos", "fifo"])
@pytest.mark.parametrize(("endpoints", "kinds", "expected"), WHERE.values(), ids=WHERE)
def test_streams_keep_off_lent_replicas(
    endpoints: list[Endpoint], kinds: list[str], expected: str, qos: bool
) -> None:
    flow = flow_of(*endpoints, startable=True, qos=qos)
    asks = queued(flow, *kinds)
    sent_to = {d.ask.id: d.address.split(":")[0] for d in flow.dispatch(0.0)}
    found = [sent_to.get(one.id, "-") for one in asks]
    assert [e if e != "any" else f for e, f in zip(expected.split(), found, strict=True)] == found
    assert "any" not in found


def test_a_large_stream_that_waits_is_not_overtaken_on_safe_replicas() -> None:
    """It finds room in the end: small whole ones behind it take only what is not for it."""
    flow = flow_of(place("safe:1", slots=4), LENT)
    [running] = queued(flow, "low~")
    flow.dispatch(0.0)
    large = ask("low", streamed=True, prompt_tokens=65_400)
    flow.report("safe:1", EngineReport(0.0, 4, 0, 0.99, 65_536), 1, 150)
    assert flow.admit(large, 1.0) is None
    small = queued(flow, "low", "low", "low", now=2.0)
    assert sent(flow.dispatch(2.0)) == [small[0].id, small[1].id]
    flow.finish(running.id, 3.0)
    flow.report("safe:1", EngineReport(3.0, 0, 0, 0.0, 65_536), 0, 0)
    assert sent(flow.dispatch(3.0)) == [large.id]


def test_headroom_is_kept_where_streams_may_go() -> None:
    flow = flow_of(place("safe:1", slots=8), place("lent:1", slots=8, lent=True))
    queued(flow, "high~", "high~", "high~", "low")
    flow.dispatch(0.0)
    kept = {e["address"]: e["keeps_free_from"]["low"] for e in flow.snapshot(0.0)["endpoints"]}
    assert kept["safe:1"] > 0
    assert kept["lent:1"] == 0


def test_what_runs_on_a_replica_that_drains() -> None:
    """It says that nothing more comes only once the engine told what others have there."""
    flow = flow_of(place(slots=2))
    [one] = queued(flow, "low")
    flow.dispatch(0.0)
    assert list(flow.occupied()) == [("a:1", M, False, 1)]
    flow.set_world(CLASSES, flow.models, [place(draining=True)], 1.0)
    assert list(flow.occupied()) == [("a:1", M, True, 1)]
    flow.finish(one.id, 2.0)
    assert list(flow.occupied()) == [("a:1", M, True, 0)]

    restarted = Flow()
    restarted.set_world(CLASSES, flow.models, [place(draining=True)], 3.0)
    assert list(restarted.occupied()) == [("a:1", M, False, 0)]
    restarted.report("a:1", EngineReport(3.5, running=1, waiting=0), 0, 0)
    assert list(restarted.occupied()) == [("a:1", M, True, 1)]
