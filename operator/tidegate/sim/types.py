"""Plain values of the engine model: what it is told and what it answers."""

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

from tidegate.core.cooperate import Rules
from tidegate.sim.prefixcache import Block, Text


class Policy(StrEnum):
    """In which order waiting requests are admitted, and which running one is preempted."""

    FCFS = "fcfs"
    PRIORITY = "priority"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """vLLM's scheduler settings, under vLLM's names.

    Defaults are vLLM 0.32's on an A100: 2,048 tokens a step, 256 requests, blocks of 16 tokens.
    `num_blocks` is what vLLM logs as GPU blocks; one of them is its null block and holds no tokens.
    `enable_prefix_caching` is on in vLLM and off here: most runs know nothing of their texts.
    `cooperation` is not vLLM's: what a scheduler plugin is told, None without one.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    num_blocks: int = 25_001
    policy: Policy = Policy.FCFS
    scheduler_reserve_full_isl: bool = True
    async_scheduling: bool = True
    enable_prefix_caching: bool = False
    cooperation: Rules | None = None

    def __post_init__(self) -> None:
        """Refuse sizes with which nothing could ever run."""
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_blocks < 2:
            raise ValueError(f"num_blocks must be at least 2 (one is the null block), got {self.num_blocks}")

    def with_policy(self, policy: Policy) -> "EngineConfig":
        """The same settings under another policy."""
        return replace(self, policy=policy)

    def refuse_cache(self, engine: str) -> None:
        """For engines that have no prefix cache. Raises ValueError where one is asked for."""
        if self.enable_prefix_caching:
            raise ValueError(f"enable_prefix_caching must be off: {engine} has no prefix cache")

    def check(self, request: "Request") -> None:
        """Refuse a request that asks for nothing, or that could never fit the KV cache.

        Raises:
            ValueError: it is such a one.
        """
        if request.prompt_tokens < 1 or request.output_tokens < 1:
            raise ValueError(f"request {request.id} needs at least one prompt and one output token")
        if any(tokens < 1 for _, tokens in request.shared):
            raise ValueError(f"request {request.id}: every part of shared needs at least one token")
        # The last output token is never computed on, so its KV is never stored.
        total = request.prompt_tokens + request.output_tokens - 1
        if total > self.kv_tokens:
            raise ValueError(
                f"request {request.id} needs {total} tokens of KV cache, the engine holds {self.kv_tokens}"
            )

    @property
    def usable_blocks(self) -> int:
        """KV blocks that hold tokens."""
        return self.num_blocks - 1

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.usable_blocks * self.block_size


@dataclass(frozen=True, slots=True)
class Request:
    """A request as an engine sees it. `output_tokens` is where it will stop; lower `priority` is earlier.

    What engines that look at promises are told: `pace_s`, the seconds between output tokens; `due_s`, the
    seconds from now until its first token is due, or its last where only that was promised.

    For a prefix cache its text, prompt and answer, is named: the parts of `shared`, each a name and its
    tokens, and after them the text `text`; empty, one that is nobody else's. Texts are the same as far as
    their parts are. So a system prompt is `shared`; turns of a conversation, each of which begins with all
    that was said before, have one `text`; and so have growing prefixes of one prompt.
    """

    id: str
    prompt_tokens: int
    output_tokens: int
    priority: int = 0
    pace_s: float | None = None
    due_s: float = math.inf
    shared: tuple[tuple[str, int], ...] = ()
    text: str = ""


class Tracked:
    """A request inside the engine, and how far it is.

    `computed` counts tokens whose KV is held or being computed by a launched step; `in_flight`
    counts output tokens that launched steps will deliver (vLLM's output placeholders). `held` are the
    first of its `blocks`, those that a prefix cache knows; `again`: it was preempted.
    """

    __slots__ = (
        "again",
        "blocks",
        "computed",
        "done",
        "generated",
        "held",
        "id",
        "in_flight",
        "key",
        "output",
        "prompt",
        "queued",
        "text",
    )

    def __init__(self, request: Request, key: tuple[int, float, int]) -> None:
        self.id = request.id
        self.prompt = request.prompt_tokens
        self.output = request.output_tokens
        # (rank, arrival, sequence): orders the queue and picks victims; the last makes it total.
        self.key = key
        self.computed = 0
        self.generated = 0
        self.in_flight = 0
        self.blocks = 0
        self.done = False
        self.queued = False
        self.again = False
        self.text = Text(request.id, request.shared, request.text)
        self.held: list[Block] = []


class Work(NamedTuple):
    """What one request gets in a step. `samples` when the step delivers an output token."""

    request: Tracked
    tokens: int
    samples: bool


@dataclass(slots=True)
class StepPlan:
    """One step: who gets how many tokens, and the sums from which its time is reckoned."""

    work: list[Work] = field(default_factory=list)
    prefill_tokens: int = 0
    decodes: int = 0
    decode_context: int = 0
    prefill_context: int = 0
    prefill_pairs: float = 0.0
    admitted: list[str] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens that the step computes."""
        return self.prefill_tokens + self.decodes

    @property
    def tokens_by_request(self) -> dict[str, int]:
        """Tokens of each scheduled request, in scheduling order."""
        return {w.request.id: w.tokens for w in self.work}


class TokenEvent(NamedTuple):
    """An output token. `nth` counts from 0; `finished` marks a request's last."""

    id: str
    nth: int
    finished: bool


@dataclass(slots=True)
class Counters:
    """What the engine has done so far. `recomputed_tokens` is KV that preemption threw away.

    `cache_queries` are tokens that were looked up in the prefix cache, `cache_hits` those that were there;
    of requests that are admitted again after a preemption neither, as in vLLM.
    """

    steps: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    finished: int = 0
    aborted: int = 0
    cache_queries: int = 0
    cache_hits: int = 0
