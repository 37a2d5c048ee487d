"""Sends a scenario's requests and notes what came back."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from tidegate.load.results import ANSWERED, LOST, REFUSED, Record, percentile
from tidegate.load.scenario import Scenario, Stream
from tidegate.load.traffic import Request, requests

BYTES_PER_TOKEN = 4
"""English text has about four bytes a token; the emulated engine counts the same way."""

RAMP_S = 1.0
"""The clients of a closed loop start over this time: all at once they would delay the open loops."""

_FILLER = "the tide turns and the gate holds while every boat finds room in the harbour. " * 400


@dataclass(slots=True)
class Run:
    """A run under way.

    `records` has every request sent so far, `lags_s` how late each was sent, `tokens` the output
    tokens that arrived, by class and second.
    """

    started: float
    window_s: float
    records: list[Record] = field(default_factory=list)
    lags_s: list[float] = field(default_factory=list)
    outstanding: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, Counter[int]] = field(default_factory=dict)

    @property
    def now_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def receive(self, record: Record, tokens: int) -> None:
        """Note output tokens of a request that arrive now."""
        now = self.now_s
        if record.first_token_s is None:
            record.first_token_s = now
        record.tokens += tokens
        if now < self.window_s:
            record.tokens_in_window += tokens
        self.tokens.setdefault(record.qos_class, Counter())[int(now)] += tokens


async def run(
    scenario: Scenario, gateway: str, *, drain_s: float = 60.0, observe: Callable[[Run], None] | None = None
) -> Run:
    """Send the scenario to `gateway` (a base URL), wait for what is under way, and return the run.

    Nothing new is sent after `scenario.seconds`; what has not ended `drain_s` later is lost.
    `observe` is called once a second.
    """
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
    async with aiohttp.ClientSession(gateway, connector=connector, read_bufsize=2**18) as session:
        state = Run(started=time.monotonic(), window_s=scenario.seconds)
        ticker = asyncio.create_task(_tick(state, observe)) if observe else None
        streams = [
            asyncio.create_task(_stream(s, scenario, session, state, drain_s)) for s in scenario.streams
        ]
        try:
            await asyncio.gather(*streams)
        finally:
            for task in (*streams, *([ticker] if ticker else [])):
                task.cancel()
            await asyncio.gather(*streams, *([ticker] if ticker else []), return_exceptions=True)
    return state


async def _tick(state: Run, observe: Callable[[Run], None]) -> None:
    while True:
        await asyncio.sleep(1.0)
        observe(state)


async def _stream(
    stream: Stream, scenario: Scenario, session: aiohttp.ClientSession, state: Run, drain_s: float
) -> None:
    source = requests(stream, scenario)
    end = state.started + scenario.seconds
    pending: set[asyncio.Task[Any]] = set()
    if stream.outstanding:
        await asyncio.sleep(max(0.0, state.started + stream.start_s - time.monotonic()))
        for _ in range(stream.outstanding):
            pending.add(asyncio.create_task(_loop(source, stream, session, state, end)))
            await asyncio.sleep(RAMP_S / stream.outstanding)
    else:
        for request in source:
            due = state.started + (request.at_s or 0.0)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            state.lags_s.append(time.monotonic() - due)
            task: asyncio.Task[Any] = asyncio.create_task(
                _send(request, stream, session, state, request.at_s or 0.0)
            )
            pending.add(task)
            task.add_done_callback(pending.discard)
    left = max(0.0, end - time.monotonic()) + drain_s
    if pending:
        _, late = await asyncio.wait(pending, timeout=left)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)


async def _loop(
    source: Iterator[Request], stream: Stream, session: aiohttp.ClientSession, state: Run, end: float
) -> None:
    """One of a closed loop's clients: the next request as soon as the last one ended."""
    while time.monotonic() < end:
        record = await _send(next(source), stream, session, state, state.now_s)
        if record.outcome != ANSWERED:
            await asyncio.sleep(1.0)  # as a client library backs off; a refusal must not become a storm


