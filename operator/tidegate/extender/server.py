"""The HTTP server that kube-scheduler calls, and what runs beside it."""

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from tidegate.adapters.kube import Kube, Reflector
from tidegate.api.names import SCHEDULER_NAME
from tidegate.core.place import Why
from tidegate.extender import wire
from tidegate.extender.desk import Desk
from tidegate.extender.gather import Cluster
from tidegate.extender.metrics import Metrics
from tidegate.extender.wake import Waker

log = logging.getLogger(__name__)

_TICK_S = 0.5
_MAX_BODY = 64 << 20
"""A pod and the names of every node: 5,000 names take 0.2 MB."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to serve. Port 0 takes any free one."""

    host: str = "127.0.0.1"
    port: int = 9100
    kubeconfig: str | None = None


def application(desk: Desk, metrics: Metrics, ready: Callable[[], bool]) -> web.Application:
    """The routes, over a desk that decides."""

    async def filter_(request: web.Request) -> web.Response:
        with metrics.seconds.labels("filter").time():
            answer = desk.filter(wire.filter_args(await request.read()))
            # Of the failures kube-scheduler makes an event, which matters only when nothing passed.
            failed, unresolvable = (
                ({}, {}) if answer.nodes else (_messages(answer.failed), _messages(answer.unresolvable))
            )
            return _json(wire.filter_result(answer.nodes, failed, unresolvable))

    async def preempt(request: web.Request) -> web.Response:
        with metrics.seconds.labels("preempt").time():
            args = wire.preempt_args(await request.read())
            return _json(wire.preempt_result(desk.preempt(args).nodes, args.violations))

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n") if ready() else web.Response(status=503, text="caches not synced\n")

    async def metrics_(_: web.Request) -> web.Response:
        body = generate_latest(metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application(client_max_size=_MAX_BODY, middlewares=[_guard(ready)])
    app.add_routes(
        [
            web.post("/filter", filter_),
            web.post("/preempt", preempt),
            web.get("/healthz", healthz),
            web.get("/readyz", readyz),
            web.get("/metrics", metrics_),
        ]
    )
    return app


def _guard(ready: Callable[[], bool]) -> Middleware:
    """Decide nothing on half a copy; answer 400 to what cannot be read."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in {"/filter", "/preempt"} and not ready():
            return web.Response(status=503, text="caches are not synced yet\n")
        try:
            return await handler(request)
        except wire.BadRequest as error:
            log.warning("%s: %s", request.path, error)
            return web.Response(status=400, text=f"{error}\n")

    return guard


async def serve(options: Options, *, started: Callable[[int], None] = lambda _port: None) -> None:
    """Serve until SIGTERM, SIGINT or cancellation. `started` is told the port."""
    async with await Kube.connect(options.kubeconfig) as kube:
        metrics, cluster = Metrics(), Cluster()
        reflectors = cluster.reflectors(kube)
        waker = Waker(kube, cluster.pods, metrics)
        desk = Desk(cluster, metrics, time.time, waker.wake)
        cluster.on_settings = lambda: waker.wake_pending(SCHEDULER_NAME) if _synced(reflectors) else None
        runner = web.AppRunner(
            application(desk, metrics, lambda: _synced(reflectors)), access_log=None, shutdown_timeout=5
        )
        await runner.setup()
        site = web.TCPSite(runner, options.host, options.port)
        await site.start()
        tasks = [asyncio.create_task(r.run()) for r in reflectors]
        tasks += [asyncio.create_task(waker.run()), asyncio.create_task(_tick(desk, reflectors, metrics))]
        port = runner.addresses[0][1]
        log.info("extender listens on %s:%d", options.host, port)
        started(port)
        try:
            await _until_stopped(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await runner.cleanup()
    log.info("extender stopped")


def _synced(reflectors: list[Reflector]) -> bool:
    return all(r.synced.is_set() for r in reflectors)


async def _tick(desk: Desk, reflectors: list[Reflector], metrics: Metrics) -> None:
    while True:
        await asyncio.sleep(_TICK_S)
        for r in reflectors:
            metrics.stale.labels(r.kind.name).set(0 if r.connected else 1)
        if _synced(reflectors):
            desk.tick()


async def _until_stopped(tasks: list["asyncio.Task[None]"]) -> None:
    """Return at a signal; raise what a task raised, since none of them ends by itself."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with suppress(NotImplementedError, RuntimeError, ValueError):  # not in the main thread: a test
            loop.add_signal_handler(number, stop.set)
    stopped = asyncio.create_task(stop.wait())
    done, _ = await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    for task in done:
        task.result()


def _messages(failed: Mapping[str, Why]) -> dict[str, str]:
    return {node: f"tidegate: {why.reason}: {why.message}" for node, why in failed.items()}


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")
