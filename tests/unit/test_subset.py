"""A gateway that narrows what may be chosen, goes on to fallbacks by itself, and tells who served."""

import itertools
from typing import Any

import pytest

from tidegate.core import subset
from tidegate.core.flow import Ask, Dispatch, Endpoint, Flow, Model, Policy, Reason
from tidegate.core.flowtypes import Pack
from tidegate.core.load import EngineReport
from tidegate.core.pick import Candidate, Need, others
from tidegate.core.types import Objectives, QoSClass

M = ("ns", "m")
CLASSES = {
    "high": QoSClass("high", 9, objectives=Objectives(ttft_s=1.0)),
    "low": QoSClass("low", 1, queue_max_wait_s=30.0),
}
IDS = itertools.count(1)


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        (["b:1", "a:1"], ("a:1", "b:1")),
        ("a:1, b:1", ("a:1", "b:1")),
        (["a:1,b:1", "a:1"], ("a:1", "b:1")),
        ([], ()),
        ("", ()),
        (" , ", ()),
        ([7.0, None, {"a": 1}, ["a:1"]], ()),
        (7.0, ()),
        (None, ()),
        ({"a:1": "b"}, ()),
    ],
    ids=str,
)
def test_hints_as_they_are_read(hint: object, expected: tuple[str, ...]) -> None:
    assert subset.read(hint) == expected


@pytest.mark.parametrize(
    ("address", "hint", "held"),
    [
        ("10.0.0.1:8000", "10.0.0.1:8000", True),
        ("10.0.0.1:8000", "10.0.0.1", True),
        ("10.0.0.1:8000", "10.0.0.1:8001", False),
        ("10.0.0.1:8000", "10.0.0.11", False),
        ("[fd00::1]:8000", "[fd00::1]:8000", True),
        ("[fd00::1]:8000", "fd00::1", True),
        ("[fd00::1]:8000", "[fd00::1]", True),
        ("[fd00::1]:8000", "fd00::2", False),
    ],
)
def test_an_address_without_a_port_stands_for_every_port(address: str, hint: str, held: bool) -> None:
    assert subset.holds(subset.read([hint]), address) is held


def flow_of(*endpoints: Endpoint, startable: bool = True, fallbacks: int = 0, **pack: Any) -> Flow:
    flow = Flow(Policy(fallbacks=fallbacks, pack=Pack(**({"front": False} | pack))))
    flow.set_world(CLASSES, {M: Model(M, ("high", "low"), startable)}, endpoints, -100.0)
    for e in endpoints:
        flow.report(e.address, EngineReport(0.0, 0, 0, 0.0, 65_536), 0, 0)
    return flow


def place(address: str, **fields: Any) -> Endpoint:
    return Endpoint(address, M, **({"lane": "low", "slots": 2} | fields))


def ask(*allowed: str, qos: str = "low", narrowed: bool = True, **fields: Any) -> Ask:
    hint = allowed if narrowed else None
    return Ask(next(IDS), M, qos, **({"prompt_tokens": 100, "output_tokens": 50, "subset": hint} | fields))


def where(dispatches: list[Dispatch]) -> dict[int, str]:
    return {d.ask.id: d.address for d in dispatches}


def test_a_narrowed_request_goes_where_it_may_and_nowhere_else() -> None:
    flow = flow_of(place("a:1"), place("b:1"), place("c:1"))
    asks = [ask("c:1") for _ in range(3)]
    for one in asks:
        assert flow.admit(one, 0.0) is None
    # Two have room there. The third waits for it, though others are empty.
    assert where(flow.dispatch(0.0)) == {asks[0].id: "c:1", asks[1].id: "c:1"}
    flow.finish(asks[0].id, 1.0)
    assert where(flow.dispatch(1.0)) == {asks[2].id: "c:1"}


def test_none_ready_of_those_it_may_go_to_is_a_503_at_once_though_replicas_are_coming() -> None:
    flow = flow_of(place("a:1"), place("b:1", ready=False))
    for one in (ask("b:1"), ask("x:1"), ask()):
        refused = flow.admit(one, 0.0)
        assert refused is not None
        assert (refused.status, refused.reason) == (503, Reason.NO_ENDPOINT)
        assert "that the gateway names" in refused.message
    assert flow.bytes == 0


def test_one_that_waits_is_told_when_the_last_of_its_endpoints_goes() -> None:
    flow = flow_of(place("a:1", slots=1), place("b:1", slots=1))
    first, waits, free = ask("a:1", size=5), ask("a:1", size=5), ask(narrowed=False)
    assert flow.admit(first, 0.0) is None
    assert flow.admit(waits, 0.0) is None
    flow.dispatch(0.0)
    assert flow.expire(1.0) == []
    flow.set_world(CLASSES, flow.models, [place("b:1", slots=1)], 2.0)
    assert flow.admit(free, 2.0) is None
    [(gone, refused)] = flow.expire(2.0)
    assert gone is waits
    assert refused.status == 503
    assert where(flow.dispatch(2.0)) == {free.id: "b:1"}
    assert flow.expire(2.0) == []
    assert flow.bytes == 0


