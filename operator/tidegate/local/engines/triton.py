"""The emulated Triton: KServe v2 and the generate extension over the pure engine model.

HTTP carries all of it; gRPC health, repository, statistics, inferences and streams of them.

Infer, generate and generate_stream all answer, whatever a real model's transaction policy would
allow. On SIGTERM it takes nothing new and lets what runs finish, for `--exit-timeout-secs` at most.
"""

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable

import orjson
from aiohttp import web

from tidegate.local.engines import triton_reports as reports
from tidegate.local.engines.common import (
    MAX_BODY_BYTES,
    Face,
    Knobs,
    Listener,
    configure_logging,
    environment,
    serve,
)
from tidegate.local.engines.triton_args import NoModelsError, TritonArgs, parse
from tidegate.local.engines.triton_core import VERSION, Code, Model, Triton, TritonError
from tidegate.local.engines.triton_wire import LENGTH_HEADER, infer_answer, parse_generate, parse_infer

logger = logging.getLogger("tidegate.engine")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_STATUS = {Code.INVALID: 400, Code.NOT_FOUND: 404, Code.UNAVAILABLE: 503}


class HttpFace:
    """The HTTP side of one Triton."""

    def __init__(self, triton: Triton) -> None:
        self._triton = triton

    def app(self) -> web.Application:
        """The routes of the HTTP port."""
        app = web.Application(middlewares=[_errors], client_max_size=MAX_BODY_BYTES)
        routes = [
            web.get("/v2", self.server),
            web.get("/v2/health/live", self.live),
            web.get("/v2/health/ready", self.ready),
            web.get("/v2/models/stats", self.stats),
            web.post("/v2/repository/index", self.index),
            web.post("/v2/repository/models/{model}/{verb:load|unload}", self.load),
        ]
        for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            routes += [
                web.get(path, self.metadata),
                web.get(path + "/ready", self.model_ready),
                web.get(path + "/config", self.config),
                web.get(path + "/stats", self.stats),
                web.post(path + "/infer", self.infer),
                web.post(path + "/generate", self.generate),
                web.post(path + "/generate_stream", self.generate_stream),
            ]
        app.add_routes(routes)
        return app

    def metrics_app(self) -> web.Application:
        """The routes of the metrics port."""
        app = web.Application(middlewares=[_errors])
        app.add_routes([web.get("/metrics", self.metrics)])
        return app

    def _model(self, request: web.Request) -> Model:
        return self._triton.model(request.match_info["model"], request.match_info.get("version", ""))

    async def live(self, _: web.Request) -> web.Response:
        """The process is alive."""
        return web.Response()

    async def ready(self, _: web.Request) -> web.Response:
        """200 while requests are taken."""
        return web.Response(status=200 if self._triton.ready else 503)

    async def server(self, _: web.Request) -> web.Response:
        """Server metadata."""
        return _json(reports.server_metadata())

    async def metadata(self, request: web.Request) -> web.Response:
        """Model metadata."""
        return _json(reports.model_metadata(self._model(request)))

    async def config(self, request: web.Request) -> web.Response:
        """Model configuration."""
        return _json(reports.model_config(self._model(request)))

    async def model_ready(self, request: web.Request) -> web.Response:
        """200 when the model is loaded."""
        self._model(request)
        return web.Response(status=200 if self._triton.ready else 503)

    async def stats(self, request: web.Request) -> web.Response:
        """Statistics of one model, or of all that are loaded."""
        if "model" in request.match_info:
            return _json(reports.statistics([self._model(request)]))
        return _json(reports.statistics(m for m in self._triton.models.values() if m.ready))

    async def metrics(self, _: web.Request) -> web.Response:
        """Prometheus text."""
        text = reports.metrics(self._triton.models.values())
        return web.Response(text=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def index(self, request: web.Request) -> web.Response:
        """The repository's models and whether they are loaded."""
        raw = await request.read()
        try:
            body = orjson.loads(raw) if raw else {}
        except orjson.JSONDecodeError as error:
            raise TritonError(Code.INVALID, f"failed to parse the request JSON buffer: {error}") from None
        ready_only = isinstance(body, dict) and body.get("ready") is True
        return _json(reports.repository_index(self._triton.models.values(), ready_only=ready_only))

    async def load(self, request: web.Request) -> web.Response:
        """Load or unload a model."""
        await request.read()
        self._triton.load(request.match_info["model"], ready=request.match_info["verb"] == "load")
        return web.Response()

    async def infer(self, request: web.Request) -> web.Response:
        """KServe v2 inference."""
        model = self._model(request)
        body = parse_infer(await request.read(), request.headers.get(LENGTH_HEADER))
        async with self._triton.infer(model, body.ask) as answer:
            texts = await answer.whole()
        payload, headers = infer_answer(model.name, body, texts)
        return web.Response(body=payload, headers=headers)

    async def generate(self, request: web.Request) -> web.Response:
        """The generate extension: one answer."""
        model = self._model(request)
        ask = parse_generate(await request.read(), stream=False)
        async with self._triton.infer(model, ask) as answer:
            texts = await answer.whole()
        return _json({"model_name": model.name, "model_version": VERSION, "text_output": texts[0]})

    async def generate_stream(self, request: web.Request) -> web.StreamResponse:
        """The generate extension: an event for each token. Headers go out with the first, as Triton's do."""
        model = self._model(request)
        ask = parse_generate(await request.read(), stream=True)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        frames: dict[str, bytes] = {}
        async with self._triton.infer(model, ask) as answer:
            async for words in answer.pieces():
                if not response.prepared:
                    await response.prepare(request)
                await response.write(b"".join(_frame(frames, model.name, word) for word in words))
        await response.write_eof()
        return response


def _frame(made: dict[str, bytes], model: str, text: str) -> bytes:
    """The event of a token; there are only two kinds in an answer, so each is made once."""
    if text not in made:
        payload = {"model_name": model, "model_version": VERSION, "text_output": text}
        made[text] = b"data: " + orjson.dumps(payload) + b"\n\n"
    return made[text]


def _json(body: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors in Triton's shape, the framework's own included."""
    try:
        return await handler(request)
    except TritonError as error:
        return _json({"error": error.message}, _STATUS[error.code])
    except web.HTTPException as error:
        return _json({"error": error.reason}, error.status)


def main(argv: list[str]) -> int:
    """Serve until told to stop. `argv` is what follows the program's name; returns the exit code."""
    configure_logging()
    try:
        knobs = Knobs.read(environment())
        args = parse(argv, knobs, environment())
    except ValueError as error:
        logger.error("%s", error)  # noqa: TRY400 - the message says it all
        return 2
    except NoModelsError as error:
        logger.error("%s", error)  # noqa: TRY400 - the message says it all
        return 1
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 2
    for flag in args.not_emulated:
        logger.warning("%s: accepted, not emulated", flag)
    for model in args.models:
        logger.info("Emulated Triton, model %s, %s", model.name, model.engine)
    return asyncio.run(serve(args.host, knobs.cold_start_s, lambda: _face(args, knobs)))


def _face(args: TritonArgs, knobs: Knobs) -> Face:
    triton = Triton(args, knobs.speed)
    http = HttpFace(triton)
    listeners = [Listener(http.app(), args.http_port)]
    if args.metrics_port is not None:
        listeners.append(Listener(http.metrics_app(), args.metrics_port))
    if args.grpc_port is None:
        return Face(listeners, triton.drain)
    # grpc must not be loaded before the template process has forked.
    from tidegate.local.engines.triton_grpc import GrpcFace

    grpc_face = GrpcFace(triton, args.host, args.grpc_port)

    async def drain() -> None:
        await triton.drain()
        await grpc_face.stop()

    return Face(listeners, drain, grpc_face.start)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