async def _send(
    request: Request, stream: Stream, session: aiohttp.ClientSession, state: Run, scheduled_s: float
) -> Record:
    record = Record(
        stream.name,
        stream.qos_class,
        request.model,
        request.prompt_tokens,
        request.output_tokens,
        scheduled_s,
        sent_s=state.now_s,
    )
    state.records.append(record)
    state.outstanding[stream.qos_class] = state.outstanding.get(stream.qos_class, 0) + 1
    try:
        async with asyncio.timeout(stream.timeout_s):
            async with session.post(
                "/v1/chat/completions", data=_body(request, stream), headers=_headers(stream)
            ) as response:
                await _receive(response, stream, record, state)
    except asyncio.CancelledError:
        record.outcome, record.detail = LOST, "not answered when the run ended"
        raise
    except TimeoutError:
        record.outcome, record.detail = LOST, f"no answer within {stream.timeout_s:.0f} s"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        record.outcome, record.detail = LOST, f"{type(error).__name__}: {error}"
    finally:
        record.end_s = state.now_s
        state.outstanding[stream.qos_class] -= 1
    return record


async def _receive(response: aiohttp.ClientResponse, stream: Stream, record: Record, state: Run) -> None:
    record.status = response.status
    if response.status != 200:
        record.detail = (await response.text())[:300]
        record.outcome = REFUSED if 400 <= response.status < 500 else LOST
    elif stream.stream:
        finished = False
        async for event in _events(response):
            if event == b"[DONE]":
                finished = True
            elif _carries_token(event):
                state.receive(record, 1)
        record.outcome = ANSWERED if finished else LOST
        record.detail = "" if finished else "stream ended without [DONE]"
    else:
        body = orjson.loads(await response.read())
        state.receive(record, int(body["usage"]["completion_tokens"]))
        record.outcome = ANSWERED


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Yield the data of each server-sent event."""
    async for line in response.content:
        if line.startswith(b"data: "):
            yield line[6:].strip()


def _carries_token(event: bytes) -> bool:
    """Whether a chat chunk brings output: usage and role-only chunks do not."""
    body: Any = orjson.loads(event)
    return any(c.get("delta", {}).get("content") for c in body.get("choices", ()))


def _body(request: Request, stream: Stream) -> bytes:
    tag = f"[{stream.name} {request.index}] "
    text = (tag + _FILLER * (1 + request.prompt_tokens * BYTES_PER_TOKEN // len(_FILLER)))[
        : request.prompt_tokens * BYTES_PER_TOKEN
    ]
    body: dict[str, Any] = {
        "model": request.model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": request.output_tokens,
        "ignore_eos": True,  # the trace says how long the answer was
        "stream": stream.stream,
    }
    if stream.stream:
        body["stream_options"] = {"include_usage": True}
    return orjson.dumps(body)


def _headers(stream: Stream) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "x-tidegate-qos": stream.qos_class}
    if stream.token:
        headers["Authorization"] = f"Bearer {stream.token}"
    return headers


def lag_ms(lags_s: list[float]) -> dict[str, float]:
    """How late the open loops' requests were sent, in milliseconds: median, 99th percentile, most."""
    figures = {"p50": 0.50, "p99": 0.99, "max": 1.0}
    return {name: round(1000 * percentile(lags_s, q), 2) if lags_s else 0.0 for name, q in figures.items()}


def recent(state: Run, window_s: float = 10.0) -> dict[str, Any]:
    """The last seconds of a run, per class, for a live view."""
    now = state.now_s
    since = max(0.0, now - window_s)
    span = max(now - since, 1e-9)
    classes: dict[str, dict[str, Any]] = {}
    for name in state.outstanding:
        mine = [r for r in state.records if r.qos_class == name]
        tokens = state.tokens.get(name, Counter())
        ttft = [r.ttft_s for r in mine if r.first_token_s is not None and r.first_token_s >= since]
        ended = [r for r in mine if r.end_s is not None]
        classes[name] = {
            "sent_per_s": sum(r.sent_s >= since for r in mine) / span,
            "outstanding": state.outstanding[name],
            "ttft_p50_s": percentile(ttft, 0.50),
            "ttft_p99_s": percentile(ttft, 0.99),
            "tokens_per_s": sum(tokens[second] for second in range(int(since), int(now))) / span,
            **{o: sum(r.outcome == o for r in ended) for o in (ANSWERED, REFUSED, LOST)},
        }
    return {"t": round(now, 1), "classes": classes, "lag_ms": lag_ms(state.lags_s)}
