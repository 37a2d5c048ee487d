"""One endpoint as a picker knows it: what it sent there, what has ended, what the engine said."""

from typing import Final

from tidegate.core.flowtypes import Ask, Endpoint
from tidegate.core.load import EngineReport
from tidegate.core.steptime import StepFit

_PIPELINE_STEPS: Final = 1.5
"""An engine that decodes begins a new prompt after the rest of its step and the one behind it."""


class Site:
    """An endpoint's facts and counts.

    Attributes:
        facts: What the fleet tells of it.
        gone: It does not exist any more, though requests of its are not over yet.
        requests: Ours in flight there; `batch` are those of them that nobody waits for.
        tokens: KV tokens that ours may come to hold, by the outputs that are expected.
        report: The engine's last word, None before the first.
    """

    __slots__ = (
        "_at_s",
        "_before",
        "_fit",
        "_last_s",
        "_step_tokens",
        "_tokens_before",
        "_work_s",
        "batch",
        "facts",
        "gone",
        "known_since_s",
        "report",
        "requests",
        "tokens",
    )

    def __init__(self, facts: Endpoint, fit: StepFit, step_tokens: int, now: float) -> None:
        self.facts = facts
        self.gone = False
        self.known_since_s = now
        self.requests = self.batch = self.tokens = 0
        self.report: EngineReport | None = None
        self._before = self._tokens_before = 0
        self._fit, self._step_tokens = fit, step_tokens
        self._work_s: dict[int, float] = {}
        self._last_s: dict[int, float] = {}
        self._at_s = now

    # ── what is there ───────────────────────────────────────────────────────────────────────────

    @property
    def takes_more(self) -> bool:
        """Whether new requests may be sent here."""
        return self.facts.ready and not self.facts.draining and not self.gone

    @property
    def free_slots(self) -> int:
        """Slots that ours leave free; below 0 where an arm sends more."""
        return self.facts.slots - self.requests

    @property
    def kv_tokens(self) -> int | None:
        """The engine's KV capacity, None where it has not said."""
        return self.report.kv_tokens if self.report is not None else None

    def fits(self, ask: Ask, share: float = 1.0) -> bool:
        """Whether the request's KV tokens fit beside ours, in this share of the cache."""
        return self.kv_tokens is None or self.tokens + ask.tokens <= share * self.kv_tokens

    @property
    def waiting(self) -> int:
        """Requests in the engine's queue: as it said, and what has come to ours since it was asked.

        A report is up to a second old. An arm that read it bare would send its whole queue to
        every engine that was free a moment ago.
        """
        if self.report is None:
            return 0
        return max(0, self.report.waiting + self.requests - self._before)

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache in use, brought up to date in the same way; 0 where it is unknown."""
        if self.report is None or self.report.kv_usage is None or not self.report.kv_tokens:
            return 0.0
        since = (self.tokens - self._tokens_before) / self.report.kv_tokens
        return max(0.0, self.report.kv_usage + since)

    # ── predicted work ──────────────────────────────────────────────────────────────────────────

    def prefill_s(self, prompt: int) -> float:
        """How long the engine takes to compute a prompt beside what is in flight, by the fit.

        All of ours count as decoding, and with all that they may come to hold: a picker cannot
        tell, and a step's time hardly feels it.
        """
        decodes = min(self.requests, self._step_tokens - 1)
        size, done, total = self._step_tokens - decodes, 0, 0.0
        while done < prompt:
            chunk = min(size, prompt - done)
            total += self._fit.seconds(chunk, decodes, self.tokens, done)
            done += chunk
        return total

    def wait_s(self, rank: int, now: float) -> float:
        """Prefill that an engine with priorities computes before a new prompt of this rank.

        All that was sent of this rank and above, and of what is below one prompt: the engine
        finishes the one that it has begun.
        """
        ahead = self.work_s(rank, now)
        behind = sum(work for r, work in self._work_s.items() if r > rank)
        longest = max((last for r, last in self._last_s.items() if r > rank), default=0.0)
        return ahead + min(behind, longest)

    def work_s(self, rank: int, now: float) -> float:
        """Prefill of this rank and above that is not computed yet."""
        self._drain(now)
        return sum(work for r, work in self._work_s.items() if r <= rank)

    def _drain(self, now: float) -> None:
        left, self._at_s = now - self._at_s, now
        for rank in sorted(self._work_s):
            used = min(left, self._work_s[rank])
            self._work_s[rank] -= used
            left -= used

    # ── what happens ────────────────────────────────────────────────────────────────────────────

    def take(self, ask: Ask, rank: int, now: float, *, batch: bool) -> None:
        """A request is sent here."""
        self._drain(now)
        self._last_s[rank] = self.prefill_s(ask.prompt_tokens)
        if self.requests and not any(self._work_s.values()):
            self._last_s[rank] += _PIPELINE_STEPS * self._fit.seconds(0, self.requests, self.tokens)
        self._work_s[rank] = self._work_s.get(rank, 0.0) + self._last_s[rank]
        self.requests += 1
        self.batch += batch
        self.tokens += ask.tokens

    def give_back(self, ask: Ask, *, batch: bool) -> None:
        """A request that was sent here is over."""
        self.requests -= 1
        self.batch -= batch
        self.tokens -= ask.tokens

    def hear(self, report: EngineReport, before: int, tokens_before: int) -> None:
        """Take the engine's word, and what of ours was in flight when it was asked."""
        self.report, self._before, self._tokens_before = report, before, tokens_before
