"""Runs the pure engine model in real time: a step is a timer.

Timers fire late on a busy machine. Steps therefore follow an absolute schedule, each starting when
the one before it was due to end, so that lateness shifts single tokens and never adds up. How late
they fired is measured (`tidegate_emulator_lag_seconds`): with a large lag, timings say nothing.
"""

import asyncio

from tidegate.core.steptime import LLAMA3_8B_A100
from tidegate.local.engines.promtext import Histogram
from tidegate.sim.engine import Engine
from tidegate.sim.pipeline import Pipeline
from tidegate.sim.types import EngineConfig, Request

# vLLM's buckets (vllm/v1/metrics/loggers.py), seconds.
TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
LATENCY_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
    *(240.0, 480.0, 960.0, 1920.0, 7680.0),
)
LAG_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0)


class Signal:
    """Wakes one waiting coroutine; setting it twice before it is awaited wakes it once."""

    __slots__ = ("_future", "_set")

    def __init__(self) -> None:
        self._set = False
        self._future: asyncio.Future[None] | None = None

    def set(self) -> None:
        """Wake the waiter, now or when it comes to wait."""
        self._set = True
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    async def wait(self) -> None:
        """Wait until set, and reset."""
        if not self._set:
            self._future = asyncio.get_running_loop().create_future()
            try:
                await self._future
            finally:
                self._future = None
        self._set = False


class Generation:
    """A request in the engine: what it has produced so far, and when. Times are the loop's clock."""

    __slots__ = (
        "arrival",
        "done",
        "each_token",
        "finish_reason",
        "first",
        "last",
        "request",
        "scheduled",
        "signal",
        "tokens",
    )

    def __init__(self, request: Request, signal: Signal, *, each_token: bool, finish_reason: str) -> None:
        self.request = request
        self.signal = signal
        self.each_token = each_token
        self.finish_reason = finish_reason
        self.arrival = 0.0
        self.scheduled = 0.0
        self.first = 0.0
        self.last = 0.0
        self.tokens = 0
        self.done = False


class Stats:
    """What an engine process has counted since it started."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished = dict.fromkeys(("stop", "length", "abort", "error"), 0)
        self.ttft = Histogram(TTFT_BUCKETS)
        self.inter_token = Histogram(INTER_TOKEN_BUCKETS)
        self.queue = Histogram(LATENCY_BUCKETS)
        self.end_to_end = Histogram(LATENCY_BUCKETS)
        self.lag = Histogram(LAG_BUCKETS)

    def token(self, generation: Generation, now: float) -> None:
        """Count a token that is about to be delivered."""
        self.generation_tokens += 1
        if generation.tokens == 0:
            generation.first = now
            self.prompt_tokens += generation.request.prompt_tokens
            self.ttft.observe(now - generation.arrival)
            self.queue.observe(generation.scheduled - generation.arrival)
        else:
            self.inter_token.observe(now - generation.last)
        generation.last = now

    def finish(self, generation: Generation, now: float) -> None:
        """Count a request that came to its end."""
        self.finished[generation.finish_reason] += 1
        self.end_to_end.observe(now - generation.arrival)


class EngineDriver:
    """One emulated engine. All methods are to be called from the running event loop."""

    def __init__(self, config: EngineConfig, speed: float = 1.0) -> None:
        self.engine = Engine(config)
        self.stats = Stats()
        self._pipeline = Pipeline(self.engine, LLAMA3_8B_A100.seconds, speed)
        self._loop = asyncio.get_running_loop()
        self._live: dict[str, Generation] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def submit(self, generation: Generation) -> None:
        """Hand a request to the engine.

        Raises:
            ValueError: the engine refuses it (see `Engine.add`).
        """
        now = self._loop.time()
        self.engine.add(generation.request, now)
        generation.arrival = now
        self._live[generation.request.id] = generation
        self._idle.clear()
        # While a step runs, vLLM's engine core waits for it; only an idle one starts at once.
        if self._pipeline.next_end is None:
            self._launch(now)
            self._arm()

    def abort(self, generation: Generation) -> None:
        """Drop a request, if it has not ended: its slot and KV blocks are free at once."""
        if self._live.pop(generation.request.id, None) is None:
            return
        self.engine.abort(generation.request.id)
        self.stats.finished["abort"] += 1
        if not self._live:
            self._idle.set()

    async def idle(self) -> None:
        """Wait until no request is left."""
        await self._idle.wait()

    def close(self) -> None:
        """Stop stepping. Unfinished requests stay unfinished."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        end = self._pipeline.next_end
        self._timer = None if end is None else self._loop.call_at(end, self._tick)

    def _tick(self) -> None:
        """End the steps that are due; launch those that follow."""
        now = self._loop.time()
        while (end := self._pipeline.next_end) is not None and end <= now:
            self.stats.lag.observe(now - end)
            _, events = self._pipeline.complete()
            for event in events:
                self._deliver(event.id, now, finished=event.finished)
            self._launch(end)
        self._arm()

    def _deliver(self, request_id: str, now: float, *, finished: bool) -> None:
        generation = self._live[request_id]
        self.stats.token(generation, now)
        generation.tokens += 1
        if finished:
            generation.done = True
            del self._live[request_id]
            self.stats.finish(generation, now)
            if not self._live:
                self._idle.set()
        if finished or generation.each_token:
            generation.signal.set()

    def _launch(self, now: float) -> None:
        for step in self._pipeline.launch(now):
            for request_id in step.plan.admitted:
                generation = self._live.get(request_id)
                # Those admitted again after a preemption keep their first time.
                if generation is not None and not generation.scheduled:
                    generation.scheduled = max(now, generation.arrival)
