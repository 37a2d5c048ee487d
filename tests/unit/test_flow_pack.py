"""Urgent work on a front, patient work behind it and, a little, between."""

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from tidegate.core.flow import Ask, Endpoint, Flow, Model, Policy
from tidegate.core.flowtypes import Pack
from tidegate.core.load import EngineReport
from tidegate.core.types import Objectives, QoSClass

M = ("ns", "m")
CLASSES = {
    "chat": QoSClass("chat", 100, objectives=Objectives(ttft_s=1.0, tpot_s=0.05)),
    "batch": QoSClass("batch", 0, queue_max_wait_s=3600),
}
IDS = itertools.count(1)


def ask(qos: str, prompt: int = 2000) -> Ask:
    return Ask(next(IDS), M, qos, prompt, 200)


class Stage:
    """Four replicas, chat every half second: a front of two."""

    def __init__(self, replicas: int = 4, chat_every_s: float = 0.4, **pack: Any) -> None:
        self.flow = Flow(Policy(pack=replace(Pack(), **pack)))
        self.places = [Endpoint(f"r{i}", M, "batch", 64) for i in range(replicas)]
        self.flow.set_world(CLASSES, {M: Model(M, tuple(CLASSES))}, self.places, 0.0)
        self.now = 0.0
        self.report()
        for _ in range(int(90 / chat_every_s)):
            self.now += chat_every_s
            one = ask("chat", 1000)
            assert self.flow.admit(one, self.now) is None
            self.flow.dispatch(self.now)
            self.flow.finish(one.id, self.now + 0.2)

        self.now += 0.4

    def report(self) -> None:
        for place in self.places:
            self.flow.report(place.address, EngineReport(self.now, 0, 0, 0.0, 400_000), 0, 0)

    def send(self, *asks: Ask) -> dict[int, str]:
        self.report()
        for one in asks:
            assert self.flow.admit(one, self.now) is None
        return {d.ask.id: d.address for d in self.flow.dispatch(self.now)}

    @property
    def front(self) -> set[str]:
        return {e["address"] for e in self.flow.snapshot(self.now)["endpoints"] if e["front"]}


def test_the_front_is_as_large_as_the_traffic_needs() -> None:
    assert Stage().front == {"r0", "r1"}
    assert Stage(chat_every_s=0.1).front == {"r0", "r1", "r2"}
    assert Stage(front=False).front == set()


def test_it_is_given_up_when_nobody_came_for_a_while() -> None:
    stage = Stage()
    stage.now += 20
    assert stage.front == set()
    assert len(stage.send(*(ask("batch") for _ in range(40)))) == 40, "and nothing is held back then"


def test_a_patient_prompt_is_sent_when_the_one_before_it_is_done() -> None:
    stage = Stage()
    asks = [ask("batch") for _ in range(8)]
    first = stage.send(*asks)
    assert sorted(first.values()) == ["r0", "r2", "r3"], "one each; r1 is kept clear"
    again = stage.flow.next_turn()
    assert again is not None
    assert 0 < again - stage.now < 0.5
    stage.now = again
    assert set(stage.send().values()) == {"r2", "r3"}, "a little early, so that they do not wait for it"
    stage.now += 0.15
    assert len({"r0", "r1"} & set(stage.send().values())) == 1, "on the front not early"


def test_without_binding_late_they_queue_at_the_engines() -> None:
    sent = Stage(late=False).send(*(ask("batch") for _ in range(40)))
    assert sum(address in ("r2", "r3") for address in sent.values()) > 20


def test_some_of_the_front_is_kept_clear() -> None:
    sent = Stage().send(*(ask("batch") for _ in range(8)))
    assert len({"r0", "r1"} & set(sent.values())) == 1
    sent = Stage(clear=False).send(*(ask("batch") for _ in range(8)))
    assert {"r0", "r1"} <= set(sent.values())


def test_the_front_takes_the_short_prompts() -> None:
    asks = [ask("batch", prompt) for prompt in (3000, 2500, 2000, 400, 3500)]
    sent = Stage().send(*asks)
    assert sent[asks[3].id] == "r0"
    assert {sent[asks[0].id], sent[asks[1].id]} == {"r2", "r3"}, "the others in their order"
    sent = Stage(short=False).send(*[replace(a, id=next(IDS)) for a in asks])
    assert len(sent) == 3


def test_where_all_are_front_nobody_is_passed_for_ever() -> None:
    stage = Stage(replicas=2)
    asks = [ask("batch", 3000), ask("batch", 400)]
    assert list(stage.send(*asks)) == [asks[0].id]


def test_people_go_to_the_front_and_beyond_it_when_it_is_busy() -> None:
    stage = Stage()
    first = [stage.send(ask("chat", 500)) for _ in range(2)]
    assert {a for by in first for a in by.values()} == {"r0", "r1"}
    spilt = [stage.send(ask("chat", 2000)) for _ in range(4)]
    assert {a for by in spilt for a in by.values()} >= {"r2", "r3"}


def test_no_prefill_beside_who_would_fall_behind_its_pace() -> None:
    stage = Stage()
    talking = ask("chat", 300)
    at = stage.send(talking)[talking.id]
    stage.now += 0.2
    sent = stage.send(*(ask("batch", 2000) for _ in range(6)))
    assert at not in sent.values(), "it has only just begun"
    stage.now += 3.0
    sent = stage.send(*(ask("batch", 2000) for _ in range(6)))
    assert at in sent.values(), "at 15 ms a token it is far ahead of 50"


