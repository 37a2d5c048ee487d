"""Sarathi's scheduler as an engine of a fleet: `Sarathi` with the slots and the KV cache of a config.

Nothing is preempted but a prompt between two of its chunks, so a request that begins has a slot and
KV for all that it will ever hold; the first in the order that finds none waits, and those behind it
with it. That takes the length of its output as known, which is in favour of this engine.
"""

from collections.abc import Iterator

from tidegate.sim.promise import Promise
from tidegate.sim.sarathi import Chunk, Job, Order, Relegation, Sarathi
from tidegate.sim.types import EngineConfig, Request, StepPlan, TokenEvent

PATIENT_S = 0.4
"""QoServe's time between the tokens of who was promised no pace."""


class FleetSarathi(Sarathi):
    """One engine's requests and schedule. Steps follow each other without a plan in between."""

    def __init__(
        self, config: EngineConfig, order: Order, chunk: Chunk, relegation: Relegation | None = None
    ) -> None:
        config.refuse_cache("the model of Sarathi's scheduler")
        super().__init__(order, chunk, relegation)
        self.config = config
        self._holders: dict[str, int] = {}
        self._held = 0

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache that is spoken for, 0 to 1."""
        return self._held / self.config.kv_tokens

    def add(self, request: Request, now: float, promise: Promise | None = None) -> None:
        """Queue a request; its promise is its own, if none is given.

        Raises:
            ValueError: as in `Sarathi.add`, or it could never fit the KV cache.
        """
        self.config.check(request)
        if promise is None:
            # What is overdue already is due at once.
            promise = Promise("own", max(1e-9, request.due_s), token_s=request.pace_s or PATIENT_S)
        super().add(request, now, promise)

    def abort(self, request_id: str) -> bool:
        """Drop a request, and what KV it holds; False when it is not known."""
        self._held -= self._holders.pop(request_id, 0)
        return super().abort(request_id)

    def complete(self, plan: StepPlan) -> list[TokenEvent]:
        """Take a launched step's results: first and last tokens."""
        events = [e for e in super().complete(plan) if e.nth == 0 or e.finished]
        for event in events:
            if event.finished:
                self._held -= self._holders.pop(event.id)
        return events

    def progress(self) -> Iterator[tuple[str, int]]:
        """For every request the tokens that are computed, launched steps included."""
        for job in self._jobs.values():
            yield job.id, job.computed

    def _head(self, now: float) -> Job | None:
        job = super()._head(now)
        if job is None or job.id in self._holders:
            return job
        tokens = job.prompt + job.output - 1
        if len(self._holders) >= self.config.max_num_seqs or self._held + tokens > self.config.kv_tokens:
            return None
        self._holders[job.id] = tokens
        self._held += tokens
        return job
