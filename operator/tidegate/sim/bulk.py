"""`Engine` for long simulations: the same schedule, with all decodes of a step counted at once.

In most steps every decoding request gets one token, and nothing else about it changes. So what they
sum up to is kept (how many, their context, how many need a KV block in which step), and a step costs
what changes in it, not what runs. Only when KV blocks run out are requests looked at one by one, as
`Engine` does. `tests/property/test_sim_bulk.py` holds both against each other, step by step.

A prefix cache finds the blocks of an answer once it has ended, and not while it is made: who would
look for them sooner, a turn that begins with an answer that is not there yet, does not exist.

Only first and last tokens are told of.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterator
from operator import attrgetter
from typing import Final

from tidegate.core.steptime import attended
from tidegate.sim.prefixcache import Block, Text
from tidegate.sim.types import EngineConfig, Policy, Request, TokenEvent
from tidegate.sim.waitroom import Key, Waitroom

_KEY = attrgetter("key")

WAITING: Final = 0
PREFILL: Final = 1
"""Admitted, its prompt computed in part; always the last of the running ones."""
DECODE: Final = 2
ENDING: Final = 3
"""All its tokens are launched; it leaves when the step of the last one completes."""
DONE: Final = 4


class Job:
    """A request inside the engine. `computed` and `known` are as of `since`, see `Bulk._stop`.

    For a prefix cache: the blocks that it `held` there; `again`, it was preempted; and its `lag`, of its
    last tokens those that were no known text when its last step was planned.
    """

    __slots__ = (
        "again",
        "computed",
        "held",
        "id",
        "key",
        "known",
        "lag",
        "last_step",
        "output",
        "prompt",
        "since",
        "state",
        "text",
    )

    def __init__(self, request: Request, key: Key) -> None:
        self.id = request.id
        self.prompt = request.prompt_tokens
        self.output = request.output_tokens
        self.key = key
        self.computed = 0
        # Output tokens that launched steps deliver or have delivered.
        self.known = 0
        self.since = 0
        self.last_step = 0
        self.state = WAITING
        self.text = Text(request.id, request.shared, request.text)
        self.held: list[Block] = []
        self.lag = 0
        self.again = False

    @property
    def done(self) -> bool:
        """Whether it has left."""
        return self.state == DONE


class BulkPlan:
    """One step: the sums from which its time is reckoned, and whose first and last tokens it brings."""

    __slots__ = (
        "decode_context",
        "decodes",
        "firsts",
        "lasts",
        "preempted",
        "prefill_context",
        "prefill_pairs",
        "prefill_tokens",
        "work",
    )

    def __init__(self) -> None:
        self.work = 0
        self.prefill_tokens = 0
        self.decodes = 0
        self.decode_context = 0
        self.prefill_context = 0
        self.prefill_pairs = 0.0
        self.firsts: list[Job] = []
        self.lasts: list[Job] = []
        self.preempted: list[str] = []

    def give(self, job: Job, tokens: int) -> int:
        """Give a request that does not decode yet tokens in this step; returns how many it then lacks.

        Where it lacks none the step brings it an output token.
        """
        self.work += tokens
        if tokens == 1 and job.computed >= job.prompt:
            self.decodes += 1
            self.decode_context += job.computed
        else:
            self.prefill_tokens += tokens
            self.prefill_context += job.computed
            self.prefill_pairs += attended(tokens, job.computed)
        job.computed += tokens
        lacks = job.prompt + job.known - job.computed
        if lacks == 0:
            if job.known == 0:
                self.firsts.append(job)
            job.known += 1
        return lacks

    def end(self, job: Job) -> bool:
        """Whether the request's last token is launched, and if so note it."""
        if job.known < job.output:
            return False
        job.state = ENDING
        self.lasts.append(job)
        return True


