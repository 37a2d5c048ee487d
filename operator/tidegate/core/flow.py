"""One central, bounded queue per (model, class), and late binding to endpoints.

A state machine without I/O or clock: tell it what happened and when, ask it what to do. Between
classes of a model strict priority, inside a class tenants by tokens and then deadlines (`core.line`),
between models the oldest whose model has room. A request holds its room from dispatch until
`finish`, whatever ends it.

A streamed answer that has begun is lost when its replica goes, a whole one can be asked for again.
So streamed requests keep off replicas on lent GPUs (unless their model has no others), and while
one waits for a safe replica, whole ones behind it may go to lent ones, and only there.
"""

import bisect
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from tidegate.core import pick, promises
from tidegate.core.crowd import Crowd
from tidegate.core.floors import PRESSING, Owed
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
from tidegate.core.line import OUTPUT_WEIGHT, PROMPT_WEIGHT, Line, Waiting
from tidegate.core.load import EngineReport, Mean
from tidegate.core.pick import NoRoom
from tidegate.core.room import Room, Running, Turn
from tidegate.core.types import Objectives, QoSClass, TenantFrom

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
_NOTHING: Final = Objectives()
_RETRY_AFTER_MAX_S: Final = 600
_CLAIMED: Final = 1000
"""Output tokens that count to minimum shares when a request is sent, at most: many ask for as much as a
context holds, and make a few hundred. What it made is known, and counted, when it ends."""
_UNMEASURED: Final = 4096
"""Requests that ended and whose tokens may still be told; of more the oldest are forgotten."""
_STARVES_S: Final = 5.0
"""However it came about that none of a class is sent, after this long one is, where it has room."""


