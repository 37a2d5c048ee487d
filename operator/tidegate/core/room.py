"""The room that endpoints have, and what of it is kept for whom.

Knows what every endpoint carries and what every class was seen to do; says how an endpoint looks to
a request. Who gets it is `core.pick`'s to say, in which order `core.flow`'s.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from tidegate.core import front, pick
from tidegate.core.flowtypes import Ask, Endpoint, Model, ModelKey, Policy
from tidegate.core.load import Load, Mean, Rate
from tidegate.core.pick import Candidate, Need, NoRoom, Place, Traffic
from tidegate.core.types import QoSClass

_PRIOR_SERVICE_S: Final = 10.0
"""How long a request holds its slot before any was seen to end: 256 tokens at 40 ms each."""
_RECENT_S: Final = 15.0
"""A class without arrivals for this long lends its headroom, and its front."""
_FRONT_TAU_S: Final = 30.0
"""The front follows the arrivals of this long: a burst spills, it does not move the boundary."""


@dataclass(slots=True)
class Turn:
    """How a model's endpoints stand in one round of dispatching.

    `keep` is the headroom, `front` the endpoints that urgent work is packed on. `safe`: some are not
    lent. `apart`: and some are, so that streamed requests have fewer to go to. `passing`: a streamed
    one waits; whole ones pass it, onto lent endpoints only.
    """

    keep: pick.Headroom
    front: frozenset[str]
    safe: bool
    apart: bool
    passing: bool = False


@dataclass(slots=True)
class Running:
    """A request that holds room, since when, and the steps that its engine had made by then.

    `shared`: the lines that waited when it was sent and were owed a part of it, and how often they
    had rested by then. `told`: its real prompt and output tokens, where they came before its end.
    """

    ask: Ask
    address: str
    since: float
    steps: float
    patient: bool
    shared: dict[tuple[ModelKey, str], int] = field(default_factory=dict)
    told: tuple[int, int] | None = None


class _Seen:
    """What a (model, class) was observed to do."""

    __slots__ = ("arrivals", "last", "lately", "prefill", "service", "tokens")

    def __init__(self) -> None:
        self.arrivals, self.lately = Rate(5.0), Rate(_FRONT_TAU_S)
        self.last = -math.inf
        self.service, self.tokens = Mean(0.1), Mean(0.1)
        self.prefill = Mean(0.02)


class Room:
    """Endpoints and traffic. Every method that needs the time is given it, in seconds."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.classes: Mapping[str, QoSClass] = {}
        self.models: Mapping[ModelKey, Model] = {}
        self.ranks: dict[str, int] = {}
        self.loads: dict[str, Load] = {}
        self.running: dict[int, Running] = {}
        self.relegated: set[int] = set()
        """Requests that nobody waits for any more, since they cannot be in time."""
        self._seen: dict[tuple[ModelKey, str], _Seen] = {}
        self._busy: Counter[tuple[ModelKey, str]] = Counter()

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
        self.ranks = {c.name: index for index, c in enumerate(by_importance)}
        fresh = {e.address: e for e in endpoints}
        for address, load in list(self.loads.items()):
            if address not in fresh:
                load.leave()
                if not load.requests:
                    del self.loads[address]
        for address, e in fresh.items():
            known = self.loads.get(address)
            if known is None:
                known = self.loads[address] = Load(address, now, self.policy.fit)
            known.become(e, self.policy.fit)
        self._seen = {key: seen for key, seen in self._seen.items() if key[0] in models}

    def _expect(self, classes: Mapping[str, QoSClass], models: Mapping[ModelKey, Model], now: float) -> None:
        """Of a model just met nothing was seen yet: keep headroom for those who would wait, at first."""
        for model in models.values():
            for name in model.classes:
                known = classes.get(name)
                if model.key not in self.models and known and known.objectives.ttft_s is not None:
                    self._seen.setdefault((model.key, name), _Seen()).last = now

    # ── what comes, goes and runs ───────────────────────────────────────────────────────────────

    def came(self, ask: Ask, now: float) -> None:
        """Note an arrival."""
        seen = self._seen.setdefault((ask.model, ask.qos_class), _Seen())
        seen.arrivals.add(now)
        seen.lately.add(now)
        seen.last = now
        seen.tokens.add(ask.tokens)
        seen.prefill.add(self.policy.fit.seconds(ask.prompt_tokens, 0))

    def take(self, ask: Ask, address: str, now: float) -> Load:
        """A request is sent to an endpoint, and holds its room there."""
        known = self.classes.get(ask.qos_class)
        load = self.loads[address]
        patient = not self.urgent(ask)
        tpot_s, priority = (known.objectives.tpot_s, known.priority) if known else (None, 0)
        steps = load.take(ask, now, tpot_s=tpot_s, priority=priority, patient=patient)
        self.running[ask.id] = Running(ask, address, now, steps, patient)
        self._busy[ask.model, ask.qos_class] += 1
        return load

    def give_back(self, request: int, now: float, *, whole: bool) -> bool:
        """A request is over; False when it holds no room (any more)."""
        running = self.running.pop(request, None)
        if running is None:
            return False
        ask = running.ask
        self.relegated.discard(request)
        self._busy[ask.model, ask.qos_class] -= 1
        if not self._busy[ask.model, ask.qos_class]:
            del self._busy[ask.model, ask.qos_class]
        load = self.loads[running.address]
        load.give_back(ask, now, running.steps, patient=running.patient, served=whole)
        if load.gone and not load.requests:
            del self.loads[running.address]
        if whole and (seen := self._seen.get((ask.model, ask.qos_class))):
            seen.service.add(now - running.since)
        return True

    # ── how it looks to a request ───────────────────────────────────────────────────────────────

    def rank(self, ask: Ask) -> int:
        """Its class's place, 0 the most important; all are equal without QoS."""
        return self.ranks.get(ask.qos_class, len(self.ranks)) if self.policy.qos else 0

    def urgent(self, ask: Ask) -> bool:
        """Whether somebody waits for its first token."""
        known = self.classes.get(ask.qos_class)
        promised = self.policy.qos and known is not None and known.objectives.ttft_s is not None
        return promised and ask.id not in self.relegated

    def ready(self, model: ModelKey) -> Iterator[Load]:
        """The endpoints of a model that take requests."""
        return (e for e in self.loads.values() if e.model == model and e.ready and not e.draining)

    def turn(self, model: ModelKey, now: float) -> Turn:
        """How a model's endpoints stand now."""
        lent = [e.lent for e in self.ready(model)]
        safe = not all(lent)
        return Turn(self.headroom(model, now), self.front(model, now), safe=safe, apart=safe and any(lent))

    def blocked(self, ask: Ask, now: float) -> bool:
        """Whether every endpoint of its model has prefill that it must wait for.

        Nothing that `choose` would not find out too; but mostly it is so, and this is cheap.
        """
        if not self.policy.pack.late or not self.gated(ask, now):
            return False
        mine = [load for load in self.loads.values() if load.model == ask.model]
        for load in mine:
            load.forecast.advance(now)
        return all(load.forecast.backlog_s > self.policy.pack.ahead_s for load in mine)

    def next_turn(self, models: Collection[ModelKey]) -> float | None:
        """When an endpoint of one of these has so little prefill left that more may be sent."""
        ahead_s = self.policy.pack.ahead_s
        busy = [load.forecast for load in self.loads.values() if load.model in models]
        # On the front all of it must be done.
        turns = [(f.clear_at, ahead_s if f.backlog_s > ahead_s else 0.0) for f in busy if f.backlog_s]
        return min((clear_at - early_s for clear_at, early_s in turns), default=None)

    def gated(self, ask: Ask, now: float) -> bool:
        """Whether a request is not urgent, and keeps out of the way of urgent ones of higher classes."""
        return not self.urgent(ask) and bool(self._urgent_lately(ask.model, now, above=self._priority(ask)))

    def behind(self, ask: Ask, turn: Turn) -> bool:
        """Whether a request may go anywhere but to the front."""
        need = self.need(ask, turn)
        places = (e for e in self.ready(ask.model) if e.address not in turn.front)
        return any(e.lent if need.only_lent else not (need.not_lent and e.lent) for e in places)

    def _priority(self, ask: Ask) -> float:
        known = self.classes.get(ask.qos_class)
        # One that is relegated keeps out of the way of its own class, too.
        return known.priority - (ask.id in self.relegated) / 2 if known else -math.inf

    def _urgent_lately(self, model: ModelKey, now: float, above: float = -math.inf) -> list[_Seen]:
        """What the urgent classes of a model did that were there lately, of those of a higher priority."""
        if not (self.policy.qos and self.policy.pack.front):
            return []
        return [
            seen
            for name, known in self.classes.items()
            if known.objectives.ttft_s is not None
            and known.priority > above
            and (seen := self._seen.get((model, name)))
            and now - seen.last < _RECENT_S
            and seen.prefill.value(0.0) > 0
        ]

    def front(self, model: ModelKey, now: float) -> frozenset[str]:
        """The endpoints that urgent work of a model is packed on; none while nobody is urgent."""
        traffic = [
            front.Urgent(seen.lately.value(now), seen.prefill.value(0.0))
            for seen in self._urgent_lately(model, now)
        ]
        if not traffic:
            return frozenset()
        places = [
            front.Standing(e.address, self.ranks.get(e.lane, len(self.ranks)), e.lent)
            for e in self.ready(model)
        ]
        return front.members(front.size(traffic, self.policy.pack.utilisation), places)

    def need(self, ask: Ask, turn: Turn) -> Need:
        """What a request asks of an endpoint."""
        known = self.classes.get(ask.qos_class)
        waits_s = known.objectives.ttft_s if known else None
        return Need(
            ask.qos_class,
            self.rank(ask),
            ask.prompt_tokens,
            ask.output_tokens,
            urgent=self.urgent(ask),
            not_lent=ask.streamed and turn.safe,
            only_lent=turn.passing,
            spill_s=math.inf if waits_s is None else self.policy.pack.spill * waits_s,
        )

    def candidates(self, ask: Ask, turn: Turn, now: float, *, gated: bool) -> list[Candidate]:
        """The endpoints of its model as a request sees them; `gated`: it keeps out of urgent ones' way."""
        loads = [load for load in self.loads.values() if load.model == ask.model]
        for load in loads:
            load.forecast.advance(now)
        if gated and self.policy.pack.late:
            # Left out before anything dearer is reckoned: mostly it is all of them.
            most = {True: 0.0, False: self.policy.pack.ahead_s}
            loads = [x for x in loads if x.forecast.backlog_s <= most[x.address in turn.front]]
        keep = turn.keep.get(self.rank(ask), {})
        kept = self._kept_clear(ask, turn, loads) if gated and self.policy.pack.clear else frozenset()
        return [self._candidate(load, ask, turn, keep, now, gated, load.address in kept) for load in loads]

    def soon_done(self, ask: Ask, address: str, turn: Turn, now: float) -> bool:
        """Whether a patient prompt fits an endpoint of the front, and is computed within `Pack.short_s`."""
        load = self.loads[address]
        if load.forecast.prefill_s(ask.prompt_tokens) > self.policy.pack.short_s:
            return False
        keep = turn.keep.get(self.rank(ask), {})
        at = self._candidate(load, ask, turn, keep, now, gated=True, kept=False)
        return not isinstance(pick.choose(self.need(ask, turn), [at]), NoRoom)

    def _candidate(
        self,
        load: Load,
        ask: Ask,
        turn: Turn,
        keep: Mapping[str, tuple[int, int]],
        now: float,
        gated: bool,
        kept: bool,
    ) -> Candidate:
        policy, pack = self.policy, self.policy.pack
        keep_slots, keep_tokens = keep.get(load.address, (0, 0))
        urgent = self.urgent(ask)
        paced = pack.pace and (gated or (urgent and bool(turn.front)))
        above = -math.inf if urgent else self._priority(ask)
        return Candidate(
            address=load.address,
            lane=load.lane,
            lane_rank=self.ranks.get(load.lane, len(self.ranks)),
            slots=load.usable_slots(now, policy.report_grace_s, policy.report_stale_s),
            used=load.requests + load.foreign,
            kv_tokens=load.kv_tokens,
            kv_used=load.tokens + load.foreign_tokens,
            ttft_s=load.forecast.first_token_s(ask.prompt_tokens) if urgent else 0.0,
            credit_s=load.forecast.credit_s(ask.prompt_tokens, above) if paced else math.inf,
            margin_s=pack.margin_s,
            front=load.address in turn.front,
            kept_clear=kept,
            keep_slots=keep_slots,
            keep_tokens=keep_tokens,
            ready=load.ready,
            draining=load.draining,
            lent=load.lent,
        )

    def _kept_clear(self, ask: Ask, turn: Turn, clear: list[Load]) -> frozenset[str]:
        """Those of the front that get no patient work now; `clear` are the endpoints without prefill."""
        pack = self.policy.pack
        mine = [e for e in clear if e.address in turn.front]
        few = sum(e.ready for e in mine) <= max(1, int(pack.clear_share * len(turn.front)))
        # The one place that there is cannot be kept for ever.
        few = few and (len(turn.front) > 1 or self.behind(ask, turn))
        return frozenset(e.address for e in mine if few or e.patient >= pack.front_patient)

    def headroom(self, model: ModelKey, now: float) -> pick.Headroom:
        """What requests of each rank must leave free at each endpoint of a model."""
        if not self.policy.qos:
            return {}
        # Kept where it can be used by all: streamed requests keep off lent endpoints.
        ready = list(self.ready(model))
        kept = [e for e in ready if not e.lent] or ready
        places = [Place(e.address, e.lane, e.slots) for e in kept]
        traffic, service = [], {}
        # A class seen here counts even when the model no longer lists it: its requests still run.
        for name, rank in self.ranks.items():
            seen = self._seen.get((model, name))
            if seen is None:
                continue
            recent = now - seen.last < _RECENT_S
            traffic.append(Traffic(name, rank, seen.arrivals.value(now), seen.tokens.value(0.0), recent))
            service[rank] = seen.service.value(_PRIOR_SERVICE_S)
        busy = {
            self.ranks[name]: n
            for (key, name), n in self._busy.items()
            if key == model and name in self.ranks
        }
        return pick.headroom(traffic, places, service, busy)
