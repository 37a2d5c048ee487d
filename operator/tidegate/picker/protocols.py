"""The protocols that clients speak, OpenAI's and KServe v2's (REST and gRPC): what is asked, and of whom."""

import re
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final
from urllib.parse import quote, unquote

import orjson

from tidegate.picker.errors import KSERVE, OPENAI, Code, RefusedError

_GENERATE: Final = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses"})
POOLED_PATHS: Final = frozenset(
    {f"/v1/{name}" for name in ("embeddings", "rerank", "score", "classify", "pooling")}
    | {"/rerank", "/v2/rerank", "/score", "/classify", "/pooling"}
)
"""Answered by the prefill alone; vLLM has some of them without /v1, and rerank as Cohere has it."""
_TOKENS: Final = frozenset({"/tokenize", "/detokenize"})
_AUDIO: Final = frozenset({"/v1/audio/transcriptions", "/v1/audio/translations"})
OPENAI_PATHS: Final = _GENERATE | POOLED_PATHS | _TOKENS | _AUDIO
"""What may reach an engine. vLLM's administrative paths, such as /v1/load_lora_adapter, may not."""
KSERVE_VERBS: Final = frozenset({"infer", "generate", "generate_stream"})
GRPC_PREFIX: Final = "/inference.GRPCInferenceService/"

MODEL_HEADERS: Final = ("x-tidegate-model", "x-gateway-model-name")
"""Name the model where the body cannot be read: sound as multipart/form-data."""

BYTES_PER_TOKEN: Final = 4
"""English text in current tokenizers; what is estimated is room, not a bill."""
AUDIO_BYTES_PER_TOKEN: Final = 320
"""Compressed speech of 128 kbit/s in Whisper's encoder, which makes 50 positions of a second."""
DEFAULT_OUTPUT_TOKENS: Final = 256
_MAX_TOKENS: Final = 1 << 20
WALKED_BYTES: Final = 256 << 10
"""Bodies above it are measured by their length: walking millions of small values would hold up all others."""
_VERSION: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_DEEP: Final = 8


class Wants(Enum):
    """What a request wants of the gateway."""

    INFERENCE = auto()
    ASIDE = auto()
    """Of an engine, but nothing of its GPUs: it does not wait, and takes no room."""
    ANY_ENGINE = auto()
    """Of whichever engine is there; no model is named."""
    SERVER = auto()
    MODEL_LIST = auto()
    MODEL = auto()
    MODEL_READY = auto()
    HEALTH = auto()
    NOTHING_WE_HAVE = auto()


@dataclass(frozen=True, slots=True)
class ListedModel:
    """An entry of `/v1/models`. `parent`: the model that an adapter belongs to."""

    name: str
    created_s: float
    parent: str | None = None


class Reads(Enum):
    """What the body is, and where in it the model is named."""

    OPENAI = auto()
    KSERVE = auto()
    FORM = auto()
    """multipart/form-data, which is not read: a header names the model."""
    NOTHING = auto()
    INFER_MESSAGE = auto()
    NAME_MESSAGE = auto()
    """A gRPC message whose `name` is the model's: metadata and the like."""


@dataclass(frozen=True, slots=True)
class Route:
    """Method and path, read. `model` is None where the path does not name it."""

    protocol: str
    wants: Wants
    model: str | None = None
    reads: Reads = Reads.OPENAI
    generates: bool = True
    """Whether the answer is made token by token; embeddings and scores are not."""
    streams: bool = False
    """Whether the path alone says that the answer is streamed."""
    grpc: bool = False
    method: str = ""
    """Of gRPC: the method's name."""
    open: bool = False
    """Whether everybody may ask."""


@dataclass(frozen=True, slots=True)
class Body:
    """What a request's body says of its size, in tokens, and by which name it wants its model."""

    model: str
    prompt_tokens: int
    output_tokens: int
    streamed: bool = False
    """Whether the answer goes out as it is made: once begun, it cannot be asked for again."""


def route(method: str, path: str, content_type: str = "") -> Route:
    """Read method and path (its query is passed over)."""
    bare = path.partition("?")[0]
    # As Envoy tells it, which turns our refusals into statuses: gRPC-Web is none.
    if content_type == "application/grpc" or content_type.startswith("application/grpc+"):
        return _grpc_route(method, bare)
    if method == "POST" and bare in OPENAI_PATHS:
        return _openai_route(bare)
    if bare == "/v2" or bare.startswith("/v2/"):
        return _kserve_route(method, bare)
    if method == "GET" and bare == "/v1/models":
        return Route(OPENAI, Wants.MODEL_LIST)
    if method == "GET" and bare.startswith("/v1/models/"):
        return Route(OPENAI, Wants.MODEL, unquote(bare.removeprefix("/v1/models/")))
    return Route(OPENAI, Wants.NOTHING_WE_HAVE)