def test_a_stream_that_may_go_to_lent_replicas_alone_goes_there() -> None:
    flow = flow_of(place("a:1"), place("b:1", lent=True))
    stream = ask("b:1", streamed=True)
    assert flow.admit(stream, 0.0) is None
    assert where(flow.dispatch(0.0)) == {stream.id: "b:1"}


def test_a_short_prompt_that_is_let_past_goes_only_where_it_may() -> None:
    """Of the prompts near the head the longest that is soon done goes to the front: not to any of it."""
    flow = flow_of(
        place("a:1", lane="high", slots=40),
        place("b:1", lane="high", slots=40),
        place("c:1", slots=1),
        front=True,
        clear=False,
    )
    assert flow.admit(ask("c:1"), 0.0) is None
    assert list(where(flow.dispatch(0.0)).values()) == ["c:1"]
    for _ in range(4):
        assert flow.admit(ask(qos="high", narrowed=False, prompt_tokens=4000), 1.0) is None
    flow.dispatch(1.0)
    front = {e["address"] for e in flow.snapshot(1.0)["endpoints"] if e["front"]}
    assert front == {"a:1", "b:1"}
    shorter = ask("a:1", "c:1", output_tokens=1)
    longer = ask("b:1", "c:1", output_tokens=1, prompt_tokens=200)
    for one in (longer, shorter):
        assert flow.admit(one, 3.0) is None
    sent: dict[int, str] = {}
    for tick in range(30, 70):
        sent |= where(flow.dispatch(tick / 10))
    assert sent == {shorter.id: "a:1", longer.id: "b:1"}


# ── fallbacks ───────────────────────────────────────────────────────────────────────────────────


def test_fallbacks_are_the_others_by_score_those_with_room_first() -> None:
    need = Need("low", 1, 100, 50)
    candidates = [
        Candidate("full:1", "low", 1, slots=2, used=2),
        Candidate("busy:1", "low", 1, slots=4, used=2, kv_used=500),
        Candidate("idle:1", "low", 1, slots=4, used=0),
        Candidate("first:1", "low", 1, slots=4, used=0),
        Candidate("going:1", "low", 1, slots=4, used=0, draining=True),
        Candidate("starting:1", "low", 1, slots=4, used=0, ready=False),
    ]
    assert others(need, candidates, "first:1", 9) == ("idle:1", "busy:1", "full:1")
    assert others(need, reversed(candidates), "first:1", 2) == ("idle:1", "busy:1")
    stream = Need("low", 1, 100, 50, not_lent=True)
    lent = [Candidate("lent:1", "low", 1, slots=4, used=0, lent=True)]
    assert others(stream, lent, "first:1", 9) == ()


def test_fallbacks_stay_within_the_hint_and_are_none_unless_asked_for() -> None:
    places = [place(f"{name}:1") for name in "abc"]
    for most, expected in ((0, ()), (1, ("c:1",)), (5, ("c:1",))):
        flow = flow_of(*places, fallbacks=most)
        assert flow.admit(ask("b:1", "c:1"), 0.0) is None
        [dispatch] = flow.dispatch(0.0)
        assert (dispatch.address, dispatch.fallbacks) == ("b:1", expected)


# ── who served ──────────────────────────────────────────────────────────────────────────────────


def test_room_is_held_where_the_request_is_served() -> None:
    flow = flow_of(place("a:1"), place("b:1"), fallbacks=1)
    one = ask(narrowed=False)
    assert flow.admit(one, 0.0) is None
    [dispatch] = flow.dispatch(0.0)
    assert dispatch.fallbacks == ("b:1",)
    assert flow.served(one.id, "b:1", 1.0)
    assert (flow.held("a:1"), flow.held("b:1")) == ((0, 0), (1, 150))
    assert not flow.served(one.id, "b:1", 1.0)
    flow.finish(one.id, 2.0)
    assert flow.held("b:1") == (0, 0)
    assert not flow.served(one.id, "a:1", 3.0)


def test_who_is_not_known_serves_nothing() -> None:
    flow = flow_of(place("a:1"))
    one = ask(narrowed=False)
    assert flow.admit(one, 0.0) is None
    assert not flow.served(one.id, "a:1", 0.0)  # it waits still
    flow.dispatch(0.0)
    for address in ("x:1", "", "a:1"):
        assert not flow.served(one.id, address, 0.0)
    assert flow.held("a:1") == (1, 150)


def test_one_that_is_served_elsewhere_frees_an_endpoint_that_went() -> None:
    flow = flow_of(place("a:1"), place("b:1"))
    one = ask(narrowed=False)
    assert flow.admit(one, 0.0) is None
    flow.dispatch(0.0)
    flow.set_world(CLASSES, flow.models, [place("b:1")], 1.0)
    assert flow.served(one.id, "b:1", 1.0)
    assert [address for address, *_ in flow.occupied()] == ["b:1"]
