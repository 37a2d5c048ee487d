"""Waiting for what takes a moment, with patience for a busy machine."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from tidegate.adapters.kube import ApiError

Seen = TypeVar("Seen")

PATIENCE_S = 60.0
"""Much longer than anything takes by itself: only a test that fails waits for so long."""
_EVERY_S = 0.05


async def eventually(
    look: Callable[[], Awaitable[Seen]],
    *,
    until: Callable[[Seen], Any] = bool,
    within_s: float = PATIENCE_S,
) -> Seen:
    """Look again and again until it is so; what was seen, or raised, last is the test's failure."""
    deadline = time.monotonic() + within_s
    seen: Seen | None = None
    while True:
        try:
            seen = await look()
            if until(seen):
                return seen
            failure: Exception = AssertionError(f"still so after {within_s:.0f} s: {seen!r}")
        except (AssertionError, ApiError, KeyError, IndexError) as error:
            error.add_note(f"for {within_s:.0f} s; last seen: {seen!r}")
            failure = error
        if time.monotonic() > deadline:
            raise failure
        await asyncio.sleep(_EVERY_S)


async def becomes(condition: Callable[[], Any], what: str, within_s: float = PATIENCE_S) -> None:
    """Wait, the event loop running, until a condition holds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {within_s:.0f} s for {what}"
        await asyncio.sleep(0.02)


def wait_for(condition: Callable[[], Any], what: str, within_s: float = PATIENCE_S) -> None:
    """Wait, blocking, until a condition holds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {within_s:.0f} s for {what}"
        time.sleep(0.02)
