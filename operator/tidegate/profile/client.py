"""The engine as a client sees it: OpenAI's completions, streamed, with the time of each token."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson


class EngineError(Exception):
    """The engine did not answer as it should; the message says what was asked and what came back."""


@dataclass(slots=True)
class Answer:
    """One request: when it was sent, and when each of its output tokens came, in monotonic seconds.

    While the answer is under way `arrivals` grows, and `begun` is set with the first; `prompt_tokens`
    is known when it has ended.
    """

    sent: float
    arrivals: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def ttft_s(self) -> float:
        """From sending to the first token."""
        return self.arrivals[0] - self.sent


class Client:
    """Talks to one engine. `token` is the bearer token, where one is wanted."""

    def __init__(self, session: aiohttp.ClientSession, model: str, token: str | None = None) -> None:
        self._session = session
        self._model = model
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    async def max_model_len(self) -> int | None:
        """The longest request, prompt and output, in tokens; None when the engine does not say.

        Raises:
            EngineError: it does not answer, or does not serve the model.
        """
        try:
            async with self._session.get("v1/models", headers=self._headers) as response:
                if response.status != 200:
                    raise EngineError(f"GET /v1/models: {response.status} {await _reason(response)}")
                cards = {c["id"]: c for c in orjson.loads(await response.read())["data"]}
        except (aiohttp.ClientError, OSError) as error:
            raise EngineError(f"GET /v1/models: {_named(error)}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError("GET /v1/models: the answer is not OpenAI's list of models") from error
        if self._model not in cards:
            raise EngineError(f"model {self._model} is not served here; served: {', '.join(cards) or 'none'}")
        length = cards[self._model].get("max_model_len")
        return length if isinstance(length, int) else None

    async def round_trip_s(self) -> float:
        """Seconds of a request that the engine's steps have no part in: GET /health.

        Raises:
            EngineError: the connection failed.
        """
        begin = time.monotonic()
        try:
            async with self._session.get("health", headers=self._headers) as response:
                await response.read()
        except (aiohttp.ClientError, OSError) as error:
            raise EngineError(f"GET /health: {_named(error)}") from error
        return time.monotonic() - begin

    async def stream(self, prompt: str, tokens: int, answer: Answer | None = None) -> Answer:
        """Ask for exactly `tokens` output tokens. `answer`, if given, is filled while they come.

        Raises:
            EngineError: the engine refused, broke off, or does not tell its tokens one by one.
        """
        answer = answer or Answer(0.0)
        body = orjson.dumps(
            {
                "model": self._model,
                "prompt": prompt,
                "max_tokens": tokens,
                "ignore_eos": True,
                "temperature": 0.0,
                "stream": True,
                # The second makes vLLM count the tokens of each event, which may hold several.
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            }
        )
        headers = {"Content-Type": "application/json", **self._headers}
        what = f"a prompt of {len(prompt)} characters"
        answer.sent = time.monotonic()
        try:
            async with self._session.post("v1/completions", data=body, headers=headers) as response:
                if response.status != 200:
                    raise EngineError(f"{what}: {response.status} {await _reason(response)}")
                usage = await _receive(response, answer, what)
        except (aiohttp.ClientError, OSError) as error:
            raise EngineError(f"{what}: {_named(error)}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(f"{what}: the stream is not OpenAI's ({_named(error)})") from error
        _check(answer, usage, tokens, what)
        return answer


async def _receive(response: aiohttp.ClientResponse, answer: Answer, what: str) -> dict[str, Any]:
    """Note the tokens of a stream; return its usage."""
    usage: dict[str, Any] = {}
    async for event in _events(response):
        now = time.monotonic()
        if error := event.get("error"):
            raise EngineError(f"{what}: {error.get('message', error) if isinstance(error, dict) else error}")
        usage = event.get("usage") or usage
        if not event.get("choices"):
            continue
        told = (event.get("usage") or {}).get("completion_tokens")
        new = 1 if told is None else told - len(answer.arrivals)
        answer.arrivals.extend([now] * new)
        answer.begun.set()
    return usage


def _check(answer: Answer, usage: dict[str, Any], tokens: int, what: str) -> None:
    """Every token must have a time, and there must be as many as were asked for."""
    if "prompt_tokens" not in usage:
        raise EngineError(f"{what}: the stream ended without usage: broken off, or not supported")
    made = usage.get("completion_tokens", 0)
    # Some engines tell the reason of the end in an event of its own.
    if len(answer.arrivals) == made + 1:
        answer.arrivals.pop()
    if made != tokens:
        raise EngineError(f"{what}: {made} tokens came, {tokens} were asked for with ignore_eos")
    if len(answer.arrivals) != made:
        raise EngineError(f"{what}: {made} tokens came in {len(answer.arrivals)} events, not one in each")
    answer.prompt_tokens = usage["prompt_tokens"]


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The server-sent events of a stream, up to [DONE]."""
    async for line in response.content:
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield orjson.loads(data)


async def _reason(response: aiohttp.ClientResponse) -> str:
    """Why a request was refused: OpenAI's message, or what there is."""
    text = (await response.text())[:2000]
    try:
        body = orjson.loads(text)
        return str(body.get("error", body).get("message", text))[:300]
    except (ValueError, AttributeError):
        return text[:300]


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
