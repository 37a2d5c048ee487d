"""Within a class: tenants by tokens, then deadlines. Between classes: minimum shares."""

import itertools
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from tidegate.core import promises
from tidegate.core.floors import Owed
from tidegate.core.flow import Ask, Endpoint, Flow, Model, Policy, Reason
from tidegate.core.flowtypes import Pack
from tidegate.core.line import Line
from tidegate.core.load import EngineReport
from tidegate.core.steptime import LLAMA3_8B_A100
from tidegate.core.types import Objectives, QoSClass, TenantFrom, Tenants

M = ("ns", "m")
IDS = itertools.count(1)
SHARED = Tenants(TenantFrom.HEADER, "x-team", {"heavy": 3})
CLASSES = {
    "chat": QoSClass("chat", 100, objectives=Objectives(ttft_s=2.0), queue_max_wait_s=600),
    "shared": QoSClass("shared", 50, queue_max_requests=30, queue_max_wait_s=600, tenants=SHARED),
    "code": QoSClass("code", 40, objectives=Objectives(completion_s=60.0), queue_max_wait_s=600),
    "batch": QoSClass("batch", 0, queue_max_wait_s=3600, minimum_share=0.2),
}


def ask(qos: str, tenant: str = "", prompt: int = 100, output: int = 50, **fields: Any) -> Ask:
    return Ask(next(IDS), M, qos, prompt, output, tenant=tenant, **fields)


class Stage:
    """One replica with so many slots, long known and idle."""

    def __init__(self, slots: int = 1, model: Model | None = None, **policy: Any) -> None:
        self.flow = Flow(Policy(**({"pack": Pack(front=False)} | policy)))
        self.model = model or Model(M, tuple(CLASSES))
        self.now = 0.0
        places = [Endpoint("a:1", M, "chat", slots)]
        self.flow.set_world(CLASSES, {M: self.model}, places, -100.0)
        self.running: list[Ask] = []
        self.order: list[Ask] = []
        self.report()

    def report(self) -> None:
        self.flow.report("a:1", EngineReport(self.now, 0, 0, 0.0, 400_000), *self.flow.held("a:1"))

    def come(self, *asks: Ask) -> None:
        for one in asks:
            assert self.flow.admit(one, self.now) is None

    def serve(self, rounds: int, each_s: float = 0.0) -> list[Ask]:
        """Whatever runs ends, and the next ones go, so many times; returns those that went."""
        begun = len(self.order)
        for _ in range(rounds):
            for one in self.running:
                self.flow.finish(one.id, self.now)
            self.report()
            self.running = [d.ask for d in self.flow.dispatch(self.now)]
            self.order += self.running
            self.now += each_s
        return self.order[begun:]


# ── tenants ─────────────────────────────────────────────────────────────────────────────────────


def test_tenants_take_turns_however_much_each_sends() -> None:
    stage = Stage()
    stage.come(*(ask("shared", "large") for _ in range(15)), *(ask("shared", "small") for _ in range(4)))
    assert Counter(a.tenant for a in stage.serve(8)) == {"large": 4, "small": 4}


def test_they_share_by_tokens_and_not_by_requests() -> None:
    stage = Stage()
    stage.come(*(ask("shared", "long", prompt=900) for _ in range(9)))
    stage.come(*(ask("shared", "short", prompt=100, output=1) for _ in range(9)))
    assert [a.tenant for a in stage.serve(6)].count("short") == 5


def test_a_weight_is_a_larger_share() -> None:
    stage = Stage()
    stage.come(*(ask("shared", name) for name in ("heavy", "light") for _ in range(9)))
    assert Counter(a.tenant for a in stage.serve(8)) == {"heavy": 6, "light": 2}


def test_who_comes_back_has_saved_nothing() -> None:
    stage = Stage()
    stage.come(ask("shared", "idle"), *(ask("shared", "busy") for _ in range(19)))
    assert {a.tenant for a in stage.serve(15)} == {"idle", "busy"}
    stage.come(*(ask("shared", name) for name in ("idle", "busy") for _ in range(6)))
    assert Counter(a.tenant for a in stage.serve(8)) == {"idle": 4, "busy": 4}


def test_an_output_that_ended_early_is_not_charged() -> None:
    stage = Stage()
    stage.come(*(ask("shared", "guesses", output=5000) for _ in range(8)))
    stage.come(*(ask("shared", "knows", output=1) for _ in range(8)))
    assert Counter(a.tenant for a in stage.serve(8)) == {"guesses": 4, "knows": 4}, "both ended at once"