def served(flow: Flow, seconds: float, coming: list[tuple[float, Ask]], holds_s: float = 2.0) -> Counter[str]:
    """What was sent by class, of requests that come at their time; each runs for `holds_s`."""
    sent: Counter[str] = Counter()
    ends: list[tuple[float, int]] = []
    coming = sorted(coming, key=lambda c: c[0])
    now = 0.0
    while now < seconds:
        while coming and coming[0][0] <= now:
            flow.admit(coming.pop(0)[1], now)
        for at, request in [e for e in ends if e[0] <= now]:
            ends.remove((at, request))
            flow.finish(request, now)
        for d in flow.dispatch(now):
            sent[d.ask.qos_class] += 1
            ends.append((now + holds_s, d.ask.id))
        now += 0.05
    return sent


def flow_with(*places: Endpoint, classes: dict[str, QoSClass] | None = None) -> Flow:
    flow = Flow(Policy())
    known = classes or CLASSES
    flow.set_world(known, {M: Model(M, tuple(known))}, places, 0.0)
    for place in places:
        flow.report(place.address, EngineReport(0.0, 0, 0, 0.0, 400_000), 0, 0)
    return flow


def place(address: str, **fields: Any) -> Endpoint:
    return Endpoint(address, M, "batch", 64, **fields)


def test_an_only_replica_serves_batch_too() -> None:
    chats = [(10.0 * i, ask("chat", 300)) for i in range(6)]
    batch = [(1.0, ask("batch")) for _ in range(5)]
    assert served(flow_with(place("r0")), 60, chats + batch) == {"chat": 6, "batch": 5}


def test_so_does_an_only_replica_that_is_not_lent() -> None:
    places = [place("safe"), *(place(f"lent{i}", lent=True) for i in range(5))]
    chats = [(5.0 * i, ask("chat", 300)) for i in range(12)]
    batch = [(1.0, replace(ask("batch"), streamed=True)) for _ in range(5)]
    assert served(flow_with(*places), 60, chats + batch)["batch"] == 5


def test_a_long_stream_that_may_only_go_to_the_front_is_not_passed_for_ever() -> None:
    places = [*(place(f"safe{i}") for i in range(2)), *(place(f"z{i}", lent=True) for i in range(4))]
    chats = [(0.25 * i, ask("chat", 1500)) for i in range(240)]
    long = replace(ask("batch", 4000), streamed=True)
    short = [(10 + 0.3 * i, replace(ask("batch", 500), streamed=True)) for i in range(160)]
    flow = flow_with(*places)
    served(flow, 60, [*chats, (10.0, long), *short])
    assert long.id not in {a.id for a in flow.waiting()}


def test_an_urgent_class_holds_up_nobody_above_it() -> None:
    classes = {
        "standard": QoSClass("standard", 500, queue_max_wait_s=3600),
        "free": QoSClass("free", 10, objectives=Objectives(ttft_s=1.0), queue_max_wait_s=3600),
    }
    flow = flow_with(place("r0"), classes=classes)
    coming = [(0.5 * i, ask(name, 500)) for i in range(100) for name in classes]
    sent = served(flow, 80, coming)
    assert sent == {"standard": 100, "free": 100}


def test_whatever_holds_a_class_up_it_is_not_for_ever() -> None:
    """A margin that nobody can keep closes every replica where somebody talks; one goes now and then."""
    flow = Flow(Policy(pack=replace(Pack(), margin_s=1e6)))
    places = [place("r0"), place("r1")]
    flow.set_world(CLASSES, {M: Model(M, tuple(CLASSES))}, places, 0.0)
    for one in places:
        flow.report(one.address, EngineReport(0.0, 0, 0, 0.0, 400_000), 0, 0)
    chats = [(0.25 * i, ask("chat", 300)) for i in range(240)]
    batch = [(5.0, ask("batch", 500)) for _ in range(8)]
    assert 3 <= served(flow, 40, chats + batch)["batch"] <= 8


def test_a_class_may_become_urgent_while_its_requests_run() -> None:
    stage = Stage()
    running = [ask("batch", 300) for _ in range(3)]
    assert len(stage.send(*running)) == 3
    urgent = replace(CLASSES["batch"], objectives=Objectives(ttft_s=5.0))
    models = {M: Model(M, tuple(CLASSES))}
    stage.flow.set_world(CLASSES | {"batch": urgent}, models, stage.places, stage.now)
    for one in running:
        stage.flow.finish(one.id, stage.now + 1)
    stage.flow.set_world(CLASSES, models, stage.places, stage.now + 1)
    stage.now += 2
    assert len(stage.send(*(ask("batch") for _ in range(8)))) == 3, "as if nothing had run"


@pytest.mark.parametrize("qos", [True, False])
def test_all_is_served_in_the_end(qos: bool) -> None:
    stage = Stage()
    flow = Flow(Policy(qos=qos))
    flow.set_world(CLASSES, {M: Model(M, tuple(CLASSES))}, stage.places, 0.0)
    asks = [ask(name, 1500) for name in ("chat", "batch") * 50]
    for one in asks:
        assert flow.admit(one, 5.0) is None
    now, sent = 5.0, []
    while len(sent) < len(asks):
        sent += [d.ask.id for d in flow.dispatch(now)]
        turn = flow.next_turn()
        now = max(now + 0.01, turn or 0.0)
        assert now < 600
        for request in sent[-200:-20]:
            flow.finish(request, now)
    assert sorted(sent) == sorted(a.id for a in asks)
