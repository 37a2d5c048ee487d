"""One central, bounded queue per (model, class), and late binding to endpoints.

A state machine without I/O or clock: tell it what happened and when, ask it what to do. Between
classes of a model strict priority, inside a class tenants by tokens and then deadlines (`core.line`),
between models the oldest whose model has room. A request holds its room from dispatch until
`finish`, whatever ends it.

A streamed answer that has begun is lost when its replica goes, a whole one can be asked for again.
So streamed requests keep off replicas on lent GPUs (unless their model has no others), and while
one waits for a safe replica, whole ones behind it may go to lent ones, and only there.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from tidegate.core import choice, describe, promises, recall
from tidegate.core.crowd import Crowd
from tidegate.core.deadlines import Deadlines
from tidegate.core.floors import PRESSING, Floors
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
from tidegate.core.line import OUTPUT_WEIGHT, PROMPT_WEIGHT, Line, LineKey, Waiting
from tidegate.core.load import EngineReport
from tidegate.core.pick import NoRoom
from tidegate.core.refusals import Standing, refused
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
        self._lines: dict[LineKey, Line] = {}
        self._where: dict[int, LineKey] = {}
        self._deadlines = Deadlines(self._room)
        self._floors = Floors(self._room, self._lines)
        self._crowds: dict[LineKey, Crowd] = {}
        self._charged: OrderedDict[int, tuple[LineKey, str, int, int]] = OrderedDict()
        """By request that ended: its line and tenant, the prompt and output tokens charged to it."""
        self._narrowed: dict[int, Ask] = {}

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
                self._deadlines.forget(key)
                self._floors.forget(key)
                self._crowds.pop(key, None)
            elif line:
                self._floors.watch(key)

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
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = Line()
        most, _ = self._bounds(ask.qos_class)
        model = self._room.models.get(ask.model)
        # A gateway that names endpoints waits for no others.
        startable = model is not None and model.startable and ask.subset is None
        if not startable and not self._room.open_to(ask):
            return self._refuse(503, Reason.NO_ENDPOINT, line, now, ask)
        tenant, weight = self._tenant(ask)
        # One that comes again had its place, and would be lost for nothing that its client did.
        if not ask.again and (len(line) >= most or (tenant is not None and line.crowds(tenant, most))):
            return self._refuse(429, Reason.QUEUE_FULL, line, now, ask)
        if self.bytes + ask.size > self.policy.max_bytes:
            return self._refuse(429, Reason.MEMORY_FULL, line, now, ask)
        one = line.add(ask, now, tenant or "", weight, self._deadlines.send_by(ask, now))
        if tenant is not None and self._room.urgent(ask) and self._beyond(key, ask, tenant, weight, now):
            line.relegate(one)
            self._room.relegated.add(ask.id)
        elif not ask.again:
            self._room.came(ask, now)
        self._floors.watch(key)
        self._where[ask.id] = key
        self.bytes += ask.size
        if ask.subset is not None:
            self._narrowed[ask.id] = ask
        return None

    def dispatch(self, now: float) -> list[Dispatch]:
        """Give endpoints to the requests whose turn it is, until no head of a queue has room.

        Within a model nothing overtakes a blocked head of a higher class, unless on endpoints that
        are not for it.
        """
        done = sent = self._round(now)
        while sent and self._floors:  # what was sent counts for minimum shares
            sent = self._round(now)
            done += sent
        return done

    def _round(self, now: float) -> list[Dispatch]:
        turns: dict[ModelKey, Turn] = {}
        done, stopped = self._pay(turns, now)
        waiting = self._waiting_lines(stopped)
        heads = {m: h for m, lines in waiting.items() if (h := self._head(lines, now))}
        while heads:
            model = min(heads, key=lambda m: self._order(heads[m])) if len(heads) > 1 else next(iter(heads))
            lines, waits, turn = waiting[model], heads[model], turns.get(model)
            gated = self._room.gated(waits.ask, now) and not self._starves(waits, now)
            # Behind one that is late and keeps out of people's way, people of lower classes do not wait.
            passed = waits if gated and waits.ask.id in self._room.relegated else None
            following = None
            if gated and self._room.blocked(waits.ask, now):
                following = self._head(lines, now, urgent_below=waits) if passed else None
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
                following = self._head(lines, now, whole_only=turn.passing)
            elif passed and (lower := self._head(lines, now, whole_only=turn.passing, urgent_below=passed)):
                following = lower
            elif waits.ask.streamed and turn.apart:
                turn.passing = True
                following = self._head(lines, now, whole_only=True)
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

    def served(self, request: int, address: str, now: float) -> bool:
        """Another endpoint than it was sent to serves a request, and has its room; False: none of ours."""
        return self._room.move(request, address, now)

    def expire(self, now: float) -> list[tuple[Ask, Refused]]:
        """Refuse what has waited as long as its class allows, or has nothing left to wait for."""
        gone: list[tuple[Ask, Refused]] = []
        for key, line in list(self._lines.items()):
            model = self._room.models.get(key[0])
            hopeless = not (model and model.startable) and not self._room.ready(key[0])
            while (oldest := line.oldest()) is not None:
                ask = oldest.ask
                late = now - oldest.since >= self._bounds(ask.qos_class)[1]
                if not (late or hopeless):
                    break
                served = self._room.ready(key[0])
                why = (429, Reason.WAITED_TOO_LONG) if served else (503, Reason.NO_ENDPOINT)
                gone.append((ask, self._expel(ask, key, *why, now)))
        shut = [a for a in self._narrowed.values() if not self._room.open_to(a)]
        gone += [(a, self._expel(a, self._where[a.id], 503, Reason.NO_ENDPOINT, now)) for a in shut]
        return gone

    def _expel(self, ask: Ask, key: LineKey, status: int, reason: Reason, now: float) -> Refused:
        refused = self._refuse(status, reason, self._lines[key], now, ask)
        del self._where[ask.id]
        self._drop(key, ask.id)
        self._room.relegated.discard(ask.id)
        return refused

    def recall(self, now: float) -> list[tuple[Ask, str]]:
        """Patient requests to abort now and where they run; see `core.recall`. Each is named once.

        Ask before `dispatch`. Abort and `finish` them: they are admitted anew when they come again.
        """
        if not self._room.bursting(now):
            return []
        return [each for model in self._room.models for each in recall.recall(self._room, model, now)]

    def promised(self, ask: Ask) -> Objectives:
        """What a request is promised: its model's own objectives, else its class's."""
        return self._deadlines.promised(ask)

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

    def comes_in(self, model: ModelKey, now: float) -> float | None:
        """In how many seconds a replica of a model is expected, where that is known."""
        return self._room.comes_in(model, now)

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
        queues = describe.queues(self._lines, self._floors, now)
        endpoints = describe.endpoints(self._room, now)
        return {
            "policy": "qos" if self.policy.qos else "fifo",
            "queued_bytes": self.bytes,
            "queues": queues,
            "endpoints": endpoints,
        }

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _line_key(self, ask: Ask) -> LineKey:
        return (ask.model, ask.qos_class if self.policy.qos else _FIFO_QUEUE)

    def _line(self, one: Waiting) -> Line:
        return self._lines[self._line_key(one.ask)]

    def _waiting_lines(self, stopped: Collection[ModelKey]) -> dict[ModelKey, list[Line]]:
        """By model the lines in which something waits, but for models at which nothing may go."""
        waiting: dict[ModelKey, list[Line]] = {}
        for (model, _), line in self._lines.items():
            if line and model not in stopped:
                waiting.setdefault(model, []).append(line)
        return waiting

    def _order(self, one: Waiting) -> tuple[int, float, int]:
        """Between lines: the higher class first, then the oldest."""
        return (self._room.rank(one.ask), one.since, one.ask.id)

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

    def _beyond(self, key: LineKey, ask: Ask, tenant: str, weight: int, now: float) -> bool:
        """Whether its tenant asks for more than its part of replicas that cannot do all that is asked."""
        prefill_s = promises.prefill_s(self.policy.fit, ask.prompt_tokens)
        # Those who wait for the first replica are not beyond what it can do.
        replicas = max(1, len(self._room.ready(ask.model)))
        return self._crowds.setdefault(key, Crowd()).beyond(tenant, weight, prefill_s, replicas, now)

    def _head(
        self,
        lines: Iterable[Line],
        now: float,
        *,
        whole_only: bool = False,
        urgent_below: Waiting | None = None,
    ) -> Waiting | None:
        """The request whose turn it is among these lines of a model, of the highest class.

        `urgent_below`: of those that somebody waits for, in classes below that request's.
        """
        room, first = self._room, None
        for line in lines:
            head = self._first(line, now, whole_only=whole_only)
            if head is None:
                continue
            if urgent_below is not None and not (
                room.urgent(head.ask) and room.rank(head.ask) > room.rank(urgent_below.ask)
            ):
                continue
            if first is None or self._order(head) < self._order(first):
                first = head
        return first

    def _first(self, line: Line, now: float, *, whole_only: bool = False) -> Waiting | None:
        """Whose turn it is in a line, after those that cannot be in time have stepped back.

        They wait behind those that can, and keep out of the way of what somebody waits for.
        """
        while (head := line.head(whole_only=whole_only)) is not None and head.due < now:
            urgent = self._room.urgent(head.ask)
            late = line.relegate_late(head, now)
            if urgent:
                self._room.relegated.update(one.ask.id for one in late)
        return head

    def _starves(self, waits: Waiting, now: float) -> bool:
        """Whether none of its class was sent for so long that it keeps out of nobody's way any more."""
        return now - max(waits.since, self._line(waits).sent_s) > _STARVES_S

    def _choose(self, waits: Waiting, turn: Turn, now: float, *, gated: bool) -> tuple[Waiting, str | NoRoom]:
        """Who of those near the head of a line goes, and where; see `core.choice`."""
        return choice.choose(self._room, self._line(waits), waits, turn, now, gated=gated)

    def _send(self, one: Waiting, address: str, now: float) -> Dispatch:
        ask = one.ask
        key = self._where.pop(ask.id)
        self._drop(key, ask.id)
        line = self._lines[key]
        line.drained.add(now)
        line.sent_s = now
        line.charge(one.tenant, PROMPT_WEIGHT * ask.prompt_tokens + OUTPUT_WEIGHT * ask.output_tokens)
        most = self.policy.fallbacks
        others = self._room.fallbacks(ask, address, most, now) if most else ()
        load = self._room.take(ask, address, now)
        if self._floors:
            self._room.running[ask.id].shared = self._floors.sent(key, ask, now)
        return Dispatch(ask, address, load.lane, now - one.since, others)

    def _learn(self, running: Running, now: float, *, whole: bool) -> None:
        """What a request that ends tells: how long such ones take, and what it did not use.

        Of its output is known how many steps its engine made meanwhile; an embedding has none.
        """
        ask, key = running.ask, self._line_key(running.ask)
        forecast = self._room.loads[running.address].forecast
        forecast.advance(now)
        made = int(forecast.steps - running.steps) if ask.output_tokens else 0
        if whole and key in self._lines:
            self._deadlines.learn(ask, now - running.since)
        tenant, _ = self._tenant(ask)
        if tenant is not None and key in self._lines:
            if not whole and running.recalled_s > running.since:  # nothing that it had is left
                all_of_it = PROMPT_WEIGHT * ask.prompt_tokens + OUTPUT_WEIGHT * ask.output_tokens
                self._lines[key].charge(tenant, -all_of_it)
            else:
                self._lines[key].charge(tenant, OUTPUT_WEIGHT * (made - ask.output_tokens))
                self._charged[ask.id] = (key, tenant, ask.prompt_tokens, made)
            if len(self._charged) > _UNMEASURED:
                self._charged.popitem(last=False)
        self._floors.ended(key, running, made, now)

    def _put_right(self, request: int, prompt_tokens: int, output_tokens: int) -> None:
        """Charge a request that has ended as it was, in place of what was reckoned."""
        key, tenant, prompt, output = self._charged.pop(request, (None, "", 0, 0))
        if key in self._lines:
            more = PROMPT_WEIGHT * (prompt_tokens - prompt) + OUTPUT_WEIGHT * (output_tokens - output)
            self._lines[key].charge(tenant, more)

    def _drop(self, key: LineKey, request: int) -> Waiting:
        line = self._lines[key]
        dropped = line.pop(request)
        self._narrowed.pop(request, None)
        self.bytes -= dropped.ask.size
        if not line:
            self._floors.rest(key)
        return dropped

    def _pay(self, turns: dict[ModelKey, Turn], now: float) -> tuple[list[Dispatch], set[ModelKey]]:
        """Send of those classes that are below their minimum share, and say which models wait for one.

        First as ever, with regard for what people wait for; where the class is far below its share,
        wherever there is room at all, headroom included. Then nothing overtakes it until there is.
        """
        done: list[Dispatch] = []
        stopped: set[ModelKey] = set()
        for key in self._floors:
            line = self._lines[key]
            while (waits := self._first(line, now)) is not None:
                owed = self._floors.requests(key, waits.ask, now)
                if owed < 1:
                    break
                model = key[0]
                if model not in turns:
                    turns[model] = self._room.turn(model, now)
                turn = replace(turns[model], keep={})
                gated, pressing = self._room.gated(waits.ask, now), owed >= PRESSING
                one, chosen = self._choose(waits, turn, now, gated=gated)
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
        most, wait_s = self._bounds(ask.qos_class)
        tenant, _ = self._tenant(ask)
        own = line.tenants.get(tenant) if tenant is not None else None
        at = Standing(
            waiting=len(line),
            most=most,
            wait_s=wait_s,
            rate=line.drained.value(now),
            held_bytes=self.bytes,
            most_bytes=self.policy.max_bytes,
            own=own.waiting if own else None,
            comes_in_s=self._room.comes_in(ask.model, now),
        )
        return refused(status, reason, ask, at)
