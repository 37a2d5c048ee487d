"""What Envoy measures of answers is what the client saw: real Envoy, the picker's own service, an engine."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.engines import EngineProcess
from support.measured import KEY, gateway
from support.paced_engine import PacedEngine
from support.ports import free_port
from support.recorded import decision_log
from support.wait import eventually
from tidegate.core.flow import Policy
from tidegate.picker.decisionlog import RecordedFlow
from tidegate.picker.desk import Desk
from tidegate.picker.measure.book import GRACE_S
from tidegate.picker.measure.record import End, Record, Source
from tidegate.render.envoy import ATTEMPTS
from tidegate.render.measure import ARRIVED_HEADER, REQUEST_HEADER
from tidegate.sim.replay import replay

TOLERANCE_S = 0.15
"""The client's own clock starts before its request reaches Envoy, on a machine that does other things."""
HEADERS = {"x-tidegate-qos": "high", "x-tenant": "acme"}
STREAM = {"model": "m", "prompt": "x" * 100, "stream": True, "max_tokens": 1000}


@dataclass
class Seen:
    """What a client saw, in seconds from when it sent."""

    status: int
    first_s: float | None
    ended_s: float
    broke: bool


class Client:
    """A client, and what was measured of its requests, in order."""

    def __init__(self, desk: Desk, http: httpx.AsyncClient) -> None:
        self.desk, self.http = desk, http
        self.records: list[Record] = []
        taken = desk.book.take

        def take(record: Record | None, now: float) -> None:
            taken(record, now)
            if record is not None:
                self.records.append(record)

        desk.book.take = take  # type: ignore[method-assign]

    async def ask(self, body: dict[str, Any], path: str = "/v1/completions", leave: int = 0) -> Seen:
        """Ask; `leave` is the number of tokens after which the client goes."""
        began, first, tokens, broke = time.perf_counter(), None, 0, False
        async with self.http.stream("POST", path, json=body, headers=HEADERS) as response:
            try:
                async for chunk in response.aiter_raw():
                    if b'":"a"' in chunk.replace(b'": "', b'":"') or not body.get("stream"):
                        first = first or time.perf_counter() - began
                        tokens += 1
                        if tokens == leave:
                            break
            except httpx.RemoteProtocolError:
                broke = True
        return Seen(response.status_code, first, time.perf_counter() - began, broke)

    async def measured(self, number: int = 1) -> Record:
        """The record of the nth request, once it is here."""
        await eventually(lambda: _sync(len(self.records)), until=lambda n: n >= number)
        return self.records[number - 1]

    def value(self, name: str, **labels: str) -> float:
        return sum(
            s.value
            for family in self.desk.metrics.registry.collect()
            for s in family.samples
            if s.name == name and labels.items() <= s.labels.items()
        )


async def _sync(value: int) -> int:
    return value


@pytest.fixture
async def engine() -> AsyncIterator[PacedEngine]:
    async with PacedEngine() as one:
        yield one


@pytest.fixture
async def client(engine: PacedEngine, tmp_path: Path) -> AsyncIterator[Client]:
    at = f"127.0.0.1:{engine.port}"
    async with gateway(tmp_path, at) as (desk, url), httpx.AsyncClient(base_url=url, timeout=30) as http:
        yield Client(desk, http)


def since(record: Record) -> tuple[float, float]:
    """First token and end, in seconds from the beginning."""
    assert record.first_s is not None
    assert record.ended_s is not None
    return record.first_s - record.started_s, record.ended_s - record.started_s


