"""vLLM's scheduler with a plugin that knows classes: `core.cooperate` decides, this obeys.

Unlike `Engine`, which serves running requests in the order of their admission: first the decodes,
class by class; then prompts of one class only, the highest that has any, those that are begun
before those that wait. Where a lower class's prompts are computed beside higher ones they take as
many tokens as the plugin says. And a waiting request of a higher class gets the slot and the KV
blocks of running lower ones.
"""

import heapq
from collections.abc import Iterable
from operator import attrgetter

from tidegate.core import cooperate
from tidegate.core.cooperate import Beside, Holder, Pace, Rules
from tidegate.sim.engine import Engine
from tidegate.sim.types import EngineConfig, Request, StepPlan, Tracked
from tidegate.sim.waitroom import Key

_RANK = attrgetter("rank")


class Paced(Tracked):
    """A request with the pace that it was promised. `first_s`: when its first token was there."""

    __slots__ = ("first_s", "pace_s")

    def __init__(self, request: Request, key: Key) -> None:
        super().__init__(request, key)
        self.pace_s = request.pace_s
        self.first_s: float | None = None

    @property
    def rank(self) -> int:
        """Its class, 0 the most important."""
        return self.key[0]

    @property
    def known(self) -> int:
        """Output tokens that launched steps deliver or have delivered."""
        return self.generated + self.in_flight

    @property
    def prefills(self) -> bool:
        """Whether more than its next token is to be computed."""
        return self.computed < self.prompt or self.prompt + self.known - self.computed > 1


class Seen:
    """Who came to an engine: the lowest class of all, and of each when and with which pace the last."""

    def __init__(self) -> None:
        self.lowest = 0
        self._last: dict[int, tuple[float, float]] = {}

    def came(self, rank: int, pace_s: float | None, now: float) -> None:
        """A request of this class is queued."""
        self.lowest = max(self.lowest, rank)
        if pace_s is not None:
            self._last[rank] = (now, pace_s)

    def above(self, rank: int) -> Iterable[tuple[float, float]]:
        """When one of each higher class came last, and its pace."""
        return (last for higher, last in self._last.items() if higher < rank)


