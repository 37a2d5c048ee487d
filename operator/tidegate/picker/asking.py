"""How the API server is asked, and how its answers are remembered: both within bounds.

A flood of strangers must not become the API server's flood, must not push out of memory those who
are known, and must not make them wait.
"""

import asyncio
import contextlib
import math
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

V = TypeVar("V")

STALE_S: Final = 600.0
"""What was known is still believed for this long while the API server does not answer."""
PATIENCE_S: Final = 2.0
"""Who is known waits this long for news of itself, then goes on as known."""
_RENEW: Final = 2 / 3
"""From this part of its time on, an answer in use is asked for again before it is old."""


class UnknowableError(Exception):
    """Nothing can be said now, and nothing is known from before."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class CrowdedError(UnknowableError):
    """More that are unknown want to be looked up than the API server is asked about."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of a line: how many questions at once, how many more wait, how many a second, after what burst."""

    at_once: int
    waiting: int
    per_s: float = math.inf
    burst: int = 0


class Line:
    """Lets questions through within its bounds, and refuses those beyond them at once."""

    def __init__(self, clock: Callable[[], float], bounds: Bounds) -> None:
        self._clock, self.bounds = clock, bounds
        self._turn = asyncio.Semaphore(bounds.at_once)
        self._inside = 0
        self._tokens, self._filled_at = float(bounds.burst), clock()

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn, and hold it while the block runs. Raises CrowdedError."""
        self._take()
        self._inside += 1
        try:
            async with self._turn:
                yield
        finally:
            self._inside -= 1

    def _take(self) -> None:
        b = self.bounds
        if self._inside >= b.at_once + b.waiting:
            raise self._crowded(self._inside / b.per_s)
        if math.isinf(b.per_s):
            return
        now = self._clock()
        self._tokens = min(float(b.burst), self._tokens + (now - self._filled_at) * b.per_s)
        self._filled_at = now
        if self._tokens < 1.0:
            raise self._crowded((1.0 - self._tokens) / b.per_s)
        self._tokens -= 1.0

    def _crowded(self, wait_s: float) -> CrowdedError:
        after = max(1, math.ceil(wait_s))
        return CrowdedError(f"too many unknown callers are being looked up; try again in {after} s", after)


@dataclass(slots=True)
class _Entry(Generic[V]):
    value: V
    size: int
    renew_at: float
    fresh_until: float
    stale_until: float


class Cache(Generic[V]):
    """Answers, bounded in number and bytes, with single flight: who asks meanwhile waits for that answer.

    Args:
        clock: Seconds.
        ttl_s: How long an answer counts, from when its question was put.
        entries: How many are kept; the least used goes first.
        max_bytes: What they hold together.
        size: Bytes of one.
        away: Whether the API server is known not to answer.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        ttl_s: float,
        entries: int,
        max_bytes: int,
        size: Callable[[Hashable, V], int],
        away: Callable[[], bool] = lambda: False,
    ) -> None:
        self._clock, self._ttl, self._limit, self._max_bytes = clock, ttl_s, entries, max_bytes
        self._size, self._away = size, away
        self._entries: OrderedDict[Hashable, _Entry[V]] = OrderedDict()
        self._flights: dict[Hashable, asyncio.Task[V]] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def peek(self, key: Hashable) -> V | None:
        """The value, if it is in memory and fresh."""
        entry = self._entries.get(key)
        if entry is None or self._clock() >= entry.fresh_until:
            return None
        self._entries.move_to_end(key)
        return entry.value

    def put(self, key: Hashable, value: V, asked_at: float | None = None) -> None:
        """Remember a value that was asked for then; one that alone is past the bound is not kept."""
        self.forget(key)
        at, size = self._clock() if asked_at is None else asked_at, self._size(key, value)
        if size > self._max_bytes:
            return
        self._entries[key] = _Entry(value, size, at + self._ttl * _RENEW, at + self._ttl, at + STALE_S)
        self.bytes += size
        while len(self._entries) > self._limit or self.bytes > self._max_bytes:
            self.bytes -= self._entries.popitem(last=False)[1].size

    def forget(self, key: Hashable) -> None:
        """Remember nothing of this key."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.bytes -= entry.size

    async def get(self, key: Hashable, ask: Callable[[bool], Awaitable[V]]) -> V:
        """The value, from memory or by `ask`, which is told whether the key is known from before.

        What `ask` raises reaches everybody who waits. On UnknowableError the old value is believed.
        """
        entry, now = self._entries.get(key), self._clock()
        if entry is None or now >= entry.stale_until:
            # Shielded: one client that leaves must not fail the others that wait.
            return await asyncio.shield(self._flight(key, ask, known=False))
        self._entries.move_to_end(key)
        if now < entry.fresh_until:
            if now >= entry.renew_at and not self._away():
                self._flight(key, ask, known=True)
            return entry.value
        if self._away():
            return entry.value
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await asyncio.shield(self._flight(key, ask, known=True))
        except (UnknowableError, TimeoutError):
            return entry.value

    def _flight(
        self, key: Hashable, ask: Callable[[bool], Awaitable[V]], *, known: bool
    ) -> "asyncio.Task[V]":
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = asyncio.ensure_future(self._ask(key, ask, known))
            flight.add_done_callback(lambda done: self._landed(key, done))
        return flight

    async def _ask(self, key: Hashable, ask: Callable[[bool], Awaitable[V]], known: bool) -> V:
        asked_at = self._clock()
        value = await ask(known)
        self.put(key, value, asked_at)
        return value

    def _landed(self, key: Hashable, done: "asyncio.Task[V]") -> None:
        self._flights.pop(key, None)
        if not done.cancelled():
            done.exception()  # seen here, in case everybody who waited has left
