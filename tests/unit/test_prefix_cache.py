"""The prefix cache against vLLM's rules: what is found, what is forgotten first, and who is in the way."""

import pytest

from tidegate.sim.bulk import Bulk
from tidegate.sim.bulk_cooperating import BulkCooperating
from tidegate.sim.cooperating import Cooperating
from tidegate.sim.engine import Engine
from tidegate.sim.prefixcache import Block, PrefixCache, Text
from tidegate.sim.types import EngineConfig, Policy, Request

BOTH = pytest.mark.parametrize("kind", [Engine, Bulk])
SYSTEM = (("system", 32),)


class One:
    """A request that holds blocks of four tokens."""

    def __init__(self, own, shared=(), rest=""):
        self.text = Text(own, shared, rest)
        self.held: list[Block] = []


def made(kind, **overrides):
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "num_blocks": 101, "async_scheduling": False}
    return kind(EngineConfig(**{**settings, "enable_prefix_caching": True, **overrides}))


def serve(engine, *requests, now=0.0):
    """Serve them to their end; the prompt tokens that were computed."""
    before = engine.counters.prefill_tokens
    for request in requests:
        engine.add(request, now)
    while engine.unfinished:
        engine.complete(engine.schedule())
    return engine.counters.prefill_tokens - before


# ── texts ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        pytest.param(("a",), ("a",), 10, id="its own text again"),
        pytest.param(("a",), ("b",), 0, id="their own"),
        pytest.param(("a", (), "s"), ("b", (), "s"), 10, id="one conversation"),
        pytest.param(("a", (("s", 12),)), ("b", (("s", 12),)), 3, id="a system prompt"),
        pytest.param(("a", (("s", 13),)), ("b", (("s", 13),)), 3, id="a block that is shared in part"),
        pytest.param(("a", (("s", 12),), "t"), ("b", (("s", 12),), "t"), 10, id="and then a conversation"),
        pytest.param(("a", (("s", 12),), "t"), ("b", (), "t"), 0, id="another beginning"),
        pytest.param(("a", (("s", 8),)), ("b", (), "s"), 2, id="as far as their parts are the same"),
        pytest.param(("a", (("s", 8), ("s", 8))), ("b", (("s", 16),)), 2, id="twice is not at length"),
        pytest.param(("a", (), "b"), ("b",), 0, id="a name is not an id"),
    ],
)
def test_texts_are_the_same_as_far_as_their_parts_are(one, other, alike):
    keys = [Text(*each).keys(10, 4)[:10] for each in (one, other)]
    assert sum(a == b for a, b in zip(*keys, strict=True)) == alike
    assert keys[0][:alike] == keys[1][:alike]
    assert len(set(keys[0])) == 10


# ── the pool ────────────────────────────────────────────────────────────────────────────────────


def test_tails_are_forgotten_before_heads_and_the_oldest_first():
    cache, first, second = PrefixCache(4), One("a"), One("b")
    cache.note(first, 12)
    cache.note(second, 8)
    assert (cache.leave(first, 4), cache.leave(second, 2)) == (4, 2), "one of the first's four was not full"
    left = []
    for free in range(5, -1, -1):
        cache.fit(free)
        left.append([len(cache.find(one, 100)) for one in (first, second)])
    assert left == [[3, 2], [2, 2], [1, 2], [0, 2], [0, 1], [0, 0]]


def test_what_somebody_holds_is_neither_free_nor_forgotten():
    cache, first, second = PrefixCache(4), One("a", (), "t"), One("b", (), "t")
    cache.note(first, 8)
    found = cache.find(second, 9)
    assert PrefixCache.free(found) == 0
    cache.share(second, found)
    assert cache.leave(first, 2) == 0
    cache.fit(0)
    assert cache.find(first, 9) == found
    assert cache.leave(second, 2) == 2


def test_of_two_that_computed_the_same_the_older_is_found_and_either_will_do():
    cache, first, second = PrefixCache(4), One("a", (), "t"), One("b", (), "t")
    cache.note(first, 4)
    cache.note(second, 4)
    assert cache.find(One("c", (), "t"), 5) == first.held
    kept = list(second.held)
    assert (cache.leave(first, 1), cache.leave(second, 1)) == (1, 1)
    cache.fit(1)
    assert cache.find(One("c", (), "t"), 5) == kept