@pytest.mark.parametrize("usage", [True, False], ids=["usage told", "events counted"])
async def test_a_stream_is_measured_as_the_client_saw_it(client: Client, usage: bool) -> None:
    x = {"first_s": 0.4, "gap_s": 0.03, "tokens": 20, "usage": usage, "role": True}
    seen = await client.ask(STREAM | {"x": x})
    record = await client.measured()
    first_s, ended_s = since(record)
    assert seen.first_s is not None
    # Response headers and the role came 0.4 s before the first token, and are not it.
    assert first_s == pytest.approx(seen.first_s, abs=TOLERANCE_S)
    assert first_s >= 0.4
    assert ended_s == pytest.approx(seen.ended_s, abs=TOLERANCE_S)
    assert (record.end, record.output_tokens) == (End.WHOLE, 20)
    assert (record.source, record.prompt_tokens) == ((Source.USAGE, 7) if usage else (Source.EVENTS, None))
    assert client.value("tidegate_ttft_seconds_sum") == pytest.approx(first_s, abs=0.05)
    assert client.value("tidegate_tpot_seconds_sum") == pytest.approx((ended_s - first_s) / 19, abs=0.01)
    assert client.value("tidegate_served_tokens_total", kind="output", source=record.source.value) == 20
    assert client.value("tidegate_tenant_tokens_total", tenant="acme", kind="output") == 20
    assert client.value("tidegate_promises_total", outcome="kept", model=KEY[1]) == 1


async def test_a_late_first_token_is_a_promise_missed(client: Client) -> None:
    await client.ask(STREAM | {"x": {"first_s": 1.7}})
    await client.measured()
    assert client.value("tidegate_promises_total", outcome="missed") == 1
    assert client.value("tidegate_attainment_ratio", qos_class="high") == 0.0


async def test_a_whole_answer_tells_its_usage(client: Client) -> None:
    x = {"first_s": 0.3, "tokens": 5000, "text": 'say \\"completion_tokens\\": 9 '}
    seen = await client.ask({"model": "m", "prompt": "x", "x": x})
    record = await client.measured()
    assert record.ended_s is not None
    assert record.ended_s - record.started_s == pytest.approx(seen.ended_s, abs=TOLERANCE_S)
    # Of 150 kB the end was looked at, and text that looks like a usage is none.
    assert (record.prompt_tokens, record.output_tokens, record.source) == (7, 5000, Source.USAGE)
    assert client.value("tidegate_ttft_seconds_count") == 0  # it shows no first token
    assert client.value("tidegate_completion_seconds_count") == 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"input_tokens": 70, "output_tokens": 300}, (70, 300, Source.USAGE)),
        ({"output_tokens": 300, "input_tokens": 70}, (70, 300, Source.USAGE)),
        (None, (None, None, Source.ESTIMATE)),
    ],
    ids=["told", "in another order", "not told"],
)
async def test_a_client_does_not_write_its_own_bill(
    client: Client, stream: bool, usage: Any, expected: tuple[Any, Any, Source]
) -> None:
    """Answers to /v1/responses repeat the client's tools, before their own usage."""
    forged = {"completion_tokens": 0, "prompt_tokens": 0, "output_tokens": 0, "input_tokens": 0}
    tools = [{"type": "function", "name": "f", "parameters": {"usage": forged, "completion_tokens": 0}}]
    answer = {"object": "response", "tools": tools, "usage": usage, "user": '"usage": {"output_tokens": 1}'}
    answer = {"type": "response.completed", "response": answer} if stream else answer
    body = {"model": "m", "input": "x", "stream": stream, "x": {"answer": answer}}
    await client.ask(body, "/v1/responses")
    record = await client.measured()
    if stream and usage is None:  # one event, and no account of it
        expected = (None, 1, Source.EVENTS)
    assert (record.prompt_tokens, record.output_tokens, record.source) == expected


async def test_events_that_end_by_carriage_returns_are_counted(client: Client) -> None:
    await client.ask(STREAM | {"x": {"tokens": 12, "eol": "\r\n"}})
    record = await client.measured()
    assert (record.output_tokens, record.source) == (12, Source.EVENTS)


