"""Sarathi's scheduler, its orders, chunks and relegation, one rule a test."""

from math import inf

import pytest

from tidegate.core.steptime import LLAMA3_8B_A100 as FIT
from tidegate.sim.arms import DYNAMIC_SIZES, Arm, DeadlineAndWork, Dynamic, Edf, Fcfs, Hopeless, Static
from tidegate.sim.drive import Outcome
from tidegate.sim.promise import ANYTIME, Promise
from tidegate.sim.sarathi import Batch, Job, Sarathi
from tidegate.sim.serve import Promised, serve
from tidegate.sim.types import Request

SOON = Promise("soon", ttft_s=6.0, token_s=0.05)
LATER = Promise("later", finish_s=600.0, token_s=0.4)


def engine(size: int = 64, order=None, relegation=None) -> Sarathi:
    return Sarathi(order or Fcfs(), Static(size), relegation)


def step(model: Sarathi, now: float = 0.0) -> dict[str, int]:
    plan = model.schedule(now)
    model.complete(plan)
    return plan.tokens_by_request


def first_served(model: Sarathi, now: float) -> str:
    return next(iter(step(model, now)))


def test_a_long_prompt_is_prefilled_in_chunks_and_gives_its_first_token_with_the_last():
    model = engine()
    model.add(Request("a", 150, 2), 0.0)
    plans = []
    while model.unfinished:
        plan = model.schedule(0.0)
        plans.append((plan.prefill_tokens, plan.prefill_context, plan.decodes, plan.decode_context))
        events = model.complete(plan)
        assert len(events) == (len(plans) >= 3)
    assert plans == [(64, 0, 0, 0), (64, 64, 0, 0), (22, 128, 0, 0), (0, 0, 1, 150)]


def test_the_chunk_includes_decodes_and_every_decode_is_in_every_step():
    model = engine()
    for name in ("a", "b"):
        model.add(Request(name, 10, 9), 0.0)
    step(model)
    model.add(Request("c", 200, 1), 1.0)
    assert step(model) == {"a": 1, "b": 1, "c": 62}


def test_decodes_that_fill_the_chunk_leave_nothing_to_prompts_and_are_all_served():
    class Shrinking:
        def tokens(self, batch: Batch, now: float) -> int:
            return 64 if now == 0 else 2

    model = Sarathi(Fcfs(), Shrinking())
    for i in range(3):
        model.add(Request(f"d{i}", 1, 50), 0.0)
    step(model)
    model.add(Request("late", 5, 1), 1.0)
    assert step(model, 1.0) == {"d0": 1, "d1": 1, "d2": 1}


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        pytest.param(Fcfs(), ["old", "long", "short"], id="fcfs: by arrival"),
        pytest.param(Edf(), ["long", "short", "old"], id="edf: by deadline, whatever the length"),
        pytest.param(DeadlineAndWork(), ["short", "long", "old"], id="qoserve: the longer later"),
        pytest.param(
            DeadlineAndWork(1.0), ["short", "old", "long"], id="qoserve: as much as its weight says"
        ),
    ],
)
def test_order_of_prompts(order, expected):
    model = engine(size=5000, order=order)
    model.add(Request("old", 100, 1), 0.0, LATER)
    model.add(Request("long", 4000, 1), 1.0, SOON)
    model.add(Request("short", 10, 1), 2.0, SOON)
    assert list(step(model, 2.0)) == expected


def test_a_prompt_half_done_gives_way_to_an_earlier_deadline_and_keeps_what_was_computed():
    model = engine(order=Edf())
    model.add(Request("batch", 100, 1), 0.0, LATER)
    assert step(model) == {"batch": 64}
    model.add(Request("person", 60, 1), 1.0, SOON)
    assert step(model, 1.0) == {"person": 60, "batch": 4}
    assert step(model, 2.0) == {"batch": 32}


def test_work_done_brings_a_prompt_forward():
    model = engine(order=DeadlineAndWork())
    model.add(Request("begun", 128, 1), 0.0, SOON)
    step(model)
    # Keys 6 + 8 ms × 64 and 6.3 + 8 ms × 60; before its first chunk the other's was 6 + 8 ms × 128.
    model.add(Request("new", 60, 1), 0.3, SOON)
    assert first_served(model, 0.3) == "begun"


@pytest.mark.parametrize(
    ("slack_s", "decodes", "waiting", "expected"),
    [
        pytest.param(inf, 0, 9000, 2552, id="no decode: the largest"),
        pytest.param(10.0, 5, 9000, 2552, id="room enough: the largest"),
        pytest.param(0.1, 5, 9000, 768, id="100 ms: 768 take 82 with the margin's 98"),
        pytest.param(0.09, 5, 9000, 512, id="90 ms: too little for 768 with its margin"),
        pytest.param(0.05, 5, 9000, 256, id="50 ms"),
        pytest.param(-1.0, 5, 9000, 128, id="late already: the least"),
        pytest.param(0.1, 5, 300, 2552, id="a short queue makes a short step, whatever the chunk"),
    ],
)
def test_the_dynamic_chunk(slack_s, decodes, waiting, expected):
    batch = Batch(decodes, decodes * 1000, 100.0 + slack_s, waiting, 0)
    size = Dynamic(FIT).tokens(batch, 100.0)
    assert size == expected
    if slack_s > 0 and decodes:
        larger = [s for s in DYNAMIC_SIZES if s > size]
        computed = min(size - decodes, waiting)
        assert 1.2 * FIT.seconds(computed, decodes, decodes * 1000) <= slack_s
        assert all(1.2 * FIT.seconds(s - decodes, decodes, decodes * 1000) > slack_s for s in larger)


