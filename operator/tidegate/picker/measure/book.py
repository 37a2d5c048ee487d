"""Joins what Envoy measured with what the picker knows of the request, and keeps the account.

A request that an engine was given stands here until its log entry comes. Where none comes within ten
seconds of its end (another gateway stands in front, or the log was lost), it is entered by estimates,
and counted as such. Without I/O or clock: every method that needs the time is given it, in seconds.
"""

import itertools
import math
import secrets
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from tidegate.core import promises
from tidegate.core.attainment import Served, Window, kept
from tidegate.core.flowtypes import Ask, ModelKey
from tidegate.core.outputs import Outputs
from tidegate.core.steptime import StepFit
from tidegate.core.types import Objectives
from tidegate.picker.measure.exports import LABELS, Measures, Top
from tidegate.picker.measure.record import End, Record, Source

MOST_OPEN: Final = 50_000
"""Requests that stand here at once; of more the oldest are forgotten."""
GRACE_S: Final = 10.0
_RECENT: Final = 512
_RECENT_S: Final = 300.0
_WORDS: Final = {True: "kept", False: "missed", None: "untold"}

Tell = Callable[[int, int, int], None]
"""Told a request's number, its prompt and its output tokens."""


@dataclass(slots=True)
class _Open:
    """A request whose entry has not come. `arrived_s` is by Envoy's clock, the rest by the picker's.

    `last`: it is not tried again, should its engine go before it answers.
    """

    ask: Ask
    secret: str
    promised: Objectives
    gpus: int
    since_s: float
    arrived_s: float | None
    last: bool = False
    ended_s: float | None = None
    whole: bool = False


@dataclass(slots=True)
class _Standing:
    """How a class of a model stands."""

    promised: Objectives
    window: Window
    recent: deque[tuple[float, float | None, float | None]] = field(
        default_factory=lambda: deque(maxlen=_RECENT)
    )