async def test_a_client_that_leaves_is_counted_up_to_there(client: Client, engine: PacedEngine) -> None:
    x = {"first_s": 0.1, "gap_s": 0.01, "tokens": 400}
    await client.ask(STREAM | {"x": x}, leave=100)
    record = await client.measured()
    assert record.end is End.LEFT
    assert record.source is Source.EVENTS
    assert record.output_tokens == pytest.approx(100, abs=15)
    await eventually(lambda: _sync(engine.left), until=lambda n: n == 1)
    assert client.value("tidegate_promises_total", outcome="untold") == 1
    assert client.value("tidegate_tpot_seconds_count") == 0


async def test_an_engine_that_dies_in_a_stream_has_missed(client: Client) -> None:
    seen = await client.ask(STREAM | {"x": {"gap_s": 0.01, "tokens": 200, "die_after": 50}})
    assert seen.broke
    record = await client.measured()
    assert record.end is End.LOST
    assert record.output_tokens == pytest.approx(50, abs=8)
    assert client.value("tidegate_promises_total", outcome="missed") == 1


async def test_a_retry_is_measured_from_the_client_s_arrival(client: Client) -> None:
    """The first attempt's engine goes before it answers; the second one's answer is late because of it."""
    x = {"die_first_s": 0.3, "first_s": 0.05, "tokens": 2, "usage": True}
    seen = await client.ask(STREAM | {"x": x})
    assert seen.status == 200
    record = await client.measured(2)
    assert client.records[0].status == 503
    assert record.status == 200
    # The attempt itself took 0.05 s; the client waited for both.
    assert seen.first_s is not None
    assert seen.first_s > 0.35
    assert client.value("tidegate_ttft_seconds_sum") == pytest.approx(seen.first_s, abs=TOLERANCE_S)
    assert client.value("tidegate_promises_total") == 1  # one request, one promise


async def test_triton_s_streams_are_counted(client: Client) -> None:
    body = {"text_input": "x", "stream": True, "x": {"first_s": 0.2, "gap_s": 0.01, "tokens": 12}}
    seen = await client.ask(body, "/v2/models/t/generate_stream")
    record = await client.measured()
    assert seen.first_s is not None
    assert since(record)[0] == pytest.approx(seen.first_s, abs=TOLERANCE_S)
    assert (record.output_tokens, record.source) == (12, Source.EVENTS)


async def test_nobody_outside_names_requests(client: Client, engine: PacedEngine) -> None:
    """A client's own headers do not reach the picker or the engine, and no answer carries ours."""
    forged = {REQUEST_HEADER: "1-forged", ARRIVED_HEADER: "1000000000.5", **HEADERS}
    response = await client.http.post("/v1/completions", json={"model": "m", "prompt": "x"}, headers=forged)
    await client.measured()
    assert response.status_code == 200
    assert REQUEST_HEADER not in response.headers
    [seen] = engine.headers
    assert seen[REQUEST_HEADER] == client.records[0].request != "1-forged"
    assert ARRIVED_HEADER not in seen
    assert client.value("tidegate_completion_seconds_sum") < 30


async def test_an_engine_that_never_answers_has_missed_once(client: Client) -> None:
    """Nine attempts, and the client gets the 503: one request, one promise."""
    seen = await client.ask(STREAM | {"x": {"die_first_s": 0.0, "deaths": 99}})
    assert seen.status == 503
    await client.measured(ATTEMPTS + 1)
    assert {r.status for r in client.records} == {503}
    assert client.value("tidegate_promises_total") == 1
    assert client.value("tidegate_promises_total", outcome="missed") == 1


async def test_an_engine_s_own_error_has_missed_and_is_not_tried_again(client: Client) -> None:
    seen = await client.ask({"model": "m", "prompt": "x", "x": {"status": 500, "first_s": 0.0, "tokens": 1}})
    assert seen.status == 500
    record = await client.measured()
    assert (record.status, record.by_engine, record.end) == (500, True, End.WHOLE)
    assert client.value("tidegate_promises_total") == 1
    assert client.value("tidegate_promises_total", outcome="missed") == 1


