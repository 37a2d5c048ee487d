"""Where the controller asks: pickers' metrics, a Prometheus server's API, Triton's own word. Real servers."""

import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import httpx
import pytest
from aiohttp import web
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tidegate.adapters.metrics import MetricsError, PrometheusServer, TextSource
from tidegate.adapters.triton import readiness
from tidegate.controller.demand import Pickers, Prometheus
from tidegate.core.flow import Flow
from tidegate.core.plan.types import LaneKey
from tidegate.picker.desk import Desk

LANE = LaneKey("ns", "m", "batch")
LABELS = {"namespace": "ns", "model": "m", "qos_class": "batch"}


class Server:
    """Answers every GET by `answer`, and remembers what was asked."""

    def __init__(self) -> None:
        self.answer: Callable[[web.Request], web.Response] = lambda _: web.Response(status=404)
        self.asked: list[str] = []
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        self.asked.append(request.query.get("query", ""))
        return self.answer(request)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    app = web.Application()
    app.router.add_get("/{path:.*}", server.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield server
    await runner.cleanup()


def text(arrivals: float, queued: float) -> web.Response:
    labels = ",".join(f'{k}="{v}"' for k, v in LABELS.items())
    lines = (
        "# HELP tidegate_arrivals_total Admitted.",
        "# TYPE tidegate_arrivals_total counter",
        f"tidegate_arrivals_total{{{labels}}} {arrivals}",
        "# TYPE tidegate_queue_requests gauge",
        f"tidegate_queue_requests{{{labels}}} {queued}",
    )
    return web.Response(text="\n".join(lines) + "\n")


async def test_pickers_are_scraped_and_go_stale(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    source = Pickers([server.url], period_s=1.0)
    server.answer = lambda _: text(10, 4)
    found, fresh = await source.read(0.0)
    assert (found[LANE].fresh, fresh) == (False, False)  # one look knows no rate
    server.answer = lambda _: text(16, 5)
    found, fresh = await source.read(2.0)
    assert (found[LANE].arrival_rps, found[LANE].queued_requests, fresh) == (3.0, 5, True)

    server.answer = lambda _: web.Response(status=500)
    assert (await source.read(6.0))[1] is True
    found, fresh = await source.read(8.0)
    assert (found[LANE].queued_requests, found[LANE].fresh, fresh) == (5, False, False)
    assert caplog.text.count("no demand from the picker") == 1
    server.answer = lambda _: text(17, 0)
    assert (await source.read(9.0))[1] is True
    assert "demand from the picker at" in caplog.text
    await source.close()


async def test_a_picker_that_is_not_there_is_no_error(unused_tcp_port: int) -> None:
    source = Pickers([f"http://127.0.0.1:{unused_tcp_port}"], period_s=0.2)
    assert await source.read(0.0) == ({}, False)
    await source.close()


def answer_query(request: web.Request) -> web.Response:
    query = request.query["query"]
    value = "2.5" if "rate(" in query else "NaN" if "inflight" in query else "7"
    row = {"metric": LABELS, "value": [0, value]}
    return web.json_response({"status": "success", "data": {"resultType": "vector", "result": [row]}})


async def test_prometheus_gives_the_same_figures(server: Server) -> None:
    server.answer = answer_query
    source = Prometheus(server.url, period_s=1.0)
    found, fresh = await source.read(0.0)
    demand = found[LANE]
    assert fresh
    assert (demand.arrival_rps, demand.prompt_tokens_per_s) == (2.5, 2.5)
    assert (demand.queued_requests, demand.queued_tokens, demand.inflight) == (7, 7.0, 0)
    assert "sum by (namespace, model, qos_class) (rate(tidegate_arrivals_total[60s]))" in server.asked
    assert "sum by (namespace, model, qos_class) (tidegate_queue_requests)" in server.asked

    server.answer = lambda _: web.Response(status=503, text="busy")
    assert (await source.read(3.0))[1] is True
    found, fresh = await source.read(10.0)
    assert (found[LANE].fresh, fresh) == (False, False)
    await source.close()


async def test_a_refused_query_names_server_and_query(server: Server) -> None:
    server.answer = lambda _: web.json_response({"status": "error", "error": "bad"}, status=400)
    source = PrometheusServer(server.url)
    with pytest.raises(MetricsError, match=r"127.0.0.1.*query up\)"):
        await source.query("up")
    source.close()


class Triton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A Triton of which a test says how ready it is."""

    def __init__(self, live: bool, ready: bool) -> None:
        self._live, self._ready = live, ready

    async def ServerLive(self, *_: Any) -> Any:  # noqa: N802
        return service_pb2.ServerLiveResponse(live=self._live)

    async def ServerReady(self, *_: Any) -> Any:  # noqa: N802
        return service_pb2.ServerReadyResponse(ready=self._ready)

    async def RepositoryIndex(self, *_: Any) -> Any:  # noqa: N802
        model = service_pb2.RepositoryIndexResponse.ModelIndex
        models = [model(name="ok", state="READY"), model(name="ranker", state="UNAVAILABLE", reason="no GPU")]
        return service_pb2.RepositoryIndexResponse(models=models)


@pytest.mark.parametrize(
    ("live", "ready", "said"),
    [
        pytest.param(True, True, "Triton is ready", id="ready"),
        pytest.param(False, False, "Triton is not live yet", id="not live"),
        pytest.param(True, False, "Triton loads its models: ranker UNAVAILABLE (no GPU)", id="loading"),
    ],
)
async def test_triton_is_asked(live: bool, ready: bool, said: str) -> None:
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Triton(live, ready), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        assert await readiness("127.0.0.1", port) == said
    finally:
        await server.stop(0)


async def test_a_triton_that_does_not_answer_is_said(unused_tcp_port: int) -> None:
    said = await readiness("127.0.0.1", unused_tcp_port, timeout_s=0.5)
    assert said.startswith(f"Triton at 127.0.0.1:{unused_tcp_port} does not answer")


async def test_histograms_are_left_where_they_are(server: Server) -> None:
    """A picker has dozens of buckets for each class of each model, and is asked every second."""
    desk = Desk(Flow())
    series = desk.metrics.measures.of(("ns", "m"), "high")
    for promised in ("kept", "missed"):
        series.promises[promised] += 1
    series.ttft.observe(0.2)
    server.answer = lambda _: web.Response(body=desk.metrics.text())
    async with httpx.AsyncClient(trust_env=False) as client:
        samples = await TextSource(server.url, client, "tidegate_").read()
    names = {sample.name for sample in samples}
    assert {"tidegate_promises_total", "tidegate_ttft_seconds_sum", "tidegate_ttft_seconds_count"} <= names
    assert not [name for name in names if name.endswith("_bucket")]
