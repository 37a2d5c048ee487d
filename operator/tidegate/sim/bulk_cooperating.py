"""`Cooperating` for long simulations, as `Bulk` is for `Engine`: decodes are counted by class.

Every class has its own count of steps, since in some steps a class does not decode. Only when KV blocks run
out are requests looked at one by one. `tests/property/test_sim_bulk.py` holds both against each other.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterator
from operator import attrgetter
from typing import Final

from tidegate.core import cooperate
from tidegate.core.cooperate import Beside, Holder, Pace, Rules
from tidegate.sim.bulk import DECODE, DONE, ENDING, PREFILL, WAITING, BulkPlan, Job
from tidegate.sim.cooperating import Seen
from tidegate.sim.types import EngineConfig, Policy, Request, TokenEvent
from tidegate.sim.waitroom import Key, Waitroom

_KEY = attrgetter("key")
_RANK = attrgetter("rank")

_LOOKED_AT: Final = 5
"""Taken out of the decodes of its class, while a step is planned request by request."""


class PacedJob(Job):
    """A request with the pace that it was promised. `first_s`: when its first token was there."""

    __slots__ = ("first_s", "pace_s", "rank")

    def __init__(self, request: Request, key: Key) -> None:
        super().__init__(request, key)
        self.rank = key[0]
        self.pace_s = request.pace_s
        self.first_s: float | None = None


class _Decodes:
    """Those of a class that decode: how many, what they attend to, who needs a block when, who ends when."""

    def __init__(self, block_size: int) -> None:
        self.step = 0
        self.count = 0
        self.context = 0
        self.phases = [0] * block_size
        self.ends: defaultdict[int, list[PacedJob]] = defaultdict(list)
        self.paced: dict[PacedJob, None] = {}


class BulkCooperating(Waitroom[PacedJob]):
    """One engine's requests, KV blocks and schedule; see `Cooperating` for what each method does."""

    def __init__(self, config: EngineConfig) -> None:
        if config.max_num_batched_tokens <= config.max_num_seqs:
            raise ValueError("max_num_batched_tokens must exceed max_num_seqs: decodes must never wait")
        config.refuse_cache("the model of a cooperating engine")
        super().__init__(config)
        self.rules = config.cooperation or Rules()
        self._block = config.block_size
        self._seen = Seen()
        self._by_rank: dict[int, _Decodes] = {}
        self._partials: dict[int, PacedJob] = {}
        self._begun: list[PacedJob] = []

    def schedule(self, now: float = 0.0) -> BulkPlan:
        """Plan the step that begins at `now`, seconds, and count it as launched."""
        for job in self._begun:
            job.first_s = now
        self._begun.clear()
        plan = BulkPlan()
        self._make_room(plan)
        rank = self._prefill_rank()
        groups = [g for r, g in self._by_rank.items() if g.count and cooperate.decodes(self.rules, r, rank)]
        count = sum(g.count for g in groups)
        context = sum(g.context for g in groups)
        needed = sum(g.phases[-g.step % self._block] for g in groups)
        most, tail, chunk = 0, None, 0
        if rank is not None:
            tail = self._partials.get(rank)
            paces = self._paces(rank) if rank > 0 else []
            most = self._most(rank, Beside(count, context, tail.computed if tail else 0), paces, now)
        if tail is not None:
            chunk = min(tail.prompt + tail.known - tail.computed, most)
            needed += self._blocks(tail.computed + chunk) - self._blocks(tail.computed)
        if needed > self.free_blocks:
            return self._schedule_tight(plan, rank, now)
        self.free_blocks -= needed
        plan.work = plan.decodes = count
        plan.decode_context = context
        for group in groups:
            self._advance(plan, group)
        if tail is not None:
            self._launch(plan, tail, chunk)
        if rank is not None and rank not in self._partials:
            self._admit(plan, rank, most - chunk)
        return self._count(plan)

    def complete(self, plan: BulkPlan) -> list[TokenEvent]:
        """Take a launched step's results: first and last tokens."""
        events = [TokenEvent(job.id, 0, job.output == 1) for job in plan.firsts if job.state != DONE]
        for job in plan.lasts:
            if isinstance(job, PacedJob) and job.state != DONE:
                if job.output > 1:
                    events.append(TokenEvent(job.id, job.output - 1, True))
                del self._known[job.id]
                self._leave(job)
                self.counters.finished += 1
        return events

    def progress(self) -> Iterator[tuple[str, int]]:
        """For every request the tokens that are computed, launched steps included."""
        for job in self._known.values():
            yield job.id, self._computed(job)

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block)

    def _computed(self, job: PacedJob) -> int:
        return job.computed + (self._group(job).step - job.since if job.state == DECODE else 0)

    def _group(self, job: PacedJob) -> _Decodes:
        group = self._by_rank.get(job.rank)
        if group is None:
            group = self._by_rank[job.rank] = _Decodes(self._block)
        return group

    def _count(self, plan: BulkPlan) -> BulkPlan:
        if plan.work:
            counters = self.counters
            counters.steps += 1
            counters.prefill_tokens += plan.prefill_tokens
            counters.decode_tokens += plan.decodes
        return plan

    def _first(self) -> PacedJob | None:
        head = self._head()
        return None if head is None or head.known >= head.output else head

    def _make_room(self, plan: BulkPlan) -> None:
        head, config = self._first(), self.config
        if head is None or head.rank >= self._seen.lowest:
            return
        total = head.prompt + head.known
        if not config.scheduler_reserve_full_isl:
            total = min(total, config.max_num_batched_tokens)
        slots = len(self.running) + 1 - config.max_num_seqs
        blocks = self._blocks(total) - self.free_blocks
        if slots <= 0 and blocks <= 0:
            return
        holders = [Holder(j.key, self._blocks(self._computed(j))) for j in self.running if j.state != ENDING]
        going = {h.order for h in cooperate.give_up(holders, head.rank, slots, blocks)}
        for job in [j for j in self.running if j.key in going]:
            self.running.remove(job)
            self._requeue(plan, job)

    def _prefill_rank(self) -> int | None:
        head = self._first()
        return cooperate.prefill_rank(self._partials, None if head is None else head.rank)

    def _paces(self, rank: int) -> list[Pace]:
        """When the next tokens of higher classes are due, and their paces."""
        return [
            Pace(job.first_s + job.pace_s * (job.known + group.step - job.since), job.pace_s)
            for higher, group in self._by_rank.items()
            if higher < rank
            for job in group.paced
            if job.first_s is not None and job.pace_s is not None
        ]

    def _most(self, rank: int, beside: Beside, paces: list[Pace], now: float) -> int:
        longest_s = cooperate.longest_s(self.rules, paces, self._seen.above(rank), now)
        budget = self.config.max_num_batched_tokens - beside.decodes
        return cooperate.prompt_tokens(self.rules, budget, beside, longest_s)

    def _advance(self, plan: BulkPlan, group: _Decodes) -> None:
        """One token for all of a class that decode; those who get their last one now stop decoding."""
        step = group.step
        group.step += 1
        group.context += group.count
        for job in group.ends.pop(step, ()):
            # An entry is stale when its job was preempted or dropped meanwhile.
            if job.state == DECODE and job.last_step == step:
                self._stop(job)
                job.state = ENDING
                plan.lasts.append(job)

    def _launch(self, plan: BulkPlan, job: PacedJob, tokens: int) -> None:
        """Give a request that does not decode yet tokens in this step."""
        if tokens == 0:
            return
        first = job.known == 0
        lacks = plan.give(job, tokens)
        if lacks == 0 and first:
            self._begun.append(job)
        if lacks > 1 or job.computed < job.prompt:
            job.state = PREFILL
            self._partials[job.rank] = job
            return
        self._partials.pop(job.rank, None)
        if not plan.end(job):
            self._start(job)

    def _start(self, job: PacedJob) -> None:
        """The request decodes from its class's next step on."""
        group = self._group(job)
        job.state, job.since = DECODE, group.step
        job.last_step = group.step + job.output - job.known - 1
        group.ends[job.last_step].append(job)
        group.count += 1
        group.context += job.computed
        group.phases[(job.computed - group.step) % self._block] += 1
        if job.pace_s is not None:
            group.paced[job] = None

    def _stop(self, job: PacedJob) -> None:
        """The request does not decode in its class's next step; its own figures are made up to date."""
        group = self._group(job)
        steps = group.step - job.since
        job.computed += steps
        job.known += steps
        group.count -= 1
        group.context -= job.computed
        group.phases[(job.computed - group.step) % self._block] -= 1
        group.paced.pop(job, None)

    def _admit(self, plan: BulkPlan, rank: int, most: int) -> None:
        config = self.config
        while most > 0 and len(self.running) < config.max_num_seqs:
            job = self._first()
            if job is None or job.rank != rank:
                return
            total = job.prompt + job.known
            tokens = min(total, most)
            must_fit = total if config.scheduler_reserve_full_isl else tokens
            if self._blocks(must_fit) > self.free_blocks:
                return
            heapq.heappop(self._heap)
            self._queued -= 1
            self.free_blocks -= self._blocks(tokens)
            self.running.append(job)
            self._launch(plan, job, tokens)
            most -= tokens

    def _made(self, request: Request, key: Key) -> PacedJob:
        self._seen.came(key[0], request.pace_s, key[1])
        return PacedJob(request, key)

    def _enqueue(self, job: PacedJob) -> None:
        job.state = WAITING
        super()._enqueue(job)

    def _leave(self, job: PacedJob) -> None:
        if job.state == WAITING:
            self._queued -= 1
        else:
            self._rest(job)
            self.free_blocks += self._blocks(job.computed)
            self.running.remove(job)
        job.state = DONE

    def _rest(self, job: PacedJob) -> None:
        """The request neither decodes nor prefills any more; its own figures are made up to date."""
        if job.state == DECODE:
            self._stop(job)
        elif self._partials.get(job.rank) is job:
            del self._partials[job.rank]

    def _requeue(self, plan: BulkPlan, job: PacedJob, given: int = 0) -> None:
        """Free a running request's blocks, `given` tokens of this step included, and queue it again."""
        self._rest(job)
        self.free_blocks += self._blocks(job.computed + given)
        self.counters.preemptions += 1
        self.counters.recomputed_tokens += job.computed
        job.computed = 0
        plan.preempted.append(job.id)
        self._enqueue(job)

    def _schedule_tight(self, plan: BulkPlan, rank: int | None, now: float) -> BulkPlan:
        """A step in which KV blocks run out: request by request, as `Cooperating._decode` and `_go_on`."""
        decoding = [job for job in sorted(self.running, key=_RANK) if job.state == DECODE]
        for job in decoding:
            self._stop(job)
            job.state = _LOOKED_AT
        given: dict[PacedJob, int] = {}
        whole = True
        for job in decoding:
            if job.state == WAITING or not cooperate.decodes(self.rules, job.rank, rank):
                continue
            whole = self._hold(plan, job, 1, given)
            if not whole:
                break
        tail = self._partials.get(rank) if rank is not None else None
        if whole and rank is not None and tail is not None:
            context = sum(job.computed for job in given)
            paces = [
                Pace(job.first_s + job.pace_s * job.known, job.pace_s)
                for job in given
                if job.rank < rank and job.first_s is not None and job.pace_s is not None
            ]
            most = self._most(rank, Beside(len(given), context, tail.computed), paces, now)
            chunk = min(tail.prompt + tail.known - tail.computed, most)
            if chunk:
                self._hold(plan, tail, chunk, given)
        for job in decoding:
            if job.state == _LOOKED_AT and job not in given:
                self._start(job)
        for job, tokens in given.items():
            self._launch(plan, job, tokens)
        return self._count(plan)

    def _hold(self, plan: BulkPlan, job: PacedJob, tokens: int, given: dict[PacedJob, int]) -> bool:
        needed = self._blocks(job.computed + tokens) - self._blocks(job.computed)
        while needed > self.free_blocks:
            last = self.config.policy is not Policy.PRIORITY
            victim = self.running[-1] if last else max(self.running, key=_KEY)
            self.running.remove(victim)
            self._requeue(plan, victim, given.pop(victim, 0))
            if victim is job:
                return False
        self.free_blocks -= needed
        given[job] = tokens
        return True
