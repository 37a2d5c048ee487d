"""A client of the gateway."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx


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
