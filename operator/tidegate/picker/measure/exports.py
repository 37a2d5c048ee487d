"""What was measured, as metrics. Their labels are bounded: tenants by name are the heaviest few."""

import bisect
import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Final

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from tidegate.core.flowtypes import ModelKey

LABELS: Final = ("namespace", "model", "qos_class")
OTHER: Final = "other"
"""The tenant label of all that are not named."""
NAMED_TENANTS: Final = 100
_CANDIDATES: Final = 1000

_TTFT_S: Final = (
    0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 30, 60, 120,
)  # fmt: skip
_TPOT_S: Final = (
    0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1,
)  # fmt: skip
_COMPLETION_S: Final = (0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 86400)

Spent = tuple[float, float, float]
"""Prompt tokens, output tokens, GPU seconds."""


class Top:
    """What tenants used: the heaviest by name, all others together.

    Every series only grows. A tenant that overtakes gets its name from then on, at zero; the one that
    it takes the place of is counted with the others from then on.
    """

    def __init__(self, most: int = NAMED_TENANTS) -> None:
        self._most = most
        self._named: dict[tuple[str, ...], Spent] = {}
        self._rest: dict[tuple[str, ...], Spent] = {}
        self._candidates: OrderedDict[tuple[str, ...], float] = OrderedDict()

    def add(self, model: ModelKey, qos_class: str, tenant: str, spent: Spent) -> None:
        """Count what one request used."""
        key = (*model, qos_class, tenant)
        if key in self._named or len(self._named) < self._most:
            self._named[key] = _sum(self._named.get(key), spent)
            return
        rest = (*model, qos_class, OTHER)
        self._rest[rest] = _sum(self._rest.get(rest), spent)
        weight = self._candidates[key] = self._candidates.pop(key, 0.0) + spent[2]
        if len(self._candidates) > _CANDIDATES:
            self._candidates.popitem(last=False)
        least = min(self._named, key=lambda k: self._named[k][2])
        if weight > 2 * self._named[least][2]:
            del self._named[least]
            self._named[key] = (0.0, 0.0, 0.0)
            self._candidates.pop(key, None)

    def __iter__(self) -> Iterator[tuple[tuple[str, ...], Spent]]:
        yield from self._named.items()
        yield from self._rest.items()


def _sum(one: Spent | None, other: Spent) -> Spent:
    return (one[0] + other[0], one[1] + other[1], one[2] + other[2]) if one else other


class Spread:
    """A histogram: how many values, in which bucket, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Count one."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """As Prometheus wants them: cumulative."""
        names = [*(str(float(b)) for b in self.bounds), "+Inf"]
        return list(zip(names, itertools.accumulate(map(float, self.counts)), strict=True))


class Series:
    """What was measured of one class of one model."""

    __slots__ = ("completion", "gpu_s", "promises", "tokens", "tpot", "ttft")

    def __init__(self) -> None:
        self.ttft, self.tpot, self.completion = Spread(_TTFT_S), Spread(_TPOT_S), Spread(_COMPLETION_S)
        self.tokens: Counter[tuple[str, str]] = Counter()
        """By kind, prompt or output, and source."""
        self.promises = dict.fromkeys(("kept", "missed", "untold"), 0)
        self.gpu_s = 0.0


class Measures(Collector):
    """All that was measured, counted in plain numbers: prometheus_client's own cost more than the rest."""

    def __init__(self) -> None:
        self._series: dict[tuple[ModelKey, str], Series] = {}
        self.records = dict.fromkeys(("measured", "estimated", "unknown", "unreadable", "forgotten"), 0)

    def of(self, model: ModelKey, qos_class: str) -> Series:
        """The series of one class of one model."""
        key = (model, qos_class)
        found = self._series.get(key)
        if found is None:
            found = self._series[key] = Series()
        return found

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        times = [
            HistogramMetricFamily(name, text, labels=LABELS)
            for name, text in (
                (
                    "tidegate_ttft_seconds",
                    "From a request's arrival to its first token, of streamed answers, as Envoy saw it.",
                ),
                (
                    "tidegate_tpot_seconds",
                    "Mean time between two output tokens of a streamed answer, as Envoy saw it.",
                ),
                (
                    "tidegate_completion_seconds",
                    "From a request's arrival to the last byte of its answer, of answers that came whole.",
                ),
            )
        ]
        tokens = CounterMetricFamily(
            "tidegate_served_tokens",
            "Tokens of answers. kind: prompt or output; source: usage (the engine's account), "
            "events (counted in the stream) or estimate.",
            labels=(*LABELS, "kind", "source"),
        )
        promises = CounterMetricFamily(
            "tidegate_promises",
            "Requests by whether all objectives were met: kept, missed, or untold.",
            labels=(*LABELS, "outcome"),
        )
        gpu_s = CounterMetricFamily(
            "tidegate_served_gpu_seconds",
            "GPU time of answers by the step-time fit, times the GPUs of a replica.",
            labels=LABELS,
        )
        for (model, qos_class), series in self._series.items():
            labels = (*model, qos_class)
            for family, spread in zip(times, (series.ttft, series.tpot, series.completion), strict=True):
                family.add_metric(labels, spread.buckets(), spread.total)
            for key, count in series.tokens.items():
                tokens.add_metric((*labels, *key), count)
            for outcome, count in series.promises.items():
                promises.add_metric((*labels, outcome), count)
            gpu_s.add_metric(labels, series.gpu_s)
        yield from (*times, tokens, promises, gpu_s, self._records())

    def _records(self) -> CounterMetricFamily:
        records = CounterMetricFamily(
            "tidegate_measurements",
            "Requests and log entries: measured, estimated (no entry came), unknown, unreadable, forgotten.",
            labels=("outcome",),
        )
        for outcome, count in self.records.items():
            records.add_metric((outcome,), count)
        return records


class Tenants(Collector):
    """The ledger by tenant."""

    def __init__(self, top: Top) -> None:
        self._top = top

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield both families."""
        tokens = CounterMetricFamily(
            "tidegate_tenant_tokens",
            f"Tokens by tenant: the {NAMED_TENANTS} heaviest by name, the rest as `{OTHER}`.",
            labels=(*LABELS, "tenant", "kind"),
        )
        gpu_s = CounterMetricFamily(
            "tidegate_tenant_gpu_seconds", "GPU time by tenant, likewise.", labels=(*LABELS, "tenant")
        )
        for key, (prompt, output, seconds) in self._top:
            tokens.add_metric((*key, "prompt"), prompt)
            tokens.add_metric((*key, "output"), output)
            gpu_s.add_metric(key, seconds)
        yield tokens
        yield gpu_s
