"""One central, bounded queue per (model, class), and late binding to endpoints.

A state machine without I/O or clock: tell it what happened and when, ask it what to do. Between
classes of a model strict priority, inside a class arrival order, between models the oldest whose
model has room. A request holds its room from dispatch until `finish`, whatever ends it.

A streamed answer that has begun is lost when its replica goes, a whole one can be asked for again.
So streamed requests keep off replicas on lent GPUs (unless their model has no others), and while
one waits for a safe replica, whole ones behind it may go to lent ones, and only there.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
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
from tidegate.core.line import Line, Waiting
from tidegate.core.load import EngineReport
from tidegate.core.pick import NoRoom
from tidegate.core.room import Room, Turn
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
_RETRY_AFTER_MAX_S: Final = 600
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
        if len(line) >= most:
            return self._refuse(429, Reason.QUEUE_FULL, line, now, ask)
        if self.bytes + ask.size > self.policy.max_bytes:
            return self._refuse(429, Reason.MEMORY_FULL, line, now, ask)
        self._room.came(ask, now)
        line.add(ask, now)
        self._where[ask.id] = key
        self.bytes += ask.size
        return None

    def dispatch(self, now: float) -> list[Dispatch]:
        """Give endpoints to the requests whose turn it is, until no head of a queue has room.

        Within a model nothing overtakes a blocked head of a higher class, unless on endpoints that
        are not for it.
        """
        done: list[Dispatch] = []
        heads = {m: h for m in {key[0] for key, line in self._lines.items() if line} if (h := self._head(m))}
        turns: dict[ModelKey, Turn] = {}
        while heads:
            model = min(heads, key=lambda m: (self._room.rank(heads[m].ask), heads[m].since, heads[m].ask.id))
            waits, turn = heads[model], turns.get(model)
            gated = self._room.gated(waits.ask, now) and not self._starves(waits, now)
            if gated and self._room.blocked(waits.ask, now):
                del heads[model]
                continue
            if turn is None:
                turn = turns[model] = self._room.turn(model, now)
            ask, chosen = self._choose(waits.ask, turn, now, gated=gated)
            following = None
            if not isinstance(chosen, NoRoom):
                done.append(self._send(ask, chosen, now))
                following = self._head(model, whole_only=turn.passing)
            elif waits.ask.streamed and turn.apart:
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
        if self._room.give_back(request, now, whole=whole):
            return Ended.DISPATCHED
        key = self._where.pop(request, None)
        if key is None:
            return None
        self._drop(key, request)
        return Ended.QUEUED

    def expire(self, now: float) -> list[tuple[Ask, Refused]]:
        """Refuse what has waited as long as its class allows, or has nothing left to wait for."""
        gone: list[tuple[Ask, Refused]] = []
        for key, line in list(self._lines.items()):
            model = self._room.models.get(key[0])
            hopeless = not (model and model.startable) and not any(True for _ in self._room.ready(key[0]))
            while (head := line.head()) is not None:
                late = now - head.since >= self._bounds(head.ask.qos_class)[1]
                if not (late or hopeless):
                    break
                served = any(True for _ in self._room.ready(key[0]))
                why = (429, Reason.WAITED_TOO_LONG) if served else (503, Reason.NO_ENDPOINT)
                gone.append((head.ask, self._refuse(*why, line, now, head.ask)))
                del self._where[head.ask.id]
                self._drop(key, head.ask.id)
        return gone

    def next_expiry(self) -> float | None:
        """When `expire` has something to do next, if nothing else happens."""
        heads = (head for line in self._lines.values() if (head := line.head()))
        return min((h.since + self._bounds(h.ask.qos_class)[1] for h in heads), default=None)

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

    def snapshot(self, now: float) -> dict[str, Any]:
        """Queues, endpoints, headroom and fronts as JSON values."""
        room = self._room
        queues = [
            {
                "namespace": key[0][0],
                "model": key[0][1],
                "qos_class": key[1] or "*",
                "waiting": len(line),
                "streamed": len(line.streamed),
                "oldest_s": round(now - head.since, 3) if (head := line.head()) else 0.0,
                "drained_per_s": round(line.drained.value(now), 3),
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

    def _head(self, model: ModelKey, *, whole_only: bool = False) -> Waiting | None:
        """The request of this model whose turn it is: the oldest of its highest class."""
        heads = (
            head
            for key, line in self._lines.items()
            if key[0] == model
            for head in line.heads(whole_only=whole_only)
        )
        return min(heads, key=lambda h: (self._room.rank(h.ask), h.since, h.ask.id), default=None)

    def _starves(self, waits: Waiting, now: float) -> bool:
        """Whether none of its class was sent for so long that it keeps out of nobody's way any more."""
        return now - max(waits.since, self._lines[self._line_key(waits.ask)].sent_s) > _STARVES_S

    def _choose(self, head: Ask, turn: Turn, now: float, *, gated: bool) -> tuple[Ask, str | NoRoom]:
        """Who goes, and where: the head, or to the front a patient one behind it whose prompt is short."""
        room = self._room
        need, found = room.need(head, turn), room.candidates(head, turn, now, gated=gated)
        if not (gated and turn.front and self.policy.pack.short):
            return head, pick.choose(need, found)
        chosen = pick.choose(need, (c for c in found if not c.front))
        if not isinstance(chosen, NoRoom) or all(c.kept_clear for c in found if c.front):
            return head, chosen
        # One that may go nowhere else goes to the front itself, or a long prompt would wait for ever.
        ask = head
        if room.behind(head, turn):
            ask = self._lines[self._line_key(head)].shortest(whole_only=turn.passing)
        ahead = (c for c in room.candidates(ask, turn, now, gated=gated) if c.front)
        return ask, pick.choose(room.need(ask, turn), ahead)

    def _send(self, ask: Ask, address: str, now: float) -> Dispatch:
        key = self._where.pop(ask.id)
        waited = now - self._drop(key, ask.id).since
        line = self._lines[key]
        line.drained.add(now)
        line.sent_s = now
        load = self._room.take(ask, address, now)
        return Dispatch(ask, address, load.lane, waited)

    def _drop(self, key: tuple[ModelKey, str], request: int) -> Waiting:
        dropped = self._lines[key].pop(request)
        self.bytes -= dropped.ask.size
        return dropped

    def _refuse(self, status: int, reason: Reason, line: Line, now: float, ask: Ask) -> Refused:
        waiting, rate = len(line), line.drained.value(now)
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
