"""One central, bounded queue per (model, class), and late binding to endpoints.

A state machine without I/O or clock: tell it what happened and when, ask it what to do. Between
classes of a model strict priority, inside a class arrival order, between models the oldest whose
model has room. A request holds its room from dispatch until `finish`, whatever ends it.

A streamed answer that has begun is lost when its replica goes, a whole one can be asked for again.
So streamed requests keep off replicas on lent GPUs (unless their model has no others), and while
one waits for a safe replica, whole ones behind it may go to lent ones, and only there.
"""

import itertools
import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tidegate.core import pick
from tidegate.core.flowtypes import (
    Ask,
    Dispatch,
    Ended,
    Endpoint,
    Model,
    ModelKey,
    Policy,
    Reason,
    Refused,
)
from tidegate.core.load import EngineReport, Load, Mean, Rate
from tidegate.core.pick import Candidate, Need, NoRoom, Place, Traffic
from tidegate.core.types import QoSClass

__all__ = [
    "Ask",
    "Dispatch",
    "Ended",
    "Endpoint",
    "Flow",
    "Model",
    "ModelKey",
    "Policy",
    "Reason",
    "Refused",
]

_FIFO_QUEUE: Final = ""
_PRIOR_SERVICE_S: Final = 10.0
"""How long a request holds its slot before any was seen to end: 256 tokens at 40 ms each."""
_RECENT_S: Final = 15.0
"""A class without arrivals for this long lends its headroom."""
_RETRY_AFTER_MAX_S: Final = 600


@dataclass(slots=True)
class _Waiting:
    ask: Ask
    since: float


@dataclass(slots=True)
class _Running:
    ask: Ask
    address: str
    since: float


class _Queue:
    """The requests of one (model, class) that wait, and how fast they leave.

    Two lines, each oldest first: answers that are streamed, and whole ones.
    """

    __slots__ = ("drained", "streamed", "whole")

    def __init__(self) -> None:
        self.streamed: OrderedDict[int, _Waiting] = OrderedDict()
        self.whole: OrderedDict[int, _Waiting] = OrderedDict()
        self.drained = Rate(30.0)

    def __len__(self) -> int:
        return len(self.streamed) + len(self.whole)

    def add(self, ask: Ask, now: float) -> None:
        (self.streamed if ask.streamed else self.whole)[ask.id] = _Waiting(ask, now)

    def pop(self, request: int) -> _Waiting:
        return (self.streamed if request in self.streamed else self.whole).pop(request)

    def heads(self, *, whole_only: bool = False) -> Iterator[_Waiting]:
        """The oldest of each line."""
        for line in (self.whole,) if whole_only else (self.whole, self.streamed):
            yield from itertools.islice(line.values(), 1)

    def head(self) -> _Waiting | None:
        """The oldest of all."""
        return min(self.heads(), key=lambda h: (h.since, h.ask.id), default=None)

    def all(self) -> Iterator[_Waiting]:
        return itertools.chain(self.whole.values(), self.streamed.values())


@dataclass(slots=True)
class _Turn:
    """One model's part in a round of dispatching.

    `apart`: there are both lent and other endpoints, so streamed requests have fewer to go to.
    `passing`: a streamed one waits; whole ones pass it, onto lent endpoints only.
    """

    keep: pick.Headroom
    safe: bool
    apart: bool
    passing: bool = False


class _Seen:
    """What a (model, class) was observed to do."""

    __slots__ = ("arrivals", "last", "service", "tokens")

    def __init__(self) -> None:
        self.arrivals = Rate(5.0)
        self.last = -math.inf
        self.service = Mean(0.1)
        self.tokens = Mean(0.1)


