"""What an engine is doing now, as far as it follows from what was sent to it and when.

A scrape is a second old, and the next arrival lands in between. How long a step takes is known
(`core.steptime`), and every request that is sent or ends is seen: so how much prefill is still
queued, how long a step is and how many steps were made can be reckoned at any moment.

An engine is faster or slower than the fit says, so its own count of generated tokens, scraped now
and then, corrects the pace; and a request that ends before its first token was expected shows that
all prefill up to its own is done.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

from tidegate.core.steptime import StepFit

_LEAST_TOKENS: Final = 32
"""Fewer generated tokens between two reports tell nothing of the pace."""
_WEIGHT: Final = 0.3
"""Of one more report, once there were a few; the first ones weigh more, since nothing is known before."""
_DONE_S: Final = 1e-6
"""Less prefill than this is none: what sums of floats leave over."""
_SPEEDS: Final = (0.02, 50.0)


@dataclass(slots=True)
class _Sent:
    """A request in flight: `tpot_s` its promised pace; when its first token is expected, then came."""

    tpot_s: float | None
    first_s: float
    steps: float | None = None
    """Steps that had been made when it got its first token; None before."""


class Forecast:
    """One engine. Times are seconds; `chunk` is the most tokens that a step of it computes."""

    __slots__ = (
        "_at",
        "_backlog",
        "_backlog_steps",
        "_chunk",
        "_context",
        "_decodes",
        "_fit",
        "_generated",
        "_reported",
        "_reports",
        "_sent",
        "_starting",
        "_step",
        "speed",
        "steps",
    )

    def __init__(self, fit: StepFit, chunk: int, now: float) -> None:
        self._fit, self._chunk, self._at = fit, chunk, now
        self.speed = 1.0
        """How many times as fast as the fit it was seen to be."""
        self.steps = 0.0
        """Steps made so far, as of the last `advance`."""
        # Seconds of these two are the fit's: the engine's own are so many divided by `speed`.
        self._backlog, self._backlog_steps = 0.0, 0.0
        self._step: float | None = None
        self._decodes, self._context = 0, 0.0
        self._generated, self._reported, self._reports = 0.0, -1, 0
        self._sent: dict[int, _Sent] = {}
        self._starting: deque[tuple[float, int]] = deque()

    def become(self, fit: StepFit, chunk: int) -> None:
        """Take the engine's own settings."""
        self._fit, self._chunk = fit, chunk

    @property
    def backlog_s(self) -> float:
        """How long until all prefill that was sent is computed, as of the last `advance`."""
        return self._backlog / self.speed

    @property
    def clear_at(self) -> float:
        """When all prefill that was sent will be computed."""
        return self._at + self.backlog_s

    def advance(self, now: float) -> None:
        """Let time pass."""
        passed = (now - self._at) * self.speed
        if passed <= 0:
            return
        self._at = now
        steps = 0.0
        if self._backlog > 0:
            prefilling = min(passed, self._backlog)
            steps = self._backlog_steps * prefilling / self._backlog
            self._backlog -= prefilling
            self._backlog_steps -= steps
            if self._backlog < _DONE_S:
                self._backlog = self._backlog_steps = 0.0
            passed -= prefilling
        if passed > 0 and self._decodes:
            steps += passed / self._decode_step()
        self.steps += steps
        self._context += steps * self._decodes
        self._generated += steps * self._decodes
        self._step = None
        while self._starting and self._starting[0][0] <= now:
            sent = self._sent.get(self._starting.popleft()[1])
            if sent is not None and sent.steps is None:
                sent.steps, sent.first_s = self.steps, now

    def prefill_s(self, tokens: int) -> float:
        """How long this many prompt tokens take beside what decodes."""
        return self._prefill(tokens) / self.speed

    def first_token_s(self, tokens: int) -> float:
        """How long a request sent now waits for its first token.

        An idle engine starts at once. One that works has launched a step and planned the next: the
        rest of the one, half of it on average, and the other are waited for.
        """
        ahead = (self._backlog or self._decode_step()) + 0.5 * self._decode_step()
        return (ahead + self._prefill(tokens)) / self.speed

    def take(self, request: int, tokens: int, tpot_s: float | None) -> None:
        """A request is sent; call `advance` before."""
        wait_s = self.first_token_s(tokens)
        if not self._backlog and self._decodes:
            self._backlog_steps = 1.5
        self._backlog_steps += -(-tokens // max(1, self._chunk - self._decodes))
        self._backlog = wait_s * self.speed
        self._decodes += 1
        self._context += tokens
        self._step = None
        self._sent[request] = _Sent(tpot_s, self._at + wait_s)
        self._starting.append((self._at + wait_s, request))

    def give_back(self, request: int, tokens: int) -> None:
        """A request is over; `tokens` are those that it held. Call `advance` before."""
        self._decodes = max(0, self._decodes - 1)
        self._context = max(0.0, self._context - tokens) if self._decodes else 0.0
        self._step = None
        sent = self._sent.pop(request, None)
        if not self._decodes:
            self._backlog = self._backlog_steps = 0.0
        elif sent is not None and sent.steps is None:
            # Prompts are computed in order: what was before this one is done, or it was dropped.
            left = max(0.0, self._backlog - (sent.first_s - self._at) * self.speed)
            self._backlog_steps *= left / self._backlog if self._backlog else 0.0
            self._backlog = left

    def calibrate(self, generated_tokens: int) -> None:
        """Take the engine's own count of generated tokens, a counter; call `advance` before."""
        seen = generated_tokens - self._reported
        if self._reported >= 0 <= seen and self._generated >= _LEAST_TOKENS:
            ratio = max(seen, 1) / self._generated
            self._reports += 1
            pace = self.speed * ratio ** max(_WEIGHT, 1 / self._reports)
            self.speed = min(max(pace, _SPEEDS[0]), _SPEEDS[1])
        if self._reported < 0 or seen < 0 or self._generated >= _LEAST_TOKENS:
            self._reported, self._generated = generated_tokens, 0.0

    def credit_s(self, prefill_tokens: int) -> float:
        """How far everybody here would be ahead of its promised pace after one more prefill.

        Of the one that is the least ahead; infinite where no pace was promised. A request that has
        made s steps in t seconds is `tpot_s * s - t` ahead.
        """
        steps, takes_s = -(-prefill_tokens // self._chunk), self.prefill_s(prefill_tokens)
        least = math.inf
        for one in self._sent.values():
            if one.tpot_s is not None:
                ahead = one.tpot_s * steps - takes_s
                if one.steps is not None:
                    ahead += one.tpot_s * (self.steps - one.steps) - (self._at - one.first_s)
                least = min(least, ahead)
        return least

    def _seconds(self, prefill: int) -> float:
        return self._fit.seconds(prefill, self._decodes, int(self._context))

    def _decode_step(self) -> float:
        """Seconds of a step of decodes by the fit; 0 when nothing decodes."""
        if self._step is None:
            self._step = self._seconds(0)
        return self._step

    def _prefill(self, tokens: int) -> float:
        whole, rest = divmod(tokens, max(1, self._chunk - self._decodes))
        seconds = whole * self._seconds(max(1, self._chunk - self._decodes)) if whole else 0.0
        return seconds + (self._seconds(rest) if rest else 0.0)
