"""What holds for the engine model whatever arrives, whenever, and however little memory there is."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.sim.drive import Arrival, drive
from tidegate.sim.engine import Engine
from tidegate.sim.pipeline import Pipeline
from tidegate.sim.types import EngineConfig, Policy, Request

CONFIGS = st.builds(
    EngineConfig,
    max_num_seqs=st.integers(1, 6),
    max_num_batched_tokens=st.integers(1, 64),
    block_size=st.sampled_from([1, 4, 16]),
    num_blocks=st.integers(60, 120),
    policy=st.sampled_from(Policy),
    scheduler_reserve_full_isl=st.booleans(),
    async_scheduling=st.booleans(),
)
# At most 40 + 20 tokens, so that with blocks of one token every request fits, two often do not.
ARRIVALS = st.lists(
    st.tuples(st.floats(0, 0.5), st.integers(1, 40), st.integers(1, 19), st.integers(-2, 2)),
    min_size=1,
    max_size=12,
)


def arrivals(raw) -> list[Arrival]:
    return [Arrival(t, Request(str(i), p, o, prio)) for i, (t, p, o, prio) in enumerate(raw)]


def flat_time(
    prefill: int, decodes: int, decode_context: int, prefill_context: int, prefill_pairs: float
) -> float:
    return 0.01


@settings(max_examples=150, deadline=None)
@given(config=CONFIGS, raw=ARRIVALS)
def test_every_request_is_served_whole_exactly_once(config, raw):
    wanted = arrivals(raw)
    run = drive(config, wanted, flat_time)
    assert sorted(run.finish_order) == sorted(a.request.id for a in wanted)
    for arrival in wanted:
        outcome = run.outcomes[arrival.request.id]
        assert outcome.tokens == arrival.request.output_tokens
        assert outcome.arrival_s < outcome.first_token_s <= outcome.finish_s
    assert run.counters.finished == len(wanted)


@settings(max_examples=100, deadline=None)
@given(config=CONFIGS, raw=ARRIVALS)
def test_same_input_same_output(config, raw):
    assert drive(config, arrivals(raw), flat_time) == drive(config, arrivals(raw), flat_time)


@settings(max_examples=150, deadline=None)
@given(config=CONFIGS, raw=ARRIVALS, aborts=st.sets(st.integers(0, 11)), data=st.data())
def test_budget_slots_and_memory_are_never_exceeded(config, raw, aborts, data):
    engine = Engine(config)
    pipeline = Pipeline(engine, flat_time)
    todo = arrivals(raw)
    computed = 0
    for _ in range(5000):
        if todo and (not engine.unfinished or data.draw(st.booleans())):
            arrival = todo.pop()
            engine.add(arrival.request, 0.0)
        for step in pipeline.launch(0.0):
            assert 0 < step.plan.tokens <= config.max_num_batched_tokens
            assert step.plan.tokens == sum(step.plan.tokens_by_request.values())
            assert len(step.plan.work) == len(step.plan.tokens_by_request)
            computed += step.plan.tokens
        held = sum(r.blocks for r in engine.running)
        assert held + engine.free_blocks == config.usable_blocks
        assert engine.free_blocks >= 0
        assert len(engine.running) <= config.max_num_seqs
        assert len(engine.running) + engine.waiting == engine.unfinished
        assert all(r.computed <= r.blocks * config.block_size for r in engine.running)
        if pipeline.next_end is not None:
            pipeline.complete()
        for i in list(aborts):
            if engine.abort(str(i)):
                aborts.discard(i)
        if not todo and not engine.unfinished:
            break
    else:
        pytest.fail("the engine does not come to an end")
    while pipeline.next_end is not None:
        pipeline.complete()
    assert engine.free_blocks == config.usable_blocks
    assert engine.running == []
    assert engine.waiting == 0
    assert computed == engine.counters.prefill_tokens + engine.counters.decode_tokens


@settings(max_examples=60, deadline=None)
@given(config=CONFIGS, raw=ARRIVALS, steps=st.integers(0, 30))
def test_aborting_everything_frees_everything(config, raw, steps):
    engine = Engine(config)
    pipeline = Pipeline(engine, flat_time)
    for arrival in arrivals(raw):
        engine.add(arrival.request, arrival.time_s)
    for _ in range(steps):
        pipeline.launch(0.0)
        if pipeline.next_end is None:
            break
        pipeline.complete()
    for arrival in arrivals(raw):
        engine.abort(arrival.request.id)
    assert engine.unfinished == 0
    assert engine.free_blocks == config.usable_blocks
    assert engine.running == []