class Book:
    """The account of one picker."""

    def __init__(self, measures: Measures, fit: StepFit, tell: Tell) -> None:
        self.outputs = Outputs()
        self.tenants = Top()
        self._measures, self._fit, self._tell = measures, fit, tell
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._ended: deque[tuple[float, int]] = deque()
        self._standings: dict[tuple[ModelKey, str], _Standing] = {}

    # ── a request's life ────────────────────────────────────────────────────────────────────────

    def handed(
        self,
        ask: Ask,
        promised: Objectives,
        now: float,
        *,
        arrived_s: float | None = None,
        last: bool = False,
        gpus: int = 1,
    ) -> str:
        """Enter a request that an engine is given; returns the value of its header.

        Nobody but Envoy and that engine sees it, and it cannot be guessed.
        """
        one = _Open(ask, secrets.token_hex(8), promised, gpus, now, arrived_s, last)
        self._open[ask.id] = one
        while len(self._open) > MOST_OPEN:
            self._open.popitem(last=False)
            self._count("forgotten")
        return f"{ask.id}-{one.secret}"

    def refused(self, ask: Ask, promised: Objectives, now: float) -> None:
        """A request was turned away by the queue: nothing of what was promised was kept."""
        if promised.ttft_s is not None or promised.completion_s is not None or promised.tpot_s is not None:
            self._judge(ask, promised, False, now)

    def ended(self, number: int, now: float, *, whole: bool) -> None:
        """The picker's own exchange with Envoy is over."""
        one = self._open.get(number)
        if one is not None and one.ended_s is None:
            one.ended_s, one.whole = now, whole
            self._ended.append((now, number))

    def take(self, record: Record | None, now: float) -> None:
        """Take in an entry of Envoy's log."""
        if record is None:
            self._count("unreadable")
            return
        number, _, secret = record.request.partition("-")
        key = int(number) if number.isascii() and number.isdecimal() and len(number) < 19 else 0
        one = self._open.get(key)
        if one is None or one.secret != secret:
            self._count("unknown")
            return
        del self._open[key]
        self._count("measured")
        self._measured(one, record, now)

    def sweep(self, now: float) -> None:
        """Enter by estimates what no entry came for."""
        while self._ended and now - self._ended[0][0] >= GRACE_S:
            one = self._open.pop(self._ended.popleft()[1], None)
            if one is not None:
                self._count("estimated")
                self._estimated(one, now)

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _measured(self, one: _Open, record: Record, now: float) -> None:
        ask, began_s = one.ask, _began(one, record)
        if record.status == 200:
            prompt = ask.prompt_tokens if record.prompt_tokens is None else record.prompt_tokens
            output = ask.output_tokens if record.output_tokens is None else record.output_tokens
            got = Served(
                prompt,
                output if ask.output_tokens else 0,
                ask.streamed,
                None if record.first_s is None else max(0.0, record.first_s - began_s),
                None if record.ended_s is None else max(0.0, record.ended_s - began_s),
            )
            self._enter(one, got, record.source, record.end, now)
            if record.output_tokens is not None:
                self._tell(ask.id, got.prompt_tokens, got.output_tokens)
            return
        # It never began to answer: if its engine went, its next attempt is another request here.
        # An engine's own error goes to the client as it is.
        failed = record.by_engine and record.status >= 500
        if failed or (record.end is End.LOST and one.last):
            self.refused(ask, one.promised, now)
        elif record.end is End.LEFT:
            waited_s = (record.ended_s or record.started_s) - began_s
            got = Served(ask.prompt_tokens, 0, ask.streamed)
            self._left(one, got, waited_s, now)

    def _estimated(self, one: _Open, now: float) -> None:
        if one.whole and one.ended_s is not None:
            took_s = one.ended_s - one.since_s
            got = Served(one.ask.prompt_tokens, one.ask.output_tokens, one.ask.streamed, None, took_s)
            self._enter(one, got, Source.ESTIMATE, End.WHOLE, now)

    def _enter(self, one: _Open, got: Served, source: Source, end: End, now: float) -> None:
        ask = one.ask
        series = self._measures.of(ask.model, ask.qos_class)
        gpu_s = one.gpus * promises.gpu_s(self._fit, got.prompt_tokens, got.output_tokens)
        exact = source if source is Source.USAGE else Source.ESTIMATE
        series.tokens["prompt", exact.value] += got.prompt_tokens
        series.tokens["output", source.value] += got.output_tokens
        series.gpu_s += gpu_s
        if ask.tenant:
            spent = (float(got.prompt_tokens), float(got.output_tokens), gpu_s)
            self.tenants.add(ask.model, ask.qos_class, ask.tenant, spent)
        if got.streamed and got.ttft_s is not None:
            series.ttft.observe(got.ttft_s)
        if end is End.LEFT:
            self._left(one, got, math.inf if got.completion_s is None else got.completion_s, now)
            return
        if end is End.LOST:
            self._judge(ask, one.promised, False, now)
            return
        tpot_s = got.tpot_s
        if tpot_s is not None:
            series.tpot.observe(tpot_s)
        if got.completion_s is not None:
            series.completion.observe(got.completion_s)
        if source is not Source.ESTIMATE and ask.output_tokens:
            self.outputs.made(ask.model, ask.qos_class, ask.tenant, got.output_tokens)
        standing = self._standing(ask, one.promised)
        standing.recent.append((now, got.ttft_s if got.streamed else None, tpot_s))
        self._judge(ask, one.promised, kept(one.promised, got), now)

    def _left(self, one: _Open, got: Served, after_s: float, now: float) -> None:
        """A client that went before anything was late is nobody's fault; one that was kept waiting is."""
        due_s = promises.first_token_due(one.promised, got.prompt_tokens, 0.0)
        first_s = got.ttft_s if got.ttft_s is not None else after_s
        late = got.streamed and math.isfinite(first_s) and first_s > due_s
        self._judge(one.ask, one.promised, False if late else None, now)

    def _judge(self, ask: Ask, promised: Objectives, verdict: bool | None, now: float) -> None:
        self._measures.of(ask.model, ask.qos_class).promises[_WORDS[verdict]] += 1
        if verdict is not None:
            self._standing(ask, promised).window.add(now, kept=verdict)

    def _standing(self, ask: Ask, promised: Objectives) -> _Standing:
        key = (ask.model, ask.qos_class)
        standing = self._standings.get(key)
        if standing is None or standing.window.width_s != promised.window_s:
            standing = self._standings[key] = _Standing(promised, Window(promised.window_s))
        standing.promised = promised
        return standing

    def _count(self, outcome: str) -> None:
        self._measures.records[outcome] += 1

    # ── what it looks like ──────────────────────────────────────────────────────────────────────

    def attainment(self, now: float) -> Iterator[tuple[ModelKey, str, Objectives, int, int]]:
        """Of every class of a model: what is promised, how many were kept lately, and of how many."""
        for (model, qos_class), standing in sorted(self._standings.items(), key=lambda item: item[0]):
            good, judged = standing.window.counts(now)
            yield model, qos_class, standing.promised, good, judged

    def describe(self, now: float) -> list[dict[str, Any]]:
        """Attainment, and TTFT and TPOT of the last five minutes (512 answers at most), as JSON values."""
        rows = []
        for model, qos_class, promised, good, judged in self.attainment(now):
            recent = [x for x in self._standings[model, qos_class].recent if now - x[0] <= _RECENT_S]
            ttft, tpot = ([x[i] for x in recent if x[i] is not None] for i in (1, 2))
            rows.append(
                {
                    "namespace": model[0],
                    "model": model[1],
                    "qos_class": qos_class,
                    "attainment": good / judged if judged else None,
                    "attainment_objective": promised.attainment,
                    "window_s": promised.window_s,
                    "kept": good,
                    "judged": judged,
                    "answers": len(recent),
                    **_percentiles("ttft", ttft),
                    **_percentiles("tpot", tpot),
                }
            )
        return rows


def _began(one: _Open, record: Record) -> float:
    """When the client's request came. An attempt began later than its request, but not by days."""
    if one.arrived_s is not None and 0 <= record.started_s - one.arrived_s <= 86400:
        return one.arrived_s
    return record.started_s


def _percentiles(name: str, values: list[Any]) -> dict[str, float | None]:
    ordered = sorted(values)

    def at(share: float) -> float | None:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 6) if ordered else None

    return {f"{name}_p50_s": at(0.5), f"{name}_p99_s": at(0.99)}


class Attainment(Collector):
    """Attainment as gauges. Those of several pickers add up by `kept` and `judged`."""

    def __init__(self, book: Book, clock: Callable[[], float]) -> None:
        self._book, self._clock = book, clock

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the gauges of every class of a model that was judged within its window."""
        families = [
            GaugeMetricFamily(name, text, labels=LABELS)
            for name, text in (
                ("tidegate_attainment_ratio", "Requests that met all objectives, of those judged."),
                ("tidegate_attainment_objective_ratio", "What that is to be, by attainmentPercent."),
                ("tidegate_attainment_kept_requests", "Requests in the window that met all objectives."),
                ("tidegate_attainment_judged_requests", "Requests in the window that could be judged."),
            )
        ]
        for model, qos_class, promised, good, judged in self._book.attainment(self._clock()):
            values = (good / judged, promised.attainment, good, judged) if judged else ()
            for family, value in zip(families, itertools.islice(values, 4), strict=False):
                family.add_metric((*model, qos_class), value)
        yield from families