@pytest.mark.parametrize("early", [True, False], ids=["before its end", "after its end"])
def test_tenants_are_charged_what_was_measured(early: bool) -> None:
    """By steps that its engine was seen to make each had none; the log says that one had a thousand."""
    stage = Stage()
    stage.come(*(ask("shared", who, output=8) for who in ("talks", "short") for _ in range(10)))
    first = stage.serve(1)[0]
    others = "short" if first.tenant == "talks" else "talks"
    if early:
        stage.flow.measured(first.id, 100, 1000)
    stage.serve(1)
    if not early:
        stage.flow.measured(first.id, 100, 1000)
    stage.flow.measured(first.id, 100, 1000)  # told twice, charged once
    stage.flow.measured(987_654, 100, 1000)  # nobody knows that one
    [queue] = stage.flow.snapshot(stage.now)["queues"]
    ahead = {name: tenant["tokens_ahead"] for name, tenant in queue["tenants"].items()}
    # The prompt was 100 as estimated; of what is charged, outputs count twice.
    assert ahead[first.tenant] == pytest.approx(2000, abs=350)
    assert {a.tenant for a in stage.serve(5)} == {others}


@pytest.mark.parametrize("others", [1, 2000])
def test_what_is_given_back_later_is_no_credit(others: int) -> None:
    line = Line()
    first = line.add(ask("shared"), 0.0, "claims")
    line.pop(first.ask.id)
    line.charge("claims", 2_000_000)
    for number in range(2000):
        line.pop(line.add(ask("shared"), 0.0, f"t{number % others}").ask.id)
        line.charge(f"t{number % others}", 1500)
    line.add(ask("shared"), 0.0, "busy")
    line.add(ask("shared"), 0.0, "claims")
    line.charge("claims", -1_999_900)
    ahead = line.describe(0.0)["tenants"]
    assert ahead["busy"]["tokens_ahead"] == 0, "it has not been given a start"


def test_an_embedding_is_charged_no_output() -> None:
    stage = Stage(slots=8)
    embeds = ask("shared", "embeds", prompt=100, output=0)
    stage.come(embeds, ask("chat", output=5000))
    assert len(stage.flow.dispatch(0.0)) == 2
    stage.flow.finish(embeds.id, 10.0)
    stage.come(*(ask("shared", name) for name in ("other", "embeds")))
    [queue] = (q for q in stage.flow.snapshot(10.0)["queues"] if q["qos_class"] == "shared")
    ahead = {name: tenant["tokens_ahead"] for name, tenant in queue["tenants"].items()}
    assert ahead == {"other": 0, "embeds": 100}, "its prompt"


def test_a_class_without_tenants_keeps_arrival_order() -> None:
    stage = Stage()
    asks = [ask("batch", "a"), ask("batch", "a"), ask("batch", "b"), ask("batch", "a")]
    stage.come(*asks)
    assert stage.serve(4) == asks


def test_arrival_order_is_without_tenants_deadlines_and_shares() -> None:
    stage = Stage(qos=False)
    asks = [
        ask("shared", "a"),
        ask("batch"),
        ask("shared", "a"),
        ask("code", prompt=9000),
        ask("shared", "b"),
    ]
    stage.come(*asks)
    stage.now = 1000.0
    assert stage.serve(5) == asks


def test_who_floods_the_queue_is_refused_and_others_find_a_place() -> None:
    stage = Stage()
    stage.come(ask("shared", "flood"))
    stage.flow.dispatch(0.0)
    verdicts = [stage.flow.admit(ask("shared", "flood"), 0.0) for _ in range(40)]
    assert verdicts.count(None) == 20, "two thirds of 30"
    assert verdicts[-1] is not None
    assert (verdicts[-1].status, verdicts[-1].reason) == (429, Reason.QUEUE_FULL)
    assert "20 of 30 shared requests wait for ns/m, 20 of them this tenant's" in verdicts[-1].message
    for name in ("a", "b", "c", "d"):
        assert stage.flow.admit(ask("shared", name), 0.0) is None


def test_invented_tenants_do_not_fill_memory() -> None:
    line = Line()
    for number in range(5000):
        line.add(ask("shared"), 0.0, f"invented-{number}")
        line.pop(line.oldest().ask.id)  # type: ignore[union-attr]
        line.charge(f"invented-{number}", 100)
    assert len(line.tenants) <= 1000


def test_many_wait_and_each_costs_little() -> None:
    line, count = Line(), 30_000
    began = time.process_time()
    for number in range(count):
        line.add(ask("shared"), 0.0, f"t{number % 1000}", due=float(-number % 977))
    for _ in range(count):
        head = line.head()
        assert head is not None
        line.pop(head.ask.id)
        line.charge(head.tenant, 100)
    assert time.process_time() - began < 20, "a linear step would take hours"


# ── deadlines ───────────────────────────────────────────────────────────────────────────────────


