"""Sarathi's scheduler with `core.relief`: who waits is served by deadline, less who is given up.

Who is given up is reckoned anew every `period_s`, and at once when the first in the line would be late. It
may be taken back as long as it can be in time; of the highest rank nobody is before that is past. A
request is due at `keep` of its deadline, by rank: predictions err, and outputs, which are not known, take
time after the prompt.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tidegate.core.relief import Claim, give_up
from tidegate.core.steptime import StepFit
from tidegate.sim.sarathi import Chunk, Job, Sarathi
from tidegate.sim.types import StepPlan

_LEAST_S: Final = 0.5
"""Between two reckonings."""


@dataclass(frozen=True, slots=True)
class Early:
    """By deadline, each at a part of it: `keep` by rank, the last for all below."""

    keep: Sequence[float]

    def key(self, job: Job) -> float:
        """When it counts as due, seconds."""
        keep = self.keep[min(job.priority, len(self.keep) - 1)]
        return job.arrival_s + keep * (job.due_s - job.arrival_s)


class Relieved(Sarathi):
    """One engine's requests and schedule. `work` times the fit is what a prompt takes in a busy engine."""

    def __init__(
        self,
        order: Early,
        chunk: Chunk,
        fit: StepFit,
        *,
        tokens: int = 2552,
        work: float = 1.0,
        period_s: float = 5.0,
    ) -> None:
        super().__init__(order, chunk)
        self._by = order
        self._token_s = work * fit.seconds(tokens, 0) / tokens
        self._period_s = period_s
        self._next_s = self._soonest_s = 0.0

    def schedule(self, now: float) -> StepPlan:
        """Plan the step that starts at `now`, after it was seen who has to be given up."""
        if self._prompts and (now >= self._next_s or (now >= self._soonest_s and self._late(now))):
            self._next_s, self._soonest_s = now + self._period_s, now + _LEAST_S
            self._relieve(now)
        return super().schedule(now)

    def _late(self, now: float) -> bool:
        """Whether the first in the line would be late, though it was not given up."""
        job = self._prompts[0][1]
        return job.key[0] == 0 and now + job.remaining * self._token_s > self._by.key(job)

    def _relieve(self, now: float) -> None:
        jobs = {job.id: job for _, job in self._prompts}
        begun_s, claims = 0.0, []
        for job in jobs.values():
            work_s, due_s = job.remaining * self._token_s, self._by.key(job)
            if job.computed:
                begun_s += work_s
            elif now + work_s <= due_s:
                claims.append(Claim(job.id, due_s, work_s, job.priority))
        given = {claim.id for claim in give_up(claims, now + begun_s)}
        hopeful = {claim.id for claim in claims} - given
        for job in jobs.values():
            waits = job.id in hopeful or (
                job.priority == 0 and now + job.remaining * self._token_s <= job.due_s
            )
            late = int(not job.computed and not waits)
            self.relegated += late > job.key[0]
            job.key = (late, job.key[1], job.key[2])
        self._prompts = [(job.key, job) for job in jobs.values()]
        heapq.heapify(self._prompts)