class Cooperating(Engine):
    """One engine's requests, KV blocks and schedule."""

    running: list[Paced]  # type: ignore[assignment]  # `_made` makes no others

    def __init__(self, config: EngineConfig) -> None:
        config.refuse_cache("the model of a cooperating engine")
        super().__init__(config)
        self.rules = config.cooperation or Rules()
        self._seen = Seen()
        self._begun: list[Paced] = []

    def schedule(self, now: float = 0.0) -> StepPlan:
        """Plan the step that begins at `now`, seconds, and count it as launched; see `Engine`."""
        for tracked in self._begun:
            tracked.first_s = now  # the step that brings it ends as this one begins
        self._begun.clear()
        plan = StepPlan()
        self._make_room(plan)
        rank = self._prefill_rank()
        gave = len(plan.preempted)
        if self._decode(plan, rank) and rank is not None:
            most = self._most(plan, rank, now)
            most -= self._go_on(plan, rank, most)
            if len(plan.preempted) == gave:
                self._admit_class(plan, rank, most)
        for one, _, samples in plan.work:
            if isinstance(one, Paced) and samples and one.known == 1:
                self._begun.append(one)
        return self._count(plan)

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _first(self) -> Paced | None:
        """Who is first in the queue; None too when its last token is on its way (see `_admit`)."""
        head = self._head()
        return head if isinstance(head, Paced) and head.known < head.output else None

    def _make_room(self, plan: StepPlan) -> None:
        """Stop lower classes where the first in the queue lacks a slot or KV blocks."""
        head, config = self._first(), self.config
        if head is None or head.rank >= self._seen.lowest:
            return
        slots = len(self.running) + 1 - config.max_num_seqs
        blocks = _blocks(config, _must_fit(config, head.prompt + head.known)) - self.free_blocks
        if slots <= 0 and blocks <= 0:
            return
        holders = [Holder(t.key, t.blocks) for t in self.running if t.known < t.output]
        going = {h.order for h in cooperate.give_up(holders, head.rank, slots, blocks)}
        for tracked in [t for t in self.running if t.key in going]:
            self.running.remove(tracked)
            self._requeue(plan, tracked)

    def _prefill_rank(self) -> int | None:
        begun = (t.rank for t in self.running if t.known < t.output and t.prefills)
        head = self._first()
        return cooperate.prefill_rank(begun, None if head is None else head.rank)

    def _decode(self, plan: StepPlan, prefill: int | None) -> bool:
        """A token for everybody who may decode; False where KV ran out and the asker had to stop."""
        for tracked in sorted(self.running, key=_RANK):
            rests = tracked.queued or tracked.known >= tracked.output or tracked.prefills
            if rests or not cooperate.decodes(self.rules, tracked.rank, prefill):
                continue
            if not self._hold(plan, tracked, 1):
                return False
            self._launch(plan, tracked, 1)
        return True

    def _most(self, plan: StepPlan, rank: int, now: float) -> int:
        """Prompt tokens of this class that the step may have."""
        paces = [
            Pace(t.first_s + t.pace_s * (t.known - 1), t.pace_s)
            for t, _, _ in plan.work
            if isinstance(t, Paced) and t.rank < rank and t.pace_s is not None and t.first_s is not None
        ]
        partial = self._partial(rank)
        computed = partial.computed if partial else 0
        beside = Beside(plan.decodes, plan.decode_context, computed)
        longest_s = cooperate.longest_s(self.rules, paces, self._seen.above(rank), now)
        budget = self.config.max_num_batched_tokens - plan.decodes
        return cooperate.prompt_tokens(self.rules, budget, beside, longest_s)

    def _partial(self, rank: int) -> Paced | None:
        """The one request of a class whose prompt is computed in part."""
        return next((t for t in self.running if t.rank == rank and t.known < t.output and t.prefills), None)

    def _go_on(self, plan: StepPlan, rank: int, most: int) -> int:
        """Go on with a prompt that is begun; return the tokens."""
        tracked = self._partial(rank)
        if tracked is None:
            return 0
        tokens = min(tracked.prompt + tracked.known - tracked.computed, most)
        if tokens == 0 or not self._hold(plan, tracked, tokens):
            return 0
        self._launch(plan, tracked, tokens)
        return tokens

    def _hold(self, plan: StepPlan, tracked: Paced, tokens: int) -> bool:
        """Take the KV blocks for more tokens, from others if need be; False where it had to stop itself."""
        needed = _blocks(self.config, tracked.computed + tokens) - tracked.blocks
        while needed > self.free_blocks:
            victim, _ = self._preempt()
            self._withdraw(plan, victim)
            self._requeue(plan, victim)
            if victim is tracked:
                return False
        self.free_blocks -= needed
        tracked.blocks += needed
        return True

    def _admit_class(self, plan: StepPlan, rank: int, most: int) -> None:
        """Admit waiting requests of a class in order, until the first that does not fit."""
        config = self.config
        if self._partial(rank) is not None:
            return
        while most > 0 and len(self.running) < config.max_num_seqs:
            head = self._first()
            if head is None or head.rank != rank:
                return
            total = head.prompt + head.known
            tokens = min(total, most)
            must_fit = total if config.scheduler_reserve_full_isl else tokens
            if _blocks(config, must_fit) > self.free_blocks:
                return
            heapq.heappop(self._heap)
            head.queued = False
            self._queued -= 1
            head.blocks = _blocks(config, tokens)
            self.free_blocks -= head.blocks
            self.running.append(head)
            plan.admitted.append(head.id)
            self._launch(plan, head, tokens)
            most -= tokens

    def _made(self, request: Request, key: Key) -> Paced:
        self._seen.came(key[0], request.pace_s, key[1])
        return Paced(request, key)


def _blocks(config: EngineConfig, tokens: int) -> int:
    return -(-tokens // config.block_size)


def _must_fit(config: EngineConfig, total: int) -> int:
    """Tokens that must find room when a request is admitted."""
    return total if config.scheduler_reserve_full_isl else min(total, config.max_num_batched_tokens)
