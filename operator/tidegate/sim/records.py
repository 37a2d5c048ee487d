"""What came of each request, and what that amounts to by class and tenant."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import fmean
from typing import Any

from tidegate.core.types import Objectives


class State(StrEnum):
    """How a request stands."""

    OPEN = "open"
    ANSWERED = "answered"
    REFUSED = "refused"
    LOST = "lost"


@dataclass(slots=True)
class Record:
    """One request. Times are seconds of the run, None what did not happen; lengths are tokens.

    `computed_before` and `computed` are tokens that were computed of it when the window began and
    ended, where it was unfinished then. `stays` are (sent, ended) at replicas that died.
    """

    number: int
    stream: str
    qos_class: str
    tenant: str
    arrival_s: float
    prompt: int
    output: int
    sent_s: float | None = None
    first_s: float | None = None
    finish_s: float | None = None
    address: str = ""
    state: State = State.OPEN
    retries: int = 0
    recalls: int = 0
    computed_before: int = 0
    computed: int = 0
    stays: tuple[tuple[float, float], ...] = ()

    @property
    def ttft_s(self) -> float:
        """Time to first token; infinite for who got none, so that it stays in percentiles."""
        return math.inf if self.first_s is None or self.state is State.LOST else self.first_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first; 0 for an answer of one token, infinite unfinished."""
        if self.finish_s is None or self.first_s is None:
            return math.inf
        return (self.finish_s - self.first_s) / (self.output - 1) if self.output > 1 else 0.0

    @property
    def completion_s(self) -> float:
        """Time to the last token."""
        return math.inf if self.finish_s is None else self.finish_s - self.arrival_s

    def kept(self, promised: Objectives) -> bool:
        """Whether all objectives were met."""
        more = promised.per_thousand_prompt_tokens_s * self.prompt / 1000
        return (
            self.state is State.ANSWERED
            and (promised.ttft_s is None or self.ttft_s <= promised.ttft_s + more)
            and (promised.tpot_s is None or self.tpot_s <= promised.tpot_s)
            and (promised.completion_s is None or self.completion_s <= promised.completion_s)
        )


@dataclass(frozen=True, slots=True)
class Figures:
    """What a class or tenant got. Requests are those that arrived in [warm-up, end − deadline].

    `tokens_per_s` are prompt and output tokens computed in the window, whoever they were for, less
    what preemptions threw away.
    """

    requests: int
    answered: int
    refused: int
    lost: int
    attainment: float
    ttft_s: dict[str, float] = field(default_factory=dict)
    tpot_s: dict[str, float] = field(default_factory=dict)
    completion_s: dict[str, float] = field(default_factory=dict)
    tokens_per_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is infinite is null."""
        spread = {name: getattr(self, name) for name in ("ttft_s", "tpot_s", "completion_s")}
        finite = {
            name: {k: v if math.isfinite(v) else None for k, v in by.items()} for name, by in spread.items()
        }
        counts = {name: getattr(self, name) for name in ("requests", "answered", "refused", "lost")}
        return {**counts, "attainment": self.attainment, **finite, "tokens_per_s": self.tokens_per_s}


def deadline_s(promised: Objectives) -> float:
    """How long a request of a class may take to be judged: what arrives later than that is not."""
    if promised.completion_s is not None:
        return promised.completion_s
    # Long enough for the answers of the traces at the promised pace: 1,000 tokens at 50 ms are 50 s.
    return (promised.ttft_s or 0.0) + 1000 * (promised.tpot_s or 0.0)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share of the sorted values lies; nearest rank from above."""
    if not values:
        return math.nan
    return values[min(len(values) - 1, math.ceil(share * len(values)) - 1 if share else 0)]


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, 90th, 99th percentile and mean."""
    ordered = sorted(values)
    if not ordered:
        return {}
    found = {name: quantile(ordered, share) for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}
    return {**found, "mean": fmean(ordered)}


def judged(records: Iterable[Record], promised: Objectives, begin_s: float, end_s: float) -> list[Record]:
    """Those that came in the window, early enough to be judged."""
    last_s = end_s - deadline_s(promised)
    return [r for r in records if begin_s <= r.arrival_s <= last_s]


def harvest_tokens(records: Iterable[Record], begin_s: float, end_s: float) -> float:
    """Prompt and output tokens computed between two times, each request counted by its progress."""
    total = 0
    for r in records:
        if r.finish_s is not None:
            # The last output token is never computed on.
            total += (r.prompt + r.output - 1 - r.computed_before) if begin_s <= r.finish_s <= end_s else 0
        else:
            total += r.computed - r.computed_before
    return float(total)


def figures(records: Iterable[Record], promised: Objectives, begin_s: float, end_s: float) -> Figures:
    """What these requests, all of one class, got."""
    records = list(records)
    mine = judged(records, promised, begin_s, end_s)
    states = [r.state for r in mine]
    return Figures(
        requests=len(mine),
        answered=states.count(State.ANSWERED),
        refused=states.count(State.REFUSED),
        lost=states.count(State.LOST),
        attainment=sum(r.kept(promised) for r in mine) / len(mine) if mine else math.nan,
        ttft_s=spread(r.ttft_s for r in mine),
        tpot_s=spread(r.tpot_s for r in mine),
        completion_s=spread(r.completion_s for r in mine),
        tokens_per_s=harvest_tokens(records, begin_s, end_s) / (end_s - begin_s),
    )
