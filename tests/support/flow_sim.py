"""The queue and emulated engines in virtual time: one model, replicas that do not move."""

import csv
import heapq
import itertools
import random
from dataclasses import dataclass, field
from importlib.resources import files

from tidegate.core.flow import Ask, Endpoint, Flow, Model, Policy
from tidegate.core.load import EngineReport
from tidegate.core.steptime import LLAMA3_8B_A100
from tidegate.core.types import Objectives, QoSClass
from tidegate.sim.engine import Engine
from tidegate.sim.pipeline import Pipeline
from tidegate.sim.types import EngineConfig, Request
from tidegate.sim.types import Policy as EnginePolicy

KEY = ("ns", "m")
CLASSES = {
    "interactive": QoSClass("interactive", 1000, objectives=Objectives(ttft_s=1.0), queue_max_wait_s=600),
    "standard": QoSClass("standard", 500, queue_max_wait_s=600),
    "batch": QoSClass("batch", 0, queue_max_wait_s=3600),
}
TRACES = {"interactive": "chat", "standard": "code", "batch": "summaries"}
CONFIG = EngineConfig(
    max_num_seqs=16, max_num_batched_tokens=512, num_blocks=4096, policy=EnginePolicy.PRIORITY
)
LANES = ("interactive", "interactive", "standard", "batch")


def lengths(trace: str) -> list[tuple[int, int]]:
    """(prompt, output) tokens of the demo's traces, capped as the demo caps them."""
    text = files("tidegate.demo").joinpath(f"data/{trace}.csv").read_text()
    rows = csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))
    return [(min(6000, int(r["prompt_tokens"])), min(256, int(r["output_tokens"]))) for r in rows]


@dataclass
class Result:
    """Per class, times to first token (seconds) and output tokens."""

    ttft_s: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in CLASSES})
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CLASSES, 0))

    def p99(self, name: str) -> float:
        values = sorted(self.ttft_s[name])
        return values[int(0.99 * len(values))]


class Simulation:
    """Events: a request comes, a step of an engine ends, a second passes."""

    def __init__(self, *, qos: bool, seed: int, seconds: float) -> None:
        self.flow = Flow(Policy(qos=qos))
        self.qos, self.seconds, self.now = qos, seconds, 0.0
        self.rng = random.Random(seed)
        self.pipelines = {
            f"e:{i}": Pipeline(Engine(CONFIG), LLAMA3_8B_A100.seconds) for i in range(len(LANES))
        }
        self.events: list[tuple[float, int, str, str]] = []
        self.numbers = itertools.count()
        self.asks: dict[int, tuple[Ask, float]] = {}
        self.rows = {
            name: itertools.cycle(self.rng.sample(found, len(found)))
            for name, trace in TRACES.items()
            if (found := lengths(trace))
        }
        self.result = Result()
        endpoints = [Endpoint(a, KEY, lane, 16) for a, lane in zip(self.pipelines, LANES, strict=True)]
        self.flow.set_world(CLASSES, {KEY: Model(KEY, tuple(CLASSES))}, endpoints, 0.0)

    def run(self, rates: dict[str, list[tuple[float, float]]], outstanding: int) -> Result:
        """Poisson arrivals by class as (until, per second) phases; batch as a closed loop."""
        self._report()
        for name, phases in rates.items():
            at, start = 0.0, 0.0
            for until, rate in phases:
                at = max(at, start)
                while (at := at + self.rng.expovariate(rate)) < until:
                    self._push(at, "come", name)
                start = until
        for _ in range(outstanding):
            self._push(0.0, "come", "batch")
        self._push(1.0, "report", "")
        while self.events and self.events[0][0] < self.seconds:
            self.now, _, kind, what = heapq.heappop(self.events)
            getattr(self, f"_{kind}")(what)
            self._dispatch()
        return self.result

    def _push(self, at: float, kind: str, what: str) -> None:
        heapq.heappush(self.events, (at, next(self.numbers), kind, what))

    def _come(self, name: str) -> None:
        prompt, output = next(self.rows[name])
        ask = Ask(next(self.numbers), KEY, name, prompt, max(1, output))
        self.asks[ask.id] = (ask, self.now)
        assert self.flow.admit(ask, self.now) is None

    def _report(self, _what: str = "") -> None:
        for address, pipeline in self.pipelines.items():
            engine, own = pipeline.engine, self.flow.held(address)
            report = EngineReport(
                self.now,
                engine.unfinished - engine.waiting,
                engine.waiting,
                engine.kv_usage,
                CONFIG.kv_tokens,
            )
            self.flow.report(address, report, *own)
        if _what == "" and self.now > 0:
            self._push(self.now + 1.0, "report", "")

    def _dispatch(self) -> None:
        for one in self.flow.dispatch(self.now):
            ask, pipeline = one.ask, self.pipelines[one.address]
            priority = -CLASSES[ask.qos_class].priority if self.qos else 0
            pipeline.engine.add(
                Request(str(ask.id), ask.prompt_tokens, ask.output_tokens, priority), self.now
            )
            self._launch(one.address)

    def _launch(self, address: str) -> None:
        for step in self.pipelines[address].launch(self.now):
            self._push(step.end, "step", address)

    def _step(self, address: str) -> None:
        for event in self.pipelines[address].complete()[1]:
            ask, came = self.asks[int(event.id)]
            if event.nth == 0:
                self.result.ttft_s[ask.qos_class].append(self.now - came)
            self.result.tokens[ask.qos_class] += 1
            if event.finished:
                self.flow.finish(ask.id, self.now)
                if ask.qos_class == "batch":
                    self._push(self.now, "come", "batch")
        self._launch(address)
