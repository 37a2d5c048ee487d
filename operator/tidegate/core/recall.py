"""Which patient requests to take back from an engine where people are served too slowly beside them.

A burst spills to replicas that batch fills, where a step of decodes alone is longer than the pace that
was promised. What runs there ends by itself in tens of seconds; a burst is over by then. A request
whose answer has not begun to go out can be asked for again, at the price of what was computed of it.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple


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
