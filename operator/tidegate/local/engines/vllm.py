"""The emulated vLLM: its OpenAI server over the pure engine model, in real time.

An honest stand-in for scheduling and timing, not for answers: the text means nothing. On SIGTERM
it does as vLLM does: with `--shutdown-timeout 0`, the default, what runs is aborted and its
connection closed; with a timeout it takes nothing new and lets what runs finish for so long.
"""

import asyncio
import contextlib
import itertools
import logging
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web

from tidegate.local.engines import vllm_metrics
from tidegate.local.engines.common import (
    MAX_BODY_BYTES,
    Face,
    Knobs,
    Listener,
    configure_logging,
    environment,
    orca_header,
    serve,
)
from tidegate.local.engines.driver import EngineDriver, Generation, Signal
from tidegate.local.engines.vllm_args import VllmArgs, parse
from tidegate.local.engines.vllm_frames import Frames, body, usage_frame
from tidegate.local.engines.vllm_requests import ApiError, Job, json_response, parse_job
from tidegate.sim.types import Request

logger = logging.getLogger("tidegate.engine")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
DONE = b"data: [DONE]\n\n"


class Server:
    """The HTTP face of one engine."""

    def __init__(self, args: VllmArgs, driver: EngineDriver) -> None:
        self._args = args
        self._driver = driver
        self._created = int(time.time())
        self._ids = itertools.count()
        self._closing = False

    def app(self) -> web.Application:
        """The routes."""
        app = web.Application(middlewares=[_errors], client_max_size=MAX_BODY_BYTES)
        app.add_routes(
            [
                web.get("/health", self.health),
                web.get("/ping", self.health),
                web.get("/metrics", self.metrics),
                web.get("/version", self.version),
                web.get("/v1/models", self.models),
                web.post("/v1/chat/completions", self.chat),
                web.post("/v1/completions", self.completions),
            ]
        )
        return app

    async def drain(self) -> None:
        """Refuse what is new; wait for what runs as long as was asked; then stop stepping."""
        self._closing = True
        if self._args.shutdown_timeout_s > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._driver.idle(), self._args.shutdown_timeout_s)
            # The last bytes are still to be written.
            await asyncio.sleep(0.05)
        self._driver.close()

    async def health(self, _: web.Request) -> web.Response:
        """200 while the engine takes requests."""
        return web.Response(status=503 if self._closing else 200)

    async def version(self, _: web.Request) -> web.Response:
        """What is imitated, and that it is an imitation."""
        return json_response({"version": "0.32.0+tidegate.emulator"})

    async def metrics(self, _: web.Request) -> web.Response:
        """Prometheus text."""
        text = vllm_metrics.render(self._driver, self._args.names[0])
        return web.Response(text=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def models(self, _: web.Request) -> web.Response:
        """The served names."""
        cards = [
            {
                "id": name,
                "object": "model",
                "created": self._created,
                "owned_by": "vllm",
                "root": self._args.model,
                "parent": None,
                "max_model_len": self._args.max_model_len,
            }
            for name in self._args.names
        ]
        return json_response({"object": "list", "data": cards})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """`/v1/chat/completions`."""
        return await self._answer(request, chat=True)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """`/v1/completions`."""
        return await self._answer(request, chat=False)

    async def _answer(self, request: web.Request, *, chat: bool) -> web.StreamResponse:
        job = parse_job(await request.read(), request.headers, self._args, chat=chat)
        if self._closing:
            raise ApiError(503, "The server is shutting down.", kind="Service Unavailable")
        engine = self._driver.engine
        load = orca_header(
            request.headers,
            [("kv_cache_usage_perc", engine.kv_usage), ("num_requests_waiting", float(engine.waiting))],
        )
        given = request.headers.get("X-Request-Id") or uuid.uuid4().hex
        answer_id = f"{'chatcmpl' if chat else 'cmpl'}-{given}"
        signal = Signal()
        generations = [
            Generation(
                Request(
                    str(next(self._ids)),
                    prompt.tokens,
                    prompt.output_tokens,
                    job.priority,
                    shared=prompt.blocks,
                ),
                signal,
                each_token=job.stream,
                finish_reason=prompt.finish_reason,
            )
            for prompt in job.prompts
        ]
        try:
            for generation in generations:
                self._driver.submit(generation)
            if job.stream:
                return await self._stream(request, job, generations, answer_id, load)
            while not all(generation.done for generation in generations):
                await signal.wait()
            return json_response(body(job, answer_id, int(time.time())), headers=load)
        finally:
            # Whatever ended the request, a client that left included, its room is free at once.
            for generation in generations:
                self._driver.abort(generation)

    async def _stream(
        self,
        request: web.Request,
        job: Job,
        generations: Sequence[Generation],
        answer_id: str,
        load: dict[str, str],
    ) -> web.StreamResponse:
        """Server-sent events, one for each token; the headers go out before the first token is made."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8", **load})
        await response.prepare(request)
        created = int(time.time())
        frames = [Frames(job, i, p, answer_id, created) for i, p in enumerate(job.prompts)]
        signal = generations[0].signal
        open_ = len(generations)
        while open_:
            await signal.wait()
            parts: list[bytes] = []
            open_ = 0
            for frame, generation in zip(frames, generations, strict=True):
                parts += frame.upto(generation.tokens, done=generation.done)
                open_ += not generation.done
            if open_ == 0:
                if job.include_usage:
                    parts.append(usage_frame(job, answer_id, created))
                parts.append(DONE)
            await response.write(b"".join(parts))
        await response.write_eof()
        return response


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors in vLLM's shape, the framework's own included."""
    try:
        return await handler(request)
    except ApiError as error:
        return error.response()
    except web.HTTPException as error:
        return ApiError(error.status, error.reason, kind=error.reason).response()


def main(argv: list[str]) -> int:
    """Serve until told to stop. `argv` is what follows the program's name; returns the exit code."""
    configure_logging()
    try:
        knobs = Knobs.read(environment())
    except ValueError as error:
        logger.error("%s", error)  # noqa: TRY400 - the message says it all
        return 2
    try:
        args = parse(argv, knobs)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 2
    for flag in args.not_emulated:
        logger.warning("%s: accepted, not emulated", flag)
    logger.info("Emulated vLLM, model %s as %s, %s", args.model, ", ".join(args.names), args.engine)

    def face() -> Face:
        server = Server(args, EngineDriver(args.engine, knobs.speed))
        return Face([Listener(server.app(), args.port)], server.drain)

    return asyncio.run(serve(args.host, knobs.cold_start_s, face))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
