"""What holds for the prefix cache whatever arrives and ends: nothing is lost, nothing is there twice."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

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
    enable_prefix_caching=st.just(True),
)
REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 40),
        st.integers(1, 19),
        st.integers(-2, 2),
        st.sampled_from([(), (("a", 5),), (("a", 17),), (("a", 17), ("b", 9))]),
        st.sampled_from(["", "t", "u"]),
    ),
    min_size=1,
    max_size=14,
)
DOINGS = st.lists(st.sampled_from(["add", "step", "step", "abort"]), max_size=120)


def flat(prefill: int, decodes: int, context: int, before: int, pairs: float) -> float:
    return 0.01


@settings(max_examples=300, deadline=None)
@given(config=CONFIGS, raw=REQUESTS, doings=DOINGS, data=st.data())
def test_blocks_are_held_or_free_and_counted_once(config, raw, doings, data):
    engine = Engine(config)
    pipeline = Pipeline(engine, flat)
    todo = [Request(str(i), p, o, rank, shared=s, text=t) for i, (p, o, rank, s, t) in enumerate(raw)]
    added, computed = 0, Counter()
    for doing in [*doings, *["add", "step"] * len(todo), *["step"] * 600]:
        if doing == "add" and added < len(todo):
            engine.add(todo[added], 0.0)
            added += 1
        elif doing == "abort" and added:
            engine.abort(str(data.draw(st.integers(0, added - 1))))
        elif doing == "step" and pipeline.next_end is not None:
            pipeline.complete()
        for step in pipeline.launch(0.0):
            assert 0 < step.plan.tokens <= config.max_num_batched_tokens
            computed.update(step.plan.tokens_by_request)
        check(engine)
    assert engine.unfinished == 0
    assert engine.free_blocks == config.usable_blocks
    assert engine.counters.cache_hits <= engine.counters.cache_queries
    assert computed.total() == engine.counters.prefill_tokens + engine.counters.decode_tokens


def check(engine: Engine) -> None:
    """Every block is held by somebody, or free; the holders that it counts are those that hold it."""
    cache, known = engine._cache, engine._known.values()
    held = Counter(block for tracked in known for block in tracked.held)
    every = [block for blocks in cache._known.values() for block in blocks]
    assert len(every) == len(set(every))
    assert set(held).isdisjoint(cache._idle)
    assert set(held) | set(cache._idle) == set(every)
    assert all(block.holders == held[block] for block in every)
    assert all(blocks for blocks in cache._known.values()), "nothing is left behind of what is forgotten"
    own = sum(tracked.blocks - len(tracked.held) for tracked in known)
    assert engine.free_blocks + len(held) + own == engine.config.usable_blocks
    assert cache.idle <= engine.free_blocks
    for tracked in known:
        assert len(tracked.held) * engine.config.block_size <= tracked.computed or not tracked.held
        assert len(set(tracked.held)) == len(tracked.held)
