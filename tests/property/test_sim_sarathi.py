"""Invariants of Sarathi's scheduler under any load and arm, and bound B above all of them."""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tidegate.core.steptime import LLAMA3_8B_A100 as FIT
from tidegate.sim.arms import Arm, DeadlineAndWork, Dynamic, Edf, Fcfs, Hopeless, Static
from tidegate.sim.bound import bound, means
from tidegate.sim.drive import Arrival, drive
from tidegate.sim.gate import PROMISES
from tidegate.sim.serve import Promised, serve
from tidegate.sim.types import EngineConfig, Policy, Request

arms = st.builds(
    Arm,
    st.just("any"),
    st.sampled_from([Fcfs(), Edf(), DeadlineAndWork()]),
    st.one_of(st.builds(Static, st.integers(1, 3000)), st.just(Dynamic(FIT))),
    st.sampled_from([None, Hopeless(FIT)]),
)
lengths = st.tuples(st.integers(1, 4000), st.integers(1, 30))


@st.composite
def workloads(draw: st.DrawFn) -> list[Promised]:
    """Up to 25 requests of the gate's classes, in order of arrival, some of them at once."""
    gaps = st.sampled_from([0.0, 0.05, 1.0, 300.0])
    rows = draw(st.lists(st.tuples(gaps, lengths, st.sampled_from(PROMISES)), min_size=1, max_size=25))
    times = itertools.accumulate(gap for gap, _, _ in rows)
    return [
        Promised(t, Request(str(i), prompt, output), promise)
        for i, (t, (_, (prompt, output), promise)) in enumerate(zip(times, rows, strict=True))
    ]


@settings(max_examples=60, deadline=None)
@given(arms, workloads())
def test_every_request_is_served_whole_and_once(arm: Arm, load: list[Promised]) -> None:
    engine = arm.engine()
    served = serve(engine, load)
    assert [each.arrival for each in served] == load
    for each in served:
        outcome = each.outcome
        assert outcome.tokens == each.arrival.request.output_tokens
        assert outcome.arrival_s < outcome.first_token_s <= outcome.finish_s
    counters = engine.counters
    assert (engine.unfinished, engine.waiting) == (0, 0)
    assert counters.prefill_tokens == sum(a.request.prompt_tokens for a in load)
    assert counters.decode_tokens == sum(a.request.output_tokens - 1 for a in load)
    assert counters.finished == len(load)


@settings(max_examples=60, deadline=None)
@given(arms, workloads())
def test_steps_keep_to_the_chunk_and_leave_no_decode_out(arm: Arm, load: list[Promised]) -> None:
    engine = arm.engine()
    for arrival in load:
        engine.add(arrival.request, 0.0, arrival.promise)
    now, decoding = 0.0, set()
    largest = arm.chunk.size if isinstance(arm.chunk, Static) else 2552
    while engine.unfinished:
        plan = engine.schedule(now)
        assert plan.work, "an engine with requests always moves"
        assert plan.prefill_tokens == 0 or plan.tokens <= largest
        ids = [work.request.id for work in plan.work]
        assert len(ids) == len(set(ids))
        assert set(ids[: plan.decodes]) == decoding
        assert sum(work.tokens for work in plan.work) == plan.tokens
        for event in engine.complete(plan):
            (decoding.discard if event.finished else decoding.add)(event.id)
        now += FIT.seconds(plan.prefill_tokens, plan.decodes)


@settings(max_examples=40, deadline=None)
@given(arms, workloads())
def test_the_same_arrivals_give_the_same_times(arm: Arm, load: list[Promised]) -> None:
    assert serve(arm.engine(), load) == serve(arm.engine(), load)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), workloads())
def test_fcfs_gives_first_tokens_in_order_of_arrival(chunk: int, load: list[Promised]) -> None:
    firsts = [x.outcome.first_token_s for x in serve(Arm("fcfs", Fcfs(), Static(chunk)).engine(), load)]
    assert firsts == sorted(firsts)


@settings(max_examples=60, deadline=None)
@given(arms, st.lists(lengths, min_size=1, max_size=25))
def test_no_arm_beats_the_bound(arm: Arm, rows: list[tuple[int, int]]) -> None:
    """Whatever the order and the chunk, a set of requests takes as long as the bound says, or longer."""
    load = [Promised(0.0, Request(str(i), p, o), PROMISES[i % 3]) for i, (p, o) in enumerate(rows)]
    took_s = max(each.outcome.finish_s for each in serve(arm.engine(), load))
    # Sarathi's decodes may go beyond its chunk, by one for each request.
    config = EngineConfig(max_num_seqs=len(rows), max_num_batched_tokens=3000 + len(rows))
    assert len(rows) / took_s <= bound(means(rows), FIT, config).requests_per_s * (1 + 1e-9)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(lengths, min_size=1, max_size=25),
    st.sampled_from([128, 512, 2048]),
    st.sampled_from([2, 16, 256]),
    st.sampled_from([300, 2000, 25_001]),
    st.sampled_from(list(Policy)),
)
def test_neither_does_vllm(
    rows: list[tuple[int, int]], budget: int, seqs: int, blocks: int, policy: Policy
) -> None:
    """Also when it preempts, and when it is told the lengths: the shortest have the best priority."""
    config = EngineConfig(seqs, budget, num_blocks=blocks, policy=policy)
    load = [Arrival(0.0, Request(str(i), p, o, p + o)) for i, (p, o) in enumerate(rows)]
    took_s = max(outcome.finish_s for outcome in drive(config, load).outcomes.values())
    most = bound(means(rows), FIT, config).requests_per_s
    assert len(rows) / took_s <= most * (1 + 1e-9)
    assert most == pytest.approx(bound(means(rows * 2), FIT, config).requests_per_s)
