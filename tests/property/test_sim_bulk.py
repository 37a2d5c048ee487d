"""The engines that count decodes at once do, step by step, what those do that look at each."""

from dataclasses import replace

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
CACHING = st.builds(replace, CONFIGS, enable_prefix_caching=st.just(True), cooperation=st.just(None))
SHARED = st.sampled_from([(), (("a", 5),), (("a", 17),), (("a", 17), ("b", 9)), (("a", 17), ("c", 3))])
TEXTS = st.lists(st.tuples(SHARED, st.sampled_from(["", "t", "u"])), min_size=14, max_size=14)
PACES = st.sampled_from([None, 0.8, 1.05, 1.2, 3.0])
REQUESTS = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 19), st.integers(0, 3), PACES), min_size=1, max_size=14
)
DOINGS = st.lists(st.sampled_from(["add", "step", "step", "step", "abort"]), max_size=120)


def known(engine) -> list:
    """What the prefix cache would forget first, in order."""
    return [block.key for block in engine._cache._idle] if engine._cache else []


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
    todo = [Request(str(i), p, o, priority, pace) for i, (p, o, priority, pace) in enumerate(raw)]
    hold_against_each_other(engines, config, todo, doings, data)


@settings(max_examples=400, deadline=None)
@given(config=CACHING, raw=REQUESTS, texts=TEXTS, doings=DOINGS, data=st.data())
def test_equal_step_by_step_with_a_prefix_cache(config, raw, texts, doings, data):
    todo = []
    for i, ((p, o, priority, _), (shared, text)) in enumerate(zip(raw, texts, strict=False)):
        # All of a prompt's parts are in it: an answer that is not there yet is nobody's prefix.
        prompt = p + sum(tokens for _, tokens in shared)
        todo.append(
            Request(str(i), min(prompt, 40), o, priority, shared=shared if prompt <= 40 else (), text=text)
        )
    hold_against_each_other((Engine, Bulk), config, todo, doings, data)


def hold_against_each_other(engines, config, todo, doings, data):
    one, many = (engine(config) for engine in engines)
    lines = Pipeline(one, seconds), Pipeline(many, seconds)
    added, now = 0, 0.0
    for doing in [*doings, *["add", "step"] * len(todo), *["step"] * 400]:
        if doing == "add" and added < len(todo):
            request = todo[added]
            # A turn comes when the one before it has been answered, or is given up.
            if request.text and any(request.text == todo[int(i)].text for i in one._known):
                request = replace(request, text="")
            one.add(request, now)
            many.add(request, now)
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
        assert known(one) == known(many)
    assert many.unfinished == 0
