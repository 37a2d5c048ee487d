"""The engine model against vLLM V1's rules, one rule a test."""

import itertools

import pytest

from tidegate.core.steptime import LLAMA3_8B_A100
from tidegate.sim.drive import Arrival, drive
from tidegate.sim.engine import Engine
from tidegate.sim.pipeline import Pipeline
from tidegate.sim.types import EngineConfig, Policy, Request


def engine(**overrides) -> Engine:
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "num_blocks": 101, "async_scheduling": False}
    return Engine(EngineConfig(**{**settings, **overrides}))


def add(model: Engine, *requests: tuple) -> None:
    """Queue (id, prompt, output[, priority]) at 0, 1, 2 … seconds."""
    for now, request in enumerate(requests):
        model.add(Request(*request), float(now))


def step(model: Engine) -> dict[str, int]:
    plan = model.schedule()
    model.complete(plan)
    return plan.tokens_by_request


def run_dry(model: Engine) -> list[str]:
    """Serve everything; return the ids in the order of finishing."""
    finished = []
    while model.unfinished:
        finished += [e.id for e in model.complete(model.schedule()) if e.finished]
    return finished


def test_a_long_prompt_is_prefilled_in_chunks():
    model = engine()
    add(model, ("a", 150, 2))
    assert [step(model) for _ in range(4)] == [{"a": 64}, {"a": 64}, {"a": 22}, {"a": 1}]
    assert model.unfinished == 0
    assert model.kv_usage == 0.0


def test_a_half_prefilled_prompt_goes_before_a_waiting_higher_priority():
    model = engine(policy=Policy.PRIORITY)
    add(model, ("batch", 150, 2, 10))
    step(model)
    model.add(Request("person", 30, 2, 0), 1.0)
    assert step(model) == {"batch": 64}, "running takes the whole budget"
    assert step(model) == {"batch": 22, "person": 30}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        pytest.param(Policy.FCFS, ["first", "second", "third"], id="fcfs knows no priority"),
        pytest.param(Policy.PRIORITY, ["third", "first", "second"], id="lower value first, then arrival"),
    ],
)
def test_order_of_the_waiting_queue(policy, expected):
    model = engine(policy=policy, max_num_seqs=1)
    add(model, ("first", 10, 1, 5), ("second", 10, 1, 5), ("third", 10, 1, 1))
    assert run_dry(model) == expected


def test_slots_full_of_batch_make_priority_wait():
    model = engine(policy=Policy.PRIORITY, max_num_seqs=2)
    add(model, ("b1", 10, 5, 9), ("b2", 10, 5, 9))
    step(model)
    model.add(Request("person", 10, 1, 0), 5.0)
    waited = 0
    while "person" not in step(model):
        waited += 1
    assert waited == 4, "nobody is preempted for a slot"
    assert model.counters.preemptions == 0


def test_admission_stops_at_the_first_head_that_does_not_fit():
    model = engine(num_blocks=11)
    add(model, ("holder", 100, 10))
    step(model)
    step(model)
    model.add(Request("large", 100, 1), 1.0)
    model.add(Request("small", 10, 1), 2.0)
    assert "small" not in step(model), "a smaller one behind the head must not pass it"
    assert model.waiting == 2


@pytest.mark.parametrize(
    ("reserve", "admitted"),
    [
        pytest.param(True, False, id="whole prompt must fit"),
        pytest.param(False, True, id="first chunk is enough"),
    ],
)
def test_scheduler_reserve_full_isl(reserve, admitted):
    model = engine(num_blocks=13, scheduler_reserve_full_isl=reserve, max_num_batched_tokens=64)
    add(model, ("holder", 60, 20))
    step(model)
    model.add(Request("long", 140, 1), 1.0)
    assert ("long" in step(model)) is admitted


@pytest.mark.parametrize(
    ("policy", "victim"),
    [
        pytest.param(Policy.FCFS, "late", id="fcfs: the last of running"),
        pytest.param(Policy.PRIORITY, "low", id="priority: the largest value"),
    ],
)
def test_the_victim_when_kv_runs_out(policy, victim):
    model = engine(policy=policy, num_blocks=7, max_num_batched_tokens=200)
    # Two blocks each, both full: the first decode asks for a third.
    add(model, ("low", 32, 9, 9), ("mid", 32, 9, 1), ("late", 32, 9, 2))
    step(model)
    assert model.free_blocks == 0
    plan = model.schedule()
    assert plan.preempted == [victim]
    assert plan.admitted == []
    assert model.counters.recomputed_tokens == 32
    model.complete(plan)
    assert sorted(run_dry(model)) == ["late", "low", "mid"]


def test_the_requester_can_be_its_own_victim():
    model = engine(policy=Policy.PRIORITY, num_blocks=5, max_num_batched_tokens=200)
    add(model, ("low", 32, 9, 9), ("high", 28, 9, 1))
    step(model)
    # `high` has room in its block; `low` asks for a third block and is the one to give way.
    plan = model.schedule()
    assert plan.preempted == ["low"]
    assert plan.tokens_by_request == {"high": 1}
    model.complete(plan)
    assert run_dry(model) == ["high", "low"]


def test_a_victim_already_planned_gives_its_tokens_back():
    model = engine(policy=Policy.PRIORITY, num_blocks=5, max_num_batched_tokens=200)
    add(model, ("low", 28, 9, 9))
    step(model)
    model.add(Request("high", 32, 9, 1), 5.0)
    step(model)
    # Now `low` stands first and still has room in its block; `high` needs a block and takes low's.
    plan = model.schedule()
    assert plan.preempted == ["low"]
    assert plan.tokens_by_request == {"high": 1}
    assert (plan.decodes, plan.decode_context, plan.prefill_tokens) == (1, 32, 0)


