"""KServe v2 over gRPC: the frames of a body, and what the messages in them name.

Bounded and total: whatever bytes come, there is a message, or a RefusedError that says what is wrong.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as pb

from tidegate.picker.errors import Code, RefusedError
from tidegate.picker.protocols import DEFAULT_OUTPUT_TOKENS, Body, Route, count, tokens

_HEAD: Final = 5
"""Of a frame: one byte that says whether the message is compressed, four of its length."""
_NAMED: Final[dict[str, Any]] = {
    "ModelInfer": pb.ModelInferRequest,
    "ModelStreamInfer": pb.ModelInferRequest,
    "ModelReady": pb.ModelReadyRequest,
    "ModelMetadata": pb.ModelMetadataRequest,
    "ModelConfig": pb.ModelConfigRequest,
    "ModelStatistics": pb.ModelStatisticsRequest,
}

Rewrite = Callable[[bytes], bytes]


class Frames:
    """Cuts a body into its messages, however it was cut on the way. Holds `most` bytes and a frame's head."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._buffer = bytearray()

    def __len__(self) -> int:
        """Bytes that are held of a message whose end has not come yet."""
        return len(self._buffer)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take some more; yields the messages that are whole now.

        Raises:
            RefusedError: A message is compressed, or larger than is taken.
        """
        self._buffer += data
        while len(self._buffer) >= _HEAD:
            if self._buffer[0]:
                raise RefusedError(
                    Code.COMPRESSED,
                    "compressed messages are not read here, and the model is named inside; call without "
                    "compression (tritonclient: compression_algorithm=None)",
                )
            length = int.from_bytes(self._buffer[1:_HEAD], "big")
            if length > self._most:
                raise too_large(self._most)
            if len(self._buffer) < _HEAD + length:
                return
            message = bytes(memoryview(self._buffer)[_HEAD : _HEAD + length])
            del self._buffer[: _HEAD + length]
            yield message

    def end(self) -> None:
        """The body is over. Raises RefusedError where it ends inside a message."""
        if self._buffer:
            raise RefusedError(Code.INVALID_BODY, "the body ends inside a gRPC message")


def too_large(most: int) -> RefusedError:
    """More was sent than is taken."""
    message = f"the body is larger than {most} bytes, which is what this gateway takes"
    return RefusedError(Code.BODY_TOO_LARGE, message)


def read_message(way: Route, message: bytes) -> Body:
    """What a message says of the model it wants and of its size.

    Raises:
        RefusedError: It is none of the method's, or names no model.
    """
    parsed = _parsed(way.method, message)
    if not isinstance(parsed, pb.ModelInferRequest):
        if not parsed.name:
            raise RefusedError(Code.MODEL_REQUIRED, "name must name a served model", param="name")
        return Body(parsed.name, 1, 0)
    if not parsed.model_name:
        raise RefusedError(Code.MODEL_REQUIRED, "model_name must name a served model", param="model_name")
    most = _whole(parsed.parameters["max_tokens"]) if "max_tokens" in parsed.parameters else None
    prompt = tokens(_text_bytes(parsed) or len(message))
    return Body(parsed.model_name, prompt, count(most, DEFAULT_OUTPUT_TOKENS), way.streams)


def rewriter(way: Route, asked: str, engine_name: str, priority: int | None) -> Rewrite:
    """What makes a client's messages the engine's: its own name of the model, Triton's priority.

    Every message of a stream passes here. One that names another model than the first is refused: the
    right to that model was not checked, and it would be served at another's place.

    Args:
        way: The route.
        asked: The name that the first message had.
        engine_name: What the engine calls that model.
        priority: Triton's level, 1 is highest; None leaves the client's own.
    """
    infers = _NAMED.get(way.method) is pb.ModelInferRequest

    def rewrite(message: bytes) -> bytes:
        parsed = _parsed(way.method, message)
        name = parsed.model_name if infers else parsed.name
        if name != asked:
            text = (
                f"this stream is {asked!r}'s, and a message of it asks for {name!r}; open one for each model"
            )
            raise RefusedError(Code.INVALID_BODY, text, param="model_name")
        if infers:
            parsed.model_name = engine_name
            if priority is not None:
                parsed.parameters["priority"].Clear()
                parsed.parameters["priority"].uint64_param = priority
        else:
            parsed.name = engine_name
        return bytes(parsed.SerializeToString())

    return rewrite


def _parsed(method: str, message: bytes) -> Any:
    parsed = _NAMED[method]()
    try:
        parsed.ParseFromString(message)
    except DecodeError as error:
        text = f"the message is no inference.{type(parsed).__name__}: {error}"
        raise RefusedError(Code.INVALID_BODY, text) from error
    return parsed


def _text_bytes(request: Any) -> int:
    """Bytes of the input that Triton's generating backends call `text_input`; 0 where there is none."""
    for index, tensor in enumerate(request.inputs):
        if tensor.name == "text_input":
            if index < len(request.raw_input_contents):
                return max(0, len(request.raw_input_contents[index]) - 4)  # its length stands before it
            return sum(len(text) for text in tensor.contents.bytes_contents)
    return 0


def _whole(parameter: Any) -> int | None:
    kind = parameter.WhichOneof("parameter_choice")
    if kind in ("int64_param", "uint64_param"):
        return int(getattr(parameter, kind))
    text = parameter.string_param if kind == "string_param" else ""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None
