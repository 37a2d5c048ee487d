"""vLLM V1's scheduler as a pure model: no clock, no I/O, no randomness.

It follows vLLM 0.32's `Scheduler.schedule`: running requests first, in admission order; then the
waiting ones, until a head does not fit. The same object is driven in virtual time by the
simulator and in real time by the emulated engines. Not modelled: speculative decoding, LoRA, and the
one step that vLLM wastes when a request ends before its known length.
"""

import heapq
from operator import attrgetter

from tidegate.core.steptime import attended
from tidegate.sim.types import Policy, Request, StepPlan, TokenEvent, Tracked, Work
from tidegate.sim.waitroom import Key, Waitroom

_KEY = attrgetter("key")


class Engine(Waitroom[Tracked]):
    """One engine's requests, KV blocks and schedule."""

    def schedule(self, now: float = 0.0) -> StepPlan:  # noqa: ARG002  (vLLM's schedule asks no clock)
        """Plan the step that begins at `now`, seconds, and count it as launched.

        The plan is empty when there is nothing to do until a launched step completes, or when the
        only thing done was to preempt (`plan.preempted`): then plan again.
        """
        plan = StepPlan()
        budget = self._schedule_running(plan)
        if not plan.preempted and budget > 0 and self._queued:
            self._admit(plan, budget)
        return self._count(plan)

    def complete(self, plan: StepPlan) -> list[TokenEvent]:
        """Take a launched step's results, oldest step first: its output tokens, in schedule order."""
        events = []
        for tracked, _, samples in plan.work:
            if not samples or tracked.done:
                continue
            index = tracked.generated
            tracked.generated = index + 1
            tracked.in_flight -= 1
            if self._cache is not None and self.config.async_scheduling and not tracked.queued:
                self._cache.note(tracked, tracked.computed - tracked.in_flight)
            finished = index + 1 == tracked.output
            events.append(TokenEvent(tracked.id, index, finished))
            if finished:
                del self._known[tracked.id]
                self._leave(tracked)
                self.counters.finished += 1
        return events

    def _count(self, plan: StepPlan) -> StepPlan:
        if plan.work:
            self.counters.steps += 1
            self.counters.prefill_tokens += plan.prefill_tokens
            self.counters.decode_tokens += plan.decodes
        return plan

    def _schedule_running(self, plan: StepPlan) -> int:
        """Give running requests their tokens, in admission order; return the budget left."""
        budget = self.config.max_num_batched_tokens
        block_size = self.config.block_size
        index = 0
        while index < len(self.running) and budget > 0:
            tracked = self.running[index]
            known = tracked.generated + tracked.in_flight
            # Its last token is already on its way (async scheduling): nothing to compute.
            if known >= tracked.output:
                index += 1
                continue
            tokens = tracked.prompt + known - tracked.computed
            tokens = min(tokens, budget)
            needed = -(-(tracked.computed + tokens) // block_size) - tracked.blocks
            while needed > self.free_blocks:
                victim, position = self._preempt()
                budget += self._withdraw(plan, victim)
                self._requeue(plan, victim)
                index -= position < index
                if victim is tracked:
                    # vLLM ends the round here; those behind it wait for the next step.
                    return budget
            if needed:
                self._take(needed)
                tracked.blocks += needed
            self._launch(plan, tracked, tokens)
            budget -= tokens
            index += 1
        return budget

    def _preempt(self) -> tuple[Tracked, int]:
        """Take the victim, possibly the one that asks, out of running; return it and where it stood."""
        if self.config.policy is Policy.PRIORITY:
            victim = max(self.running, key=_KEY)
            position = self.running.index(victim)
        else:
            position = len(self.running) - 1
        return self.running.pop(position), position

    def _requeue(self, plan: StepPlan, victim: Tracked) -> None:
        """Free a victim's KV blocks: it starts again from nothing and queues by its original arrival."""
        self._give(victim, victim.blocks)
        self.counters.preemptions += 1
        self.counters.recomputed_tokens += victim.computed
        victim.again = True
        victim.blocks = 0
        victim.computed = 0
        plan.preempted.append(victim.id)
        self._enqueue(victim)

    @staticmethod
    def _withdraw(plan: StepPlan, victim: Tracked) -> int:
        """Undo what this step had planned for a victim; return the tokens."""
        for position, (tracked, tokens, samples) in enumerate(plan.work):
            if tracked is not victim:
                continue
            del plan.work[position]
            victim.computed -= tokens
            victim.in_flight -= samples
            if _is_decode(victim, tokens):
                plan.decodes -= 1
                plan.decode_context -= victim.computed
            else:
                plan.prefill_tokens -= tokens
                plan.prefill_context -= victim.computed
                plan.prefill_pairs -= attended(tokens, victim.computed)
            return tokens
        return 0

    def _admit(self, plan: StepPlan, budget: int) -> None:
        """Admit waiting requests in order, until the first that does not fit."""
        config = self.config
        while budget > 0 and len(self.running) < config.max_num_seqs:
            tracked = self._head()
            # A preempted head whose last token is still on its way ends when that step completes.
            if tracked is None or tracked.generated + tracked.in_flight >= tracked.output:
                return
            # A preempted request recomputes the tokens it had generated as well.
            total = tracked.prompt + tracked.generated + tracked.in_flight
            found = self._found(tracked, total)
            cached = len(found) * config.block_size
            tokens = min(total - cached, budget)
            if not self._room(found, total if config.scheduler_reserve_full_isl else cached + tokens):
                return
            heapq.heappop(self._heap)
            tracked.queued = False
            self._queued -= 1
            tracked.blocks = self._enter(tracked, found, total, cached + tokens)
            tracked.computed = cached
            self.running.append(tracked)
            plan.admitted.append(tracked.id)
            self._launch(plan, tracked, tokens)
            budget -= tokens

    def _launch(self, plan: StepPlan, tracked: Tracked, tokens: int) -> None:
        """Enter a request's tokens in the plan, as computed from now on."""
        context = tracked.computed
        if _is_decode(tracked, tokens):
            plan.decodes += 1
            plan.decode_context += context
        else:
            plan.prefill_tokens += tokens
            plan.prefill_context += context
            plan.prefill_pairs += attended(tokens, context)
        tracked.computed = context + tokens
        if self._cache is not None:
            # What is still on its way is no known text.
            self._cache.note(tracked, min(tracked.computed, tracked.prompt + tracked.generated))
        samples = tracked.computed == tracked.prompt + tracked.generated + tracked.in_flight
        if samples:
            tracked.in_flight += 1
        plan.work.append(Work(tracked, tokens, samples))

    def _made(self, request: Request, key: Key) -> Tracked:
        return Tracked(request, key)

    def _enqueue(self, tracked: Tracked) -> None:
        tracked.queued = True
        super()._enqueue(tracked)

    def _leave(self, tracked: Tracked) -> None:
        tracked.done = True
        self._give(tracked, tracked.blocks)
        tracked.blocks = 0
        if tracked.queued:
            tracked.queued = False
            self._queued -= 1
        else:
            self.running.remove(tracked)


def _is_decode(tracked: Tracked, tokens: int) -> bool:
    """One token on top of a whole prompt; asked before the token counts as computed."""
    return tokens == 1 and tracked.computed >= tracked.prompt
