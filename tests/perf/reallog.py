"""One request log through an engine over HTTP and through the model, and what differs."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import aiohttp
import orjson
from scipy.stats import kendalltau

from tidegate.core.stepfit import quantile
from tidegate.sim.drive import Arrival, drive
from tidegate.sim.pipeline import StepTime
from tidegate.sim.types import EngineConfig, Request
from tidegate.sim.workload import Length, chat_lengths, summary_lengths

CHAT, BATCH = "chat", "batch"
PRIORITY = {CHAT: 0, BATCH: 10}
SHARES = (0.5, 0.9, 0.99)
_WORD = 7
"""A token id that every model has."""


@dataclass(frozen=True, slots=True)
class Item:
    """A request of the log: sent at `at_s`, or as soon as the request `follows` has ended."""

    request: Request
    kind: str
    at_s: float = 0.0
    follows: str | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as its client saw it, seconds from the start of the run."""

    kind: str
    sent_s: float
    first_s: float
    finish_s: float


@dataclass(frozen=True, slots=True)
class Result:
    """A log served to its end: by id what clients saw, and how often the engine preempted."""

    seen: dict[str, Seen]
    preemptions: int

    @property
    def total_s(self) -> float:
        """When the last request ended."""
        return max(s.finish_s for s in self.seen.values())

    def ttfts(self, kind: str) -> list[float]:
        """Times to first token, in rising order."""
        return sorted(s.first_s - s.sent_s for s in self.seen.values() if s.kind == kind)

    def completions(self, kind: str) -> list[float]:
        """Times from sending to the last token, in rising order."""
        return sorted(s.finish_s - s.sent_s for s in self.seen.values() if s.kind == kind)


