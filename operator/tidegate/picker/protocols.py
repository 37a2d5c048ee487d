"""The two protocols that clients speak, OpenAI's and KServe v2's: what is asked, and error shapes."""

from dataclasses import dataclass
from enum import Enum, auto
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import unquote

import orjson

OPENAI: Final = "OpenAI"
KSERVE: Final = "KServeV2"

_GENERATE: Final = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses"})
OPENAI_PATHS: Final = _GENERATE | {
    f"/v1/{name}" for name in ("embeddings", "rerank", "score", "classify", "pooling")
}
"""What may reach an engine. vLLM's administrative paths, such as /v1/load_lora_adapter, may not."""
KSERVE_VERBS: Final = frozenset({"infer", "generate", "generate_stream"})

BYTES_PER_TOKEN: Final = 4
"""English text in current tokenizers; what is estimated is room, not a bill."""
DEFAULT_OUTPUT_TOKENS: Final = 256
_MAX_TOKENS: Final = 1 << 20

_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class Wants(Enum):
    """What a request wants of the gateway."""

    INFERENCE = auto()
    MODEL_LIST = auto()
    MODEL = auto()
    MODEL_READY = auto()
    HEALTH = auto()
    NOTHING_WE_HAVE = auto()


@dataclass(frozen=True, slots=True)
class Route:
    """Method and path, read. `model` is None where the body names it."""

    protocol: str
    wants: Wants
    model: str | None = None
    generates: bool = True
    """Whether the answer is made token by token; embeddings and scores are not."""
    streams: bool = False
    """Whether the path alone says that the answer is streamed."""


@dataclass(frozen=True, slots=True)
class Body:
    """What a request's body says of its size, in tokens, and by which name it wants its model."""

    model: str
    prompt_tokens: int
    output_tokens: int
    streamed: bool = False
    """Whether the answer goes out as it is made: once begun, it cannot be asked for again."""


class BadRequestError(ValueError):
    """The client's mistake. `param` names the field of the body that is wrong, where there is one."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


def route(method: str, path: str) -> Route:
    """Read method and path (its query is passed over)."""
    bare = path.partition("?")[0]
    if bare.startswith("/v2"):
        return _kserve_route(method, bare)
    if method == "POST" and bare in OPENAI_PATHS:
        return Route(OPENAI, Wants.INFERENCE, generates=bare in _GENERATE)
    if method == "GET" and bare == "/v1/models":
        return Route(OPENAI, Wants.MODEL_LIST)
    if method == "GET" and bare.startswith("/v1/models/"):
        return Route(OPENAI, Wants.MODEL, unquote(bare.removeprefix("/v1/models/")))
    return Route(OPENAI, Wants.NOTHING_WE_HAVE)


def _kserve_route(method: str, path: str) -> Route:
    parts = path.split("/")[2:]  # "", "v2", …
    match method, parts:
        case "GET", ["health", "live" | "ready"]:
            return Route(KSERVE, Wants.HEALTH)
        case "GET", ["models", name, "ready"] | ["models", name, "versions", _, "ready"]:
            return Route(KSERVE, Wants.MODEL_READY, unquote(name))
        case "POST", ["models", name, verb] | ["models", name, "versions", _, verb] if verb in KSERVE_VERBS:
            return Route(KSERVE, Wants.INFERENCE, unquote(name), streams=verb == "generate_stream")
    return Route(KSERVE, Wants.NOTHING_WE_HAVE)


def read_body(way: Route, body: bytes, json_length: int | None = None) -> Body:
    """Read an inference request's body.

    Args:
        way: Its route.
        body: All of it.
        json_length: KServe v2's Inference-Header-Content-Length: tensors in binary follow the JSON.

    Raises:
        BadRequestError: It is no JSON object, or does not name a model.
    """
    try:
        parsed = orjson.loads(body[:json_length])
    except orjson.JSONDecodeError as error:
        raise BadRequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise BadRequestError("the body must be a JSON object")
    if way.protocol == KSERVE:
        parameters = parsed.get("parameters")
        most = parsed.get(
            "max_tokens", parameters.get("max_tokens") if isinstance(parameters, dict) else None
        )
        text = parsed.get("text_input")
        size = _size(text) if text is not None else len(body)
        return Body(way.model or "", _tokens(size), _count(most, DEFAULT_OUTPUT_TOKENS), way.streams)
    model = parsed.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequestError("model must be a string that names a served model", param="model")
    output = _openai_output(parsed) if way.generates else 0
    return Body(model, _openai_prompt(parsed), output, bool(parsed.get("stream")))


def _openai_prompt(body: dict[str, Any]) -> int:
    """Estimated prompt tokens; token ids are counted, text is measured."""
    given = body.get("messages", body.get("prompt", body.get("input")))
    if isinstance(given, list) and given and all(isinstance(t, int) for t in given):
        return len(given)
    return _tokens(_size(given))


def _size(value: Any, depth: int = 0) -> int:
    """Bytes of the text in nested messages. Inlined images and sound count by their length too."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode(errors="replace"))
    if depth > 8:
        return 0
    if isinstance(value, list):
        return sum(_size(v, depth + 1) for v in value)
    if isinstance(value, dict):
        return sum(_size(v, depth + 1) for v in value.values())
    return BYTES_PER_TOKEN if isinstance(value, int) else 0


def _tokens(size: int) -> int:
    return min(_MAX_TOKENS, max(1, -(-size // BYTES_PER_TOKEN)))


def _openai_output(body: dict[str, Any]) -> int:
    most = body.get("max_completion_tokens") or body.get("max_tokens") or body.get("max_output_tokens")
    several = _count(body.get("n"), 1)
    return min(_MAX_TOKENS, _count(most, DEFAULT_OUTPUT_TOKENS) * several)


def _count(value: Any, default: int) -> int:
    """A positive integer, else the default: the engine says what is wrong with others."""
    usable = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return min(_MAX_TOKENS, value) if usable else default


def with_priority(body: bytes, level: int, json_length: int | None = None) -> tuple[bytes, int | None]:
    """Put Triton's `priority` parameter (1 is highest) into a KServe v2 body.

    Returns the body and, where binary tensors follow the JSON, the new length of the JSON.
    """
    parsed = orjson.loads(body[:json_length])
    parameters = parsed.get("parameters")
    parsed["parameters"] = {**(parameters if isinstance(parameters, dict) else {}), "priority": level}
    head = orjson.dumps(parsed)
    if json_length is None:
        return head, None
    return head + body[json_length:], len(head)


def error_body(
    protocol: str, status: int, message: str, *, code: str | None = None, param: str | None = None
) -> bytes:
    """An error in the protocol's shape. `code` is one word for programs; else the status's phrase."""
    if protocol == KSERVE:
        return orjson.dumps({"error": message})
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    word = code or HTTPStatus(status).phrase.lower().replace(" ", "_")
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": word}})


def model_list(models: list[tuple[str, float]]) -> bytes:
    """OpenAI's list of models, from (name, created unix seconds)."""
    return orjson.dumps({"object": "list", "data": [_model(name, at) for name, at in models]})


def model_entry(name: str, created_s: float) -> bytes:
    """One model in OpenAI's shape."""
    return orjson.dumps(_model(name, created_s))


def _model(name: str, created_s: float) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(created_s), "owned_by": "tidegate"}