class Flow:
    """Admits, queues and dispatches. Every method that needs the time is given it, in seconds."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy or Policy()
        self.bytes = 0
        self._room = Room(self.policy)
        self._lines: dict[tuple[ModelKey, str], Line] = {}
        self._where: dict[int, tuple[ModelKey, str]] = {}
        self._paces: dict[tuple[ModelKey, str], Mean] = {}
        self._owed: dict[tuple[ModelKey, str], Owed] = {}
        self._crowds: dict[tuple[ModelKey, str], Crowd] = {}
        self._charged: OrderedDict[int, tuple[tuple[ModelKey, str], str, int, int]] = OrderedDict()
        """By request that ended: its line and tenant, the prompt and output tokens charged to it."""

    @property
    def models(self) -> Mapping[ModelKey, Model]:
        """The models that exist."""
        return self._room.models

    # ── the world ───────────────────────────────────────────────────────────────────────────────

    def set_world(
        self,
        classes: Mapping[str, QoSClass],
        models: Mapping[ModelKey, Model],
        endpoints: Iterable[Endpoint],
        now: float,
    ) -> None:
        """Replace what exists. In-flight counts stay; a vanished endpoint goes once it is empty."""
        self._room.set_world(classes, models, endpoints, now)
        for key, line in list(self._lines.items()):
            if key[0] not in models and not line:
                del self._lines[key]
                self._paces.pop(key, None)
                self._owed.pop(key, None)
                self._crowds.pop(key, None)
            elif line and self.policy.qos and self._minimum_share(key):
                self._owed.setdefault(key, Owed())

    def report(self, address: str, report: EngineReport, own_before: int, own_tokens_before: int) -> None:
        """Take an engine's own counts; `own_…` are ours from just before it was asked."""
        load = self._room.loads.get(address)
        if load is not None:
            load.correct(report, own_before, own_tokens_before)

    def held(self, address: str) -> tuple[int, int]:
        """Requests and KV tokens that this queue has in flight at an endpoint."""
        load = self._room.loads.get(address)
        return (load.requests, load.tokens) if load else (0, 0)

    # ── a request's life ────────────────────────────────────────────────────────────────────────

    def admit(self, ask: Ask, now: float) -> Refused | None:
        """Queue a request, or say why not. Call `dispatch` next."""
        key = self._line_key(ask)
        line = self._lines.setdefault(key, Line())
        most, _ = self._bounds(ask.qos_class)
        ready = any(True for _ in self._room.ready(ask.model))
        model = self._room.models.get(ask.model)
        if not ready and not (model and model.startable):
            return self._refuse(503, Reason.NO_ENDPOINT, line, now, ask)
        tenant, weight = self._tenant(ask)
        if len(line) >= most or (tenant is not None and line.crowds(tenant, most)):
            return self._refuse(429, Reason.QUEUE_FULL, line, now, ask)
        if self.bytes + ask.size > self.policy.max_bytes:
            return self._refuse(429, Reason.MEMORY_FULL, line, now, ask)
        one = line.add(ask, now, tenant or "", weight, self._send_by(ask, now))
        if tenant is not None and self._room.urgent(ask) and self._beyond(key, ask, tenant, weight, now):
            self._relegate(one)
        else:
            self._room.came(ask, now)
        if self.policy.qos and self._minimum_share(key):
            self._owed.setdefault(key, Owed())
        self._where[ask.id] = key
        self.bytes += ask.size
        return None

    def dispatch(self, now: float) -> list[Dispatch]:
        """Give endpoints to the requests whose turn it is, until no head of a queue has room.

        Within a model nothing overtakes a blocked head of a higher class, unless on endpoints that
        are not for it.
        """
        done = sent = self._round(now)
        while sent and self._owed:  # what was sent counts for minimum shares
            sent = self._round(now)
            done += sent
        return done

    def _round(self, now: float) -> list[Dispatch]:
        turns: dict[ModelKey, Turn] = {}
        done, stopped = self._pay(turns, now)
        models = {key[0] for key, line in self._lines.items() if line} - stopped
        heads = {m: h for m in models if (h := self._head(m, now))}
        while heads:
            model = min(heads, key=lambda m: (self._room.rank(heads[m].ask), heads[m].since, heads[m].ask.id))
            waits, turn = heads[model], turns.get(model)
            gated = self._room.gated(waits.ask, now) and not self._starves(waits, now)
            # Behind one that is late and keeps out of people's way, people of lower classes do not wait.
            passed = waits if gated and waits.ask.id in self._room.relegated else None
            following = None
            if gated and self._room.blocked(waits.ask, now):
                following = self._head(model, now, urgent_below=waits) if passed else None
                if following is None:
                    del heads[model]
                else:
                    heads[model] = following
                continue
            if turn is None:
                turn = turns[model] = self._room.turn(model, now)
            one, chosen = self._choose(waits, turn, now, gated=gated)
            if not isinstance(chosen, NoRoom):
                done.append(self._send(one, chosen, now))
                following = self._head(model, now, whole_only=turn.passing)
            elif passed and (lower := self._head(model, now, whole_only=turn.passing, urgent_below=passed)):
                following = lower
            elif waits.ask.streamed and turn.apart:
                turn.passing = True
                following = self._head(model, now, whole_only=True)
            if following is None:
                del heads[model]
            else:
                heads[model] = following
        return done

    def finish(self, request: int, now: float, *, whole: bool = True) -> Ended | None:
        """End a request, however it ended. Its room is given back by the first call only.

        `whole` False keeps an aborted one out of the measured service times.
        """
        running = self._room.running.get(request)
        if running is not None:
            self._learn(running, now, whole=whole)
            self._room.give_back(request, now, whole=whole)
            if running.told is not None:
                self._put_right(request, *running.told)
            return Ended.DISPATCHED
        key = self._where.pop(request, None)
        if key is None:
            return None
        self._drop(key, request)
        self._room.relegated.discard(request)
        return Ended.QUEUED

    def measured(self, request: int, prompt_tokens: int, output_tokens: int) -> None:
        """Take the tokens that a request really had, while it runs or after: its tenant had those."""
        running = self._room.running.get(request)
        if running is not None:
            running.told = (prompt_tokens, output_tokens)
        else:
            self._put_right(request, prompt_tokens, output_tokens)

    def expire(self, now: float) -> list[tuple[Ask, Refused]]:
        """Refuse what has waited as long as its class allows, or has nothing left to wait for."""
        gone: list[tuple[Ask, Refused]] = []
        for key, line in list(self._lines.items()):
            model = self._room.models.get(key[0])
            hopeless = not (model and model.startable) and not any(True for _ in self._room.ready(key[0]))
            while (oldest := line.oldest()) is not None:
                ask = oldest.ask
                late = now - oldest.since >= self._bounds(ask.qos_class)[1]
                if not (late or hopeless):
                    break
                served = any(True for _ in self._room.ready(key[0]))
                why = (429, Reason.WAITED_TOO_LONG) if served else (503, Reason.NO_ENDPOINT)
                gone.append((ask, self._refuse(*why, line, now, ask)))
                del self._where[ask.id]
                self._drop(key, ask.id)
                self._room.relegated.discard(ask.id)
        return gone

    def next_expiry(self) -> float | None:
        """When `expire` has something to do next, if nothing else happens."""
        oldest = (first for line in self._lines.values() if (first := line.oldest()))
        return min((o.since + self._bounds(o.ask.qos_class)[1] for o in oldest), default=None)

    def next_turn(self) -> float | None:
        """When a request that waits may find room though nothing else happens: a prefill is done."""
        if not self.policy.qos:
            return None  # nobody waits for prefill there
        waiting = {key[0] for key, line in self._lines.items() if line}
        return self._room.next_turn(waiting)

    # ── what it looks like ──────────────────────────────────────────────────────────────────────

    def waiting(self) -> Iterator[Ask]:
        """Everything that is queued."""
        for line in self._lines.values():
            yield from (one.ask for one in line)

    def in_flight(self) -> Iterator[tuple[Ask, str]]:
        """Everything that is dispatched, with the lane that serves it."""
        for one in self._room.running.values():
            yield one.ask, self._room.loads[one.address].lane

    def occupied(self) -> Iterator[tuple[str, ModelKey, bool, int]]:
        """For every endpoint: address, model, whether nothing more comes, and requests that run there.

        After a restart what the picker before sent there is known only once the engine has reported,
        so until then more may come.
        """
        for load in self._room.loads.values():
            yield load.address, load.model, load.drained, load.requests + load.foreign

    def sharing(self) -> Iterator[tuple[ModelKey, str, int, int]]:
        """Of every queue: model, class, tenants that wait, and how many were relegated ever."""
        for (model, qos_class), line in self._lines.items():
            yield model, qos_class, line.tenants_waiting, line.relegated

    def snapshot(self, now: float) -> dict[str, Any]:
        """Queues, endpoints, headroom and fronts as JSON values."""
        room = self._room
        queues = [
            {
                "namespace": key[0][0],
                "model": key[0][1],
                "qos_class": key[1] or "*",
                **line.describe(now),
                "owed_gpu_s": round(owed.seconds(now), 3) if (owed := self._owed.get(key)) else None,
            }
            for key, line in sorted(self._lines.items())
        ]
        turns = {model: room.turn(model, now) for model in room.models}
        names = {rank: name for name, rank in room.ranks.items()}
        endpoints = []
        for address, load in sorted(room.loads.items()):
            turn = turns.get(load.model)
            keep = turn.keep if turn else {}
            described = load.describe(now, self.policy.report_stale_s)
            described["keeps_free_from"] = {names[r]: by.get(address, (0, 0))[0] for r, by in keep.items()}
            endpoints.append(described | {"front": bool(turn and address in turn.front)})
        return {
            "policy": "qos" if self.policy.qos else "fifo",
            "queued_bytes": self.bytes,
            "queues": queues,
            "endpoints": endpoints,
        }

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _line_key(self, ask: Ask) -> tuple[ModelKey, str]:
        return (ask.model, ask.qos_class if self.policy.qos else _FIFO_QUEUE)

    def _bounds(self, qos_class: str) -> tuple[int, float]:
        if not self.policy.qos:
            return self.policy.fifo_max_requests, self.policy.fifo_max_wait_s
        known = self._room.classes.get(qos_class)
        return (known.queue_max_requests, known.queue_max_wait_s) if known else (0, 0.0)

    def _tenant(self, ask: Ask) -> tuple[str | None, int]:
        """Whose request it is, and that tenant's weight; None where its class is not shared by tenants."""
        known = self._room.classes.get(ask.qos_class) if self.policy.qos else None
        if known is None or known.tenants.source is TenantFrom.NONE:
            return None, 1
        return ask.tenant, known.tenants.weights.get(ask.tenant, 1)

    def _beyond(self, key: tuple[ModelKey, str], ask: Ask, tenant: str, weight: int, now: float) -> bool:
        """Whether its tenant asks for more than its part of replicas that cannot do all that is asked."""
        prefill_s = promises.prefill_s(self.policy.fit, ask.prompt_tokens)
        # Those who wait for the first replica are not beyond what it can do.
        replicas = max(1, sum(1 for _ in self._room.ready(ask.model)))
        return self._crowds.setdefault(key, Crowd()).beyond(tenant, weight, prefill_s, replicas, now)

    def _promised(self, ask: Ask) -> Objectives:
        model, known = self._room.models.get(ask.model), self._room.classes.get(ask.qos_class)
        own = model.objectives.get(ask.qos_class) if model else None
        return own or (known.objectives if known else _NOTHING)

    def _send_by(self, ask: Ask, now: float) -> float:
        """When it must be sent to be in time; infinite where nothing is promised."""
        if not self.policy.qos:
            return math.inf
        pace = self._paces.get((ask.model, ask.qos_class))
        return promises.send_by(
            self._promised(ask),
            self.policy.fit,
            ask.prompt_tokens,
            ask.output_tokens,
            now,
            pace.value(1.0) if pace else 1.0,
        )

    def _head(
        self, model: ModelKey, now: float, *, whole_only: bool = False, urgent_below: Waiting | None = None
    ) -> Waiting | None:
        """The request of this model whose turn it is, of its highest class.

        `urgent_below`: of those that somebody waits for, in classes below that request's.
        """
        room, above = self._room, urgent_below.ask if urgent_below else None
        heads = (
            head
            for key, line in self._lines.items()
            if key[0] == model
            and (head := self._first(line, now, whole_only=whole_only))
            and (above is None or (room.urgent(head.ask) and room.rank(head.ask) > room.rank(above)))
        )
        return min(heads, key=lambda h: (room.rank(h.ask), h.since, h.ask.id), default=None)

    def _first(self, line: Line, now: float, *, whole_only: bool = False) -> Waiting | None:
        """Whose turn it is in a line, after those that cannot be in time have stepped back."""
        while (head := line.head(whole_only=whole_only)) is not None and head.due < now:
            self._relegate(head)
        return head

    def _relegate(self, one: Waiting) -> None:
        """It waits behind those that can be in time, and keeps out of the way of what somebody waits for."""
        self._lines[self._line_key(one.ask)].relegate(one)
        if self._room.urgent(one.ask):
            self._room.relegated.add(one.ask.id)

    def _starves(self, waits: Waiting, now: float) -> bool:
        """Whether none of its class was sent for so long that it keeps out of nobody's way any more."""
        return now - max(waits.since, self._lines[self._line_key(waits.ask)].sent_s) > _STARVES_S

    def _choose(self, waits: Waiting, turn: Turn, now: float, *, gated: bool) -> tuple[Waiting, str | NoRoom]:
        """Who goes, and where: the head, or to the front a patient one near it that is soon done."""
        room, head = self._room, waits.ask
        need, found = room.need(head, turn), room.candidates(head, turn, now, gated=gated)
        if not (gated and turn.front and self.policy.pack.short):
            return waits, pick.choose(need, found)
        chosen = pick.choose(need, (c for c in found if not c.front))
        if not isinstance(chosen, NoRoom) or all(c.kept_clear for c in found if c.front):
            return waits, chosen
        # One that may go nowhere else goes to the front itself, or a long prompt would wait for ever.
        near = [waits]
        if room.behind(head, turn):
            near = self._lines[self._line_key(head)].near(waits, whole_only=turn.passing)
        shortest = near[0].ask
        ahead = (c for c in room.candidates(shortest, turn, now, gated=gated) if c.front)
        address = pick.choose(room.need(shortest, turn), ahead)
        if isinstance(address, NoRoom):
            return near[0], address
        soon = bisect.bisect_left(near, True, key=lambda one: not room.soon_done(one.ask, address, turn, now))
        return near[max(0, soon - 1)], address

    def _send(self, one: Waiting, address: str, now: float) -> Dispatch:
        ask = one.ask
        key = self._where.pop(ask.id)
        self._drop(key, ask.id)
        line = self._lines[key]
        line.drained.add(now)
        line.sent_s = now
        line.charge(one.tenant, PROMPT_WEIGHT * ask.prompt_tokens + OUTPUT_WEIGHT * ask.output_tokens)
        load = self._room.take(ask, address, now)
        if self._owed:
            self._room.running[ask.id].shared = self._share(key, self._gpu_s(ask), now)
        return Dispatch(ask, address, load.lane, now - one.since)

    def _learn(self, running: Running, now: float, *, whole: bool) -> None:
        """What a request that ends tells: how long such ones take, and what it did not use.

        Of its output is known how many steps its engine made meanwhile; an embedding has none.
        """
        ask, key = running.ask, self._line_key(running.ask)
        forecast = self._room.loads[running.address].forecast
        forecast.advance(now)
        made = int(forecast.steps - running.steps) if ask.output_tokens else 0
        if whole and key in self._lines and self._promised(ask).completion_s is not None:
            expected_s = promises.work_s(self.policy.fit, ask.prompt_tokens, ask.output_tokens)
            self._paces.setdefault(key, Mean(0.1)).add((now - running.since) / expected_s)
        tenant, _ = self._tenant(ask)
        if tenant is not None and key in self._lines:
            self._lines[key].charge(tenant, OUTPUT_WEIGHT * (made - ask.output_tokens))
            self._charged[ask.id] = (key, tenant, ask.prompt_tokens, made)
            if len(self._charged) > _UNMEASURED:
                self._charged.popitem(last=False)
        if self._owed:
            self._settle(running, made, now)

    def _put_right(self, request: int, prompt_tokens: int, output_tokens: int) -> None:
        """Charge a request that has ended as it was, in place of what was reckoned."""
        key, tenant, prompt, output = self._charged.pop(request, (None, "", 0, 0))
        if key in self._lines:
            more = PROMPT_WEIGHT * (prompt_tokens - prompt) + OUTPUT_WEIGHT * (output_tokens - output)
            self._lines[key].charge(tenant, more)

    def _drop(self, key: tuple[ModelKey, str], request: int) -> Waiting:
        line = self._lines[key]
        dropped = line.pop(request)
        self.bytes -= dropped.ask.size
        if not line and key in self._owed:
            self._owed[key].rest()
        return dropped

    # ── minimum shares ──────────────────────────────────────────────────────────────────────────

    def _minimum_share(self, key: tuple[ModelKey, str]) -> float:
        known = self._room.classes.get(key[1])
        return known.minimum_share if known else 0.0

    def _gpu_s(self, ask: Ask) -> float:
        return promises.gpu_s(self.policy.fit, ask.prompt_tokens, min(ask.output_tokens, _CLAIMED))

    def _share(self, key: tuple[ModelKey, str], gpu_s: float, now: float) -> dict[tuple[ModelKey, str], int]:
        """Note GPU time that a line gets for all that have a minimum share of it; returns who was owed."""
        shared = {}
        for other, owed in self._owed.items():
            if other == key:
                owed.own(gpu_s, self._minimum_share(key), now)
            elif other[0] == key[0] and self._lines[other]:
                owed.others(gpu_s, self._minimum_share(other), now)
                shared[other] = owed.rests
        return shared

    def _settle(self, running: Running, made: int, now: float) -> None:
        """Note what a request took otherwise than when it was sent, for those that were owed of it then."""
        ask, key = running.ask, self._line_key(running.ask)
        gpu_s = promises.gpu_s(self.policy.fit, ask.prompt_tokens, made) - self._gpu_s(ask)
        for other, owed in self._owed.items():
            if other == key:
                owed.own(gpu_s, self._minimum_share(key), now)
            elif running.shared.get(other) == owed.rests:
                owed.others(gpu_s, self._minimum_share(other), now)

    def _pay(self, turns: dict[ModelKey, Turn], now: float) -> tuple[list[Dispatch], set[ModelKey]]:
        """Send of those classes that are below their minimum share, and say which models wait for one.

        First as ever, with regard for what people wait for; where the class is far below its share,
        wherever there is room at all, headroom included. Then nothing overtakes it until there is.
        """
        done: list[Dispatch] = []
        stopped: set[ModelKey] = set()
        for key, owed in self._owed.items():
            while (waits := self._first(self._lines[key], now)) is not None:
                by_requests = owed.seconds(now) / self._gpu_s(waits.ask)
                if by_requests < 1:
                    break
                model = key[0]
                if model not in turns:
                    turns[model] = self._room.turn(model, now)
                turn = replace(turns[model], keep={})
                one, chosen = self._choose(waits, turn, now, gated=self._room.gated(waits.ask, now))
                pressing = by_requests >= PRESSING
                if isinstance(chosen, NoRoom) and pressing:
                    one, chosen = self._choose(waits, turn, now, gated=False)
                if isinstance(chosen, NoRoom):
                    # A stream may wait for a safe replica alone: others are not kept from lent ones.
                    if pressing and not (waits.ask.streamed and turn.apart):
                        stopped.add(model)
                    break
                done.append(self._send(one, chosen, now))
        return done, stopped

    def _refuse(self, status: int, reason: Reason, line: Line, now: float, ask: Ask) -> Refused:
        waiting, rate = len(line), line.drained.value(now)
        most, wait = self._bounds(ask.qos_class)
        estimate = waiting / rate if rate > 0 else wait
        after = min(_RETRY_AFTER_MAX_S, max(1, math.ceil(estimate)))
        name = f"{ask.model[0]}/{ask.model[1]}"
        tenant, _ = self._tenant(ask)
        own = line.tenants.get(tenant) if tenant is not None else None
        whose = f", {own.waiting} of them this tenant's" if own else ""
        text = {
            Reason.QUEUE_FULL: f"{waiting} of {most} {ask.qos_class} requests wait for {name}{whose}",
            Reason.WAITED_TOO_LONG: f"no room at {name} for class {ask.qos_class} within {wait:g} s",
            Reason.MEMORY_FULL: f"the queue holds {self.bytes} bytes of {self.policy.max_bytes} allowed",
            Reason.NO_ENDPOINT: f"no replica of {name} is ready",
        }[reason]
        return Refused(status, reason, f"{text}; try again in {after} s", after)
