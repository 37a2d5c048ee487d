"""Metrics from elsewhere: Prometheus text over HTTP, and queries to a Prometheus server."""

import asyncio
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import httpx
from prometheus_client.parser import text_string_to_metric_families


class MetricsError(Exception):
    """The metrics could not be had; the message says from where and why."""


class Sample(NamedTuple):
    """One value of a metric, by the full name of the sample (`…_total`, `…_bucket`)."""

    name: str
    labels: Mapping[str, str]
    value: float


def parse(text: str, prefix: str = "") -> list[Sample]:
    """Read Prometheus' text format; samples whose names do not begin with `prefix` are left out.

    Raises:
        ValueError: The text is not in that format.
    """
    # Dropped before parsing: a picker's histograms are most of its text, and parsing costs.
    lines = (line for line in text.splitlines() if line.removeprefix("# TYPE ").startswith(prefix))
    families = text_string_to_metric_families("\n".join(lines) + "\n")
    return [Sample(s.name, s.labels, float(s.value)) for family in families for s in family.samples]


class TextSource:
    """`/metrics` of one server, without the buckets of its histograms: most of it, and nobody asks."""

    def __init__(self, url: str, client: httpx.AsyncClient, prefix: str = "") -> None:
        base = url.rstrip("/")
        self.url = base if base.endswith("/metrics") else f"{base}/metrics"
        self._client, self._prefix = client, prefix

    async def read(self) -> list[Sample]:
        """Scrape once. Raises MetricsError."""
        try:
            response = await self._client.get(self.url)
            response.raise_for_status()
            lines = (line for line in response.text.splitlines() if "_bucket{" not in line)
            return parse("\n".join(lines), self._prefix)
        except (httpx.HTTPError, ValueError) as error:
            raise MetricsError(f"{self.url}: {str(error) or type(error).__name__}") from error


class PrometheusServer:
    """Instant queries to a Prometheus server, through prometheus-api-client in a thread."""

    def __init__(self, url: str, timeout_s: float = 2.0) -> None:
        from prometheus_api_client import PrometheusConnect
        from urllib3.util.retry import Retry

        self.url = url
        # The caller asks again in its next period: a retry here would only make it late.
        self._api = PrometheusConnect(url=url, retry=Retry(total=0), timeout=math.ceil(timeout_s))

    async def query(self, promql: str) -> list[Sample]:
        """Evaluate now; one sample a series. NaN and infinite values are left out.

        Raises:
            MetricsError: The server did not answer, or refused the query.
        """
        import requests
        from prometheus_api_client.exceptions import PrometheusApiClientException

        try:
            result: list[dict[str, Any]] = await asyncio.to_thread(self._api.custom_query, promql)
        except (requests.RequestException, PrometheusApiClientException, ValueError, KeyError) as error:
            raise MetricsError(f"{self.url}: {error} (query {promql})") from error
        samples = (
            Sample(row["metric"].get("__name__", ""), row["metric"], float(row["value"][1])) for row in result
        )
        return [s for s in samples if math.isfinite(s.value)]

    def close(self) -> None:
        """Close its connections."""
        self._api.close()
