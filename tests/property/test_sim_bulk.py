"""The engines that count decodes at once do, step by step, what those do that look at each."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.core.cooperate import Rules
from tidegate.core.steptime import Branch, StepFit
from tidegate.sim.bulk import Bulk
from tidegate.sim.bulk_cooperating import BulkCooperating
from tidegate.sim.cooperating import Cooperating
from tidegate.sim.engine import Engine
from tidegate.sim.pipeline import Pipeline
from tidegate.sim.types import EngineConfig, Policy, Request

FIT = StepFit(
    "second",
    "hand-made",
    *[Branch(1.0, 0.0, 1e-2, 1e-2, 1e-7, 1e-9)] * 2,
    knee=512,
    floor_s=0.0,
    trained_up_to=99,
)

CONFIGS = st.builds(
    lambda seqs, more, block_size, spare, **rest: EngineConfig(
        max_num_seqs=seqs,
        max_num_batched_tokens=seqs + more,
        block_size=block_size,
        # The largest request fits, and not always a second one.
        num_blocks=1 - (-(58 + spare) // block_size),
        **rest,
    ),
    seqs=st.integers(1, 6),
    more=st.integers(1, 40),
    block_size=st.sampled_from([1, 4, 16]),
    spare=st.integers(0, 60),
    policy=st.sampled_from(Policy),
    scheduler_reserve_full_isl=st.booleans(),
    async_scheduling=st.booleans(),
    cooperation=st.builds(Rules, fit=st.just(FIT), pause=st.booleans(), guard_s=st.sampled_from([0.0, 5.0])),
)
PACES = st.sampled_from([None, 0.8, 1.05, 1.2, 3.0])
REQUESTS = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 19), st.integers(0, 3), PACES), min_size=1, max_size=14
)
DOINGS = st.lists(st.sampled_from(["add", "step", "step", "step", "abort"]), max_size=120)


def seconds(
    prefill: int, decodes: int, decode_context: int, prefill_context: int, prefill_pairs: float
) -> float:
    """Another time for every other step."""
    work = prefill * 1e-2 + decodes * 1e-4 + decode_context * 1e-7
    return 1 + work + prefill_context * 1e-9 + prefill_pairs * 1e-11


@pytest.mark.parametrize(
    "engines",
    [
        pytest.param((Engine, Bulk), id="vLLM's"),
        pytest.param((Cooperating, BulkCooperating), id="with a plugin"),
    ],
)
@settings(max_examples=400, deadline=None)
@given(config=CONFIGS, raw=REQUESTS, doings=DOINGS, data=st.data())
def test_equal_step_by_step(engines, config, raw, doings, data):
    one, many = (engine(config) for engine in engines)
    lines = Pipeline(one, seconds), Pipeline(many, seconds)
    todo = [Request(str(i), p, o, priority, pace) for i, (p, o, priority, pace) in enumerate(raw)]
    added, now = 0, 0.0
    for doing in [*doings, *["add", "step"] * len(todo), *["step"] * 400]:
        if doing == "add" and added < len(todo):
            one.add(todo[added], now)
            many.add(todo[added], now)
            added += 1
        elif doing == "abort" and added:
            victim = str(data.draw(st.integers(0, added - 1)))
            assert one.abort(victim) == many.abort(victim)
        elif doing == "step" and lines[0].next_end is not None:
            now = lines[0].next_end
            told, brief = (line.complete()[1] for line in lines)
            assert [e for e in told if e.nth == 0 or e.finished] == sorted(
                brief, key=lambda e: [t.id for t in told].index(e.id)
            )
        wanted, got = (line.launch(now) for line in lines)
        assert [step.end for step in wanted] == [step.end for step in got]
        assert [step.plan.preempted for step in wanted] == [step.plan.preempted for step in got]
        assert one.free_blocks == many.free_blocks
        assert [r.id for r in one.running] == [r.id for r in many.running]
        assert (one.waiting, one.unfinished) == (many.waiting, many.unfinished)
        assert one.counters == many.counters
    assert many.unfinished == 0
