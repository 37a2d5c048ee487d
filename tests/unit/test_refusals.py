"""When to try again, of a queue that drains and of a model whose replica is still starting."""

import pytest

from tidegate.core.flow import Ask, Endpoint, Flow, Model
from tidegate.core.flowtypes import Reason
from tidegate.core.load import EngineReport
from tidegate.core.refusals import Standing, expected_s, refused
from tidegate.core.types import QoSClass

M = ("ns", "m")
ASK = Ask(1, M, "low", 10, 10)


@pytest.mark.parametrize(
    ("start_s", "under_way_s", "expected"),
    [
        pytest.param(None, None, None, id="nothing is known"),
        pytest.param(None, 5.0, None, id="no start was seen to end"),
        pytest.param(40.0, None, 40.0, id="none is under way"),
        pytest.param(40.0, 25.0, 15.0, id="the rest of it"),
        pytest.param(40.0, 90.0, 4.0, id="late"),
    ],
)
def test_when_a_replica_is_expected(
    start_s: float | None, under_way_s: float | None, expected: float | None
) -> None:
    assert expected_s(start_s, under_way_s) == expected


def standing(**more: object) -> Standing:
    fields = {"waiting": 12, "most": 12, "wait_s": 30.0, "rate": 4.0, "held_bytes": 1, "most_bytes": 2}
    return Standing(**(fields | more))  # type: ignore[arg-type]


TIMES = [
    ("at the rate at which it drains", Reason.QUEUE_FULL, {}, 3),
    ("where nothing drains, the longest wait", Reason.QUEUE_FULL, {"rate": 0.0}, 30),
    ("a start says nothing of a full queue", Reason.QUEUE_FULL, {"comes_in_s": 99.0}, 3),
    ("the rest of a start, rounded up", Reason.NO_ENDPOINT, {"comes_in_s": 14.2}, 15),
    ("no start was seen", Reason.NO_ENDPOINT, {"rate": 0.0}, 30),
    ("not at once", Reason.NO_ENDPOINT, {"comes_in_s": 0.0}, 1),
    ("nor never", Reason.NO_ENDPOINT, {"comes_in_s": 1e9}, 600),
]


@pytest.mark.parametrize(("reason", "fields", "after"), [t[1:] for t in TIMES], ids=[t[0] for t in TIMES])
def test_when_to_try_again(reason: Reason, fields: dict[str, float], after: int) -> None:
    found = refused(429, reason, ASK, standing(**fields))
    assert found.retry_after_s == after
    assert found.message.endswith(f"try again in {after} s")
    assert ("one is expected in" in found.message) is (
        reason is Reason.NO_ENDPOINT and "comes_in_s" in fields
    )


@pytest.mark.parametrize(("startable", "after"), [(True, 20), (False, 30)])
def test_the_queue_knows_how_far_a_start_is(startable: bool, after: int) -> None:
    flow = Flow()
    model = Model(M, ("low",), startable, start_s=50.0, starting_s=10.0)
    flow.set_world({"low": QoSClass("low", 1)}, {M: model}, (), 100.0)
    if not startable:
        no = flow.admit(ASK, 120.0)
    else:
        assert flow.admit(ASK, 90.0) is None
        [(_, no)] = flow.expire(120.0)
    assert no is not None
    assert (no.status, no.reason, no.retry_after_s) == (503, Reason.NO_ENDPOINT, after)


def test_an_adapter_is_loaded_where_it_runs_or_the_engine_says_so() -> None:
    flow = Flow()
    places = [Endpoint(address, M, "low", 4) for address in ("a:1", "b:1", "c:1")]
    flow.set_world({"low": QoSClass("low", 1)}, {M: Model(M, ("low",))}, places, 0.0)
    for place in places:
        loaded = ("law",) if place.address == "c:1" else ()
        flow.report(place.address, EngineReport(0.0, 0, 0, 0.0, 65_536, adapters=loaded), 0, 0)

    def send(number: int, adapter: str) -> str:
        assert flow.admit(Ask(number, M, "low", 10, 10, adapter=adapter), 0.1) is None
        [sent] = flow.dispatch(0.1)
        return sent.address

    assert send(1, "law") == "c:1"
    assert send(2, "sql") == "a:1"  # nobody has it: the emptiest
    assert send(3, "") == "b:1"
    assert send(4, "sql") == "a:1"  # though it is no emptier than the others
    flow.finish(2, 0.2)
    flow.finish(4, 0.2)
    assert not flow._room.loads["a:1"].has_adapter("sql")
    assert flow._room.loads["c:1"].has_adapter("law")
