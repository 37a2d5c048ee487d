"""What the controller says over HTTP: metrics, health, and its last decisions."""

from collections.abc import Awaitable, Callable

import orjson
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from tidegate.controller.history import Decisions

Check = Callable[[], str]
"""Why it is not healthy, or ""."""


def application(
    registry: CollectorRegistry, decisions: Decisions, healthy: Check, ready: Check
) -> web.Application:
    """`/metrics`, `/healthz`, `/readyz` and `/debug/decisions`."""

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def debug(_: web.Request) -> web.Response:
        return web.Response(body=orjson.dumps(decisions.to_json()), content_type="application/json")

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/healthz", _probe(healthy))
    app.router.add_get("/readyz", _probe(ready))
    app.router.add_get("/debug/decisions", debug)
    return app


def _probe(check: Check) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def probe(_: web.Request) -> web.StreamResponse:
        problem = check()
        return web.Response(text=f"{problem or 'ok'}\n", status=503 if problem else 200)

    return probe
