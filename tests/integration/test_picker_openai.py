"""OpenAI's paths through a real Envoy: how each goes, what engines get, and what responses say."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from support.fake_engine import FakeEngine
from support.local_picker import LocalPicker, served
from support.ports import free_port
from tidegate.picker.protocols import POOLED_PATHS

GOOD, POOR = {"authorization": "Bearer good"}, {"authorization": "Bearer poor"}


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    one = await FakeEngine().start()
    yield one
    await one.stop()


@pytest.fixture
async def client(engine: FakeEngine, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Of a gateway that shows endpoints and takes 300,000 bytes; the engine of `away` is not there."""
    chat = replace(
        served("chat", "OpenAI", "External"),
        names=("chat", "talk", "sql"),
        engine_names={"chat": "org/chat", "talk": "org/chat", "sql": "lora-7"},
        adapters=frozenset({"sql"}),
    )
    addresses = [f"127.0.0.1:{engine.port}", f"127.0.0.1:{free_port()}"]
    away = served("away", "OpenAI", "vLLM")
    with LocalPicker(tmp_path, [chat, away], addresses, max_body=300_000, show_endpoint=True) as picker:
        async with httpx.AsyncClient(base_url=picker.url, timeout=30, headers=GOOD) as client:
            yield client


BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "潮"}]}),
    ("/v1/completions", {"prompt": "hello"}),
    ("/v1/responses", {"input": "hello", "instructions": "be brief"}),
    ("/v1/embeddings", {"input": ["hello"]}),
    ("/v1/rerank", {"query": "a", "documents": ["b", "c"]}),
    ("/v2/rerank", {"query": "a", "documents": ["b", "c"]}),
    ("/score", {"text_1": "a", "text_2": "b"}),
    ("/tokenize", {"prompt": "hello"}),
    ("/detokenize", {"tokens": [1, 2]}),
]


async def test_every_path_reaches_the_engine_by_its_own_name(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    for path, body in BODIES:
        for asked, called in (("chat", "org/chat"), ("talk", "org/chat"), ("sql", "lora-7")):
            answer = await client.post(path, json={"model": asked, **body}, headers={"x-tidegate-qos": "low"})
            assert answer.status_code == 200, (path, answer.text)
            assert answer.headers["x-tidegate-qos"] == "low"
            assert answer.headers["x-tidegate-endpoint"] == f"127.0.0.1:{engine.port}"
            seen = engine.seen[-1]
            inside = {"priority": 1_000_000_000 - 10} if path in POOLED_PATHS else {}
            assert (seen.path, seen.body) == (path, {"model": called, **body} | inside)
            assert seen.headers["x-request-id"] == answer.headers["x-request-id"]
            queued = path not in ("/tokenize", "/detokenize")
            assert ("x-tidegate-queue-seconds" in answer.headers) is queued
            assert ("x-vllm-priority" in seen.headers) is queued


async def test_a_stream_says_it_with_its_headers(client: httpx.AsyncClient) -> None:
    body = {"model": "chat", "input": "hello", "stream": True}
    async with client.stream("POST", "/v1/responses", json=body) as answer:
        assert answer.headers["x-tidegate-qos"] == "high"
        assert float(answer.headers["x-tidegate-queue-seconds"]) < 5
        assert [line async for line in answer.aiter_lines()][-2] == "data: [DONE]"


async def test_sound_is_passed_on_as_it_is(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    form = {"files": {"file": ("a.wav", b"RIFF\0\xff" * 20_000)}, "data": {"model": "lora-7"}}
    for path in ("/v1/audio/transcriptions", "/v1/audio/translations"):
        answer = await client.post(path, **form, headers={"x-tidegate-model": "sql"})
        assert answer.status_code == 200, answer.text
        seen = engine.seen[-1]
        assert seen.path == path
        assert seen.headers["content-type"].startswith("multipart/form-data; boundary=")
        assert seen.raw.count(b"RIFF\0\xff") == 20_000
        assert b'name="model"\r\n\r\nlora-7' in seen.raw
        unnamed = await client.post(path, **form)
        assert (unnamed.status_code, unnamed.json()["error"]["code"]) == (400, "model_required")
    large = await client.post(path, files={"file": b"x" * 300_001}, headers={"x-tidegate-model": "sql"})
    assert (large.status_code, large.headers["x-tidegate-code"]) == (413, "body_too_large")


async def test_adapters_are_listed_with_their_model(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()["data"]
    assert {m["id"]: m["parent"] for m in listed} == {
        "chat": None,
        "talk": None,
        "sql": "chat",
        "away": None,
        "alias-away": None,
    }
    assert (await client.get("/v1/models", headers=POOR)).json()["data"] == []


async def test_a_request_keeps_its_id(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await client.post(
        "/v1/completions", json={"model": "chat", "prompt": "x"}, headers={"x-request-id": "mine-7"}
    )
    assert answer.headers["x-request-id"] == engine.seen[-1].headers["x-request-id"] == "mine-7"
    refused = await client.post("/v1/completions", json={"model": "no"}, headers={"x-request-id": "mine-8"})
    assert refused.headers["x-request-id"] == "mine-8"


REFUSED: list[tuple[str, dict[str, Any], dict[str, str], int, str]] = [
    ("/v1/chat/completions", {"content": b"{"}, GOOD, 400, "invalid_json"),
    ("/v1/rerank", {"content": b"[]"}, GOOD, 400, "invalid_body"),
    ("/score", {"json": {}}, GOOD, 400, "model_required"),
    ("/v1/responses", {"json": {"model": "chat"}}, {"authorization": "Bearer bad"}, 401, "invalid_token"),
    ("/v1/embeddings", {"json": {"model": "chat"}}, POOR, 403, "class_not_allowed"),
    ("/tokenize", {"json": {"model": "chat"}}, POOR, 403, "class_not_allowed"),
    ("/v1/completions", {"json": {"model": "no"}}, GOOD, 404, "model_not_found"),
    ("/v1/load_lora_adapter", {"json": {}}, GOOD, 404, "unknown_url"),
    ("/v1/completions", {"content": b"x" * 300_001}, GOOD, 413, "body_too_large"),
]


async def test_refusals_have_a_code_in_body_and_header(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for path, what, headers, status, code in REFUSED:
        answer = await client.post(path, **what, headers=headers)
        assert answer.status_code == status, (path, answer.text)
        assert answer.headers["content-type"] == "application/json"
        error = orjson.loads(answer.content)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == answer.headers["x-tidegate-code"] == code
        assert ("www-authenticate" in answer.headers) is (status == 401)
    assert not engine.seen