async def test_behind_another_gateway_it_is_estimates_that_say_so(
    engine: PacedEngine, tmp_path: Path
) -> None:
    at = f"127.0.0.1:{engine.port}"
    async with (
        gateway(tmp_path, at, measured=False) as (desk, url),
        httpx.AsyncClient(base_url=url, timeout=30) as http,
    ):
        one = Client(desk, http)
        await one.ask(STREAM | {"max_tokens": 40, "x": {"tokens": 3, "usage": True}})
        await eventually(lambda: _sync(len(list(desk.flow.in_flight()))), until=lambda n: n == 0)
        desk.book.sweep(desk.clock() + GRACE_S + 1)
    assert one.value("tidegate_measurements_total", outcome="estimated") == 1
    assert one.value("tidegate_served_tokens_total", kind="output", source="estimate") == 40
    assert one.value("tidegate_ttft_seconds_count") == 0
    assert one.value("tidegate_completion_seconds_count") == 1
    assert one.value("tidegate_promises_total", outcome="untold") == 1


async def test_replay_of_a_measured_queue_decides_the_same(engine: PacedEngine, tmp_path: Path) -> None:
    decisions = decision_log()
    flow = RecordedFlow(Policy(), decisions)
    at = f"127.0.0.1:{engine.port}"
    async with (
        gateway(tmp_path, at, flow) as (desk, url),
        httpx.AsyncClient(base_url=url, timeout=30) as http,
    ):
        one = Client(desk, http)
        for n in range(25):
            await one.ask(STREAM | {"x": {"tokens": 3 + n % 2, "usage": True}})
        await one.measured(25)
        # What was measured is what is reckoned with from then on.
        assert desk.book.outputs.expected(KEY, "high", "acme", 1000) in range(3, 8)
        await one.ask(STREAM | {"x": {"tokens": 3, "usage": True}})
        await one.measured(26)
    lines = decisions.take().splitlines(keepends=True)
    assert sum(b'"call":"measured"' in line for line in lines) == 26
    replayed = replay(lines)
    assert replayed.different == 0
    assert replayed.decisions["admitted"] == 26


async def test_the_emulated_vllm_is_measured(tmp_path: Path) -> None:
    """Its streams have a role first, one event a token, and a usage where it is asked for."""
    port = free_port()
    args = ["--model", "m", "--host", "127.0.0.1", "--port", str(port), "--scheduling-policy", "priority"]
    with EngineProcess("vllm", args, tmp_path / "vllm.log") as process:
        await asyncio.to_thread(process.wait_for, f"http://127.0.0.1:{port}/health")
        async with (
            gateway(tmp_path, f"127.0.0.1:{port}") as (desk, url),
            httpx.AsyncClient(base_url=url, timeout=60) as http,
        ):
            client = Client(desk, http)
            chat = {"model": "m", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 12}
            streamed = chat | {"stream": True, "ignore_eos": True}
            for body in (streamed | {"stream_options": {"include_usage": True}}, streamed):
                began = time.perf_counter()
                async with http.stream("POST", "/v1/chat/completions", json=body, headers=HEADERS) as answer:
                    text = b"".join([chunk async for chunk in answer.aiter_raw()])
                took_s = time.perf_counter() - began
                record = await client.measured(len(client.records) + 1)
                assert answer.status_code == 200, text
                assert record.output_tokens == 12
                assert record.source is (Source.USAGE if "stream_options" in body else Source.EVENTS)
                assert since(record)[1] == pytest.approx(took_s, abs=TOLERANCE_S)
                assert since(record)[0] < since(record)[1]
            whole = await http.post("/v1/chat/completions", json=chat | {"ignore_eos": True}, headers=HEADERS)
            record = await client.measured(3)
            usage = whole.json()["usage"]
            assert (record.prompt_tokens, record.output_tokens) == (
                usage["prompt_tokens"],
                usage["completion_tokens"],
            )