class Bulk(Waitroom[Job]):
    """One engine's requests, KV blocks and schedule; see `Engine` for what each method does."""

    def __init__(self, config: EngineConfig) -> None:
        if config.max_num_batched_tokens <= config.max_num_seqs:
            raise ValueError("max_num_batched_tokens must exceed max_num_seqs: decodes must never wait")
        super().__init__(config)
        self._block = config.block_size
        self._step = 0
        # Steps whose results were taken, and how many were under way when the last one was planned.
        self._completed = self._behind = 0
        # Of those in DECODE: how many, what they attend to, who needs a block when, who ends when.
        self._decodes = 0
        self._context = 0
        self._phases = [0] * config.block_size
        self._ends: defaultdict[int, list[Job]] = defaultdict(list)

    def schedule(self, now: float = 0.0) -> BulkPlan:  # noqa: ARG002  (vLLM's schedule asks no clock)
        """Plan the step that begins at `now`, seconds, and count it as launched."""
        plan = BulkPlan()
        tail = self.running[-1] if self.running and self.running[-1].state == PREFILL else None
        budget = self.config.max_num_batched_tokens
        chunk = 0
        needed = self._phases[-self._step % self._block]
        if tail is not None:
            chunk = min(tail.prompt + tail.known - tail.computed, budget - self._decodes)
            needed += self._blocks(tail.computed + chunk) - self._blocks(tail.computed)
        if needed > self.free_blocks:
            return self._schedule_tight(plan)
        self._take(needed)
        budget -= self._decodes + chunk
        plan.work = plan.decodes = self._decodes
        plan.decode_context = self._context
        self._advance(plan)
        if tail is not None:
            self._launch(plan, tail, chunk)
        if budget > 0 and self._queued:
            self._admit(plan, budget)
        return self._count(plan)

    def complete(self, plan: BulkPlan) -> list[TokenEvent]:
        """Take a launched step's results: first and last tokens."""
        self._completed += 1
        events = [TokenEvent(job.id, 0, job.output == 1) for job in plan.firsts if job.state != DONE]
        for job in plan.lasts:
            if job.state != DONE:
                if job.output > 1:
                    events.append(TokenEvent(job.id, job.output - 1, True))
                del self._known[job.id]
                job.lag = 0
                self._leave(job)
                self.counters.finished += 1
        return events

    def progress(self) -> Iterator[tuple[str, int]]:
        """For every request the tokens that are computed, launched steps included."""
        for job in self._known.values():
            yield job.id, job.computed + (self._step - job.since if job.state == DECODE else 0)

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block)

    def _count(self, plan: BulkPlan) -> BulkPlan:
        if plan.work:
            self._behind = self._step - self._completed
            self._step += 1
            counters = self.counters
            counters.steps += 1
            counters.prefill_tokens += plan.prefill_tokens
            counters.decode_tokens += plan.decodes
        return plan

    def _advance(self, plan: BulkPlan) -> None:
        """One token for everybody who decodes; those who get their last one now stop decoding."""
        self._context += self._decodes
        for job in self._ends.pop(self._step, ()):
            # An entry is stale when its job was preempted or dropped meanwhile.
            if job.state == DECODE and job.last_step == self._step:
                self._stop(job, self._step + 1)
                job.state = ENDING
                job.lag = self._step - self._completed
                plan.lasts.append(job)

    def _launch(self, plan: BulkPlan, job: Job, tokens: int) -> None:
        """Give a request that does not decode yet tokens in this step."""
        if tokens == 0:
            return
        lacks = plan.give(job, tokens)
        if self._cache is not None:
            job.lag = self._step - self._completed if job.state == DECODE else 0
            self._cache.note(job, job.computed - job.lag)
        if lacks:
            job.state = PREFILL
        elif not plan.end(job):
            self._start(job, self._step + 1)

    def _start(self, job: Job, step: int) -> None:
        """The request decodes from `step` on."""
        job.state, job.since = DECODE, step
        job.last_step = step + job.output - job.known - 1
        self._ends[job.last_step].append(job)
        self._decodes += 1
        self._context += job.computed
        self._phases[(job.computed - step) % self._block] += 1

    def _stop(self, job: Job, step: int) -> None:
        """The request does not decode in `step` nor later; its own figures are made up to date."""
        steps = step - job.since
        if steps > 0:
            job.lag = self._behind
        job.computed += steps
        job.known += steps
        self._decodes -= 1
        self._context -= job.computed
        self._phases[(job.computed - step) % self._block] -= 1

    def _admit(self, plan: BulkPlan, budget: int) -> None:
        """Admit waiting requests in order, until the first that does not fit."""
        config = self.config
        while budget > 0 and len(self.running) < config.max_num_seqs:
            job = self._head()
            if job is None or job.known >= job.output:
                return
            total = job.prompt + job.known
            found = self._found(job, total)
            cached = len(found) * self._block
            tokens = min(total - cached, budget)
            if not self._room(found, total if config.scheduler_reserve_full_isl else cached + tokens):
                return
            heapq.heappop(self._heap)
            self._queued -= 1
            self._enter(job, found, total, cached + tokens)
            job.computed = cached
            self.running.append(job)
            self._launch(plan, job, tokens)
            budget -= tokens

    def _made(self, request: Request, key: Key) -> Job:
        return Job(request, key)

    def _enqueue(self, job: Job) -> None:
        job.state = WAITING
        super()._enqueue(job)

    def _leave(self, job: Job) -> None:
        if job.state == WAITING:
            self._queued -= 1
        else:
            if job.state == DECODE:
                self._stop(job, self._step)
            self._known_text(job)
            self._give(job, self._blocks(job.computed))
            self.running.remove(job)
        job.state = DONE

    def _known_text(self, job: Job, given: int = 0) -> None:
        """Have what it computed found by others, and what this step had given it, as in `Engine`."""
        if self._cache is None:
            return
        under_way = self._step - self._completed
        lag = under_way if given and job.state == DECODE else min(job.lag, under_way)
        self._cache.note(job, job.computed + given - lag)

    def _schedule_tight(self, plan: BulkPlan) -> BulkPlan:
        """A step in which KV blocks run out: request by request, as `Engine._schedule_running`."""
        for job in self.running:
            if job.state == DECODE:
                self._stop(job, self._step)
        budget, given = self.config.max_num_batched_tokens, dict[Job, int]()
        index = 0
        while index < len(self.running) and budget > 0:
            job = self.running[index]
            index += 1
            if job.known >= job.output:
                continue
            tokens = min(job.prompt + job.known - job.computed, budget)
            needed = self._blocks(job.computed + tokens) - self._blocks(job.computed)
            while needed > self.free_blocks and job.state != WAITING:
                victim, position = self._preempt()
                budget += self._withdraw(victim, given, plan)
                index -= position < index
            if job.state == WAITING:
                break
            self._take(needed)
            given[job] = tokens
            budget -= tokens
        for job in self.running:
            if job in given:
                self._launch(plan, job, given[job])
            elif job.state == DECODE:
                self._start(job, self._step + (1 if given else 0))
        return self._count(plan)

    def _preempt(self) -> tuple[Job, int]:
        if self.config.policy is Policy.PRIORITY:
            victim = max(self.running, key=_KEY)
            position = self.running.index(victim)
        else:
            position = len(self.running) - 1
        return self.running.pop(position), position

    def _withdraw(self, victim: Job, given: dict[Job, int], plan: BulkPlan) -> int:
        """Take a victim's blocks and what this step had given it; returns the tokens."""
        tokens = given.pop(victim, 0)
        self._known_text(victim, tokens)
        self._give(victim, self._blocks(victim.computed + tokens))
        self.counters.preemptions += 1
        self.counters.recomputed_tokens += victim.computed
        victim.computed = victim.lag = 0
        victim.again = True
        plan.preempted.append(victim.id)
        self._enqueue(victim)
        return tokens
