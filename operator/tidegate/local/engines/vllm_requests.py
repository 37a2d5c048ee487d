"""OpenAI request bodies, checked as vLLM checks them, and errors in vLLM's shape."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import web

from tidegate.local.engines.common import count_tokens, draw_output, prompt_blocks
from tidegate.local.engines.vllm_args import VllmArgs
from tidegate.sim.types import Policy

PRIORITY_HEADER = "X-Vllm-Priority"
# vLLM's default of the completions API (OpenAI's); chat answers may fill the context.
COMPLETION_MAX_TOKENS = 16


class ApiError(Exception):
    """An error that is answered in vLLM's shape."""

    def __init__(
        self, status: int, message: str, *, kind: str = "BadRequestError", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param

    def response(self) -> web.Response:
        """The JSON answer."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}
        return json_response({"error": error}, status=self.status)


def json_response(
    body: object, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    """A JSON answer."""
    return web.Response(
        body=orjson.dumps(body), status=status, headers=headers, content_type="application/json"
    )


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: its length, and how many tokens answer it. `ends` when the answer ends by itself.

    `blocks` are its full KV blocks for a prefix cache, each with its tokens; nothing without one.
    """

    tokens: int
    output_tokens: int
    ends: bool
    blocks: tuple[tuple[str, int], ...] = ()

    @property
    def finish_reason(self) -> str:
        """OpenAI's name for why the answer ended."""
        return "stop" if self.ends else "length"


@dataclass(frozen=True, slots=True)
class Job:
    """A checked request: the prompts that it asks to be answered, and how."""

    model: str
    chat: bool
    prompts: tuple[Prompt, ...]
    priority: int
    stream: bool
    include_usage: bool


def parse_job(raw: bytes, headers: Mapping[str, str], args: VllmArgs, *, chat: bool) -> Job:
    """Read the body of a chat or completions request.

    Raises:
        ApiError: 400 for what is not as it should be, 404 for a model that is not served.
    """
    body = _object(raw, headers)
    model = _field(body, "model", str) or args.names[0]
    if model not in args.names:
        raise ApiError(404, f"The model `{model}` does not exist.", kind="NotFoundError", param="model")
    _refuse_unsupported(body)
    stream = bool(_field(body, "stream", bool))
    texts = [_chat_text(body)] if chat else _completion_prompts(body)
    options = _field(body, "stream_options", dict)
    if options is not None and not stream:
        raise ApiError(400, "Stream options can only be defined when `stream=True`.", param="stream_options")
    return Job(
        model=model,
        chat=chat,
        prompts=tuple(_sized(body, text, args, chat=chat) for text in texts),
        priority=_priority(body, headers, args),
        stream=stream,
        include_usage=bool(options and _field(options, "include_usage", bool)),
    )


def _object(raw: bytes, headers: Mapping[str, str]) -> dict[str, Any]:
    content_type = headers.get("Content-Type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(400, "Unsupported Media Type: Only 'application/json' is allowed", kind="Bad Request")
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"JSON decode error: {error}", kind="Bad Request") from None
    if not isinstance(body, dict):
        raise ApiError(400, "Input should be a valid dictionary", kind="Bad Request")
    return body


def _field(body: Mapping[str, Any], name: str, kind: type) -> Any:
    """A field of the given type, or None when it is absent or null.

    An integer is a fine float; a boolean is neither, whatever Python says.
    """
    value = body.get(name)
    wanted = (int, float) if kind is float else kind
    if value is None or (isinstance(value, wanted) and (kind is bool or not isinstance(value, bool))):
        return value
    names = {
        int: "integer",
        float: "number",
        str: "string",
        bool: "boolean",
        dict: "dictionary",
        list: "list",
    }
    raise ApiError(400, f"{name}: Input should be a valid {names[kind]}", kind="Bad Request", param=name)


def _refuse_unsupported(body: Mapping[str, Any]) -> None:
    n = _field(body, "n", int)
    if n not in {None, 1}:
        raise ApiError(400, f"n must be 1: the emulated engine answers once, got {n}.", param="n")
    temperature = _field(body, "temperature", float)
    if temperature is not None and temperature < 0:
        raise ApiError(400, f"temperature must be non-negative, got {temperature}.", param="temperature")
    stop = body.get("stop")
    # Checked but never met: the emulated text holds nothing worth stopping at.
    stops = [] if stop is None else stop if isinstance(stop, list) else [stop]
    if not all(isinstance(s, str) and s for s in stops):
        raise ApiError(400, "stop: Input should be a string or a list of strings, none empty", param="stop")


def _chat_text(body: Mapping[str, Any]) -> str:
    messages = _field(body, "messages", list)
    if not messages:
        raise ApiError(400, "messages: Field required", kind="Bad Request", param="messages")
    parts: list[str] = []
    for position, message in enumerate(messages):
        where = f"messages[{position}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ApiError(400, f"{where}: a message needs a role", kind="Bad Request", param="messages")
        content = message.get("content")
        parts.append(_content(content, where))
    return "".join(parts)


def _content(content: object, where: str) -> str:
    """The text of a message: a string, a list of text parts, or nothing (a tool call)."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [p.get("text") for p in content if isinstance(p, dict) and p.get("type") == "text"]
        if len(texts) == len(content) and all(isinstance(t, str) for t in texts):
            return "".join(str(t) for t in texts)
    raise ApiError(400, f"{where}.content: only text is served by this model", param="messages")


def _completion_prompts(body: Mapping[str, Any]) -> list[str | list[int]]:
    """The prompts of a completions request: a string, token ids, or a list of either."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(type(item) is int and item >= 0 for item in prompt):
            return [prompt]
        if all(isinstance(item, str) for item in prompt):
            return list(prompt)
        if all(isinstance(item, list) and item and all(type(t) is int for t in item) for item in prompt):
            return list(prompt)
    raise ApiError(
        400,
        "prompt: Input should be a string, token ids, or a list of either",
        kind="Bad Request",
        param="prompt",
    )


def _sized(body: Mapping[str, Any], text: str | list[int], args: VllmArgs, *, chat: bool) -> Prompt:
    """Measure a prompt and decide how long its answer is."""
    tokens = count_tokens(text) if isinstance(text, str) else len(text)
    room = args.max_model_len - tokens
    wanted = _max_tokens(body)
    if wanted is None:
        wanted = room if chat else min(COMPLETION_MAX_TOKENS, room)
    if room < 1 or wanted > room:
        asked = 0 if room < 1 and wanted < 1 else wanted
        raise ApiError(
            400,
            f"This model's maximum context length is {args.max_model_len} tokens. However, you requested"
            f" {asked} output tokens and your prompt contains {tokens} input tokens, for a total of"
            f" {tokens + asked} tokens. Please reduce the length of the input prompt or the number of"
            " requested output tokens.",
            param="input_tokens",
        )
    least = _field(body, "min_tokens", int) or 0
    if not 0 <= least <= wanted:
        raise ApiError(
            400, f"min_tokens must be in [0, max_tokens={wanted}], got {least}.", param="min_tokens"
        )
    blocks = prompt_blocks(text, args.engine.block_size) if args.engine.enable_prefix_caching else ()
    if _field(body, "ignore_eos", bool):
        return Prompt(tokens, wanted, ends=False, blocks=blocks)
    raw = text.encode() if isinstance(text, str) else repr(text).encode()
    output, ends = draw_output(raw, least, wanted)
    return Prompt(tokens, output, ends, blocks)


def _max_tokens(body: Mapping[str, Any]) -> int | None:
    """`max_completion_tokens` goes before the deprecated `max_tokens`."""
    for name in ("max_completion_tokens", "max_tokens"):
        value = _field(body, name, int)
        if value is not None:
            if value < 1:
                raise ApiError(400, f"max_tokens must be at least 1, got {value}.", param=name)
            return int(value)
    return None


def _priority(body: Mapping[str, Any], headers: Mapping[str, str], args: VllmArgs) -> int:
    """The header goes before the body; lower is earlier; only the priority policy knows any."""
    priority = _field(body, "priority", int) or 0
    header = headers.get(PRIORITY_HEADER)
    if header is not None:
        try:
            priority = int(header)
        except ValueError:
            message = f"{PRIORITY_HEADER} must be an integer, got {header!r}."
            raise ApiError(400, message, param="priority") from None
    if priority != 0 and args.engine.policy is not Policy.PRIORITY:
        message = f"Got priority {priority} but Priority scheduling is not enabled."
        raise ApiError(400, message, param="priority")
    return int(priority)
