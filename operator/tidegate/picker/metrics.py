"""What the picker tells Prometheus and the controller (names: docs/designs/0001-skeleton.md).

Labels come from objects that exist, never from what a client wrote, so their number is bounded; what
was measured of answers, and tenants, are in `measure.exports`.
"""

from collections import Counter as Tally
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from tidegate.core.flow import Ask, Flow, ModelKey
from tidegate.picker.measure.exports import Measures

ENDPOINT_INFLIGHT = "tidegate_endpoint_inflight_requests"
"""Read by the controller, which deletes a draining replica once this says 0 of it."""

_LABELS = ("namespace", "model", "qos_class")
_WAITS_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


@dataclass(frozen=True, slots=True)
class _Series:
    """The series of one model and class: looking them up by labels costs more than counting."""

    arrivals: Counter
    prompts: Counter
    outputs: Counter
    waits: Histogram


class Metrics:
    """All of the picker's metrics, in a registry of their own."""

    def __init__(self, flow: Flow) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tidegate_requests",
            "Requests that ended: answered, refused, cancelled by the client, recalled, or lost.",
            (*_LABELS, "outcome"),
            registry=self.registry,
        )
        self.arrivals = self._counter("tidegate_arrivals", "Requests admitted to the queue.")
        self.prompts = self._counter("tidegate_prompt_tokens", "Estimated prompt tokens of arrivals.")
        self.outputs = self._counter("tidegate_output_tokens", "Expected output tokens of arrivals.")
        self.recalls = self._counter(
            "tidegate_recalls",
            "Requests taken back from an engine, to come again: people waited beside them.",
        )
        self.waits = Histogram(
            "tidegate_queue_seconds",
            "Wait in the central queue, from admission to dispatch.",
            _LABELS,
            buckets=_WAITS_S,
            registry=self.registry,
        )
        self.reports = Counter(
            "tidegate_engine_reports",
            "Scrapes of engines, by whether they succeeded.",
            ("outcome",),
            registry=self.registry,
        )
        self.reviews = Counter(
            "tidegate_identity_reviews",
            "Questions to the API server of who calls (token) and of what they may use (access): good, bad, "
            "failed, or crowded: not put, because too many unknown callers are being looked up.",
            ("review", "outcome"),
            registry=self.registry,
        )
        self.log_stops = Counter(
            "tidegate_decision_log_stops",
            "Times that recording decisions was given up: disk, behind, full, unwritable or raised.",
            ("reason",),
            registry=self.registry,
        )
        self.served_elsewhere = Counter(
            "tidegate_served_elsewhere",
            "Requests that a gateway sent on to a fallback, as it told.",
            registry=self.registry,
        )
        self.measures = Measures()
        self.collectors: list[Collector] = []
        for collector in (gauges(flow), self.measures):
            self.register(collector)
        self._series: dict[tuple[ModelKey, str], _Series] = {}
        self._ended: dict[tuple[ModelKey, str, str], Counter] = {}

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, _LABELS, registry=self.registry)

    def register(self, collector: Collector) -> None:
        """Add what is looked up when somebody asks."""
        self.collectors.append(collector)
        self.registry.register(collector)

    def arrived(self, ask: Ask) -> None:
        """Count an admitted request."""
        series = self._of(ask)
        series.arrivals.inc()
        series.prompts.inc(ask.prompt_tokens)
        series.outputs.inc(ask.output_tokens)

    def dispatched(self, ask: Ask, waited_s: float) -> None:
        """Note how long a request waited."""
        self._of(ask).waits.observe(waited_s)

    def recalled(self, ask: Ask) -> None:
        """Count a request that is taken back."""
        self.recalls.labels(*ask.model, ask.qos_class).inc()

    def ended(self, model: ModelKey, qos_class: str, outcome: str) -> None:
        """Count a request out. Empty names: it ended before they were known."""
        key = (model, qos_class, outcome)
        counter = self._ended.get(key)
        if counter is None:
            counter = self._ended[key] = self.requests.labels(*model, qos_class, outcome)
        counter.inc()

    def _of(self, ask: Ask) -> "_Series":
        key = (ask.model, ask.qos_class)
        series = self._series.get(key)
        if series is None:
            labels = (*ask.model, ask.qos_class)
            series = self._series[key] = _Series(
                self.arrivals.labels(*labels),
                self.prompts.labels(*labels),
                self.outputs.labels(*labels),
                self.waits.labels(*labels),
            )
        return series

    def reviewed(self, review: str, outcome: str) -> None:
        """Count a question to the API server."""
        self.reviews.labels(review, outcome).inc()

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


def gauges(flow: Flow) -> Collector:
    """What a queue holds, as metrics."""
    return _Gauges(flow)


class _Gauges(Collector):
    """What is waiting and in flight, counted when somebody asks."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Yield the gauges; every class that a model serves has a value, be it 0."""
        waiting: Tally[tuple[str, ...]] = Tally()
        tokens: Tally[tuple[str, ...]] = Tally()
        running: Tally[tuple[str, ...]] = Tally()
        for model in self._flow.models.values():
            for name in model.classes:
                waiting[*model.key, name] = tokens[*model.key, name] = running[*model.key, name, name] = 0
        for ask in self._flow.waiting():
            waiting[*ask.model, ask.qos_class] += 1
            tokens[*ask.model, ask.qos_class] += ask.tokens
        for ask, lane in self._flow.in_flight():
            running[*ask.model, ask.qos_class, lane] += 1
        yield _gauge("tidegate_queue_requests", "Requests in the central queue.", _LABELS, waiting)
        yield _gauge("tidegate_queue_tokens", "Estimated tokens of what is queued.", _LABELS, tokens)
        yield _gauge(
            "tidegate_inflight_requests",
            "Requests dispatched whose last byte was not seen yet; lane: class of the replica's lane.",
            (*_LABELS, "lane"),
            running,
        )
        shared: Tally[tuple[str, ...]] = Tally()
        relegated = CounterMetricFamily(
            "tidegate_relegated",
            "Requests put behind others: too late to be in time, or beyond their tenant's part.",
            labels=_LABELS,
        )
        for key, name, tenants, count in self._flow.sharing():
            shared[*key, name] = tenants
            relegated.add_metric((*key, name), count)
        yield _gauge("tidegate_queue_tenants", "Tenants that have requests in the queue.", _LABELS, shared)
        yield relegated
        occupied = GaugeMetricFamily(
            ENDPOINT_INFLIGHT,
            "Requests that run at an endpoint, ours and what its engine reports of others.",
            labels=("namespace", "model", "address", "draining"),
        )
        for address, key, draining, count in self._flow.occupied():
            occupied.add_metric((*key, address, "true" if draining else "false"), count)
        yield occupied


def _gauge(
    name: str, text: str, labels: tuple[str, ...], values: Tally[tuple[str, ...]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family