# ── the engine ──────────────────────────────────────────────────────────────────────────────────


@BOTH
@pytest.mark.parametrize(
    ("first", "second", "computed"),
    [
        pytest.param(Request("a", 48, 2), Request("b", 48, 2), 48, id="another text"),
        pytest.param(Request("a", 48, 2), Request("a", 48, 2), 16, id="whole: the last block again"),
        pytest.param(Request("a", 47, 2), Request("a", 47, 2), 15, id="full blocks only"),
        pytest.param(Request("a", 49, 2), Request("a", 49, 2), 1, id="the last token is always computed"),
        pytest.param(
            Request("a", 48, 2, shared=SYSTEM), Request("b", 60, 2, shared=SYSTEM), 28, id="a system prompt"
        ),
        pytest.param(
            Request("a", 40, 25, text="s"), Request("b", 80, 2, text="s"), 16, id="the next turn: 64 computed"
        ),
        pytest.param(
            Request("a", 40, 24, text="s"), Request("b", 80, 2, text="s"), 32, id="a last token never is"
        ),
        pytest.param(
            Request("a", 32, 1, text="p"), Request("b", 48, 2, text="p"), 16, id="a prefix, then the whole"
        ),
    ],
)
def test_what_is_found(kind, first, second, computed):
    engine = made(kind)
    assert serve(engine, first) == first.prompt_tokens
    assert serve(engine, second) == computed
    assert engine.counters.cache_queries == first.prompt_tokens + second.prompt_tokens
    assert engine.counters.cache_hits == second.prompt_tokens - computed
    assert engine.kv_usage == 0.0


@BOTH
def test_off_nothing_is_found(kind):
    engine = made(kind, enable_prefix_caching=False)
    assert [serve(engine, Request("a", 48, 2)) for _ in range(2)] == [48, 48]
    assert engine.counters.cache_queries == 0


@BOTH
def test_a_prompt_is_found_while_it_is_computed(kind):
    engine = made(kind, max_num_batched_tokens=200)
    engine.add(Request("a", 64, 2, shared=(("s", 48),)), 0.0)
    engine.add(Request("b", 64, 2, shared=(("s", 48),)), 1.0)
    plan = engine.schedule()
    assert plan.prefill_tokens == 64 + 16
    assert engine.free_blocks == 100 - 4 - 1, "the first three are both's"
    assert plan.prefill_context == 48


@BOTH
def test_batch_evicts_prefixes_of_people(kind):
    engine = made(kind, num_blocks=11)
    assert serve(engine, Request("chat", 64, 2, text="s")) == 64
    assert serve(engine, Request("batch", 100, 2)) == 100, "seven blocks, of which six were never used"
    assert serve(engine, Request("chat again", 64, 2, text="s")) == 64 - 48, "the tail went first"
    serve(engine, Request("more batch", 150, 2))
    assert serve(engine, Request("and again", 64, 2, text="s")) == 64


@BOTH
def test_a_victim_finds_what_was_not_taken_from_it(kind):
    engine = made(kind, policy=Policy.PRIORITY, num_blocks=6, max_num_batched_tokens=200)
    engine.add(Request("low", 33, 40, 9), 0.0)
    engine.add(Request("high", 32, 4, 1), 1.0)
    prefills = []
    while engine.unfinished:
        plan = engine.schedule()
        prefills.append(plan.prefill_tokens)
        engine.complete(plan)
    assert engine.counters.preemptions == 1
    assert engine.counters.cache_queries == 65, "who was preempted is not counted again, as in vLLM"
    assert sum(prefills) < 65 + 33, "its first block was still there"


@pytest.mark.parametrize("kind", [Cooperating, BulkCooperating])
def test_engines_without_a_cache_say_so(kind):
    with pytest.raises(ValueError, match="must be off"):
        made(kind)


def test_a_part_of_a_text_needs_tokens():
    with pytest.raises(ValueError, match="every part of shared"):
        made(Engine).add(Request("a", 10, 1, shared=(("s", 0),)), 0.0)
