"""Demand by model and class: from the pickers' counters, or from a Prometheus server that has them."""

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

import httpx

from tidegate.adapters.metrics import MetricsError, PrometheusServer, Sample, TextSource
from tidegate.core.plan.types import Demand, LaneKey
from tidegate.facts.demand import COUNTERS, GAUGES, Meter, Values, demands, window_s

log = logging.getLogger(__name__)

STALE_PERIODS: Final = 5
"""Figures that are older than this many periods are not acted on."""

_ENDPOINTS: Final = "tidegate_endpoint_inflight_requests"


@dataclass(frozen=True, slots=True)
class Occupied:
    """What runs on a replica. `drained`: every picker knows that it drains, and has nothing there."""

    requests: int
    drained: bool


class Reading(Protocol):
    """Something that knows the demand. `occupied` is by pod address, as of the last read."""

    occupied: Mapping[str, Occupied]

    async def read(self, now: float) -> tuple[Mapping[LaneKey, Demand], bool]:
        """Demand by class of a model, and whether all of it is fresh."""
        ...

    async def close(self) -> None:
        """Close its connections."""
        ...


def by_lane(samples: Iterable[Sample], wanted: Sequence[str]) -> Values:
    """Sum samples by metric and (namespace, model, qos_class)."""
    values: Values = {}
    for sample in samples:
        labels = sample.labels
        if sample.name in wanted and {"namespace", "model", "qos_class"} <= labels.keys():
            key = (sample.name, LaneKey(labels["namespace"], labels["model"], labels["qos_class"]))
            values[key] = values.get(key, 0.0) + sample.value
    return values


def occupancy(samples: Iterable[Sample], *, whole: bool) -> dict[str, Occupied]:
    """What runs on each replica, by its address, over all pickers.

    A picker that has not heard yet that a replica drains says so by its label, and may still send
    there. `whole` False: not every picker answered, so nothing is known to be empty.
    """
    found: dict[str, Occupied] = {}
    for sample in samples:
        if sample.name == _ENDPOINTS and {"address", "draining"} <= sample.labels.keys():
            host = sample.labels["address"].rpartition(":")[0].strip("[]")
            before = found.get(host, Occupied(0, drained=whole))
            requests = before.requests + round(sample.value)
            told = before.drained and sample.labels["draining"] == "true"
            found[host] = Occupied(requests, drained=told and not requests)
    return found


class Pickers:
    """Scrapes every picker once a period; what they see adds up."""

    def __init__(self, urls: Sequence[str], period_s: float) -> None:
        # Not later than the loop: a picker that hangs costs one period, not the plan.
        self._client = httpx.AsyncClient(timeout=max(0.2, min(period_s, 2.0)), trust_env=False)
        self._sources = [TextSource(url, self._client, "tidegate_") for url in urls]
        self._meters = [Meter(window_s(period_s)) for _ in urls]
        self._stale_s = STALE_PERIODS * period_s
        self._said: set[str] = set()
        self.occupied: Mapping[str, Occupied] = {}

    async def read(self, now: float) -> tuple[Mapping[LaneKey, Demand], bool]:
        """Demand over all pickers. Stale where one of them was not heard of for five periods."""
        answers = await asyncio.gather(
            *(self._scrape(s, m, now) for s, m in zip(self._sources, self._meters, strict=True))
        )
        seen = [sample for answer in answers for sample in answer or ()]
        self.occupied = occupancy(seen, whole=all(answer is not None for answer in answers))
        total: Values = {}
        for meter in self._meters:
            for key, value in meter.values().items():
                total[key] = total.get(key, 0.0) + value
        # One scrape knows no rate yet.
        fresh = bool(self._meters) and all(
            len(m.history) > 1 and m.age_s(now) <= self._stale_s for m in self._meters
        )
        return demands(total, fresh=fresh), fresh

    async def _scrape(self, source: TextSource, meter: Meter, now: float) -> Sequence[Sample] | None:
        """Take in what one picker says; None when it does not answer."""
        try:
            samples = await source.read()
            meter.observe(now, by_lane(samples, COUNTERS), by_lane(samples, GAUGES))
        except MetricsError as error:
            if source.url not in self._said:  # once, not every second
                log.warning("no demand from the picker: %s; it is asked again every period", error)
            self._said.add(source.url)
        else:
            if source.url in self._said:
                self._said.remove(source.url)
                log.info("demand from the picker at %s again", source.url)
            return samples
        return None

    async def close(self) -> None:
        """Close its connections."""
        await self._client.aclose()


class Prometheus:
    """The same metrics by PromQL, for pickers that a Prometheus server already scrapes."""

    def __init__(self, url: str, period_s: float, rate_window_s: int = 60) -> None:
        self._server = PrometheusServer(url, timeout_s=max(1.0, period_s))
        self._rate_window_s = rate_window_s
        self._last: tuple[float, dict[LaneKey, Demand]] = (float("-inf"), {})
        self._stale_s = STALE_PERIODS * max(period_s, 1.0)
        self._failing = False
        self.occupied: Mapping[str, Occupied] = {}

    async def read(self, now: float) -> tuple[Mapping[LaneKey, Demand], bool]:
        """Demand by the server's newest samples (it looks back 5 minutes at most)."""
        labels = "namespace, model, qos_class"
        queries = {m: f"sum by ({labels}) (rate({m}[{self._rate_window_s}s]))" for m in COUNTERS}
        queries |= {m: f"sum by ({labels}) ({m})" for m in GAUGES}
        queries[_ENDPOINTS] = _ENDPOINTS
        self.occupied = {}
        try:
            answers = await asyncio.gather(*(self._server.query(q) for q in queries.values()))
        except MetricsError as error:
            if not self._failing:
                log.warning("no demand from Prometheus: %s; it is asked again every period", error)
            self._failing = True
        else:
            self._failing = False
            values: Values = {}
            for metric, samples in zip(queries, answers, strict=True):
                named = [Sample(metric, s.labels, s.value) for s in samples]
                if metric == _ENDPOINTS:
                    self.occupied = occupancy(named, whole=True)
                else:
                    values |= by_lane(named, (metric,))
            self._last = (now, demands(values, fresh=True))
        read_at, known = self._last
        fresh = now - read_at <= self._stale_s and bool(known)
        return (known if fresh else {k: replace(d, fresh=False) for k, d in known.items()}), fresh

    async def close(self) -> None:
        """Close its connections."""
        self._server.close()