class Flow:
    """Admits, queues and dispatches. Every method that needs the time is given it, in seconds."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy or Policy()
        self.classes: Mapping[str, QoSClass] = {}
        self.models: Mapping[ModelKey, Model] = {}
        self.bytes = 0
        self._ranks: dict[str, int] = {}
        self._queues: dict[tuple[ModelKey, str], _Queue] = {}
        self._seen: dict[tuple[ModelKey, str], _Seen] = {}
        self._loads: dict[str, Load] = {}
        self._running: dict[int, _Running] = {}
        self._busy: Counter[tuple[ModelKey, str]] = Counter()
        self._where: dict[int, tuple[ModelKey, str]] = {}

    # ── the world ───────────────────────────────────────────────────────────────────────────────

    def set_world(
        self,
        classes: Mapping[str, QoSClass],
        models: Mapping[ModelKey, Model],
        endpoints: Iterable[Endpoint],
        now: float,
    ) -> None:
        """Replace what exists. In-flight counts stay; a vanished endpoint goes once it is empty."""
        self._expect(classes, models, now)
        self.classes, self.models = classes, models
        by_importance = sorted(classes.values(), key=lambda c: (-c.priority, c.name))
        self._ranks = {c.name: index for index, c in enumerate(by_importance)}
        fresh = {e.address: e for e in endpoints}
        for address, load in list(self._loads.items()):
            if address not in fresh:
                load.leave()
                if not load.requests:
                    del self._loads[address]
        for address, e in fresh.items():
            known = self._loads.get(address)
            if known is None:
                known = self._loads[address] = Load(address, now)
            known.become(e)
        for key, queue in list(self._queues.items()):
            if key[0] not in models and not queue:
                del self._queues[key]
        self._seen = {key: seen for key, seen in self._seen.items() if key[0] in models}

    def _expect(self, classes: Mapping[str, QoSClass], models: Mapping[ModelKey, Model], now: float) -> None:
        """Of a model just met nothing was seen yet: keep headroom for those who would wait, at first."""
        for model in models.values():
            for name in model.classes:
                known = classes.get(name)
                if model.key not in self.models and known and known.objectives.ttft_s is not None:
                    self._seen.setdefault((model.key, name), _Seen()).last = now

    def report(self, address: str, report: EngineReport, own_before: int, own_tokens_before: int) -> None:
        """Take an engine's own counts; `own_…` are ours from just before it was asked."""
        load = self._loads.get(address)
        if load is not None:
            load.correct(report, own_before, own_tokens_before)

    def held(self, address: str) -> tuple[int, int]:
        """Requests and KV tokens that this queue has in flight at an endpoint."""
        load = self._loads.get(address)
        return (load.requests, load.tokens) if load else (0, 0)

    # ── a request's life ────────────────────────────────────────────────────────────────────────

    def admit(self, ask: Ask, now: float) -> Refused | None:
        """Queue a request, or say why not. Call `dispatch` next."""
        key = self._queue_key(ask)
        queue = self._queues.setdefault(key, _Queue())
        most, _ = self._bounds(ask.qos_class)
        ready = any(True for _ in self._ready(ask.model))
        model = self.models.get(ask.model)
        if not ready and not (model and model.startable):
            return self._refuse(503, Reason.NO_ENDPOINT, queue, now, ask)
        if len(queue) >= most:
            return self._refuse(429, Reason.QUEUE_FULL, queue, now, ask)
        if self.bytes + ask.size > self.policy.max_bytes:
            return self._refuse(429, Reason.MEMORY_FULL, queue, now, ask)
        seen = self._seen.setdefault((ask.model, ask.qos_class), _Seen())
        seen.arrivals.add(now)
        seen.last = now
        seen.tokens.add(ask.prompt_tokens + ask.output_tokens)
        queue.add(ask, now)
        self._where[ask.id] = key
        self.bytes += ask.size
        return None

    def dispatch(self, now: float) -> list[Dispatch]:
        """Give endpoints to the requests whose turn it is, until no head of a queue has room.

        Within a model nothing overtakes a blocked head of a higher class, unless on endpoints that
        are not for it.
        """
        done: list[Dispatch] = []
        heads = {m: h for m in {key[0] for key, q in self._queues.items() if q} if (h := self._head(m))}
        turns: dict[ModelKey, _Turn] = {}
        while heads:
            model = min(heads, key=lambda m: (self._rank(heads[m].ask), heads[m].since, heads[m].ask.id))
            ask, turn = heads[model].ask, turns.get(model)
            if turn is None:
                turn = turns[model] = self._turn(model, now)
            chosen = pick.choose(self._need(ask, turn), self._candidates(ask, turn.keep, now))
            following = None
            if not isinstance(chosen, NoRoom):
                done.append(self._send(ask, chosen, now))
                following = self._head(model, whole_only=turn.passing)
            elif ask.streamed and turn.apart:
                turn.passing = True
                following = self._head(model, whole_only=True)
            if following is None:
                del heads[model]
            else:
                heads[model] = following
        return done

    def finish(self, request: int, now: float, *, whole: bool = True) -> Ended | None:
        """End a request, however it ended. Its room is given back by the first call only.

        `whole` False keeps an aborted one out of the measured service times.
        """
        running = self._running.pop(request, None)
        if running is not None:
            self._busy[running.ask.model, running.ask.qos_class] -= 1
            load = self._loads[running.address]
            load.give_back(running.ask.prompt_tokens + running.ask.output_tokens)
            if load.gone and not load.requests:
                del self._loads[running.address]
            if whole and (seen := self._seen.get((running.ask.model, running.ask.qos_class))):
                seen.service.add(now - running.since)
            return Ended.DISPATCHED
        key = self._where.pop(request, None)
        if key is None:
            return None
        self._drop(key, request)
        return Ended.QUEUED

    def expire(self, now: float) -> list[tuple[Ask, Refused]]:
        """Refuse what has waited as long as its class allows, or has nothing left to wait for."""
        gone: list[tuple[Ask, Refused]] = []
        for key, queue in list(self._queues.items()):
            model = self.models.get(key[0])
            hopeless = not (model and model.startable) and not any(True for _ in self._ready(key[0]))
            while (head := queue.head()) is not None:
                late = now - head.since >= self._bounds(head.ask.qos_class)[1]
                if not (late or hopeless):
                    break
                served = any(True for _ in self._ready(key[0]))
                why = (429, Reason.WAITED_TOO_LONG) if served else (503, Reason.NO_ENDPOINT)
                gone.append((head.ask, self._refuse(*why, queue, now, head.ask)))
                del self._where[head.ask.id]
                self._drop(key, head.ask.id)
        return gone

    def next_expiry(self) -> float | None:
        """When `expire` has something to do next, if nothing else happens."""
        heads = (head for queue in self._queues.values() if (head := queue.head()))
        return min((h.since + self._bounds(h.ask.qos_class)[1] for h in heads), default=None)

    # ── what it looks like ──────────────────────────────────────────────────────────────────────

    def waiting(self) -> Iterator[Ask]:
        """Everything that is queued."""
        for queue in self._queues.values():
            yield from (one.ask for one in queue.all())

    def in_flight(self) -> Iterator[tuple[Ask, str]]:
        """Everything that is dispatched, with the lane that serves it."""
        for one in self._running.values():
            yield one.ask, self._loads[one.address].lane

    def occupied(self) -> Iterator[tuple[str, ModelKey, bool, int]]:
        """For every endpoint: address, model, whether nothing more comes, and requests that run there.

        After a restart what the picker before sent there is known only once the engine has reported,
        so until then more may come.
        """
        for load in self._loads.values():
            yield load.address, load.model, load.drained, load.requests + load.foreign

    def snapshot(self, now: float) -> dict[str, Any]:
        """Queues, endpoints and headroom as JSON values."""
        queues = [
            {
                "namespace": key[0][0],
                "model": key[0][1],
                "qos_class": key[1] or "*",
                "waiting": len(queue),
                "streamed": len(queue.streamed),
                "oldest_s": round(now - head.since, 3) if (head := queue.head()) else 0.0,
                "drained_per_s": round(queue.drained.value(now), 3),
            }
            for key, queue in sorted(self._queues.items())
        ]
        kept = {model: self._headroom(model, now) for model in self.models}
        names = {rank: name for name, rank in self._ranks.items()}
        endpoints = []
        for address, load in sorted(self._loads.items()):
            keep = {names[r]: by.get(address, (0, 0))[0] for r, by in kept.get(load.model, {}).items()}
            endpoints.append(load.describe(now, self.policy.report_stale_s) | {"keeps_free_from": keep})
        return {
            "policy": "qos" if self.policy.qos else "fifo",
            "queued_bytes": self.bytes,
            "queues": queues,
            "endpoints": endpoints,
        }

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _queue_key(self, ask: Ask) -> tuple[ModelKey, str]:
        return (ask.model, ask.qos_class if self.policy.qos else _FIFO_QUEUE)

    def _bounds(self, qos_class: str) -> tuple[int, float]:
        if not self.policy.qos:
            return self.policy.fifo_max_requests, self.policy.fifo_max_wait_s
        known = self.classes.get(qos_class)
        return (known.queue_max_requests, known.queue_max_wait_s) if known else (0, 0.0)

    def _rank(self, ask: Ask) -> int:
        return self._ranks.get(ask.qos_class, len(self._ranks)) if self.policy.qos else 0

    def _need(self, ask: Ask, turn: _Turn) -> Need:
        known = self.classes.get(ask.qos_class)
        return Need(
            ask.qos_class,
            self._rank(ask),
            ask.prompt_tokens,
            ask.output_tokens,
            urgent=self.policy.qos and known is not None and known.objectives.ttft_s is not None,
            not_lent=ask.streamed and turn.safe,
            only_lent=turn.passing,
        )

    def _head(self, model: ModelKey, *, whole_only: bool = False) -> _Waiting | None:
        """The request of this model whose turn it is: the oldest of its highest class."""
        heads = (
            head
            for key, queue in self._queues.items()
            if key[0] == model
            for head in queue.heads(whole_only=whole_only)
        )
        return min(heads, key=lambda h: (self._rank(h.ask), h.since, h.ask.id), default=None)

    def _turn(self, model: ModelKey, now: float) -> _Turn:
        lent = [e.lent for e in self._ready(model)]
        safe = not all(lent)
        return _Turn(self._headroom(model, now), safe=safe, apart=safe and any(lent))

    def _ready(self, model: ModelKey) -> Iterator[Load]:
        return (e for e in self._loads.values() if e.model == model and e.ready and not e.draining)

    def _candidates(self, ask: Ask, keep: pick.Headroom, now: float) -> list[Candidate]:
        rank = self._rank(ask)
        left = keep.get(rank, {})
        return [
            Candidate(
                address=load.address,
                lane=load.lane,
                lane_rank=self._ranks.get(load.lane, len(self._ranks)),
                slots=load.usable_slots(now, self.policy.report_grace_s, self.policy.report_stale_s),
                used=load.requests + load.foreign,
                kv_tokens=load.kv_tokens,
                kv_used=load.tokens + load.foreign_tokens,
                prefill_tokens=load.prefill(now),
                keep_slots=left.get(load.address, (0, 0))[0],
                keep_tokens=left.get(load.address, (0, 0))[1],
                ready=load.ready,
                draining=load.draining,
                lent=load.lent,
            )
            for load in self._loads.values()
            if load.model == ask.model
        ]

    def _headroom(self, model: ModelKey, now: float) -> pick.Headroom:
        if not self.policy.qos:
            return {}
        # Kept where it can be used by all: streamed requests keep off lent endpoints.
        ready = list(self._ready(model))
        kept = [e for e in ready if not e.lent] or ready
        places = [Place(e.address, e.lane, e.slots) for e in kept]
        traffic, service = [], {}
        # A class seen here counts even when the model no longer lists it: its requests still run.
        for name, rank in self._ranks.items():
            seen = self._seen.get((model, name))
            if seen is None:
                continue
            recent = now - seen.last < _RECENT_S
            traffic.append(Traffic(name, rank, seen.arrivals.value(now), seen.tokens.value(0.0), recent))
            service[rank] = seen.service.value(_PRIOR_SERVICE_S)
        busy = {
            self._ranks[name]: n
            for (key, name), n in self._busy.items()
            if key == model and name in self._ranks
        }
        return pick.headroom(traffic, places, service, busy)

    def _send(self, ask: Ask, address: str, now: float) -> Dispatch:
        key = self._where.pop(ask.id)
        queue = self._queues[key]
        waited = now - self._drop(key, ask.id).since
        queue.drained.add(now)
        load = self._loads[address]
        load.take(ask.prompt_tokens, ask.prompt_tokens + ask.output_tokens, now)
        self._running[ask.id] = _Running(ask, address, now)
        self._busy[ask.model, ask.qos_class] += 1
        return Dispatch(ask, address, load.lane, waited)

    def _drop(self, key: tuple[ModelKey, str], request: int) -> _Waiting:
        dropped = self._queues[key].pop(request)
        self.bytes -= dropped.ask.size
        return dropped

    def _refuse(self, status: int, reason: Reason, queue: _Queue, now: float, ask: Ask) -> Refused:
        waiting, rate = len(queue), queue.drained.value(now)
        most, wait = self._bounds(ask.qos_class)
        estimate = waiting / rate if rate > 0 else wait
        after = min(_RETRY_AFTER_MAX_S, max(1, math.ceil(estimate)))
        name = f"{ask.model[0]}/{ask.model[1]}"
        text = {
            Reason.QUEUE_FULL: f"{waiting} of {most} {ask.qos_class} requests wait for {name}",
            Reason.WAITED_TOO_LONG: f"no room at {name} for class {ask.qos_class} within {wait:g} s",
            Reason.MEMORY_FULL: f"the queue holds {self.bytes} bytes of {self.policy.max_bytes} allowed",
            Reason.NO_ENDPOINT: f"no replica of {name} is ready",
        }[reason]
        return Refused(status, reason, f"{text}; try again in {after} s", after)
