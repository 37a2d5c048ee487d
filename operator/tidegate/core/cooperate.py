"""What a scheduler plugin inside an engine decides, so that lower classes keep out of the way of higher ones.

A router cannot reorder what an engine has begun. A plugin can: who is in the next step, how large a
lower class's part of a prompt may be beside those who were promised a pace, and who gives up its
slot or KV blocks for a waiting request of a higher class. Plain values in, plain values out: the
engine model (`sim`) is one that asks, a plugin of a real engine may be another.

Ranks count from 0, the most important class. Times are seconds.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from tidegate.core.steptime import LLAMA3_8B_A100, StepFit

LOST_S: Final = 1.0
"""Who is this far behind its pace has lost it: holding others back would not bring it back."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What the plugin is told.

    Attributes:
        fit: What it believes a step to take.
        pause: a step that computes a prompt has no decodes of lower classes.
        share: of the pace that is promised to who is present, what a step with a lower class's prompt
            may take. An arrival waits for the rest of a step and the one planned behind it.
        guard_s: a class counts as present for so long after a request of it came.
    """

    fit: StepFit = LLAMA3_8B_A100
    pause: bool = True
    share: float = 0.55
    guard_s: float = 15.0


class Pace(NamedTuple):
    """Who decodes beside a prompt: when its next token is due, and the pace that it was promised."""

    due_s: float
    token_s: float


class Beside(NamedTuple):
    """What a step carries already, and the tokens of the prompt at hand that are computed."""

    decodes: int
    decode_context: int
    prompt_context: int


class Holder(NamedTuple):
    """A running request that may have to give up what it holds. The last in order gives up first."""

    order: tuple[int, float, int]
    blocks: int


def prefill_rank(begun: Iterable[int], waiting: int | None) -> int | None:
    """The class whose prompts the next step computes: the highest that has one; None where none has.

    Args:
        begun: Ranks of the running requests whose prompts are computed in part.
        waiting: Rank of the first one in the queue.
    """
    ranks = [*begun] if waiting is None else [*begun, waiting]
    return min(ranks, default=None)


def decodes(rules: Rules, rank: int, prefill: int | None) -> bool:
    """Whether a class decodes in a step that computes prompts of the class `prefill`."""
    return prefill is None or rank <= prefill or not rules.pause


def longest_s(rules: Rules, paces: Iterable[Pace], seen: Iterable[tuple[float, float]], now: float) -> float:
    """How long a step that begins now with a lower class's prompt may be; infinite where nobody minds.

    Args:
        rules: What the plugin is told.
        paces: Those of higher classes that decode in the step.
        seen: For each higher class, when one came last, and the pace that it was promised.
        now: When the step begins.
    """
    most = min((rules.share * pace for came, pace in seen if now - came < rules.guard_s), default=math.inf)
    for due_s, token_s in paces:
        slack_s = due_s - now
        if slack_s > -LOST_S:
            most = min(most, rules.share * token_s, slack_s)
    return most


def prompt_tokens(rules: Rules, budget: int, beside: Beside, most_s: float) -> int:
    """The most tokens of a prompt with which the step takes at most `most_s`, up to `budget`.

    A step that would be empty otherwise has one at least, so that an engine always moves.
    """
    carried, context, computed = beside
    if most_s == math.inf:
        return budget

    def fits(tokens: int) -> bool:
        return rules.fit.seconds(tokens, carried, context, computed) <= most_s

    low, high = (0 if carried else min(1, budget)), budget
    while low < high:  # the step's time never falls with more tokens
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def give_up(holders: Sequence[Holder], rank: int, slots: int, blocks: int) -> list[Holder]:
    """Who stops, so that the first in the queue finds room; nobody where that would not be enough.

    Args:
        holders: Running requests that may be stopped.
        rank: The class of the one that waits: only lower ones give up.
        slots: How many slots it lacks.
        blocks: How many KV blocks it lacks.
    """
    chosen: list[Holder] = []
    for holder in sorted((h for h in holders if h.order[0] > rank), reverse=True):
        if slots <= 0 and blocks <= 0:
            break
        chosen.append(holder)
        slots, blocks = slots - 1, blocks - holder.blocks
    return chosen if slots <= 0 and blocks <= 0 else []
