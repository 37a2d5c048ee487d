"""Whether promises were kept, over which time, and how long answers are expected to be."""

import pytest

from tidegate.core.attainment import Served, Window, kept
from tidegate.core.outputs import Outputs
from tidegate.core.types import Objectives

CHAT = Objectives(ttft_s=1.0, per_thousand_prompt_tokens_s=0.1, tpot_s=0.05)
LATER = Objectives(completion_s=60.0)
FIRST_ONLY = Objectives(ttft_s=1.0)


@pytest.mark.parametrize(
    ("promised", "got", "verdict"),
    [
        (CHAT, Served(0, 11, True, 1.0, 1.5), True),
        (CHAT, Served(0, 11, True, 1.001, 1.5), False),
        (CHAT, Served(2000, 11, True, 1.2, 1.5), True),  # longer prompts may take longer
        (CHAT, Served(0, 11, True, 0.5, 1.11), False),  # 61 ms a token
        (CHAT, Served(0, 1, True, 0.5, 9.0), True),  # one token has no pace
        (CHAT, Served(0, 11, True, None, 1.5), None),  # nobody saw the first token
        (CHAT, Served(0, 11, False, 1.5, 1.5), True),  # whole: 1 s and ten times 50 ms
        (CHAT, Served(0, 11, False, 1.6, 1.6), False),
        (CHAT, Served(0, 0, False, 1.1, 1.1), False),  # an embedding is due like a first token
        (CHAT, Served(0, 0, False, 0.9, 0.9), True),
        (FIRST_ONLY, Served(0, 11, False, 9.0, 9.0), None),  # a whole answer shows no first token
        (LATER, Served(0, 11, True, 59.0, 60.0), True),
        (LATER, Served(0, 11, False, None, 61.0), False),
        (LATER, Served(0, 11, True, 59.0, None), None),
        (Objectives(ttft_s=1.0, completion_s=2.0), Served(0, 9, True, None, 3.0), False),
        (Objectives(), Served(0, 11, True, 1.0, 1.0), None),
    ],
)
def test_a_promise_is_kept_when_all_of_it_is(promised: Objectives, got: Served, verdict: bool | None) -> None:
    assert kept(promised, got) is verdict


def test_a_window_forgets_what_is_older_than_it() -> None:
    window = Window(60.0)
    for second in range(100):
        window.add(float(second), kept=second >= 70)
    good, judged = window.counts(99.0)
    assert (good, judged) == (30, 60)
    assert window.counts(99.0 + 61.0) == (0, 0)


def test_a_window_takes_what_comes_out_of_order() -> None:
    window = Window(60.0)
    window.add(10.0, kept=True)
    window.add(8.0, kept=False)
    assert window.counts(10.0) == (1, 2)


MODEL = ("ns", "m")


def test_lengths_are_believed_once_enough_were_seen() -> None:
    outputs = Outputs()
    for _ in range(19):
        outputs.made(MODEL, "high", "a", 40)
    assert outputs.expected(MODEL, "high", "a", 500) == 500
    outputs.made(MODEL, "high", "a", 40)
    assert outputs.expected(MODEL, "high", "a", 500) == 40
    assert outputs.expected(MODEL, "high", "a", 16) == 16  # never more than it asked for
    assert outputs.expected(MODEL, "high", "new", 500) == 40  # a new tenant is like the others
    assert outputs.expected(MODEL, "low", "a", 500) == 500
    assert outputs.expected(MODEL, "high", "a", 0) == 0  # an embedding makes none


def test_a_tenant_with_longer_answers_has_longer_estimates() -> None:
    outputs = Outputs()
    for n in range(200):
        outputs.made(MODEL, "high", "short", 10)
        outputs.made(MODEL, "high", "long", 800 + 40 * (n % 5))
    short, long = (outputs.expected(MODEL, "high", who, 4000) for who in ("short", "long"))
    assert short == 10
    assert 880 <= long <= 1100  # above the mean, by twice how far they are from it


def test_tenants_are_forgotten() -> None:
    outputs = Outputs()
    for _ in range(20):
        outputs.made(MODEL, "high", "first", 10)
    for n in range(3000):
        outputs.made(MODEL, "high", f"t{n}", 100)
    assert len(outputs._seen) <= 2000
    assert outputs.expected(MODEL, "high", "first", 50) == 50  # by the class's figures now
