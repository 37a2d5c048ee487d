"""A fleet of engines behind one router, in virtual time: events, and nothing that decides.

The router is told what a picker is told, as late as a picker is told it: arrivals and ends at once,
engines' reports once a second and `scrape_age_s` old, what exists when it changes. Deterministic by
seed: the same fleet and streams give the same bytes.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from tidegate.core.flowtypes import Ask, Endpoint, Model, ModelKey
from tidegate.core.load import EngineReport
from tidegate.core.steptime import LLAMA3_8B_A100
from tidegate.core.types import QoSClass
from tidegate.sim.pipeline import Pipeline, StepTime
from tidegate.sim.records import Record, State
from tidegate.sim.router import Arm, Build
from tidegate.sim.types import Counters, EngineConfig, Policy, Request, TokenEvent
from tidegate.sim.workload import Arrival, Stream

TICK_S: Final = 0.25
"""The picker looks at its queue this often though nothing happened (picker/desk.py)."""
LEAST_S: Final = 1e-4
"""A timer is not set for sooner than this."""
RECALLS: Final = 2
"""How often a request may be taken back from its engine."""
AGAIN_S: Final = 0.1
"""Envoy waits so long before it asks again (render/envoy.py)."""
SCRAPE_S: Final = 1.0
"""The picker asks every engine this often (picker/engines.py)."""


@dataclass(frozen=True, slots=True)
class Replica:
    """One engine. `speed` divides its step times: 0.8 is a fifth slower than anybody knows.

    `config` None takes the setting's.
    """

    address: str
    model: ModelKey
    lane: str
    speed: float = 1.0
    config: EngineConfig | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong at a replica from `start_s` until `end_s`.

    `death`: it is gone, and what runs there with it; it is back, empty, at the end. `slow`: steps
    take `factor` times as long. `deaf`: its metrics are not answered.
    """

    kind: str
    address: str
    start_s: float
    end_s: float
    factor: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what is not known."""
        if self.kind not in ("death", "slow", "deaf"):
            raise ValueError(f"fault kind must be death, slow or deaf, got {self.kind!r}")
        if not 0 <= self.start_s < self.end_s or self.factor <= 0:
            raise ValueError(f"fault at {self.address}: 0 <= start_s < end_s and factor > 0 are needed")


@dataclass(frozen=True, slots=True)
class Setting:
    """What is simulated, whatever the arm. Seconds and tokens."""

    classes: Mapping[str, QoSClass]
    replicas: Sequence[Replica]
    streams: Sequence[Stream]
    seconds: float
    warm_up_s: float = 0.0
    config: EngineConfig = field(default_factory=EngineConfig)
    step_time: StepTime = LLAMA3_8B_A100.seconds
    scrape_age_s: float = 0.05
    faults: Sequence[Fault] = ()
    models: Sequence[ModelKey] = ()
    """Models that may come to have replicas though none is there yet (`sim.cluster`)."""

    def __post_init__(self) -> None:
        """Refuse a window in which nothing would be measured, and names that are not there."""
        if not 0 <= self.warm_up_s < self.seconds:
            raise ValueError(f"warm_up_s of {self.warm_up_s:g} must be within seconds, {self.seconds:g}")
        for stream in self.streams:
            if stream.qos_class not in self.classes:
                raise ValueError(f"stream {stream.name}: class {stream.qos_class!r} is not defined")
            if stream.model not in (*self.models, *(r.model for r in self.replicas)):
                raise ValueError(f"stream {stream.name}: no replica serves {'/'.join(stream.model)}")


@dataclass(slots=True)
class Run:
    """What came of it. `recomputed_tokens` are those that preemptions and aborts threw away."""

    arm: str
    seed: int
    setting: Setting
    records: list[Record]
    preemptions: int = 0
    recomputed_tokens: int = 0
    steps: int = 0


class _Site:
    """One replica's engine, and who runs there."""

    def __init__(self, replica: Replica, config: EngineConfig, step_time: StepTime, build: Build) -> None:
        self.replica, self.config = replica, config
        self._build = build
        self.step_time = step_time
        self.slow, self.deaf, self.alive = 1.0, False, True
        self.draining = self.lent = False
        self.epoch = 0
        self.restart()

    def restart(self) -> None:
        self.epoch += 1
        self.first_tokens = 0
        self.engine = self._build(self.config)
        self.line = Pipeline(self.engine, self._seconds, self.replica.speed)

    def _seconds(self, prefill: int, decodes: int, context: int, before: int, pairs: float) -> float:
        return self.slow * self.step_time(prefill, decodes, context, before, pairs)


