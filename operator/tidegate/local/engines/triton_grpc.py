"""The emulated Triton's gRPC side: health, repository, statistics, inferences and streams of them.

Messages are those that tritonclient ships, imported with the first call: an engine that is never
asked over gRPC need not carry them.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from tidegate.local.engines import triton_reports as reports
from tidegate.local.engines.triton_core import VERSION, Ask, Code, Model, Triton, TritonError
from tidegate.local.engines.triton_wire import ask_from, strings, values

_SERVICE = "inference.GRPCInferenceService"
_STATUS = {
    Code.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Code.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Code.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
}
Method = Callable[[Any, Any], Awaitable[Any]]


class GrpcFace:
    """One Triton's gRPC server."""

    def __init__(self, triton: Triton, host: str, port: int) -> None:
        self._triton = triton
        self._address = f"{host}:{port}"
        # Without the option a second server would share the port in silence.
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: the port cannot be had.
        """
        methods: dict[str, Method] = {
            "ServerLive": self.server_live,
            "ServerReady": self.server_ready,
            "ServerMetadata": self.server_metadata,
            "ModelReady": self.model_ready,
            "ModelMetadata": self.model_metadata,
            "ModelStatistics": self.model_statistics,
            "RepositoryIndex": self.repository_index,
            "RepositoryModelLoad": self.load,
            "RepositoryModelUnload": self.unload,
            "ModelInfer": self.infer,
        }
        handlers: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(_served(name, method))
            for name, method in methods.items()
        }
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self.stream_infer)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
        try:
            self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise OSError(f"gRPC on {self._address}: {error}") from error
        await self._server.start()

    async def stop(self) -> None:
        """Close, cutting off what still runs."""
        await self._server.stop(grace=None)

    async def server_live(self, _: Any, pb: Any) -> Any:
        """The process is alive."""
        return pb.ServerLiveResponse(live=True)

    async def server_ready(self, _: Any, pb: Any) -> Any:
        """Whether requests are taken."""
        return pb.ServerReadyResponse(ready=self._triton.ready)

    async def server_metadata(self, _: Any, pb: Any) -> Any:
        """Server metadata."""
        return pb.ServerMetadataResponse(**reports.server_metadata())

    async def model_ready(self, request: Any, pb: Any) -> Any:
        """Whether a model is loaded; an unknown one is not."""
        model = self._triton.models.get(request.name)
        return pb.ModelReadyResponse(ready=model is not None and model.ready and self._triton.ready)

    async def model_metadata(self, request: Any, pb: Any) -> Any:
        """Model metadata."""
        return pb.ModelMetadataResponse(
            **reports.model_metadata(self._triton.model(request.name, request.version))
        )

    async def model_statistics(self, request: Any, pb: Any) -> Any:
        """Statistics of one model, or of all that are loaded."""
        if request.name:
            models = [self._triton.model(request.name, request.version)]
        else:
            models = [m for m in self._triton.models.values() if m.ready]
        return pb.ModelStatisticsResponse(**reports.statistics(models))

    async def repository_index(self, request: Any, pb: Any) -> Any:
        """The repository's models and whether they are loaded."""
        rows = reports.repository_index(self._triton.models.values(), ready_only=request.ready)
        return pb.RepositoryIndexResponse(models=rows)

    async def load(self, request: Any, pb: Any) -> Any:
        """Load a model."""
        self._triton.load(request.model_name, ready=True)
        return pb.RepositoryModelLoadResponse()

    async def unload(self, request: Any, pb: Any) -> Any:
        """Unload a model."""
        self._triton.load(request.model_name, ready=False)
        return pb.RepositoryModelUnloadResponse()

    async def infer(self, request: Any, pb: Any) -> Any:
        """KServe v2 inference."""
        model, ask = self._asked(request, stream=False)
        async with self._triton.infer(model, ask) as answer:
            texts = await answer.whole()
        return _answer(pb, model, ask, texts)

    async def stream_infer(self, messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:  # noqa: ARG002
        """Inferences one after the other; one whose input `stream` is true answers token by token.

        Errors of a request are messages of the stream, which goes on.
        """
        from tritonclient.grpc import service_pb2 as pb

        async for raw in messages:
            request = pb.ModelInferRequest.FromString(raw)
            try:
                model, ask = self._asked(request, stream=_wants_stream(request))
                async with self._triton.infer(model, ask) as answer:
                    if not ask.stream:
                        yield _streamed(pb, _answer(pb, model, ask, await answer.whole()))
                        continue
                    async for words in answer.pieces():
                        for word in words:
                            yield _streamed(pb, _answer(pb, model, ask, [word]))
            except TritonError as error:
                yield bytes(pb.ModelStreamInferResponse(error_message=error.message).SerializeToString())

    def _asked(self, request: Any, *, stream: bool) -> tuple[Model, Ask]:
        model = self._triton.model(request.model_name, request.model_version)
        tensors, shape = _tensors(request)
        parameters = {n: getattr(p, p.WhichOneof("parameter_choice")) for n, p in request.parameters.items()}
        return model, ask_from(tensors, parameters, shape=shape, identity=request.id, stream=stream)


def _answer(pb: Any, model: Model, ask: Ask, texts: list[str]) -> Any:
    raw = b"".join(len(t.encode()).to_bytes(4, "little") + t.encode() for t in texts)
    return pb.ModelInferResponse(
        model_name=model.name,
        model_version=VERSION,
        id=ask.id,
        outputs=[{"name": "text_output", "datatype": "BYTES", "shape": list(ask.shape)}],
        raw_output_contents=[raw],
    )


def _streamed(pb: Any, answer: Any) -> bytes:
    return bytes(pb.ModelStreamInferResponse(infer_response=answer).SerializeToString())


def _wants_stream(request: Any) -> bool:
    """The input `stream` of the vLLM backend."""
    tensors, _ = _tensors(request)
    return tensors.get("stream", [False])[:1] == [True]


def _tensors(request: Any) -> tuple[dict[str, list[Any]], tuple[int, ...]]:
    """The inputs by name, and the shape of `text_input`."""
    tensors: dict[str, list[Any]] = {}
    shape: tuple[int, ...] = (1,)
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise TritonError(Code.INVALID, "raw_input_contents must hold one entry for each of inputs")
    for position, tensor in enumerate(request.inputs):
        if raw:
            tensors[tensor.name] = values(tensor.datatype, raw[position])
        elif tensor.datatype == "BYTES":
            packed = b"".join(len(b).to_bytes(4, "little") + b for b in tensor.contents.bytes_contents)
            tensors[tensor.name] = list(strings(packed))
        else:
            contents = tensor.contents
            tensors[tensor.name] = [*contents.int_contents, *contents.int64_contents, *contents.bool_contents]
        if tensor.name == "text_input":
            shape = tuple(tensor.shape)
            # BYTES elements are counted, since the answer is given the same shape.
            count = 1
            for dimension in shape:
                count *= dimension
            if count != len(tensors[tensor.name]):
                message = f"input 'text_input': shape {list(shape)} wants {count} elements"
                raise TritonError(Code.INVALID, message)
    return tensors, shape


def _served(name: str, method: Method) -> Callable[[bytes, Any], Awaitable[bytes]]:
    """A method over plain bytes, its errors as gRPC statuses."""

    async def serve(raw: bytes, context: Any) -> bytes:
        from tritonclient.grpc import service_pb2 as pb

        request = getattr(pb, f"{name}Request")()
        request.ParseFromString(raw)
        try:
            answer = await method(request, pb)
        except TritonError as error:
            await context.abort(_STATUS[error.code], error.message)
        return bytes(answer.SerializeToString())

    return serve
