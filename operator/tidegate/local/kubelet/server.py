"""The kubelet's HTTPS server: what the API server asks for `kubectl logs`."""

import ssl
from collections.abc import Callable, Iterable
from pathlib import Path

import orjson
from aiohttp import web

from tidegate.local.kubelet.clock import Clock, parse
from tidegate.local.kubelet.logs import LogOptions, read
from tidegate.local.kubelet.worker import Worker

Find = Callable[[str, str], Worker | None]
"""Namespace and name → the pod's worker."""


def tls(cert: Path, key: Path, client_ca: Path) -> ssl.SSLContext:
    """TLS that asks every client for a certificate of `client_ca`."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(client_ca))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(cert, key)
    return context


def application(find: Find, workers: Callable[[], Iterable[Worker]], clock: Clock) -> web.Application:
    """Build the server's routes."""

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def pods(_: web.Request) -> web.Response:
        body = {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": [w.obj for w in workers()]}
        return web.Response(body=orjson.dumps(body), content_type="application/json")

    async def logs(request: web.Request) -> web.StreamResponse:
        return await _logs(request, find, clock)

    async def unsupported(_: web.Request) -> web.Response:
        text = "a process node serves logs only: its processes are ordinary ones of this machine\n"
        return web.Response(status=501, text=text)

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/pods", pods)
    app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", logs)
    for verb in ("exec", "attach", "portForward", "run"):
        app.router.add_route("*", f"/{verb}/{{tail:.*}}", unsupported)
    return app


async def _logs(request: web.Request, find: Find, clock: Clock) -> web.StreamResponse:
    at = request.match_info
    worker = find(at["namespace"], at["pod"])
    if worker is None:
        return web.Response(
            status=404, text=f'pod "{at["pod"]}" not found in namespace "{at["namespace"]}"\n'
        )
    try:
        options = log_options(dict(request.query), clock.now())
    except ValueError as error:
        return web.Response(status=400, text=f"{error}\n")
    previous = request.query.get("previous") == "true"
    path, alive, why = worker.log_of(at["container"], previous=previous)
    if path is None or not path.exists():
        return web.Response(status=400, text=(why or f"no log is kept of {at['container']}") + "\n")
    response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
    response.enable_chunked_encoding()
    await response.prepare(request)
    async for chunk in read(path, options, alive):
        if chunk:
            await response.write(chunk)
    await response.write_eof()
    return response


def log_options(query: dict[str, str], now: float) -> LogOptions:
    """Read the query of `/containerLogs`. Raises ValueError naming the field."""

    def number(name: str) -> int | None:
        text = query.get(name)
        if text is None:
            return None
        if not text.isdigit():
            raise ValueError(f"{name} is {text!r}; it must be a whole number, 0 or more")
        return int(text)

    since_seconds = number("sinceSeconds")
    since: float | None = None
    if since_seconds is not None:
        since = now - since_seconds
    elif query.get("sinceTime"):
        since = parse(query["sinceTime"])
    return LogOptions(
        tail_lines=number("tailLines"),
        since_s=since,
        limit_bytes=number("limitBytes"),
        timestamps=query.get("timestamps") == "true",
        follow=query.get("follow") == "true",
    )
