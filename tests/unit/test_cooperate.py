"""The plugin's decisions, one table each."""

import math

import pytest

from tidegate.core.cooperate import (
    Beside,
    Holder,
    Pace,
    Rules,
    decodes,
    give_up,
    longest_s,
    prefill_rank,
    prompt_tokens,
)
from tidegate.core.steptime import LLAMA3_8B_A100 as FIT

RULES = Rules(FIT, share=0.5, guard_s=10.0)
NOTHING = Beside(0, 0, 0)


@pytest.mark.parametrize(
    ("begun", "waiting", "expected"),
    [
        pytest.param([], None, None, id="no prompt"),
        pytest.param([2], None, 2, id="one that is begun"),
        pytest.param([2], 0, 0, id="a higher one that waits comes first"),
        pytest.param([1, 2], 2, 1, id="the highest that is begun"),
    ],
)
def test_whose_prompts_are_computed(begun, waiting, expected):
    assert prefill_rank(begun, waiting) == expected


@pytest.mark.parametrize(
    ("rank", "prefill", "pause", "expected"),
    [
        pytest.param(2, None, True, True, id="no prompt in the step"),
        pytest.param(2, 2, True, True, id="beside its own class's prompt"),
        pytest.param(0, 2, True, True, id="beside a lower class's prompt"),
        pytest.param(2, 0, True, False, id="not beside a higher class's prompt"),
        pytest.param(2, 0, False, True, id="unless it does not pause"),
    ],
)
def test_who_decodes(rank, prefill, pause, expected):
    assert decodes(Rules(FIT, pause=pause), rank, prefill) is expected


@pytest.mark.parametrize(
    ("paces", "seen", "expected"),
    [
        pytest.param([], [], math.inf, id="nobody minds"),
        pytest.param([], [(91.0, 0.05)], 0.025, id="one came lately"),
        pytest.param([], [(90.0, 0.05)], math.inf, id="and one long ago"),
        pytest.param([Pace(109.0, 0.05)], [], 0.025, id="who is far ahead is not used up"),
        pytest.param([Pace(109.0, 0.05), Pace(100.01, 0.05)], [], 0.01, id="the least slack"),
        pytest.param([Pace(99.9, 0.05)], [], -0.1, id="who is behind"),
        pytest.param([Pace(98.9, 0.05)], [], math.inf, id="who has lost its pace"),
    ],
)
def test_how_long_a_step_may_be(paces, seen, expected):
    assert longest_s(RULES, paces, seen, 100.0) == pytest.approx(expected)


@pytest.mark.parametrize("most_s", [-0.1, 0.0, 0.02, 0.0275, 0.05, 0.3, math.inf])
@pytest.mark.parametrize("beside", [NOTHING, Beside(1, 900, 0), Beside(40, 60_000, 2048)])
def test_the_most_tokens_that_keep_to_the_time(beside, most_s):
    budget = 2048 - beside.decodes
    tokens = prompt_tokens(RULES, budget, beside, most_s)
    least = 0 if beside.decodes else 1
    assert least <= tokens <= budget

    def seconds(prefill):
        return FIT.seconds(prefill, *beside)

    assert tokens == least or seconds(tokens) <= most_s
    assert tokens == budget or seconds(tokens + 1) > most_s


HOLDERS = [Holder((2, 1.0, 1), 10), Holder((2, 5.0, 2), 4), Holder((1, 2.0, 3), 7), Holder((0, 3.0, 4), 50)]


@pytest.mark.parametrize(
    ("rank", "slots", "blocks", "expected"),
    [
        pytest.param(0, 0, 0, [], id="it lacks nothing"),
        pytest.param(0, 1, 0, [2], id="a slot: the last that came of the lowest class"),
        pytest.param(0, 0, 12, [2, 1], id="blocks: as many as it takes"),
        pytest.param(0, 0, 21, [2, 1, 3], id="then the next class"),
        pytest.param(0, 0, 22, [], id="nobody where that is not enough"),
        pytest.param(1, 0, 15, [], id="its own class gives nothing"),
        pytest.param(2, 1, 0, [], id="nor does a higher one"),
    ],
)
def test_who_gives_up(rank, slots, blocks, expected):
    assert [holder.order[2] for holder in give_up(HOLDERS, rank, slots, blocks)] == expected
