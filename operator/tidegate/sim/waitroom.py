"""What every model of vLLM's scheduler has: its requests by id, its queue, its slots and KV blocks."""

import heapq
from typing import Generic, Protocol, TypeVar

from tidegate.sim.prefixcache import Block, PrefixCache, Text
from tidegate.sim.types import Counters, EngineConfig, Policy, Request

Key = tuple[int, float, int]
"""(rank, arrival, sequence): orders the queue and picks victims; the last makes it total."""


class Known(Protocol):
    """A request inside an engine."""

    id: str
    key: Key
    text: Text
    held: list[Block]
    again: bool

    @property
    def done(self) -> bool:
        """Whether it has left."""
        ...


J = TypeVar("J", bound=Known)


class Waitroom(Generic[J]):
    """One engine's requests. What a subclass adds is the schedule."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.counters = Counters()
        self.running: list[J] = []
        self.free_blocks = config.usable_blocks
        """Blocks that nobody holds; some of them may still be found by who shares their text."""
        self._cache = PrefixCache(config.block_size) if config.enable_prefix_caching else None
        self._known: dict[str, J] = {}
        # Requests that left the queue otherwise than by admission stay in the heap, done.
        self._heap: list[tuple[Key, J]] = []
        self._queued = 0
        self._sequence = 0

    @property
    def waiting(self) -> int:
        """Requests in the queue, preempted ones included."""
        return self._queued

    @property
    def unfinished(self) -> int:
        """Requests that are running or waiting."""
        return len(self._known)

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks in use, 0 to 1."""
        return 1.0 - self.free_blocks / self.config.usable_blocks

    def add(self, request: Request, now: float) -> None:
        """Queue a request that arrives at `now`, seconds.

        Raises:
            ValueError: its id is taken, it asks for nothing, or it could never fit the KV cache.
        """
        if request.id in self._known:
            raise ValueError(f"request {request.id} is already known")
        self.config.check(request)
        rank = request.priority if self.config.policy is Policy.PRIORITY else 0
        job = self._known[request.id] = self._made(request, (rank, now, self._sequence))
        self._sequence += 1
        self._enqueue(job)

    def abort(self, request_id: str) -> bool:
        """Drop a request and free what it holds at once; False when it is not known (any more)."""
        job = self._known.pop(request_id, None)
        if job is None:
            return False
        self._leave(job)
        self.counters.aborted += 1
        return True

    def _made(self, request: Request, key: Key) -> J:
        """The request as this engine keeps it."""
        raise NotImplementedError

    def _leave(self, job: J) -> None:
        """Free a request's slot and KV blocks, whether it runs or waits."""
        raise NotImplementedError

    def _take(self, blocks: int) -> None:
        """Use up free blocks, so many."""
        self.free_blocks -= blocks
        if self._cache is not None:
            self._cache.fit(self.free_blocks)

    def _give(self, job: J, blocks: int) -> None:
        """A request lets go of its blocks, so many in all."""
        self.free_blocks += blocks if self._cache is None else self._cache.leave(job, blocks)

    def _found(self, job: J, total: int) -> list[Block]:
        """The blocks that a request of so many tokens finds computed, when it is admitted."""
        return [] if self._cache is None else self._cache.find(job, total)

    def _room(self, found: list[Block], tokens: int) -> bool:
        """Whether the free blocks hold the first so many tokens of a request that found some of them."""
        wanted = -(-tokens // self.config.block_size) - len(found)
        return wanted + PrefixCache.free(found) <= self.free_blocks

    def _enter(self, job: J, found: list[Block], total: int, tokens: int) -> int:
        """Admit a request of `total` tokens: blocks for the first so many of them; returns how many."""
        blocks = -(-tokens // self.config.block_size)
        if self._cache is not None:
            if not job.again:
                self.counters.cache_queries += total
                self.counters.cache_hits += len(found) * self.config.block_size
            self.free_blocks -= PrefixCache.free(found)
            self._cache.share(job, found)
        self._take(blocks - len(found))
        return blocks

    def _enqueue(self, job: J) -> None:
        """Put a request into the queue, or back into it."""
        self._queued += 1
        heapq.heappush(self._heap, (job.key, job))

    def _head(self) -> J | None:
        """The first waiting request; None when there is none."""
        while self._heap:
            job = self._heap[0][1]
            if not job.done:
                return job
            heapq.heappop(self._heap)
        return None
