"""Asks the engines themselves, every second, what they run: for what the picker cannot know.

The picker's own counts are exact for what went through it. The engines' say what did not, such as
requests that an earlier picker had sent, and how much KV cache there is.
"""

import asyncio
import logging
import math
from collections.abc import Iterable
from typing import Final

import aiohttp

from tidegate.adapters.metrics import Sample, parse
from tidegate.core.load import EngineReport
from tidegate.picker.desk import Desk

log = logging.getLogger(__name__)

PERIOD_S: Final = 1.0
_TIMEOUT_S: Final = 2.0
_AT_ONCE: Final = 64
_MAX_BYTES: Final = 8 << 20

_RUNNING: Final = "vllm:num_requests_running"
_WAITING: Final = "vllm:num_requests_waiting"
_KV_USAGE: Final = "vllm:kv_cache_usage_perc"
_KV_CONFIG: Final = "vllm:cache_config_info"
_GENERATED: Final = "vllm:generation_tokens_total"
_ADAPTERS: Final = "vllm:lora_requests_info"
_PENDING: Final = "nv_inference_pending_request_count"
_WANTED: Final = (_RUNNING, _WAITING, _KV_USAGE, _KV_CONFIG, _GENERATED, _ADAPTERS, _PENDING)


def read_report(text: str, now: float) -> EngineReport | None:
    """What an engine's metrics say; None where they are neither vLLM's nor Triton's."""
    # Histograms are nearly all of the text, and parsing costs.
    lines = "\n".join(line for line in text.splitlines() if line.startswith(_WANTED))
    by_name: dict[str, list[Sample]] = {}
    for sample in parse(lines):
        by_name.setdefault(sample.name, []).append(sample)
    if _RUNNING in by_name:
        usages = _values(by_name, _KV_USAGE)
        return EngineReport(
            time_s=now,
            running=int(sum(_values(by_name, _RUNNING))),
            waiting=int(sum(_values(by_name, _WAITING))),
            kv_usage=sum(usages) / len(usages) if usages else None,
            kv_tokens=sum(_kv_tokens(s) for s in by_name.get(_KV_CONFIG, ())) or None,
            generated_tokens=int(sum(made)) if (made := _values(by_name, _GENERATED)) else None,
            adapters=_adapters(by_name.get(_ADAPTERS, ())),
        )
    if _PENDING in by_name:
        return EngineReport(now, running=0, waiting=int(sum(_values(by_name, _PENDING))))
    return None


def _values(by_name: dict[str, list[Sample]], name: str) -> list[float]:
    """What can be reckoned with: an engine that is starting may say NaN."""
    return [s.value for s in by_name.get(name, ()) if math.isfinite(s.value)]


def _adapters(samples: Iterable[Sample]) -> tuple[str, ...]:
    """LoRA adapters that run or wait there: vLLM writes them in labels, the newest sample by its value."""
    newest = max(samples, key=lambda s: s.value, default=None)
    if newest is None:
        return ()
    listed = (newest.labels.get(f"{state}_lora_adapters", "") for state in ("running", "waiting"))
    return tuple(sorted({name for text in listed for name in text.split(",") if name}))


def _kv_tokens(sample: Sample) -> int:
    """Capacity in tokens; one sample for each data-parallel rank."""
    try:
        return int(sample.labels["num_gpu_blocks"]) * int(sample.labels["block_size"])
    except (KeyError, ValueError):  # "None" before the engine has measured its memory
        return 0


class Engines:
    """Scrapes every endpoint that is ready, and a new one at once."""

    def __init__(self, desk: Desk, period_s: float = PERIOD_S) -> None:
        self._desk, self._period = desk, period_s
        self._turn = asyncio.Semaphore(_AT_ONCE)
        self._failing: set[str] = set()

    async def run(self) -> None:
        """Scrape until cancelled."""
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=_AT_ONCE, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            tasks: dict[str, asyncio.Task[None]] = {}
            try:
                while True:
                    self._follow(tasks, session)
                    await asyncio.sleep(0.05)
            finally:
                await _cancel(tasks.values())

    def _follow(self, tasks: dict[str, asyncio.Task[None]], session: aiohttp.ClientSession) -> None:
        """One task for each ready endpoint."""
        world = self._desk.world
        ready = {e.address for e in world.endpoints if e.ready}
        # A task ends only by what nobody thought of; the next one begins afresh.
        for address in [a for a, task in tasks.items() if task.done()]:
            log.error("scraping %s ended", address, exc_info=tasks.pop(address).exception())
        for address in ready - tasks.keys():
            tasks[address] = asyncio.create_task(self._keep(session, address))
        for address in tasks.keys() - ready:
            tasks.pop(address).cancel()

    async def _keep(self, session: aiohttp.ClientSession, address: str) -> None:
        while True:
            url = self._desk.world.metrics_urls.get(address)
            if url is not None:
                async with self._turn:
                    await self._once(session, address, url)
            await asyncio.sleep(self._period)

    async def _once(self, session: aiohttp.ClientSession, address: str, url: str) -> None:
        before, asked = self._desk.flow.held(address), self._desk.clock()
        try:
            async with session.get(url) as response:
                response.raise_for_status()
                text = (await response.content.read(_MAX_BYTES)).decode()
            report = read_report(text, asked)
            problem = "" if report else "neither vLLM's nor Triton's metrics"
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, ArithmeticError) as error:
            report, problem = None, str(error) or type(error).__name__
        self._desk.metrics.reports.labels("ok" if report else "failed").inc()
        if report is not None:
            self._failing.discard(address)
            self._desk.report(address, report, before)
        elif address not in self._failing:
            self._failing.add(address)
            log.warning("%s: %s; a quarter of its slots is left alone until it answers", url, problem)


async def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    found = list(tasks)
    for task in found:
        task.cancel()
    await asyncio.gather(*found, return_exceptions=True)
