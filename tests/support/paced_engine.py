"""An OpenAI and KServe engine that a request's own body tells when to say what."""

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web


@dataclass
class PacedEngine:
    """Obeys `x` in the body: first_s, gap_s (seconds), tokens, usage, role, text, die_after (tokens).

    `answer` is answered as it is, of a stream as its one event; `eol` ends a stream's lines.
    With die_first_s the first attempt, or the first `deaths`, end after that long, without an answer.
    """

    port: int = 0
    headers: list[dict[str, str]] = field(default_factory=list)
    left: int = 0
    deaths: int = 0
    _runner: web.AppRunner | None = None

    async def __aenter__(self) -> "PacedEngine":
        app = web.Application(client_max_size=64 << 20)
        app.router.add_route("POST", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]
        await web.TCPSite(self._runner, "127.0.0.2", self.port).start()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        body = orjson.loads(await request.read())
        self.headers.append({k.lower(): v for k, v in request.headers.items()})
        x: dict[str, Any] = {"first_s": 0.0, "gap_s": 0.0, "tokens": 3, "text": "a"} | body.get("x", {})
        if "die_first_s" in x and self.deaths < x.get("deaths", 1):
            self.deaths += 1
            await asyncio.sleep(x["die_first_s"])
            _abort(request)
            return web.Response()
        usage = {"prompt_tokens": 7, "total_tokens": 7 + x["tokens"], "completion_tokens": x["tokens"]}
        if "stream" not in request.path and not body.get("stream"):
            await asyncio.sleep(x["first_s"])
            if "answer" in x:
                return web.json_response(x["answer"])
            text = {"choices": [{"message": {"content": x["text"] * x["tokens"]}}], "usage": usage}
            return web.json_response(
                text if x.get("usage", True) else {"text_output": "a"}, status=x.get("status", 200)
            )
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)  # like vLLM: headers first, and tokens when there are some
        if x.get("role"):
            await response.write(_event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}))
        await asyncio.sleep(x["first_s"])
        if "answer" in x:
            await response.write(_event(x["answer"]))
            return response
        try:
            for index in range(x["tokens"]):
                if index == x.get("die_after"):
                    _abort(request)
                    return response
                said = {"text_output": x["text"]} if "generate" in request.path else _delta(x["text"])
                await response.write(_event(said).replace(b"\n", x.get("eol", "\n").encode()))
                await asyncio.sleep(x["gap_s"] if index < x["tokens"] - 1 else 0)
            if x.get("usage"):
                await response.write(_event({"choices": [], "usage": usage}))
            if "generate" not in request.path:
                await response.write(b"data: [DONE]\n\n")
            await response.write_eof()
        except (asyncio.CancelledError, ConnectionError):
            self.left += 1
            with contextlib.suppress(ConnectionError):
                raise
        return response


def _abort(request: web.Request) -> None:
    assert request.transport is not None
    request.transport.abort()  # type: ignore[attr-defined]


def _delta(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


def _event(payload: object) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"