def _openai_route(path: str) -> Route:
    if path in _TOKENS:
        return Route(OPENAI, Wants.ASIDE, generates=False)
    reads = Reads.FORM if path in _AUDIO else Reads.OPENAI
    return Route(OPENAI, Wants.INFERENCE, reads=reads, generates=path not in POOLED_PATHS)


def _kserve_route(method: str, path: str) -> Route:
    parts = path.rstrip("/").split("/")[2:]  # "", "v2", …
    match parts:
        case ["models", name, "versions", version, *rest] if _VERSION.fullmatch(version):
            parts = ["models", name, *rest]
    match method, parts:
        case "GET", []:
            return Route(KSERVE, Wants.SERVER, open=True)
        case "GET", ["health", "live" | "ready"]:
            return Route(KSERVE, Wants.HEALTH, open=True)
        case "GET", ["models", name, "ready"]:
            return Route(KSERVE, Wants.MODEL_READY, unquote(name), open=True)
        case "GET", ["models", name] | ["models", name, "config" | "stats"]:
            return Route(KSERVE, Wants.ASIDE, unquote(name), Reads.NOTHING, generates=False)
        case "POST", ["models", name, verb] if verb in KSERVE_VERBS:
            streams = verb == "generate_stream"
            return Route(KSERVE, Wants.INFERENCE, unquote(name), Reads.KSERVE, streams=streams)
    return Route(KSERVE, Wants.NOTHING_WE_HAVE)


def _grpc_route(method: str, path: str) -> Route:
    name = path.removeprefix(GRPC_PREFIX) if method == "POST" and path.startswith(GRPC_PREFIX) else ""
    match name:
        case "ModelInfer" | "ModelStreamInfer":
            streams = name == "ModelStreamInfer"
            return Route(
                KSERVE, Wants.INFERENCE, reads=Reads.INFER_MESSAGE, streams=streams, grpc=True, method=name
            )
        case "ModelReady" | "ModelMetadata" | "ModelConfig" | "ModelStatistics":
            anybody = name == "ModelReady"
            return Route(KSERVE, Wants.ASIDE, reads=Reads.NAME_MESSAGE, grpc=True, method=name, open=anybody)
        case "ServerLive" | "ServerReady" | "ServerMetadata":
            return Route(KSERVE, Wants.ANY_ENGINE, reads=Reads.NOTHING, grpc=True, method=name, open=True)
    return Route(KSERVE, Wants.NOTHING_WE_HAVE, grpc=True)


def engine_path(path: str, name: str) -> str:
    """A KServe v2 path with the engine's own name of the model."""
    bare, mark, query = path.partition("?")
    parts = bare.split("/")
    parts[3] = quote(name, safe="")
    return "/".join(parts) + mark + query


def read_body(way: Route, body: bytes, json_length: int | None = None) -> Body:
    """Read the body of a request that is sent to an engine; not a gRPC message.

    Args:
        way: Its route.
        body: All of it.
        json_length: KServe v2's Inference-Header-Content-Length: tensors in binary follow the JSON.

    Raises:
        RefusedError: It is no JSON object, or does not name a model.
    """
    if way.reads is Reads.NOTHING:
        return Body(way.model or "", 1, 0)
    parsed = _object(body[:json_length])
    if way.reads is Reads.KSERVE:
        parameters = parsed.get("parameters")
        most = parsed.get(
            "max_tokens", parameters.get("max_tokens") if isinstance(parameters, dict) else None
        )
        text = parsed.get("text_input")
        size = _size(text) if text is not None and len(body) <= WALKED_BYTES else len(body)
        return Body(way.model or "", tokens(size), count(most, DEFAULT_OUTPUT_TOKENS), way.streams)
    model = parsed.get("model")
    if not isinstance(model, str) or not model:
        message = "model must be a string that names a served model; GET /v1/models lists them"
        raise RefusedError(Code.MODEL_REQUIRED, message, param="model")
    output = _openai_output(parsed) if way.generates else 0
    return Body(
        model, _openai_prompt(parsed, len(body)), output, way.generates and bool(parsed.get("stream"))
    )