def test_what_must_be_sent_first_goes_first() -> None:
    stage = Stage()
    short, long = ask("code", output=10), ask("code", output=2000)
    stage.come(short)
    stage.now = 1.0
    stage.come(long)
    assert stage.serve(2) == [long, short], "it came later, and takes longer than the other has to spare"


def test_what_cannot_be_in_time_waits_behind_what_can_and_is_not_lost() -> None:
    stage = Stage()
    late = [ask("code"), ask("code")]
    stage.come(*late)
    stage.now = 100.0
    timely = [ask("code"), ask("code")]
    stage.come(*timely)
    assert stage.serve(4) == timely + late
    assert stage.flow.snapshot(stage.now)["queues"][0]["relegated"] == 2


def test_relegated_requests_still_come_before_lower_classes() -> None:
    stage = Stage()
    late, low = ask("code"), ask("batch")
    stage.come(low, late)
    stage.now = 100.0
    assert stage.serve(1) == [late]


def test_people_do_not_wait_behind_what_is_relegated_and_finds_no_room() -> None:
    promised = Objectives(ttft_s=2.0)
    classes = {name: QoSClass(name, priority, objectives=promised) for name, priority in (("a", 2), ("b", 1))}
    flow = Flow()
    flow.set_world(classes, {M: Model(M, ("a", "b"))}, [Endpoint("a:1", M, "a", 64)], -100.0)
    flow.report("a:1", EngineReport(0.0, 0, 0, 0.0, 400_000), 0, 0)
    for _ in range(3):
        assert flow.admit(ask("a", prompt=8000), 0.0) is None
    assert len(flow.dispatch(0.0)) == 3
    late, people = ask("a", prompt=40_000), [ask("b"), ask("b")]
    for one in (late, *people):
        assert flow.admit(one, 0.0) is None
    assert [d.ask for d in flow.dispatch(0.0)] == people
    assert [d.ask for d in flow.dispatch(6.0)] == [late]


def test_a_model_may_promise_otherwise() -> None:
    stage = Stage(model=Model(M, tuple(CLASSES), objectives={"code": Objectives(completion_s=5.0)}))
    one = ask("code", output=10)
    stage.come(one)
    [queue] = stage.flow.snapshot(0.0)["queues"]
    assert 4.5 < queue["first_due_in_s"] < 5.0


def test_the_pace_of_such_requests_is_learned() -> None:
    stage = Stage()
    stage.come(*(ask("code") for _ in range(30)))
    stage.serve(30, each_s=1.0)
    stage.come(ask("code"))
    [queue] = stage.flow.snapshot(stage.now)["queues"]
    assert queue["first_due_in_s"] == pytest.approx(59, abs=0.3), "they were seen to take a second each"


def test_when_a_request_must_be_sent() -> None:
    fit, chat = LLAMA3_8B_A100, Objectives(ttft_s=1.0, per_thousand_prompt_tokens_s=0.1)
    prefill_s = fit.seconds(2000, 0)
    by = promises.send_by(chat, fit, 2000, 50, 10.0, 1.0)
    assert by == pytest.approx(10 + 1.0 + 0.2 - prefill_s)
    assert promises.send_by(Objectives(), fit, 2000, 50, 10.0, 1.0) == float("inf")
    both = replace(chat, completion_s=1.2)
    assert promises.send_by(both, fit, 2000, 50, 10.0, 1.0) < by
    # An engine that takes a hundredth of the fit: nobody is given up for a prompt that it reads at once.
    assert promises.send_by(chat, fit, 200_000, 50, 10.0, 0.01) > 10


# ── minimum shares ──────────────────────────────────────────────────────────────────────────────


def test_a_low_class_gets_its_share_and_no_more_while_others_press() -> None:
    stage = Stage()
    for _ in range(40):
        stage.come(ask("code"), ask("code"), ask("batch"))
    sent = Counter(a.qos_class for a in stage.serve(60, each_s=0.5))
    assert 8 <= sent["batch"] <= 13, sent


def test_without_a_share_strict_priority() -> None:
    stage = Stage()
    stage.flow.set_world(
        {**CLASSES, "batch": replace(CLASSES["batch"], minimum_share=0.0)},
        {M: stage.model},
        [Endpoint("a:1", M, "chat", 1)],
        0.0,
    )
    for _ in range(30):
        stage.come(ask("code"), ask("batch"))
    assert {a.qos_class for a in stage.serve(30)} == {"code"}


def test_far_below_its_share_it_takes_the_headroom_of_others() -> None:
    stage = Stage(slots=8, pack=Pack())
    low = [ask("batch") for _ in range(10)]
    stage.come(*low)
    sent: list[Ask] = []
    for _ in range(120):
        stage.come(*(ask("chat") for _ in range(6)))
        sent += stage.serve(1, each_s=0.05)
    share = sum(a.qos_class == "batch" for a in sent) / len(sent)
    assert 0 < share < 0.25


