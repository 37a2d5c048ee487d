"""Bound B above who knows everything: vLLM's own engine, outputs known, and nobody to be in time for."""

import random
from collections.abc import Callable, Sequence

import pytest

from tidegate.core.steptime import LLAMA3_8B_A100 as FIT
from tidegate.sim.bound import bound, means
from tidegate.sim.bulk import Bulk
from tidegate.sim.pipeline import Pipeline
from tidegate.sim.types import EngineConfig, Policy, Request
from tidegate.sim.workload import Length, chat_lengths, summary_lengths

COUNT = 500
Next = Callable[[list[Length], list[Length]], int]
"""Whose turn it is, of those that wait and beside those that run: the index of one, all lengths known."""


def computed(length: Length) -> int:
    """Tokens whose KV a request holds in the end."""
    return length.prompt + length.output - 1


def makespan(config: EngineConfig, lengths: Sequence[Length], turn: Next, *, packs: bool) -> float:
    """When the last one ends. `packs`: nobody is let in who would not fit to its end; none is preempted."""
    engine = Bulk(config)
    pipeline = Pipeline(engine, FIT.seconds)
    waiting, running, now = list(lengths), dict[str, Length](), 0.0
    while waiting or running:
        while waiting and len(running) < config.max_num_seqs:
            one = waiting[index := turn(waiting, [*running.values()])]
            # Blocks are whole, so each may hold one less than a block more.
            held = sum(computed(r) + config.block_size for r in [*running.values(), one])
            if packs and running and held > config.kv_tokens:
                break
            del waiting[index]
            number = str(len(waiting))
            running[number] = one
            engine.add(Request(number, one.prompt, one.output), now)
        pipeline.launch(now)
        now = pipeline.next_end or now
        for event in pipeline.complete()[1]:
            if event.finished:
                del running[event.id]
    assert engine.counters.finished == len(lengths)
    assert not packs or engine.counters.preemptions == 0
    return now


def first(waiting: list[Length], running: list[Length]) -> int:
    """As they come."""
    return 0


def shortest(waiting: list[Length], running: list[Length]) -> int:
    """The least work first."""
    return min(range(len(waiting)), key=lambda i: computed(waiting[i]))


def longest_answer(waiting: list[Length], running: list[Length]) -> int:
    """The longest answer first, so that the end is not one long tail of decodes."""
    return max(range(len(waiting)), key=lambda i: waiting[i].output)


def mix(waiting: list[Length], running: list[Length]) -> int:
    """Whoever brings the share of answers among what runs nearest to that of all that is left."""
    wanted = sum(r.output for r in waiting) / sum(r.prompt for r in waiting)
    prompts, outputs = sum(r.prompt for r in running), sum(r.output for r in running)

    def off(i: int) -> float:
        return abs((outputs + waiting[i].output) / (prompts + waiting[i].prompt) - wanted)

    return min(range(min(64, len(waiting))), key=off)


SUMMARIES = random.Random(1).sample(list(summary_lengths()), COUNT)
LARGE = EngineConfig(max_num_batched_tokens=2552)


@pytest.mark.parametrize("turn", [first, shortest, longest_answer, mix])
def test_a_clairvoyant_batch_policy_stays_below_the_bound(turn: Next) -> None:
    """And none is so far below that the bound would say nothing: a short run has a tail of decodes."""
    rate = COUNT / makespan(LARGE, SUMMARIES, turn, packs=True)
    most = bound(means(SUMMARIES), FIT, LARGE).requests_per_s
    assert 0.6 * most < rate < most


@pytest.mark.parametrize("seqs", [64, 128, 256, 512])
@pytest.mark.parametrize("budget", [600, 1024, 2048, 2552])
def test_batch_alone_stays_below_the_bound_with_any_flags(budget: int, seqs: int) -> None:
    """Each below its own bound, and all below that of the largest engine."""
    config = EngineConfig(seqs, budget, policy=Policy.PRIORITY)
    rate = COUNT / makespan(config, SUMMARIES, first, packs=False)
    summaries = means(SUMMARIES)
    assert rate < bound(summaries, FIT, config).requests_per_s
    assert rate < bound(summaries, FIT, EngineConfig(512, 2552)).requests_per_s


@pytest.mark.parametrize("turn", [first, shortest, longest_answer, mix])
def test_beside_chat_that_nobody_waits_for_it_stays_below_too(turn: Next) -> None:
    """Chat is served whenever it suits batch: no policy that keeps to a promise is better off."""
    chat = random.Random(2).sample(list(chat_lengths()), COUNT // 2)
    both = random.Random(3).sample([*SUMMARIES, *chat], COUNT + len(chat))
    took_s = makespan(LARGE, both, turn, packs=True)
    most = bound(means(SUMMARIES), FIT, LARGE, means(chat), len(chat) / took_s).requests_per_s
    assert 0.6 * most < COUNT / took_s < most


def test_an_engine_that_is_faster_than_its_fit_is_above() -> None:
    """The tests above can fail."""
    rate = COUNT / (makespan(LARGE, SUMMARIES, longest_answer, packs=True) / 2)
    assert rate > bound(means(SUMMARIES), FIT, LARGE).requests_per_s