@dataclass(frozen=True, slots=True)
class Load:
    """What a log is made of. `scale` divides the traces' lengths, so that a small model holds them."""

    chats: int = 60
    chats_per_s: float = 2.0
    batches: int = 120
    clients: int = 36
    scale: int = 4

    def log(self, seed: int) -> list[Item]:
        """Chats as Poisson arrivals, and batch as a closed loop: each client's next when its last ended."""
        rng = random.Random(f"{seed}/real")
        chat, batch = (self._lengths(rows, rng) for rows in (chat_lengths(), summary_lengths()))
        now, items = 0.0, []
        for i in range(self.chats):
            now += rng.expovariate(self.chats_per_s)
            items.append(Item(Request(f"chat-{i}", *chat[i], PRIORITY[CHAT]), CHAT, now))
        for i in range(self.batches):
            before = f"batch-{i - self.clients}" if i >= self.clients else None
            # They start one after the other: all at once, the order would be chance.
            at_s = 0.0 if before else 0.02 * i
            items.append(Item(Request(f"batch-{i}", *batch[i], PRIORITY[BATCH]), BATCH, at_s, before))
        return items

    def _lengths(self, rows: Sequence[Length], rng: random.Random) -> list[tuple[int, int]]:
        lengths = [(max(1, x.prompt // self.scale), max(1, x.output // self.scale)) for x in rows]
        rng.shuffle(lengths)
        return lengths


def through_model(
    config: EngineConfig, log: Sequence[Item], step_time: StepTime, request_s: float, speed: float = 1.0
) -> Result:
    """What the model says. `request_s` is what a request takes outside of steps: taken on its way in."""
    following = {i.follows: i.request for i in log if i.follows is not None}
    arrivals = [Arrival(i.at_s + request_s, i.request) for i in log if i.follows is None]
    run = drive(config, arrivals, step_time, speed, following, request_s)
    seen = {}
    for item in log:
        outcome = run.outcomes[item.request.id]
        assert outcome.first_token_s is not None
        assert outcome.finish_s is not None
        sent_s = outcome.arrival_s - request_s
        seen[item.request.id] = Seen(item.kind, sent_s, outcome.first_token_s, outcome.finish_s)
    return Result(seen, run.counters.preemptions)


async def through_engine(url: str, model: str, log: Sequence[Item], *, priorities: bool) -> Result:
    """What an engine does with it: OpenAI's completions, streamed, prompts as token ids.

    Raises:
        aiohttp.ClientError: a request was refused or broke off.
    """
    ended = {item.request.id: asyncio.Event() for item in log}
    # vLLM closes idle connections after five seconds; on one that it just closed a request would be lost.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        url, connector=connector, timeout=timeout, raise_for_status=True, read_bufsize=2**18
    ) as session:
        before = await _preemptions(session)
        begin = time.monotonic()

        async def serve(item: Item) -> Seen:
            if item.follows is not None:
                await ended[item.follows].wait()
            else:
                await asyncio.sleep(begin + item.at_s - time.monotonic())
            sent_s = time.monotonic() - begin
            body = _body(item.request, model, priorities=priorities)
            headers = {"Content-Type": "application/json"}
            async with session.post("/v1/completions", data=body, headers=headers) as response:
                await response.content.readuntil(b"\n\n")
                first_s = time.monotonic() - begin
                async for _ in response.content.iter_any():
                    pass
            ended[item.request.id].set()
            return Seen(item.kind, sent_s, first_s, time.monotonic() - begin)

        async with asyncio.TaskGroup() as group:
            tasks = {item.request.id: group.create_task(serve(item)) for item in log}
        return Result({id_: t.result() for id_, t in tasks.items()}, await _preemptions(session) - before)


def _body(request: Request, model: str, *, priorities: bool) -> bytes:
    body = {
        "model": model,
        "prompt": [_WORD] * request.prompt_tokens,
        "max_tokens": request.output_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
    }
    if priorities:
        body["priority"] = request.priority
    return orjson.dumps(body)


async def _preemptions(session: aiohttp.ClientSession) -> int:
    async with session.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(
        int(float(line.split()[-1])) for line in lines if line.startswith("vllm:num_preemptions_total")
    )


@dataclass(frozen=True, slots=True)
class Difference:
    """The model's figures by the engine's: 1.0 is the same.

    `same_order` is the share of pairs of requests that ended in the same order. `factor` is the
    machine: the engine's total time by the model's; `figures` are ratios with the model's steps
    made longer by it, `raw` without.
    """

    same_order: float
    factor: float
    raw: dict[str, float]
    figures: dict[str, float]
    preemptions: tuple[int, int]


def difference(
    config: EngineConfig, log: Sequence[Item], real: Result, step_time: StepTime, request_s: float
) -> Difference:
    """Lay the model's run of a log beside an engine's."""
    plain = through_model(config, log, step_time, request_s)
    factor = real.total_s / plain.total_s
    scaled = through_model(config, log, step_time, request_s, 1 / factor)
    return Difference(
        same_order(scaled, real),
        factor,
        ratios(plain, real),
        ratios(scaled, real),
        (scaled.preemptions, real.preemptions),
    )


def same_order(a: Result, b: Result) -> float:
    """The share of pairs of requests that ended in the same order: Kendall's tau, from 0 to 1."""
    ids = sorted(a.seen)
    tau = kendalltau([a.seen[i].finish_s for i in ids], [b.seen[i].finish_s for i in ids]).statistic
    return float((tau + 1) / 2)


def ratios(model: Result, real: Result) -> dict[str, float]:
    """Percentiles of each kind, the model's by the engine's."""
    found = {}
    for kind in (CHAT, BATCH):
        for what, of in (("TTFT", Result.ttfts), ("completion", Result.completions)):
            for share in SHARES:
                name = f"{kind} {what} p{round(100 * share)}"
                found[name] = quantile(of(model, kind), share) / quantile(of(real, kind), share)
    return found


def brief(load: Load, requests: float) -> Load:
    """A smaller log of the same kind: so much of it."""
    return replace(load, chats=int(load.chats * requests), batches=int(load.batches * requests))