def test_what_it_is_owed() -> None:
    owed = Owed()
    owed.others(10.0, 0.2, 0.0)
    assert owed.seconds(0.0) == pytest.approx(2.0)
    owed.own(2.5, 0.2, 0.0)
    assert owed.seconds(0.0) == pytest.approx(0.0)
    owed.own(5.0, 0.2, 0.0)
    assert owed.seconds(60.0) == pytest.approx(-4.0 / 2.71828, rel=1e-3), "forgotten in a minute"
    owed.others(100.0, 0.2, 60.0)
    owed.rest()
    assert owed.seconds(60.0) == 0.0, "who does not wait is owed nothing"


def test_a_large_claim_gives_nobody_the_whole_model() -> None:
    stage = Stage(slots=40)
    stage.come(ask("chat", output=130_000), *(ask("batch", prompt=500, output=200) for _ in range(60)))
    stage.flow.dispatch(stage.now)
    stage.come(*(ask("chat") for _ in range(5)))
    assert [d.ask.qos_class for d in stage.flow.dispatch(stage.now)].count("chat") == 5


@pytest.mark.parametrize("rests", [False, True])
def test_what_others_did_not_need_is_taken_from_who_was_owed_it_alone(rests: bool) -> None:
    stage = Stage(slots=100)
    chats = [ask("chat", output=1000) for _ in range(60)]
    before = [ask("batch")] if rests else []
    stage.come(*chats, *before)
    assert sum(d.ask.qos_class == "chat" for d in stage.flow.dispatch(0.0)) == 60
    for one in before:
        stage.flow.finish(one.id, 0.0)
    stage.come(*(ask("batch") for _ in range(80)))

    def owed_s() -> float:
        [queue] = (q for q in stage.flow.snapshot(0.0)["queues"] if q["qos_class"] == "batch")
        return float(queue["owed_gpu_s"])

    owed_before = owed_s()
    for one in chats:
        stage.flow.finish(one.id, 0.0)
    assert owed_s() == owed_before


def test_a_request_without_tokens_is_owed_served_and_learnt_from() -> None:
    promised = replace(CLASSES["batch"], objectives=Objectives(completion_s=60.0))
    stage = Stage()
    places = [Endpoint("a:1", M, "chat", 1)]
    stage.flow.set_world({**CLASSES, "batch": promised}, {M: stage.model}, places, 0.0)
    stage.come(*(ask("code") for _ in range(30)), *(ask("batch", prompt=0, output=0) for _ in range(3)))
    went = Counter(a.qos_class for a in stage.serve(20, each_s=0.5))
    assert went["batch"] == 3
    assert went["code"] == 17


def test_a_share_that_is_given_while_requests_wait_holds_for_them() -> None:
    stage = Stage()
    places = [Endpoint("a:1", M, "chat", 1)]
    without = {**CLASSES, "batch": replace(CLASSES["batch"], minimum_share=0.0)}
    stage.flow.set_world(without, {M: stage.model}, places, 0.0)
    stage.come(*(ask(name) for name in ("batch", "code") for _ in range(30)))
    stage.flow.set_world(CLASSES, {M: stage.model}, places, 0.0)
    assert Counter(a.qos_class for a in stage.serve(25, each_s=0.5))["batch"] >= 3


# ── what comes and goes ─────────────────────────────────────────────────────────────────────────


def test_who_waits_for_the_first_replica_is_not_beyond_its_part() -> None:
    shared = replace(CLASSES["chat"], tenants=SHARED)
    flow = Flow()
    flow.set_world({"chat": shared}, {M: Model(M, ("chat",), startable=True)}, [], 0.0)
    for number in range(12):
        assert flow.admit(ask("chat", f"t{number % 2}"), number / 10) is None
    assert [relegated for *_, relegated in flow.sharing()] == [0]


def test_of_models_that_are_gone_nothing_is_kept() -> None:
    flow = Flow()
    for number in range(3):
        key = ("ns", f"m{number}")
        one = replace(ask("code"), model=key)
        place = Endpoint("a:1", key, "code", 4)
        flow.set_world(CLASSES, {key: Model(key, ("code",))}, [place], number * 10.0)
        flow.report("a:1", EngineReport(number * 10.0, 0, 0, 0.0, 400_000), 0, 0)
        assert flow.admit(one, number * 10.0) is None
        assert len(flow.dispatch(number * 10.0)) == 1
        flow.set_world(CLASSES, {}, [], number * 10.0 + 1)
        flow.finish(one.id, number * 10.0 + 2)
    flow.set_world(CLASSES, {}, [], 100.0)
    room = flow._room
    assert not any((flow._lines, flow._where, flow._deadlines, flow._floors, flow._crowds))
    assert not any((room.running, room.loads, room._busy, room._seen))
