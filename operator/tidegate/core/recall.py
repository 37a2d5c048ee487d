"""Which patient requests to take back from an engine where people are served too slowly beside them.

A burst spills to replicas that batch fills, where a step of decodes alone is longer than the pace that
was promised. What runs there ends by itself in tens of seconds; a burst is over by then. A request
whose answer has not begun to go out can be asked for again, at the price of what was computed of it.
"""

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from tidegate.core.flowtypes import Ask, ModelKey
from tidegate.core.load import Load
from tidegate.core.room import Room, Running
from tidegate.core.types import Reclaim

_SENT_S: Final = 0.05
_LEAVES_S: Final = 1.0


class Held(NamedTuple):
    """A request that may be taken back. `tokens` are those computed of it: they are lost."""

    id: int
    tokens: int


def chosen(
    held: Iterable[Held], step_s: Callable[[int, int], float], target_s: float, worth_s: float
) -> list[int]:
    """The requests to take back, those that lose the least first, until a step takes `target_s` at most.

    Args:
        held: All that may be taken back.
        step_s: Seconds of a step without so many requests that hold so many tokens.
        target_s: What a step may take.
        worth_s: What it may take at most once all of them are gone, or none is: nobody is thrown away for
            nothing.
    """
    ids: list[int] = []
    tokens = 0
    for one in sorted(held, key=lambda h: (h.tokens, h.id)):
        if step_s(len(ids), tokens) <= target_s:
            return ids
        ids.append(one.id)
        tokens += one.tokens
    return ids if step_s(len(ids), tokens) <= worth_s else []


def recall(room: Room, model: ModelKey, now: float) -> list[tuple[Ask, str]]:
    """What to take back from a model's front in a burst, and from where."""
    if not (room.policy.qos and room.policy.pack.recall and room.in_burst(model, now)):
        return []
    slow: dict[str, tuple[Load, float]] = {}
    for load in room.fronted(model, now):
        load.forecast.advance(now)
        target_s = room.too_slow(load) if 0 < load.patient < load.requests else None
        if target_s is not None:
            slow[load.address] = (load, target_s)
    if not slow:
        return []
    here: dict[str, list[Running]] = {address: [] for address in slow}
    for one in room.running.values():
        if one.address in here:
            here[one.address].append(one)
    found: list[tuple[Ask, str]] = []
    for address, (load, target_s) in slow.items():
        found += _from(room, load, here[address], target_s, now)
    return found


def _from(room: Room, load: Load, here: list[Running], target_s: float, now: float) -> list[tuple[Ask, str]]:
    # On their way out already. Who is still there after a second could not be aborted.
    going = [_computed(one, load) for one in here if now - one.recalled_s < _LEAVES_S]
    gone = sum(going)

    def step_s(fewer: int, tokens: int) -> float:
        return load.forecast.decode_step_s(fewer + len(going), tokens + gone)

    held = [Held(one.ask.id, _computed(one, load)) for one in here if _comes_again(room, one, now)]
    taken = [
        room.running[number]
        for number in chosen(held, step_s, target_s, target_s / room.policy.pack.recall_pace)
    ]
    for one in taken:
        one.recalled_s = now
    return [(one.ask, load.address) for one in taken]


def _comes_again(room: Room, one: Running, now: float) -> bool:
    known = room.classes.get(one.ask.qos_class)
    always = known is not None and known.reclaim is Reclaim.ALWAYS
    # Who was sent this moment is not on its way yet.
    there = now - one.since >= _SENT_S and now - one.recalled_s >= _LEAVES_S
    return there and one.patient and always and one.ask.recallable and not one.ask.streamed


def _computed(one: Running, load: Load) -> int:
    return one.ask.prompt_tokens + int(load.forecast.steps - one.steps)
