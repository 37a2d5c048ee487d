"""What an engine is doing now, as far as it follows from what was sent to it and when.

A scrape is a second old, and the next arrival lands in between. How long a step takes is known
(`core.steptime`), and every request that is sent or ends is seen: so how much prefill is still
queued, how long a step is and how many steps were made can be reckoned at any moment.

An engine is faster or slower than the fit says, so its own count of generated tokens, scraped now
and then, corrects the pace; and a request that was served before its first token was expected shows
that all prefill up to its own is done.
"""

import bisect
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from tidegate.core.pace import Pace
from tidegate.core.steptime import StepFit

_LOST_S: Final = 1.0
"""Who is this far behind its pace has lost it: holding others back would not bring it back."""
_DONE_S: Final = 1e-6
"""Less prefill than this is none: what sums of floats leave over."""


@dataclass(slots=True)
class _Sent:
    """A request in flight: when its first token is expected, until it is `there`.

    `prefill` is what its prompt takes by the fit, seconds. `pace`: with whom it shares the pace that it
    was promised; `begun` is where it stands among them.
    """

    prefill: float
    first_s: float
    pace: "_Pace | None"
    there: bool = False
    begun: float = 0.0


@dataclass(slots=True)
class _Pace:
    """Those who were promised one pace, by one priority, and have not lost it.

    `waiting`: how many have no first token yet. `begun`: of the others `tpot_s * steps - time` as of
    their first tokens, ascending, with their ids: the last one is the least ahead.
    """

    tpot_s: float
    priority: int
    waiting: int = 0
    begun: list[tuple[float, int]] = field(default_factory=list)


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
        "_pace",
        "_paces",
        "_prompt",
        "_sent",
        "_starting",
        "_step",
        "speed",
        "steps",
    )

    def __init__(self, fit: StepFit, chunk: int, now: float) -> None:
        self._fit, self._chunk, self._at = fit, chunk, now
        self.steps = 0.0
        """Steps made so far, as of the last `advance`."""
        # Seconds of these are the fit's: the engine's own are so many divided by `speed`.
        self._backlog, self._backlog_steps = 0.0, 0.0
        self._step: float | None = None
        self._decodes, self._context = 0, 0.0
        self._pace = Pace(now)
        self.speed = self._pace.speed
        """How many times as fast as the fit it was seen to be."""
        self._sent: dict[int, _Sent] = {}
        self._starting: deque[int] = deque()
        self._paces: dict[tuple[float, int], _Pace] = {}
        # As `_step` what follows from the rest, until that changes: see `_changed`.
        self._prompt: tuple[int, float] | None = None

    def become(self, fit: StepFit, chunk: int) -> None:
        """Take the engine's own settings."""
        if (fit, chunk) != (self._fit, self._chunk):
            self._fit, self._chunk = fit, chunk
            self._changed()

    @property
    def backlog_s(self) -> float:
        """How long until all prefill that was sent is computed, as of the last `advance`."""
        return self._backlog / self.speed

    def left_s(self, now: float) -> float:
        """The same as of `now`, for who only looks: nothing changes."""
        return max(0.0, self.backlog_s - (now - self._at))

    def turn_at(self, ahead_s: float) -> float:
        """When more may be sent: once `ahead_s` of prefill is left, or none where less is left already.

        Infinite where there is none, so that nobody waits for it.
        """
        left_s = self._backlog / self.speed
        if not left_s:
            return math.inf
        clear_at = self._at + left_s
        return clear_at - ahead_s if left_s > ahead_s else clear_at

    def advance(self, now: float) -> None:
        """Let time pass."""
        passed = (now - self._at) * self.speed
        if passed <= 0:
            return
        self._at = now
        steps, decodes = 0.0, self._decodes
        if self._backlog > 0:
            prefilling = min(passed, self._backlog)
            steps = self._backlog_steps * prefilling / self._backlog
            passed -= prefilling
            self._leave_backlog(self._backlog - prefilling)
        if passed > 0 and decodes:
            steps += passed / self._decode_step()
        made = steps * decodes
        self.steps += steps
        self._context += made
        self._pace.expect(made, now)
        self._step = self._prompt = None  # as `_changed` does: this is called the most
        if self._starting:
            self._start()

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

    def take(self, request: int, tokens: int, tpot_s: float | None, priority: int = 0) -> None:
        """A request is sent; call `advance` before."""
        wait_s, prefill = self.first_token_s(tokens), self._prefill(tokens)
        if not self._backlog and self._decodes:
            self._backlog_steps = 1.5
        self._backlog_steps += -(-tokens // max(1, self._chunk - self._decodes))
        self._backlog = wait_s * self.speed
        self._decodes += 1
        self._context += tokens
        self._changed()
        pace = None
        if tpot_s is not None:
            pace = self._paces.setdefault((tpot_s, priority), _Pace(tpot_s, priority))
            pace.waiting += 1
        self._sent[request] = _Sent(prefill, self._at + wait_s, pace)
        self._starting.append(request)

    def give_back(self, request: int, tokens: int, *, served: bool = True) -> None:
        """A request is over; `tokens` are those that it held. Call `advance` before.

        `served` False: it was refused or dropped, so that it proves nothing of what was before it.
        """
        self._decodes = max(0, self._decodes - 1)
        self._context = max(0.0, self._context - tokens) if self._decodes else 0.0
        self._changed()
        sent = self._sent.pop(request, None)
        if sent is not None and sent.pace is not None:
            self._leave_pace(request, sent, sent.pace)
        if not self._decodes:
            self._leave_backlog(0.0)
        elif sent is not None and not sent.there:
            # Prompts are computed in order: what was before one that was served is done.
            done = (sent.first_s - self._at) * self.speed if served else sent.prefill
            self._leave_backlog(self._backlog - max(0.0, done))
        self._start()

    def calibrate(self, generated_tokens: int, at: float, *, alone: bool = True) -> None:
        """Take the engine's own count of generated tokens as of `at`; call `advance` before. See `Pace`."""
        self._pace.count(generated_tokens, at, self._at, alone=alone)
        self.speed = self._pace.speed

    def credit_s(self, prefill_tokens: int, above: float = -math.inf) -> float:
        """How far everybody here would be ahead of its promised pace after one more prefill.

        Of the one that is the least ahead, among those of a priority above `above`; infinite where no
        pace was promised, or what was promised is lost: by who is far behind, or where a step of
        decodes alone takes longer. A request that has made s steps in t seconds is
        `tpot_s * s - t` ahead.
        """
        if not self._paces:
            return math.inf
        steps, takes_s = -(-prefill_tokens // self._chunk), self.prefill_s(prefill_tokens)
        step_s = self._decode_step() / self.speed
        least = math.inf
        for pace in self._paces.values():
            ahead = self._least_ahead(pace)
            if pace.priority > above and pace.tpot_s > step_s:
                least = min(least, ahead + pace.tpot_s * steps - takes_s)
        return least

    def decode_step_s(self, fewer: int = 0, tokens: int = 0) -> float:
        """Seconds of a step of decodes, without so many requests that hold so many tokens."""
        context = max(0, int(self._context) - tokens)
        return self._fit.seconds(0, max(0, self._decodes - fewer), context) / self.speed

    def tightest_tpot_s(self) -> float | None:
        """The shortest time per token that somebody here was promised and has not lost; None without any."""
        self.give_up_lost()
        kept = (pace.tpot_s for pace in self._paces.values() if pace.waiting or pace.begun)
        return min(kept, default=None)

    def give_up_lost(self) -> None:
        """Leave out who has lost its pace by now, as `credit_s` does: it does not find it again."""
        for pace in self._paces.values():
            self._least_ahead(pace)

    def _least_ahead(self, pace: _Pace) -> float:
        """How far the one is ahead that is the least; infinite where there is none.

        Who has no first token yet is neither ahead nor behind, as one who begins now.
        """
        now_begun = pace.tpot_s * self.steps - self._at
        begun = pace.begun
        while begun and now_begun - begun[-1][0] < -_LOST_S:
            begun.pop()
        ahead = now_begun - begun[-1][0] if begun else math.inf
        return min(ahead, 0.0) if pace.waiting else ahead

    def _leave_pace(self, request: int, sent: _Sent, pace: _Pace) -> None:
        if not sent.there:
            pace.waiting -= 1
        else:
            place = bisect.bisect_left(pace.begun, (sent.begun, request))
            if pace.begun[place : place + 1] == [(sent.begun, request)]:
                del pace.begun[place]
        key = (pace.tpot_s, pace.priority)
        # After all of a pace have lost it others may have begun one anew.
        if not pace.waiting and not pace.begun and self._paces.get(key) is pace:
            del self._paces[key]

    def _changed(self) -> None:
        """Time, what decodes, its context or the settings are others: reckon anew."""
        self._step = self._prompt = None

    def _start(self) -> None:
        """Note who has its first token by now. Prompts are computed in the order in which they were sent."""
        starting = self._starting
        while starting:
            sent = self._sent.get(starting[0])
            if sent is not None and not sent.there:
                if self._backlog > 0 and sent.first_s > self._at:
                    return
                sent.there, pace = True, sent.pace
                if pace is not None:
                    sent.begun = pace.tpot_s * self.steps - self._at
                    pace.waiting -= 1
                    bisect.insort(pace.begun, (sent.begun, starting[0]))
            starting.popleft()

    def _leave_backlog(self, left: float) -> None:
        """So much prefill is left, and so many of its steps."""
        if left < _DONE_S:
            self._backlog = self._backlog_steps = 0.0
        elif left < self._backlog:
            self._backlog_steps *= left / self._backlog
            self._backlog = left

    def _seconds(self, prefill: int) -> float:
        return self._fit.seconds(prefill, self._decodes, int(self._context))

    def _decode_step(self) -> float:
        """Seconds of a step of decodes by the fit; 0 when nothing decodes."""
        if self._step is None:
            self._step = self._seconds(0)
        return self._step

    def _prefill(self, tokens: int) -> float:
        """Seconds of a prompt by the fit. Of one prompt it is asked several times in a row."""
        if self._prompt is not None and self._prompt[0] == tokens:
            return self._prompt[1]
        room = max(1, self._chunk - self._decodes)
        whole, rest = divmod(tokens, room)
        seconds = whole * self._seconds(room) if whole else 0.0
        if rest:
            seconds += self._seconds(rest)
        self._prompt = (tokens, seconds)
        return seconds