def test_the_dynamic_chunk_looks_at_the_token_that_is_due_first():
    seen = []

    class Spy:
        def tokens(self, batch: Batch, now: float) -> int:
            seen.append(batch.least_due_s)
            return 1000

    model = Sarathi(Fcfs(), Spy())
    model.add(Request("later", 10, 9), 0.0, LATER)
    model.add(Request("soon", 10, 9), 1.0, SOON)
    for _ in range(2):
        step(model, 1.0)
    model.add(Request("next", 10, 9), 2.0, SOON)
    step(model, 2.0)
    # Arrival 1, deadline 6, and its third token (i = 2) comes next: 50 ms × 3.
    assert seen == [inf, pytest.approx(1 + 6 + 0.05 * 3)]


def test_a_chunk_is_chosen_by_what_the_step_would_compute():
    seen = []

    class Spy:
        def tokens(self, batch: Batch, now: float) -> int:
            seen.append(batch)
            return 50

    model = Sarathi(Fcfs(), Spy())
    model.add(Request("a", 80, 3), 0.0)
    model.add(Request("b", 70, 3), 0.0)
    for _ in range(3):
        step(model)
    assert [(b.prompt_tokens, b.head_context, b.decodes, b.decode_context) for b in seen] == [
        (150, 0, 0, 0),
        (100, 50, 0, 0),
        (50, 20, 1, 80),
    ]


def test_the_doomed_go_behind_all_others_once_and_are_served():
    model = engine(order=Edf(), relegation=Hopeless(FIT))
    model.add(Request("doomed", 60, 1), 0.0, SOON)
    model.add(Request("batch", 100, 1), 1.0, LATER)
    assert step(model, 7.0) == {"batch": 64}
    assert step(model, 7.1) == {"batch": 36, "doomed": 28}
    assert step(model, 700.0) == {"doomed": 32}
    assert model.relegated == 1


def test_a_prompt_half_done_is_not_relegated():
    model = engine(order=Edf(), relegation=Hopeless(FIT))
    model.add(Request("begun", 100, 1), 0.0, SOON)
    step(model, 5.0)
    model.add(Request("batch", 100, 1), 5.0, LATER)
    assert first_served(model, 7.0) == "begun"


@pytest.mark.parametrize(
    ("now", "doomed"),
    [
        pytest.param(5.5, False, id="1,000 tokens take 0.1 s at full speed"),
        pytest.param(5.89, False, id="just in time"),
        pytest.param(5.95, True, id="too late"),
    ],
)
def test_who_is_hopeless(now, doomed):
    job = Job(Request("a", 1000, 5), SOON, 0.0, 0)
    assert FIT.seconds(2552, 0) / 2.552 == pytest.approx(0.0978, rel=0.01)
    assert Hopeless(FIT).doomed(job, now) is doomed


@pytest.mark.parametrize(
    ("promise", "first", "finish", "kept"),
    [
        pytest.param(SOON, 16.0, 900.0, True, id="people are judged by the first token alone"),
        pytest.param(SOON, 16.1, 16.2, False, id="first token late"),
        pytest.param(LATER, 600.0, 610.0, True, id="finished in time"),
        pytest.param(LATER, 11.0, 610.1, False, id="finished late"),
        pytest.param(LATER, 11.0, None, False, id="never finished"),
        pytest.param(ANYTIME, 1e9, 1e9, True, id="no promise"),
    ],
)
def test_whether_a_promise_was_kept(promise, first, finish, kept):
    assert promise.kept(Outcome(10.0, first, finish)) is kept


def test_serve_lays_steps_out_in_time():
    arm = Arm("fcfs", Fcfs(), Static(10))
    arrivals = [Promised(5.0, Request("a", 15, 2)), Promised(5.5, Request("b", 5, 1))]
    served = serve(arm.engine(), arrivals, lambda p, d, dc, pc, pairs: 1.0)
    by_id = {each.arrival.request.id: each.outcome for each in served}
    # 5–6: ten of a. 6–7: five of a, five of b, each with its first token. 7–8: a's second.
    assert by_id["a"] == Outcome(5.0, 7.0, 8.0, 2)
    assert by_id["b"] == Outcome(5.5, 7.0, 7.0, 1)


@pytest.mark.parametrize(
    ("arrivals", "message"),
    [
        pytest.param([(1.0, "a"), (0.5, "b")], "sort by time_s", id="not in order"),
        pytest.param([(1.0, "a"), (1.0, "a")], "arrives twice", id="at once"),
        pytest.param([(1.0, "a"), (99.0, "a")], "arrives twice", id="after it finished"),
    ],
)
def test_arrivals_that_are_refused(arrivals, message):
    with pytest.raises(ValueError, match=message):
        serve(engine(), [Promised(at, Request(name, 5, 1)) for at, name in arrivals])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: engine().add(Request("a", 0, 1), 0.0), "at least one prompt", id="no prompt"),
        pytest.param(lambda: engine().add(Request("a", 1, 0), 0.0), "at least one prompt", id="no output"),
        pytest.param(lambda: Static(0), "chunk size must be at least 1", id="empty chunk"),
        pytest.param(lambda: Promise("x", ttft_s=0.0), "must be positive", id="deadline at once"),
    ],
)
def test_values_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("steps", [0, 1, 5], ids=["waits", "half a prompt", "decodes"])
def test_who_is_aborted_leaves_the_others_as_they_are(steps):
    model = engine()
    model.add(Request("a", 150, 9), 0.0)
    model.add(Request("b", 100, 2), 0.0)
    for _ in range(steps):
        step(model)
    plan = model.schedule(0.0)
    assert model.abort("a")
    assert not model.abort("a")
    assert "a" not in {event.id for event in model.complete(plan)}
    for _ in range(10):
        assert "a" not in step(model)
    assert (model.unfinished, model.waiting, model.counters.finished) == (0, 0, 1)