def test_a_preempted_request_recomputes_what_it_had_generated():
    model = engine(num_blocks=5, max_num_batched_tokens=200)
    add(model, ("a", 30, 20), ("b", 30, 20))
    events = []
    recomputed = None
    while model.unfinished:
        plan = model.schedule()
        if "b" in plan.admitted and model.counters.preemptions:
            recomputed = plan.tokens_by_request["b"]
        events += model.complete(plan)
    assert recomputed is not None
    assert recomputed > 30
    assert [e.nth for e in events if e.id == "b"] == list(range(20)), "no token comes twice"


def test_abort_frees_at_once_also_in_the_middle_of_a_step():
    model = engine(max_num_seqs=1)
    add(model, ("running", 40, 5), ("waiting", 10, 1))
    plan = model.schedule()
    assert model.abort("running")
    assert model.kv_usage == 0.0
    assert model.complete(plan) == []
    assert "waiting" in step(model)
    assert not model.abort("running")


def test_async_scheduling_makes_an_arrival_wait_for_the_launched_step():
    requests = [
        Arrival(0.0, Request("first", 512, 10)),
        Arrival(0.001, Request("second", 16, 1)),
    ]
    one = LLAMA3_8B_A100.seconds(512, 0)
    two = LLAMA3_8B_A100.seconds(0, 1, 512)
    at_once = drive(EngineConfig(async_scheduling=False), requests).outcomes["second"].first_token_s
    behind = drive(EngineConfig(async_scheduling=True), requests).outcomes["second"].first_token_s
    assert at_once == pytest.approx(one + LLAMA3_8B_A100.seconds(16, 1, 512))
    assert behind == pytest.approx(one + two + LLAMA3_8B_A100.seconds(16, 1, 513))


def test_async_scheduling_computes_no_token_too_many():
    run = drive(EngineConfig(), [Arrival(0.0, Request("a", 10, 7))])
    assert run.counters.prefill_tokens == 10
    assert run.counters.decode_tokens == 6
    assert run.outcomes["a"].tokens == 7


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_steps_follow_each_other_without_a_gap(async_scheduling):
    pipeline = Pipeline(engine(async_scheduling=async_scheduling), LLAMA3_8B_A100.seconds)
    add(pipeline.engine, ("a", 10, 6))
    steps = pipeline.launch(0.0)
    while pipeline.next_end is not None:
        steps += pipeline.launch(pipeline.complete()[0].end)
    assert len(steps) == 6
    assert all(later.start == earlier.end for earlier, later in itertools.pairwise(steps))


def test_who_arrives_while_the_last_step_runs_is_seen_when_it_has_ended():
    """With async scheduling too: vLLM's core waits for results when there is nothing more to launch."""
    pipeline = Pipeline(engine(async_scheduling=True), LLAMA3_8B_A100.seconds)
    add(pipeline.engine, ("a", 10, 1))
    assert len(pipeline.launch(0.0)) == 1
    add(pipeline.engine, ("b", 10, 1))
    assert pipeline.launch(0.001) == []
    add(pipeline.engine, ("c", 10, 1))
    end = pipeline.complete()[0].end
    assert [step.plan.tokens_by_request for step in pipeline.launch(end)] == [{"b": 10, "c": 10}]


def test_nobody_is_planned_in_place_of_a_victim_before_the_running_step_has_ended():
    """The first of the running ones lacks a block and is its own victim: the others wait for a turn."""
    pipeline = Pipeline(
        engine(policy=Policy.PRIORITY, async_scheduling=True, block_size=1, num_blocks=27),
        LLAMA3_8B_A100.seconds,
    )
    add(pipeline.engine, ("low", 10, 15, 1))
    launched = pipeline.launch(0.0)
    add(pipeline.engine, ("high", 10, 15, 0))
    while not pipeline.engine.counters.preemptions:
        launched = pipeline.launch(pipeline.complete()[0].end)
    assert launched == []
    end = pipeline.complete()[0].end
    assert [step.plan.tokens_by_request for step in pipeline.launch(end)] == [{"high": 1}] * 2


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_closed_loop_sends_the_next_when_the_last_has_ended(asynchronous):
    first, second = Request("a", 100, 3), Request("b", 50, 2)
    config = EngineConfig(async_scheduling=asynchronous)
    run = drive(config, [Arrival(0.0, first)], following={"a": second}, gap_s=0.5)
    assert run.finish_order == ["a", "b"]
    assert run.outcomes["b"].arrival_s == run.outcomes["a"].finish_s + 0.5
    alone = drive(config, [Arrival(0.0, second)]).outcomes["b"]
    assert run.outcomes["b"].ttft_s == pytest.approx(alone.ttft_s)


def test_speed_divides_step_times():
    arrivals = [Arrival(0.0, Request("a", 100, 20))]
    slow, fast = (drive(EngineConfig(), arrivals, speed=s).outcomes["a"].finish_s for s in (1.0, 4.0))
    assert slow == pytest.approx(4 * fast)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        pytest.param(Request("a", 0, 1), "at least one prompt", id="no prompt"),
        pytest.param(Request("a", 1, 0), "at least one prompt", id="no output"),
        pytest.param(Request("a", 1500, 200), "the engine holds 1600", id="never fits"),
    ],
)
def test_what_can_never_be_served_is_refused(request_, message):
    with pytest.raises(ValueError, match=message):
        engine().add(request_, 0.0)


def test_an_id_is_taken_once():
    model = engine()
    add(model, ("a", 1, 1))
    with pytest.raises(ValueError, match="already known"):
        model.add(Request("a", 1, 1), 1.0)


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens", "block_size", "num_blocks"])
def test_sizes_that_can_run_nothing_are_refused(name):
    with pytest.raises(ValueError, match=name):
        EngineConfig(**{name: 0})
