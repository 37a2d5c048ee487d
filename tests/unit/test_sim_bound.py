"""Bound B: hand-made programmes, its dual, its guards, and engines that stay below it."""

import csv
import itertools
import random
from dataclasses import replace
from importlib.resources import files

import pytest

from tidegate.core.steptime import LLAMA3_8B_A100 as FIT
from tidegate.core.steptime import Branch, StepFit
from tidegate.sim.bound import Means, bound, means
from tidegate.sim.drive import Arrival, drive
from tidegate.sim.types import EngineConfig, Request

CONFIG = EngineConfig()
PLAIN = Branch(0.01, 0.0, 1e-4, 1e-4, 0.0, 0.0)
SIMPLE = StepFit("simple", "hand-made", PLAIN, PLAIN, 512, 0.0, 10**6)
"""10 ms a step and 0.1 ms a token, whichever: a step of 2,048 takes 214.8 ms."""


def trace(name: str) -> list[tuple[int, int]]:
    """(prompt, output) tokens of one of the demo's traces, outputs capped at 1,000."""
    text = files("tidegate.demo").joinpath(f"data/{name}.csv").read_text()
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    return [(int(r["prompt_tokens"]), min(1000, int(r["output_tokens"]))) for r in rows]


SUMMARIES, CHAT = trace("summaries"), trace("chat")


def test_means_are_of_pairs():
    # 10 + 3: decodes attend to 11 and 12 tokens. 20 + 1: no decode at all.
    assert means([(10, 3), (20, 1)]) == Means(15.0, 1.0, 11.5)


@pytest.mark.parametrize(
    ("batch", "config", "expected"),
    [
        pytest.param(Means(2048, 0, 0), CONFIG, 1 / 0.2148, id="prompts alone: full steps, one request each"),
        pytest.param(
            Means(2048, 0, 0),
            EngineConfig(max_num_batched_tokens=256),
            1 / (8 * 0.01 + 0.2048),
            id="a small budget: eight steps a prompt",
        ),
        pytest.param(
            Means(100, 400, 0),
            EngineConfig(max_num_seqs=10),
            1 / (40 * 0.01 + 0.05),
            id="ten slots: forty steps for its decodes",
        ),
        pytest.param(
            Means(100, 400, 0),
            EngineConfig(max_num_batched_tokens=100),
            1 / (5 * 0.01 + 0.05),
            id="decodes are in the budget: five steps",
        ),
        pytest.param(
            Means(100, 400, 400_000),
            EngineConfig(num_blocks=5001),
            1 / (5 * 0.01 + 0.05),
            id="80,000 tokens of KV: five steps for its context",
        ),
    ],
)
def test_hand_made_cases(batch, config, expected):
    assert bound(batch, SIMPLE, config).requests_per_s == pytest.approx(expected)


def test_the_knee_is_kept_to():
    """Small steps are dearer a token, large ones cost what the fit says: nothing is taken from both."""
    full_s = FIT.seconds(2048, 0)
    assert full_s < 4 * FIT.seconds(512, 0)
    assert bound(Means(2048, 0, 0), FIT, CONFIG).requests_per_s == pytest.approx(1 / full_s)


def test_a_decode_never_gives_time_back():
    published, clamped = FIT, replace(FIT, high=replace(FIT.high, per_decode_s=-FIT.high.per_token_s))
    assert published.high.per_decode_s < clamped.high.per_decode_s
    answers = [bound(means(SUMMARIES), fit, CONFIG, means(CHAT), 2.0) for fit in (published, clamped)]
    assert answers[0] == answers[1]
    assert "slots, high" in answers[0].prices, "large steps carry decodes here"


def test_interactive_load_is_taken_off_what_is_left():
    batch, people = Means(2048, 0, 0), Means(1024, 0, 0)
    half = bound(batch, SIMPLE, CONFIG, people, 1 / 0.2148)
    assert half.requests_per_s == pytest.approx(0.5 / 0.2148)


def test_decodes_ride_along_where_the_other_class_leaves_slots():
    """Prompts of one class and decodes of the other share steps, so together they cost less."""
    config = EngineConfig(max_num_seqs=10)
    prompts, decodes = Means(2000, 0, 0), Means(1, 400, 0)
    beside = bound(prompts, SIMPLE, config, decodes, 1.0).requests_per_s
    decode_s = 40 * 0.01 + 0.0401
    assert beside > bound(prompts, SIMPLE, config).requests_per_s * (1 - decode_s)


def test_the_dual_has_the_same_value():
    """Only time has a right side that is not zero, so without other load its price is the bound."""
    for batch in (means(SUMMARIES), means(CHAT), Means(2048, 0, 0)):
        answer = bound(batch, FIT, CONFIG)
        assert answer.prices["time"] == pytest.approx(answer.requests_per_s)
        assert all(price > 0 for price in answer.prices.values())


def test_what_binds_is_named():
    few = bound(means(SUMMARIES), FIT, replace(CONFIG, max_num_seqs=8))
    assert "slots, low" in few.prices
    assert "kv, low" not in few.prices
    little = bound(means(SUMMARIES), FIT, replace(CONFIG, num_blocks=2001))
    assert "kv, low" in little.prices


def test_the_bound_falls_with_load_and_is_concave_in_it():
    batch, people = means(SUMMARIES), means(CHAT)
    loads = [0.25 * i for i in range(12)]
    rates = [bound(batch, FIT, CONFIG, people, load).requests_per_s for load in loads]
    falls = [a - b for a, b in itertools.pairwise(rates)]
    assert min(falls) > 0
    assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(falls))


def test_a_budget_within_the_knee_cannot_use_the_large_steps():
    answer = bound(means(SUMMARIES), FIT, replace(CONFIG, max_num_batched_tokens=512))
    assert not any("high" in name for name in answer.prices)
    assert answer.requests_per_s < bound(means(SUMMARIES), FIT, CONFIG).requests_per_s


def test_batch_alone_stays_below_the_bound_and_not_far():
    """vLLM's own scheduler, saturated: 0.91 of the bound in the middle of a long run."""
    lengths = random.Random(1).sample(SUMMARIES, 800)
    run = drive(CONFIG, [Arrival(0.0, Request(str(i), p, o)) for i, (p, o) in enumerate(lengths)])
    ends = sorted(outcome.finish_s for outcome in run.outcomes.values())
    most = bound(means(lengths), FIT, CONFIG).requests_per_s
    assert len(ends) / ends[-1] < most
    assert 0.8 * most < 400 / (ends[599] - ends[199])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: means([]), "must not be empty", id="no lengths"),
        pytest.param(lambda: Means(0, 1, 1), "prompt must be positive", id="no prompt"),
        pytest.param(
            lambda: bound(means(SUMMARIES), FIT, CONFIG, means(CHAT), 50.0),
            "more than one replica serves: lower it",
            id="too much interactive load",
        ),
        pytest.param(
            lambda: bound(means(SUMMARIES), FIT, CONFIG, means(CHAT), -1.0),
            "must not be negative",
            id="negative load",
        ),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
