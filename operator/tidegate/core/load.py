"""What one endpoint carries: our own requests exactly, everybody else's as the engine reports it."""

import math
from dataclasses import dataclass
from typing import Any

from tidegate.core.flowtypes import Ask, Endpoint
from tidegate.core.forecast import Forecast
from tidegate.core.steptime import StepFit


@dataclass(frozen=True, slots=True)
class EngineReport:
    """An engine's own word at `time_s`. `kv_tokens` is its capacity, `kv_usage` 0…1 of it.

    `generated_tokens` is a counter of all output tokens so far, None where the engine has none.
    """

    time_s: float
    running: int
    waiting: int
    kv_usage: float | None = None
    kv_tokens: int | None = None
    generated_tokens: int | None = None


class Rate:
    """Events, or amounts, per second, forgotten exponentially over `tau_s` seconds."""

    __slots__ = ("_at", "_tau", "_value")

    def __init__(self, tau_s: float) -> None:
        self._tau, self._value, self._at = tau_s, 0.0, 0.0

    def add(self, now: float, amount: float = 1.0) -> None:
        """Count one event."""
        self._value = self.value(now) + amount / self._tau
        self._at = now

    def raise_to(self, value: float, now: float) -> None:
        """Take a rate that is known to be at least this."""
        self._value, self._at = max(self.value(now), value), now

    def deviation(self, now: float) -> float:
        """The standard deviation of the rate, were the events a Poisson process."""
        return math.sqrt(self.value(now) / (2 * self._tau))

    def value(self, now: float) -> float:
        """The rate as of `now`."""
        return self._value * math.exp(min(0.0, self._at - now) / self._tau)


class Mean:
    """A mean that forgets: each new value weighs `alpha`, the first one all."""

    __slots__ = ("_alpha", "_value")

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha
        self._value: float | None = None

    def add(self, value: float) -> None:
        """Take one more."""
        self._value = value if self._value is None else self._value + self._alpha * (value - self._value)

    def value(self, prior: float) -> float:
        """The mean, or `prior` before anything was seen."""
        return prior if self._value is None else self._value


class Load:
    """The state of one endpoint. `requests` and `tokens` are ours; `foreign…` are not."""

    __slots__ = (
        "_known_since",
        "_report",
        "address",
        "draining",
        "forecast",
        "foreign",
        "foreign_tokens",
        "gone",
        "kv_tokens",
        "lane",
        "lent",
        "model",
        "patient",
        "ready",
        "requests",
        "slots",
        "tokens",
    )

    def __init__(self, address: str, now: float, fit: StepFit) -> None:
        self.address = address
        self.model: tuple[str, str] = ("", "")
        self.lane = ""
        self.slots = 0
        self.ready = self.draining = self.gone = self.lent = False
        self.requests = self.tokens = self.foreign = self.foreign_tokens = 0
        self.kv_tokens: int | None = None
        self._report: EngineReport | None = None
        self._known_since = now
        self.patient = 0
        self.forecast = Forecast(fit, 2048, now)

    def become(self, facts: Endpoint, fit: StepFit) -> None:
        """Take the endpoint's facts as they are now."""
        self.forecast.become(fit, facts.chunk)
        self.model, self.lane, self.slots = facts.model, facts.lane, facts.slots
        self.ready, self.draining, self.lent = facts.ready, facts.draining, facts.lent
        self.gone = False

    def leave(self) -> None:
        """The endpoint is gone; only what is in flight keeps this."""
        self.ready, self.gone = False, True

    def take(self, ask: Ask, now: float, *, tpot_s: float | None, priority: int, patient: bool) -> float:
        """Count a request in, with the prefill that it queues; returns the steps made so far."""
        self.requests += 1
        self.patient += patient
        self.tokens += ask.tokens
        self.forecast.advance(now)
        self.forecast.take(ask.id, ask.prompt_tokens, tpot_s, priority)
        return self.forecast.steps

    def give_back(self, ask: Ask, now: float, steps: float, *, patient: bool, served: bool) -> None:
        """Count a request out; `steps` is what `take` returned."""
        self.requests -= 1
        self.patient -= patient
        self.tokens -= ask.tokens
        self.forecast.advance(now)
        self.forecast.give_back(ask.id, ask.prompt_tokens + int(self.forecast.steps - steps), served=served)

    @property
    def drained(self) -> bool:
        """Whether nothing more is sent here, and what others run here is known from the engine."""
        return self.gone or (self.draining and self._report is not None)

    def correct(self, report: EngineReport, own_before: int, own_tokens_before: int) -> None:
        """Take the engine's counts: what exceeds ours runs there without us.

        Ours from before and after the question bound what it may have seen of us, so that a
        request on its way is not taken for somebody else's. After a restart of the picker this is
        how what still runs is found again.
        """
        own = max(own_before, self.requests)
        self.foreign = max(0, report.running + report.waiting - own)
        self.kv_tokens = report.kv_tokens or self.kv_tokens
        self.foreign_tokens = 0
        if self.kv_tokens and report.kv_usage is not None:
            held = int(report.kv_usage * self.kv_tokens)
            self.foreign_tokens = max(0, held - max(own_tokens_before, self.tokens))
        if report.generated_tokens is not None:
            self.forecast.advance(report.time_s)
            self.forecast.calibrate(report.generated_tokens, report.time_s, alone=not self.foreign)
        self._report = report

    def usable_slots(self, now: float, grace_s: float, stale_s: float) -> int:
        """Slots that may be filled: none before the first report, a quarter less on stale ones.

        The first report is waited for `grace_s` at most: an engine without metrics serves too.
        """
        if self._report is None:
            return 0 if now - self._known_since < grace_s else self._careful()
        return self.slots if now - self._report.time_s < stale_s else self._careful()

    def _careful(self) -> int:
        return max(1, self.slots - math.ceil(self.slots / 4)) if self.slots else 0

    def describe(self, now: float, stale_s: float) -> dict[str, Any]:
        """The endpoint as JSON values."""
        age = None if self._report is None else round(now - self._report.time_s, 3)
        return {
            "address": self.address,
            "namespace": self.model[0],
            "model": self.model[1],
            "lane": self.lane,
            "ready": self.ready,
            "draining": self.draining,
            "lent": self.lent,
            "slots": self.slots,
            "requests": self.requests,
            "foreign_requests": self.foreign,
            "kv_tokens": self.kv_tokens,
            "kv_used": self.tokens + self.foreign_tokens,
            "prefill_s": round(self.forecast.left_s(now), 3),
            "speed": round(self.forecast.speed, 2),
            "report_age_s": age,
            "stale": age is None or age >= stale_s,
        }