def read_form(headers: dict[str, str], size: int) -> Body:
    """A form of `size` bytes, by its headers: a stream is what is asked for as one.

    Raises:
        RefusedError: No header names the model.
    """
    model = next((value for name in MODEL_HEADERS if (value := headers.get(name, "").strip())), None)
    if model is None:
        message = f"the header {MODEL_HEADERS[0]} must name the model: forms are passed on and not read"
        raise RefusedError(Code.MODEL_REQUIRED, message, param=MODEL_HEADERS[0])
    prompt = min(_MAX_TOKENS, max(1, -(-size // AUDIO_BYTES_PER_TOKEN)))
    return Body(model, prompt, DEFAULT_OUTPUT_TOKENS, "text/event-stream" in headers.get("accept", ""))


def _object(text: bytes) -> dict[str, Any]:
    try:
        parsed = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise RefusedError(Code.INVALID_JSON, f"the body is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise RefusedError(Code.INVALID_BODY, "the body must be a JSON object")
    return parsed


def _openai_prompt(body: dict[str, Any], length: int) -> int:
    """Estimated prompt tokens; token ids are counted, text is measured. `length`: the body's bytes."""
    pairs = _pairs(body, length)
    if pairs:
        return tokens(pairs)
    if length > WALKED_BYTES:
        return tokens(length)
    given = body.get("messages", body.get("prompt", body.get("input")))
    more = _size(body.get("instructions")) if "input" in body else 0
    if isinstance(given, list) and given and all(isinstance(t, int) for t in given):
        return len(given) + (tokens(more) if more else 0)
    return tokens(_size(given) + more)


_PAIRS: Final = (
    ("query", "documents"),
    ("queries", "documents"),
    ("queries", "items"),
    ("text_1", "text_2"),
    ("data_1", "data_2"),
)
"""What rerank and score compare, by the names that vLLM takes: each of the one with each of the other."""


def _pairs(body: dict[str, Any], length: int) -> int:
    """Bytes that a cross-encoder reads: the query again with every document. 0 where it is none."""
    for one, other in _PAIRS:
        if one in body and other in body:
            several = body[other] if isinstance(body[other], list) else [body[other]]
            if length > WALKED_BYTES:
                query = len(body[one]) if isinstance(body[one], str) else 0
                return query * max(1, len(several)) + length
            return _size(body[one]) * max(1, len(several)) + _size(several)
    return 0


def _size(value: Any, depth: int = 0) -> int:
    """Bytes of the text in nested messages. Inlined images and sound count by their length too."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode(errors="replace"))
    if depth > _DEEP:
        return 0
    if isinstance(value, list):
        return sum(_size(v, depth + 1) for v in value)
    if isinstance(value, dict):
        return sum(_size(v, depth + 1) for v in value.values())
    return BYTES_PER_TOKEN if isinstance(value, int) else 0


def tokens(size: int) -> int:
    """Tokens of a text of so many bytes."""
    return min(_MAX_TOKENS, max(1, -(-size // BYTES_PER_TOKEN)))


def _openai_output(body: dict[str, Any]) -> int:
    most = body.get("max_completion_tokens") or body.get("max_tokens") or body.get("max_output_tokens")
    several = count(body.get("n"), 1)
    return min(_MAX_TOKENS, count(most, DEFAULT_OUTPUT_TOKENS) * several)


def count(value: Any, default: int) -> int:
    """A positive integer, else the default: the engine says what is wrong with others."""
    usable = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return min(_MAX_TOKENS, value) if usable else default


def for_engine(
    body: bytes,
    json_length: int | None = None,
    *,
    model: str | None = None,
    priority: int | None = None,
    vllm_priority: int | None = None,
) -> tuple[bytes, int | None]:
    """A JSON body as the engine wants it.

    Args:
        body: A body that `read_body` has read.
        json_length: Where binary tensors follow the JSON, its length.
        model: The engine's own name of the model, to stand in `model`.
        priority: Triton's `priority` parameter; 1 is highest.
        vllm_priority: VLLM's field `priority`; 0 is highest.

    Returns:
        The body and, where binary tensors follow the JSON, the new length of the JSON.

    Raises:
        RefusedError: It is nested too deep to be written again.
    """
    parsed = _object(body[:json_length])
    if model is not None:
        parsed["model"] = model
    if vllm_priority is not None:
        parsed["priority"] = vllm_priority
    if priority is not None:
        parameters = parsed.get("parameters")
        parsed["parameters"] = {**(parameters if isinstance(parameters, dict) else {}), "priority": priority}
    try:
        head = orjson.dumps(parsed)
    except orjson.JSONEncodeError as error:
        raise RefusedError(Code.INVALID_BODY, "the body is nested too deep; 200 levels are taken") from error
    if json_length is None:
        return head, None
    return head + body[json_length:], len(head)


def model_list(models: list[ListedModel]) -> bytes:
    """OpenAI's list of models."""
    return orjson.dumps({"object": "list", "data": [_model(m) for m in models]})


def model_entry(model: ListedModel) -> bytes:
    """One model in OpenAI's shape."""
    return orjson.dumps(_model(model))


def _model(model: ListedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.created_s),
        "owned_by": "tidegate",
        "parent": model.parent,
    }


def server_metadata(version: str) -> bytes:
    """KServe v2's description of a server: this gateway."""
    return orjson.dumps({"name": "tidegate", "version": version, "extensions": ["generate"]})
