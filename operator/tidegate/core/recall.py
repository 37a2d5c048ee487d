"""Which patient requests to take back from an engine where people are served too slowly beside them.

A burst spills to replicas that batch fills, where a step of decodes alone is longer than the pace that
was promised. What runs there ends by itself in tens of seconds; a burst is over by then. A request
whose answer has not begun to go out can be asked for again, at the price of what was computed of it.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tidegate.core.flowtypes import Ask, ModelKey
from tidegate.core.load import Load
from tidegate.core.room import Room, Running
from tidegate.core.types import Reclaim


class Held(NamedTuple):
    """A request that may be taken back. `tokens` are those computed of it: they are lost."""

    id: int
    tokens: int


def chosen(held: Iterable[Held], step_s: Callable[[int, int], float], target_s: float) -> list[int]:
    """The requests to take back, those that lose the least first, until a step takes `target_s` at most.

    Args:
        held: All that may be taken back.
        step_s: Seconds of a step without so many requests that hold so many tokens.
        target_s: What a step may take.
    """
    ids: list[int] = []
    tokens = 0
    for one in sorted(held, key=lambda h: (h.tokens, h.id)):
        if step_s(len(ids), tokens) <= target_s:
            break
        ids.append(one.id)
        tokens += one.tokens
    return ids


def recall(room: Room, model: ModelKey, now: float) -> list[tuple[Ask, str]]:
    """What to take back from a model's front, and from where. Each is named once."""
    if not (room.policy.qos and room.policy.pack.recall):
        return []
    return [each for load in room.fronted(model, now) for each in _from(room, load, now)]


def _from(room: Room, load: Load, now: float) -> list[tuple[Ask, str]]:
    if load.patient in (0, load.requests):
        return []
    load.forecast.advance(now)
    tpot_s = load.forecast.tightest_tpot_s()
    target_s = math.inf if tpot_s is None else room.policy.pack.recall_pace * tpot_s
    if load.forecast.decode_step_s() <= target_s:
        return []
    here = [one for one in room.running.values() if one.address == load.address]
    # On their way out already.
    going = [_computed(one, load) for one in here if one.recalled]

    def step_s(fewer: int, tokens: int) -> float:
        return load.forecast.decode_step_s(fewer + len(going), tokens + sum(going))

    held = [Held(one.ask.id, _computed(one, load)) for one in here if _comes_again(room, one)]
    taken = [room.running[number] for number in chosen(held, step_s, target_s)]
    for one in taken:
        one.recalled = True
    return [(one.ask, load.address) for one in taken]


def _comes_again(room: Room, one: Running) -> bool:
    known = room.classes.get(one.ask.qos_class)
    always = known is not None and known.reclaim is Reclaim.ALWAYS
    return one.patient and always and one.ask.recallable and not one.ask.streamed and not one.recalled


def _computed(one: Running, load: Load) -> int:
    return one.ask.prompt_tokens + int(load.forecast.steps - one.steps)