Event = tuple[float, int, Callable[[], None]]


class Fleet:
    """Runs one arm on a setting with a seed."""

    def __init__(self, setting: Setting, arm: Arm, seed: int) -> None:
        self.setting, self.arm, self.seed = setting, arm, seed
        self.now = 0.0
        self.router = arm.router()
        self._turn_s = 0.0
        # Whether the router has heard of something since it was last asked; of steps it hears nothing.
        self._told = False
        self._events: list[Event] = []
        self._count = itertools.count()
        self._numbers = itertools.count(1)
        self._records: dict[int, Record] = {}
        self._all: list[Record] = []
        self._streams: dict[int, Stream] = {}
        self._closed: dict[str, Iterator[Arrival]] = {}
        replicas = list(setting.replicas)
        if arm.lanes is not None:
            lanes = arm.lanes(len(replicas))
            replicas = [replace(r, lane=lane) for r, lane in zip(replicas, lanes, strict=True)]
        self._sites = {r.address: self._site(r) for r in replicas}
        self._gone: list[Counters] = []
        self._thrown_away = 0
        # Of requests that are sent as growing prefixes: tokens of the one that runs, and of those before.
        self._parts: dict[int, int] = {}
        self._done: dict[int, int] = {}
        self._kept = 0
        order = sorted({c.priority for c in setting.classes.values()}, reverse=True)
        self._priority = {
            name: order.index(c.priority) if arm.engine_priority else 0 for name, c in setting.classes.items()
        }

    def run(self, progress: Callable[[float], None] | None = None) -> Run:
        """Run to the end; `progress` is told the virtual time now and then."""
        setting = self.setting
        self._tell_world()
        for stream in setting.streams:
            self._start(stream)
        for index, site in enumerate(self._sites.values()):
            # Engines are asked one after the other, spread over the period.
            self._at(SCRAPE_S * index / len(self._sites), partial(self._scrape, site))
        for fault in setting.faults:
            self._at(fault.start_s, partial(self._fault, fault, begins=True))
            self._at(fault.end_s, partial(self._fault, fault, begins=False))
        self._at(setting.warm_up_s, self._mark)
        self._tick(progress)
        while self._events and self._events[0][0] <= setting.seconds:
            self.now, _, what = heapq.heappop(self._events)
            what()
            if self._told:
                self._pump()
        self.now = setting.seconds
        self._note_progress("end")
        counters = [*self._gone, *(site.engine.counters for site in self._sites.values())]
        return Run(
            arm=self.arm.name,
            seed=self.seed,
            setting=setting,
            records=self._all,
            preemptions=sum(c.preemptions for c in counters),
            recomputed_tokens=self._thrown_away
            + sum(c.recomputed_tokens for c in counters)
            + max(0, self._kept - sum(c.cache_hits for c in counters)),
            steps=sum(c.steps for c in counters),
        )

    # ── replicas that come and go ───────────────────────────────────────────────────────────────

    def at(self, time_s: float, what: Callable[[], None]) -> None:
        """Have something done at a time that has not passed yet."""
        self._at(time_s, what)

    def add_replica(self, replica: Replica) -> None:
        """A replica is ready."""
        site = self._sites[replica.address] = self._site(replica)
        self._tell_world()
        self._scrape(site)

    def note_replica(self, address: str, *, draining: bool, lent: bool) -> None:
        """What the picker is told of a replica: nothing more is to come, and whose GPUs it stands on."""
        site = self._sites[address]
        if (site.draining, site.lent) != (draining, lent):
            site.draining, site.lent = draining, lent
            self._tell_world()

    def remove_replica(self, address: str) -> int:
        """A replica ends; what runs there is lost, or asked for again. Returns tokens thrown away."""
        site = self._sites.pop(address)
        lost = sum(tokens for _, tokens in site.engine.progress())
        self._gone.append(site.engine.counters)
        self._lose(site)
        return lost

    def in_flight(self, address: str) -> int:
        """Requests that were sent there and have not ended."""
        return self.router.held(address)[0]

    def _site(self, replica: Replica) -> _Site:
        policy = Policy.PRIORITY if self.arm.engine_priority else Policy.FCFS
        config = (replica.config or self.setting.config).with_policy(policy)
        return _Site(replica, self.arm.engine(replica.lane, config), self.setting.step_time, self.arm.build)

    # ── events ──────────────────────────────────────────────────────────────────────────────────

    def _at(self, time_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._count), what))

    def _start(self, stream: Stream) -> None:
        arrivals = stream.arrivals(self.seed)
        if stream.outstanding:
            self._closed[stream.name] = arrivals
            for arrival in itertools.islice(arrivals, stream.outstanding):
                self._at(0.0, partial(self._come, stream, arrival))
        else:
            self._follow(stream, arrivals)

    def _follow(self, stream: Stream, arrivals: Iterator[Arrival]) -> None:
        """The next of an open loop, and after it the one behind."""
        arrival = next(arrivals, None)
        if arrival is None:
            return

        def come() -> None:
            self._come(stream, arrival)
            self._follow(stream, arrivals)

        self._at(arrival.time_s, come)

    def _come(self, stream: Stream, arrival: Arrival) -> None:
        number = next(self._numbers)
        prompt, output = arrival.length
        record = Record(number, stream.name, stream.qos_class, stream.tenant, self.now, prompt, output)
        self._all.append(record)
        self._streams[number] = stream
        self._ask(record)

    def _ask(self, record: Record) -> None:
        """Bring a request to the router, for the first time or again."""
        stream = self._streams[record.number]
        self._records[record.number] = record
        ask = Ask(
            id=record.number,
            model=stream.model,
            qos_class=stream.qos_class,
            prompt_tokens=record.prompt,
            output_tokens=record.output if self.arm.clairvoyant else stream.expected_output,
            streamed=stream.streamed,
            tenant=stream.tenant,
            recallable=record.recalls < RECALLS,
            again=record.recalls + record.retries > 0,
        )
        refused = self.router.admit(ask, self.now)
        self._look()
        if refused is not None:
            self._refuse(record)

    def _refuse(self, record: Record) -> None:
        record.state = State.REFUSED
        del self._records[record.number]
        self._again(record)

    def _again(self, record: Record) -> None:
        """A closed loop sends the next when one has ended."""
        stream = self._streams.pop(record.number)
        arrivals = self._closed.get(stream.name)
        if arrivals is not None:
            # Refused at once: a client waits a moment before it tries again.
            wait_s = TICK_S if record.state is State.REFUSED else 0.0
            self._at(self.now + wait_s, lambda: self._come(stream, next(arrivals)))

    def _look(self) -> None:
        """Have the router asked, after this event."""
        self._told = True

    def _pump(self) -> None:
        """What the picker does after everything that it is told (picker/desk.py)."""
        self._told = False
        for ask, _ in self.router.expire(self.now):
            self._refuse(self._records[ask.id])
        for ask, address in self.router.recall(self.now):
            self._recall(self._records[ask.id], self._sites[address])
        for sent in self.router.dispatch(self.now):
            record, site = self._records[sent.ask.id], self._sites[sent.address]
            record.sent_s, record.address = self.now, sent.address
            priority = self._priority[record.qos_class]
            promised = self.setting.classes[record.qos_class].objectives
            due_s = (promised.ttft_s or promised.completion_s or math.inf) + record.arrival_s - self.now
            prompt, output = sent.ask.prompt_tokens, record.output
            if prompt < record.prompt:
                output = 1
                self._parts[record.number] = prompt
            # What was sent of it before is to be found in the engine's prefix cache.
            self._kept += self._done.get(record.number, 0)
            request = Request(str(record.number), prompt, output, priority, promised.tpot_s, due_s)
            site.engine.add(request, self.now)
            self._launch(site)
        turn_s = self.router.next_turn()
        if turn_s is not None and not self.now < self._turn_s <= turn_s:
            self._turn_s = max(turn_s, self.now + LEAST_S)
            self._at(self._turn_s, self._look)

    def _recall(self, record: Record, site: _Site) -> None:
        """Abort a request where it runs; what was computed of it is lost, and it comes again."""
        self._thrown_away += dict(site.engine.progress()).get(str(record.number), 0)
        site.engine.abort(str(record.number))
        self.router.finish(record.number, self.now, whole=False)
        self._forget_parts(record)
        record.stays += ((record.sent_s or 0.0, self.now),)
        record.address, record.first_s = "", None
        record.recalls += 1
        self._at(self.now + AGAIN_S, partial(self._ask, record))

    def _launch(self, site: _Site) -> None:
        epoch = site.epoch
        for step in site.line.launch(self.now):
            self._at(step.end, partial(self._step, site, epoch))

    def _step(self, site: _Site, epoch: int) -> None:
        if epoch != site.epoch:
            return  # of an engine that has died
        for event in site.line.complete()[1]:
            site.first_tokens += event.nth == 0
            self._token(event)
        self._launch(site)

    def _token(self, event: TokenEvent) -> None:
        record = self._records[int(event.id)]
        if record.number in self._parts:
            if event.finished:
                self._part_ended(record)
            return
        if event.nth == 0:
            record.first_s = self.now
        if event.finished:
            record.finish_s, record.state = self.now, State.ANSWERED
            del self._records[record.number]
            self._done.pop(record.number, None)
            self.router.finish(record.number, self.now)
            self._look()
            self._again(record)

    def _part_ended(self, record: Record) -> None:
        """A prefix of a prompt is computed; its router has more of it to send."""
        self._done[record.number] = self._parts.pop(record.number)
        self.router.finish(record.number, self.now)
        self._look()

    def _forget_parts(self, record: Record) -> None:
        self._parts.pop(record.number, None)
        self._done.pop(record.number, None)

    def _scrape(self, site: _Site) -> None:
        address, asked_s = site.replica.address, self.now
        if self._sites.get(address) is not site:
            return  # it is gone
        self._at(self.now + SCRAPE_S, partial(self._scrape, site))
        if site.deaf or not site.alive:
            return
        before, engine = self.router.held(address), site.engine
        report = EngineReport(
            time_s=asked_s,
            running=engine.unfinished - engine.waiting,
            waiting=engine.waiting,
            kv_usage=engine.kv_usage,
            kv_tokens=site.config.kv_tokens,
            generated_tokens=site.first_tokens + engine.counters.decode_tokens,
        )

        def hear() -> None:
            if self._sites.get(address) is site:
                self.router.report(address, report, *before)
                self._look()

        self._at(asked_s + self.setting.scrape_age_s, hear)

    def _tick(self, progress: Callable[[float], None] | None) -> None:
        if progress is not None:
            progress(self.now)
        self._look()
        self._at(self.now + TICK_S, partial(self._tick, progress))

    def _fault(self, fault: Fault, *, begins: bool) -> None:
        site = self._sites.get(fault.address)
        if site is None:
            return  # it is not there now
        if fault.kind == "slow":
            site.slow = fault.factor if begins else 1.0
        elif fault.kind == "deaf":
            site.deaf = begins
        else:
            site.alive = not begins
            if begins:
                self._lose(site)
            self._tell_world()

    def _lose(self, site: _Site) -> None:
        """A replica dies: what had begun to answer is lost, the rest is asked for again."""
        here = [r for r in self._records.values() if r.address == site.replica.address]
        site.restart()
        self._tell_world()
        for record in here:
            self.router.finish(record.number, self.now, whole=False)
            self._forget_parts(record)
            streamed = self._streams[record.number].streamed
            record.stays += ((record.sent_s or 0.0, self.now),)
            record.address = ""
            if streamed and record.first_s is not None:
                record.state = State.LOST
                del self._records[record.number]
                self._again(record)
            else:
                record.first_s, record.retries = None, record.retries + 1
                self._ask(record)

    # ── what the router and the records are told ────────────────────────────────────────────────

    def _tell_world(self) -> None:
        ranked = sorted(self.setting.classes.values(), key=lambda c: (-c.priority, c.name))
        names = tuple(c.name for c in ranked)
        sites = [s for s in self._sites.values() if s.alive]
        keys = (*(s.replica.model for s in self._sites.values()), *self.setting.models)
        models = {key: Model(key, names, startable=True) for key in keys}
        endpoints = [
            Endpoint(
                s.replica.address,
                s.replica.model,
                s.replica.lane,
                slots=s.config.max_num_seqs,
                draining=s.draining,
                lent=s.lent,
                chunk=s.config.max_num_batched_tokens,
            )
            for s in sites
        ]
        self.router.set_world(self.setting.classes, models, endpoints, self.now)
        self._look()

    def _mark(self) -> None:
        self._note_progress("start")

    def _note_progress(self, which: str) -> None:
        """How many tokens of each unfinished request are computed, at either end of the window."""
        computed = dict(self._done)
        for site in self._sites.values():
            for name, tokens in site.engine.progress():
                computed[int(name)] = max(tokens, computed.get(int(name), 0))
        for number, tokens in computed.items():
            record = self._records[number]
            if which == "start":
                record.computed_before = tokens
            else:
                record.computed = tokens
