"""A small OpenAI engine that does what a test tells it, on a loopback port of its own."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web


@dataclass
class Seen:
    """A request as it reached the engine."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    raw: bytes


@dataclass
class FakeEngine:
    """Answers `tokens` chunks; while `gate` is clear everything waits before its first token."""

    tokens: int = 3
    seen: list[Seen] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    running: int = 0
    extra_running: int = 0
    """Reported as running beside what is: somebody else's requests."""
    peak: int = 0
    left: int = 0
    """Requests whose client went away."""
    kv_blocks: int = 4096
    port: int = 0
    _runner: web.AppRunner | None = None
    _transports: set[asyncio.Transport] = field(default_factory=set)

    async def start(self, port: int = 0) -> "FakeEngine":
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self.gate.set()
        return self

    async def stop(self) -> None:
        if self._runner is not None:
            await self.kill()
            await self._runner.cleanup()
            self._runner = None

    async def kill(self) -> None:
        """Go as SIGKILL goes: the port closed, every connection reset."""
        assert self._runner is not None
        for site in list(self._runner.sites):
            await site.stop()
        for transport in list(self._transports):
            transport.abort()

    async def _metrics(self, _request: web.Request) -> web.Response:
        running = self.running + self.extra_running
        text = (
            f'vllm:num_requests_running{{engine="0"}} {running}\n'
            'vllm:num_requests_waiting{engine="0"} 0\n'
            'vllm:kv_cache_usage_perc{engine="0"} 0.0\n'
            f'vllm:cache_config_info{{block_size="16",num_gpu_blocks="{self.kv_blocks}"}} 1.0\n'
        )
        return web.Response(text=text)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        transport = request.transport
        assert transport is not None
        self._transports.add(transport)
        raw = await request.read()
        body = orjson.loads(raw) if raw and request.content_type == "application/json" else {}
        self.seen.append(Seen(request.path, {k.lower(): v for k, v in request.headers.items()}, body, raw))
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            return await self._answer(request, body)
        except asyncio.CancelledError:
            self.left += 1
            raise
        except ConnectionError:
            self.left += 1
            return web.Response()
        finally:
            self.running -= 1
            self._transports.discard(transport)

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if not body.get("stream"):
            await self.gate.wait()
            return web.json_response({"id": "x", "usage": {"completion_tokens": self.tokens}})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await self.gate.wait()
        for _ in range(self.tokens):
            await response.write(b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n')
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response
