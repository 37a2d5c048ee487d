"""Sarathi's scheduler as a pure model: no clock, no I/O, no randomness.

In each step every request that has its first token gets its next one; what is left of the chunk
goes to prompts, in the order that the arm says. The chunk includes the decodes. Nothing is
preempted but a prompt between two of its chunks, slots never bind, and neither does KV: so stands
the setting in which QoServe's tables were made (A. Agrawal et al., "Taming Throughput-Latency
Tradeoff in LLM Inference with Sarathi-Serve", OSDI 2024; QoServe, ASPLOS 2026).
"""

import heapq
from math import inf
from typing import NamedTuple, Protocol

from tidegate.core.steptime import attended
from tidegate.sim.promise import ANYTIME, Promise
from tidegate.sim.types import Counters, Request, StepPlan, TokenEvent, Tracked, Work


class Job(Tracked):
    """A request inside the engine, with what it was promised. Times in seconds."""

    __slots__ = ("arrival_s", "due_s", "paced_from_s", "priority", "token_s")

    def __init__(self, request: Request, promise: Promise, now: float, sequence: int) -> None:
        super().__init__(request, (0, now, sequence))
        self.priority = request.priority
        self.arrival_s = now
        self.due_s = now + promise.due_s
        self.token_s = promise.token_s
        # Token i is due at `paced_from_s + token_s * i`.
        self.paced_from_s = now + promise.due_s + promise.token_s

    @property
    def remaining(self) -> int:
        """Prompt tokens still to be computed."""
        return self.prompt - self.computed


class Batch(NamedTuple):
    """What a chunk is chosen from: the decodes of the step, and the prompts that wait.

    `least_due_s` is when the first of the decodes' tokens is due, `inf` without decodes;
    `head_context` the tokens of the first waiting prompt that are computed already.
    """

    decodes: int
    decode_context: int
    least_due_s: float
    prompt_tokens: int
    head_context: int


class Order(Protocol):
    """In which order prompts are served: the least key first, ties by arrival."""

    def key(self, job: Job) -> float:
        """The job's key; it may only change when tokens of the job are computed."""
        ...


class Chunk(Protocol):
    """How many tokens a step computes at most, decodes included."""

    def tokens(self, batch: Batch, now: float) -> int:
        """The chunk of the step that starts at `now`, seconds; at least 1."""
        ...


class Relegation(Protocol):
    """Which requests are put behind all others."""

    def doomed(self, job: Job, now: float) -> bool:
        """Whether the job cannot keep its promise any more."""
        ...


class Sarathi:
    """One engine's requests and schedule.

    Arguments are the arm: the order of prompts, the size of the chunk, and who is relegated; None
    relegates nobody.
    """

    def __init__(self, order: Order, chunk: Chunk, relegation: Relegation | None = None) -> None:
        self.counters = Counters()
        self.relegated = 0
        self._order = order
        self._chunk = chunk
        self._relegation = relegation
        self._prompts: list[tuple[tuple[int, float, int], Job]] = []
        self._prompt_tokens = 0
        self._decoding: list[Job] = []
        self._jobs: dict[str, Job] = {}
        self._sequence = 0

    @property
    def waiting(self) -> int:
        """Requests whose prompt is not computed yet, wholly or in part."""
        return len(self._prompts)

    @property
    def unfinished(self) -> int:
        """Requests that decode or wait; between two steps, when no step is launched."""
        return len(self._jobs)

    def add(self, request: Request, now: float, promise: Promise = ANYTIME) -> None:
        """Queue a request that arrives at `now`, seconds.

        Raises:
            ValueError: its id is taken, or it asks for nothing.
        """
        if request.id in self._jobs:
            raise ValueError(f"request {request.id} is already known")
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            raise ValueError(f"request {request.id} needs at least one prompt and one output token")
        job = Job(request, promise, now, self._sequence)
        self._sequence += 1
        self._jobs[request.id] = job
        self._prompt_tokens += job.prompt
        self._push(job)

    def abort(self, request_id: str) -> bool:
        """Drop a request; False when it is not known (any more)."""
        job = self._jobs.pop(request_id, None)
        if job is None:
            return False
        job.done = True
        if job.remaining:
            self._prompt_tokens -= job.remaining
            self._prompts = [entry for entry in self._prompts if entry[1] is not job]
            heapq.heapify(self._prompts)
        self._decoding = [one for one in self._decoding if one is not job]
        self.counters.aborted += 1
        return True

    def schedule(self, now: float) -> StepPlan:
        """Plan the step that starts at `now`, seconds, and count it as launched; empty when idle."""
        plan = StepPlan()
        work = plan.work
        least_due_s = inf
        for job in self._decoding:
            due_s = job.paced_from_s + job.token_s * job.generated
            least_due_s = min(due_s, least_due_s)
            plan.decode_context += job.computed
            job.computed += 1
            work.append(Work(job, 1, True))
        plan.decodes = len(work)
        if self._head(now) is not None:
            self._prefill(plan, least_due_s, now)
        if work:
            self.counters.steps += 1
            self.counters.prefill_tokens += plan.prefill_tokens
            self.counters.decode_tokens += plan.decodes
        return plan

    def complete(self, plan: StepPlan) -> list[TokenEvent]:
        """Take a launched step's results: its output tokens, in schedule order."""
        events = []
        ended = False
        for job, _, samples in plan.work:
            if not samples or job.done:
                continue
            nth = job.generated
            job.generated = nth + 1
            finished = nth + 1 == job.output
            events.append(TokenEvent(job.id, nth, finished))
            if finished:
                job.done = ended = True
                del self._jobs[job.id]
                self.counters.finished += 1
        if ended:
            self._decoding = [job for job in self._decoding if not job.done]
        return events

    def _prefill(self, plan: StepPlan, least_due_s: float, now: float) -> None:
        """Give what the decodes leave of the chunk to prompts, in order."""
        batch = Batch(
            plan.decodes,
            plan.decode_context,
            least_due_s,
            self._prompt_tokens,
            self._prompts[0][1].computed,
        )
        budget = self._chunk.tokens(batch, now) - plan.decodes
        while budget > 0 and (job := self._head(now)) is not None:
            heapq.heappop(self._prompts)
            if job.computed == 0:
                plan.admitted.append(job.id)
            tokens = min(job.remaining, budget)
            plan.prefill_tokens += tokens
            plan.prefill_context += job.computed
            plan.prefill_pairs += attended(tokens, job.computed)
            job.computed += tokens
            budget -= tokens
            self._prompt_tokens -= tokens
            whole = job.computed == job.prompt
            plan.work.append(Work(job, tokens, whole))
            if whole:
                self._decoding.append(job)
            else:
                self._push(job)

    def _head(self, now: float) -> Job | None:
        """The prompt to serve next, after the doomed before it were put behind all others."""
        relegation = self._relegation
        while self._prompts:
            job = self._prompts[0][1]
            # Judged once, and never when a part of it is computed: that would be thrown away.
            begun_or_judged = job.computed > 0 or job.key[0] == 1
            if relegation is None or begun_or_judged or not relegation.doomed(job, now):
                return job
            job.key = (1, job.key[1], job.key[2])
            heapq.heapreplace(self._prompts, (job.key, job))
            self.relegated += 1
        return None

    def _push(self, job: Job) -> None:
        job.key = (job.key[0], self._order.key(job), job.key[2])
        heapq.heappush(self._prompts, (job.key, job))
