"""A client of the gateway, and waiting for what takes a moment."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import httpx

Seen = TypeVar("Seen")


def body(model: str, *, tokens: int = 8, prompt: str = "Hello there", stream: bool = False) -> dict[str, Any]:
    """A chat request for exactly `tokens` output tokens."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": stream,
    }


class Caller:
    """Calls the gateway with one token."""

    def __init__(self, client: httpx.AsyncClient, token: str | None) -> None:
        self.client = client
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    async def chat(
        self, model: str, *, headers: dict[str, str] | None = None, **fields: Any
    ) -> httpx.Response:
        """One chat completion, whole."""
        return await self.client.post(
            "/v1/chat/completions", json=body(model, **fields), headers=self.headers | (headers or {})
        )

    @asynccontextmanager
    async def stream(self, model: str, **fields: Any) -> AsyncIterator[AsyncIterator[str]]:
        """A streamed chat completion: its data lines, headers already checked."""
        request = body(model, stream=True, **fields)
        async with self.client.stream(
            "POST", "/v1/chat/completions", json=request, headers=self.headers
        ) as r:
            assert r.status_code == 200, await r.aread()
            yield (line[6:] async for line in r.aiter_lines() if line.startswith("data: "))


async def eventually(
    look: Callable[[], Awaitable[Seen]], *, until: Callable[[Seen], bool] = bool, within_s: float = 30
) -> Seen:
    """Look again and again until it is so; fails with what was seen last."""
    deadline = time.monotonic() + within_s
    while True:
        seen = await look()
        if until(seen):
            return seen
        assert time.monotonic() < deadline, f"still so after {within_s:.0f} s: {seen!r}"
        await asyncio.sleep(0.2)
