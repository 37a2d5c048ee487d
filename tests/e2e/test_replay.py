"""A picker records what it decides under real traffic; a fresh queue then decides the same."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.chat import Caller
from support.wait import eventually
from tidegate.local.cluster import LocalCluster


@asynccontextmanager
async def recording(cluster: LocalCluster, path: Path) -> AsyncIterator[None]:
    """The picker writes its decisions to `path` in the block, and is as it was after it."""
    await asyncio.to_thread(cluster.restart, "picker", ["--decision-log", str(path)])
    try:
        yield
    finally:
        await asyncio.to_thread(cluster.restart, "picker", [])


async def endpoints(cluster: LocalCluster, client: httpx.AsyncClient) -> list[dict[str, Any]]:
    state = (await client.get(f"{cluster.url('picker')}/debug/state")).json()
    return [e for e in state["endpoints"] if e["model"] == "chat-8b"]


async def stream(caller: Caller, tokens: int) -> str:
    async with caller.stream("chat-8b", tokens=tokens) as lines:
        return [line async for line in lines][-1]


async def leave(caller: Caller, *, streamed: bool) -> None:
    """A client that goes in the middle of its stream, or before its answer."""
    if streamed:
        async with caller.stream("chat-8b", tokens=4000) as lines:
            async for _ in lines:
                break
    else:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(caller.chat("chat-8b", tokens=4000), 0.3)


def replayed(path: Path) -> tuple[int, dict[str, Any]]:
    """By the command, so in a process of its own: nothing there knows of the picker's."""
    command = [sys.executable, "-P", "-m", "tidegate", "replay", str(path), "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in {0, 1}, done.stderr
    return done.returncode, json.loads(done.stdout)


async def test_a_fresh_queue_decides_as_the_live_one_did(
    examples: LocalCluster, gateway: httpx.AsyncClient, chat: Caller, pipeline: Caller, tmp_path: Path
) -> None:
    """Two classes, whole and streamed, more than there are slots, and clients that leave."""
    path = tmp_path / "decisions.jsonl"
    async with recording(examples, path):
        await eventually(
            lambda: endpoints(examples, gateway), until=lambda found: any(e["ready"] for e in found)
        )
        answers = await asyncio.gather(
            *(pipeline.chat("chat-8b", tokens=400) for _ in range(40)),
            *(chat.chat("chat-8b", tokens=20) for _ in range(10)),
            *(stream(pipeline, 200) for _ in range(10)),
            *(stream(chat, 60) for _ in range(10)),
            *(leave(chat, streamed=streamed) for streamed in (True, False) for _ in range(5)),
        )
        assert {a.status_code for a in answers if isinstance(a, httpx.Response)} == {200}
        assert {a for a in answers if isinstance(a, str)} == {"[DONE]"}
    code, found = await asyncio.to_thread(replayed, path)
    assert (code, found["differences"]) == (0, [])
    assert found["cut"] is None, "a picker that is asked to stop ends its log"
    decisions = found["decisions"]
    assert decisions["admitted"] == decisions["ended"] >= 75, "those who left may not have come this far"
    assert found["compared"] >= 200
    text = await asyncio.to_thread(path.read_text)
    assert all(f'"qos_class":"{name}"' in text for name in ("interactive", "batch"))
    assert all(f'"streamed":{word}' in text for word in ("true", "false"))
    assert '"whole":false' in text, "of those who left before their answer"
    assert "Hello there" not in text, "what was asked is nobody's business here"
