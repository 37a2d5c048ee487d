"""The picker's process: ext_proc over gRPC, health over gRPC, metrics and state over HTTP."""

import asyncio
import contextlib
import logging
import signal
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import orjson
from aiohttp import web
from envoy.service.accesslog.v3 import als_pb2_grpc

from tidegate.adapters.kube import Kube
from tidegate.api.identity import IdentitySources
from tidegate.core.flow import Flow, Policy
from tidegate.picker.cluster import Cluster
from tidegate.picker.decisionlog import MAX_BYTES, DecisionLog, RecordedFlow, Stop
from tidegate.picker.desk import Desk
from tidegate.picker.engines import Engines
from tidegate.picker.exchange import DEFAULT_MAX_BODY
from tidegate.picker.fronts import HEALTH_SERVICES, Health, Listen, ServerName, front, listen
from tidegate.picker.identity import Identity, Limits, strangers
from tidegate.picker.measure import server as measure
from tidegate.picker.service import Service, Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Options:
    """How `tidegate picker` was called."""

    host: str = "127.0.0.1"
    ext_proc_port: int = 9002
    health_port: int = 9003
    http_port: int = 9091
    measure_port: int = 9004
    kubeconfig: str | None = None
    qos: bool = True
    trust_class_header: bool = False
    max_body: int = DEFAULT_MAX_BODY
    show_endpoint: bool = False
    drain_s: float = 10.0
    fallbacks: int = 0
    tls: tuple[Path, Path] | None = None
    """Files of the certificate and its key, for gateways that speak TLS to the picker."""
    identity: IdentitySources = field(default_factory=IdentitySources)
    decision_log: Path | None = None
    decision_log_max_bytes: int = MAX_BYTES
    server: ServerName = ServerName.FRAMES


class Picker:
    """All of it, from start to stop."""

    def __init__(self, options: Options, kube: Kube) -> None:
        self.options = options
        policy = Policy(qos=options.qos, fallbacks=options.fallbacks)
        self.decisions = self._decision_log(policy)
        self.desk = Desk(RecordedFlow(policy, self.decisions) if self.decisions else Flow(policy))
        sources = options.identity
        settings = Settings(
            options.qos,
            options.trust_class_header,
            options.max_body,
            sources=sources,
            show_endpoint=options.show_endpoint,
        )
        self.identity = Identity(
            kube,
            self.desk.clock,
            audiences=sources.tokens.audiences,
            limits=Limits(strangers(sources.tokens.unknown_per_second)),
            count=self.desk.metrics.reviewed,
        )
        self.service = Service(self.desk, self.identity, settings)
        self.cluster = Cluster(kube, self.desk)
        self.engines = Engines(self.desk)
        self.stopping = False
        self._health = Health()

    def _decision_log(self, policy: Policy) -> DecisionLog | None:
        path = self.options.decision_log
        if path is None:
            return None

        def stopped(reason: Stop) -> None:
            self.desk.metrics.log_stops.labels(reason.value).inc()

        return DecisionLog(path, policy, stopped, self.options.decision_log_max_bytes)

    @property
    def ready(self) -> bool:
        """Whether requests can be placed: the facts are here, and it is not stopping."""
        return self.desk.informed.is_set() and not self.stopping

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Serve while the block runs, then finish what is under way, within the bound.

        Raises:
            OSError: A port is taken.
        """
        o = self.options
        where = Listen(o.host, o.ext_proc_port, o.health_port, o.tls)
        server = front(o.server, self.service, self._health, where)
        logs = grpc.aio.server(options=measure.OPTIONS)
        als_pb2_grpc.add_AccessLogServiceServicer_to_server(
            measure.AccessLogs(self.desk.book, self.desk.clock), logs
        )
        listen(logs, o.host, o.measure_port)
        self._set_health()
        self._health.set("liveness", True)
        await server.start()
        runner = web.AppRunner(self._app(), access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, o.host, o.http_port).start()
        except OSError:
            await server.drain(0)
            await server.stop()
            raise
        if self.decisions is not None:  # the ports are ours now, so no other picker writes this file
            self.decisions.start()
        loops = [
            self.cluster.run(),
            self.engines.run(),
            self.desk.run(),
            self.identity.run(),
            self._announce(),
        ]
        tasks = [asyncio.create_task(loop) for loop in loops]
        await logs.start()
        try:
            yield
        finally:
            self.stopping = True
            self._set_health()
            await server.drain(o.drain_s)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await logs.stop(0)
            await server.stop()
            await runner.cleanup()
            if self.decisions is not None:
                await asyncio.to_thread(self.decisions.close)

    async def _announce(self) -> None:
        """Turn health to serving once there are facts."""
        await self.desk.informed.wait()
        self._set_health()
        log.info(
            "ready: %d models, %d endpoints", len(self.desk.world.models), len(self.desk.world.endpoints)
        )

    def _set_health(self) -> None:
        for name in HEALTH_SERVICES:
            if name != "liveness":
                self._health.set(name, self.ready)

    def _app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/debug/state", self._state)
        return app

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _request: web.Request) -> web.Response:
        if self.ready:
            return web.Response(text="ok\n")
        why = "stopping" if self.stopping else "classes, models and pods are not listed yet"
        return web.Response(status=503, text=f"{why}\n")

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(
            body=self.desk.metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"}
        )

    async def _state(self, _request: web.Request) -> web.Response:
        state = self.desk.flow.snapshot(self.desk.clock())
        state["api_server_connected"] = self.cluster.connected
        state["identity"] = self.identity.snapshot()
        state["models"] = sorted(self.desk.world.by_name)
        state["notes"] = list(self.desk.world.notes)
        running = Counter((*ask.model, ask.qos_class) for ask, _ in self.desk.flow.in_flight())
        state["in_flight"] = [
            {"namespace": key[0], "model": key[1], "qos_class": key[2], "requests": count}
            for key, count in sorted(running.items())
        ]
        state["promises"] = self.desk.book.describe(self.desk.clock())
        return web.Response(body=orjson.dumps(state), content_type="application/json")


async def run(options: Options) -> None:
    """Run until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop.set)
    async with await Kube.connect(options.kubeconfig) as kube, Picker(options, kube).serving():
        await stop.wait()
        log.info("stopping: what is under way may take %.0f s", options.drain_s)
