"""The room that endpoints have, and what of it is kept for whom.

Knows what every endpoint carries and what every class was seen to do; says how an endpoint looks to
a request. Who gets it is `core.pick`'s to say, in which order `core.flow`'s.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from tidegate.core import front, pick, subset
from tidegate.core.flowtypes import Ask, Endpoint, Model, ModelKey, Policy
from tidegate.core.load import Load, Mean, Rate
from tidegate.core.pick import Candidate, Need, NoRoom, Traffic
from tidegate.core.refusals import expected_s
from tidegate.core.replicas import Replicas
from tidegate.core.types import QoSClass

_PRIOR_SERVICE_S: Final = 10.0
"""How long a request holds its slot before any was seen to end: 256 tokens at 40 ms each."""
_RECENT_S: Final = 15.0
"""A class without arrivals for this long lends its headroom, and its front."""
_FRONT_TAU_S: Final = 30.0
"""The front follows the arrivals of this long: a burst spills, it does not move the boundary."""

_BURST_TAU_S: Final = 2.0
_BURST_SIGMAS, _BURST_FACTOR = 3.0, 1.3
"""In two seconds so many more than chance explains, and by so much more than lately, are a burst."""
_RAISED_TAU_S: Final = 10.0
"""A burst that does not go on is forgotten in this long: many that come at once are not yet one."""
_BURST_LASTS_S: Final = 30.0
"""So long after a burst began, or was seen to go on, who came in it may still be there."""


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
    recalled_s: float = -math.inf
    shared: dict[tuple[ModelKey, str], int] = field(default_factory=dict)
    told: tuple[int, int] | None = None


class _Seen:
    """What a (model, class) was observed to do."""

    __slots__ = ("arrivals", "burst", "burst_s", "last", "lately", "prefill", "raised", "service", "tokens")

    def __init__(self) -> None:
        self.arrivals, self.lately = Rate(5.0), Rate(_FRONT_TAU_S)
        self.burst, self.raised = Rate(_BURST_TAU_S), Rate(_RAISED_TAU_S)
        self.burst_s = -math.inf
        self.last = -math.inf
        self.service, self.tokens = Mean(0.1), Mean(0.1)
        self.prefill = Mean(0.02)

    def believed(self, now: float) -> float:
        """Arrivals a second that the front is made for."""
        return max(self.lately.value(now), self.raised.value(now))


class Room:
    """Endpoints and traffic. Every method that needs the time is given it, in seconds."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.classes: Mapping[str, QoSClass] = {}
        self.models: Mapping[ModelKey, Model] = {}
        self.ranks: dict[str, int] = {}
        self.loads: dict[str, Load] = {}
        self.running: dict[int, Running] = {}
        self._burst_s = -math.inf
        self.relegated: set[int] = set()
        """Requests that nobody waits for any more, since they cannot be in time."""
        self._seen: dict[tuple[ModelKey, str], _Seen] = {}
        self._busy: Counter[tuple[ModelKey, str]] = Counter()
        self._told_at = 0.0
        # What follows from `classes` and `loads`: `set_world` and whoever drops a load make it anew.
        self._awaited: dict[str, int] = {}
        self._replicas: dict[ModelKey, Replicas] = {}
        self._none = Replicas((), {})

    def set_world(
        self,
        classes: Mapping[str, QoSClass],
        models: Mapping[ModelKey, Model],
        endpoints: Iterable[Endpoint],
        now: float,
    ) -> None:
        """Replace what exists. In-flight counts stay; a vanished endpoint goes once it is empty."""
        self._expect(classes, models, now)
        self._told_at = now
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
        # Classes for whose first token somebody waits, and their priorities.
        awaited = {name: c.priority for name, c in classes.items() if c.objectives.ttft_s is not None}
        self._awaited = awaited if self.policy.qos else {}
        self._regroup()

    def _regroup(self) -> None:
        """An endpoint came, went or changed."""
        by_model = defaultdict[ModelKey, list[Load]](list)
        for load in self.loads.values():
            by_model[load.model].append(load)
        self._replicas = {model: Replicas(loads, self.ranks) for model, loads in by_model.items()}

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
        seen.burst.add(now)
        if self.policy.pack.recall:
            rate, deviation = seen.burst.value(now), seen.burst.deviation(now)
            if rate - _BURST_SIGMAS * deviation > _BURST_FACTOR * seen.believed(now):
                seen.burst_s = self._burst_s = now
            if now - seen.burst_s < _BURST_TAU_S:
                seen.raised.raise_to(rate, now)
        seen.last = now
        seen.tokens.add(ask.tokens)
        seen.prefill.add(self.policy.fit.seconds(ask.prompt_tokens, 0))

    def take(self, ask: Ask, address: str, now: float) -> Load:
        """A request is sent to an endpoint, and holds its room there."""
        load = self.loads[address]
        patient = not self.urgent(ask)
        steps = self._enter(load, ask, now, patient=patient)
        self.running[ask.id] = Running(ask, address, now, steps, patient)
        self._busy[ask.model, ask.qos_class] += 1
        return load

    def _enter(self, load: Load, ask: Ask, now: float, *, patient: bool) -> float:
        known = self.classes.get(ask.qos_class)
        tpot_s, priority = (known.objectives.tpot_s, known.priority) if known else (None, 0)
        return load.take(ask, now, tpot_s=tpot_s, priority=priority, patient=patient)

    def move(self, request: int, address: str, now: float) -> bool:
        """A request is served by another endpoint of its model than it was sent to; False: it is not."""
        running, load = self.running.get(request), self.loads.get(address)
        if running is None or load is None or address == running.address or load.model != running.ask.model:
            return False
        self._leave(running, now, served=False)
        running.steps = self._enter(load, running.ask, now, patient=running.patient)
        running.address = address
        return True

    def _leave(self, running: Running, now: float, *, served: bool) -> None:
        load = self.loads[running.address]
        load.give_back(running.ask, now, running.steps, patient=running.patient, served=served)
        if load.gone and not load.requests:
            del self.loads[running.address]
            self._regroup()

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
        self._leave(running, now, served=whole)
        if whole and (seen := self._seen.get((ask.model, ask.qos_class))):
            seen.service.add(now - running.since)
        return True

    # ── how it looks to a request ───────────────────────────────────────────────────────────────

    def rank(self, ask: Ask) -> int:
        """Its class's place, 0 the most important; all are equal without QoS."""
        return self.ranks.get(ask.qos_class, len(self.ranks)) if self.policy.qos else 0

    def urgent(self, ask: Ask) -> bool:
        """Whether somebody waits for its first token."""
        return ask.qos_class in self._awaited and ask.id not in self.relegated

    def ready(self, model: ModelKey) -> Sequence[Load]:
        """The endpoints of a model that take requests."""
        return self._replicas.get(model, self._none).ready

    def comes_in(self, model: ModelKey, now: float) -> float | None:
        """In how many seconds a replica is expected; None where nobody knows, or none may be started."""
        known = self.models.get(model)
        if known is None or not known.startable:
            return None
        under_way_s = known.starting_s
        if under_way_s is not None:
            under_way_s += now - self._told_at
        return expected_s(known.start_s, under_way_s)

    def allows(self, ask: Ask, address: str) -> bool:
        """Whether its gateway lets a request go there."""
        return ask.subset is None or subset.holds(ask.subset, address)

    def open_to(self, ask: Ask) -> Sequence[Load]:
        """Those of them that a request may go to, as its gateway says."""
        ready = self.ready(ask.model)
        return ready if ask.subset is None else [e for e in ready if self.allows(ask, e.address)]

    def fallbacks(self, ask: Ask, address: str, most: int, now: float) -> tuple[str, ...]:
        """Where a request may go if the endpoint that it was given does not take it, the best first."""
        turn = self.turn(ask.model, now)
        found = self.candidates(ask, turn, now, gated=False)
        return pick.others(self.need(ask, turn), found, address, most)

    def turn(self, model: ModelKey, now: float) -> Turn:
        """How a model's endpoints stand now."""
        replicas = self._replicas.get(model, self._none)
        return Turn(
            self._headroom(model, replicas, now),
            self._front(model, replicas, now),
            safe=replicas.safe,
            apart=replicas.apart,
        )

    def blocked(self, ask: Ask, now: float) -> bool:
        """Whether every endpoint of its model has prefill that a gated request must wait for.

        Nothing that `choose` would not find out too; but mostly it is so, and this is cheap.
        """
        if not self.policy.pack.late:
            return False
        ahead_s = self.policy.pack.ahead_s
        return all(load.forecast.backlog_s > ahead_s for load in self._advanced(ask.model, now))

    def next_turn(self, models: Collection[ModelKey]) -> float | None:
        """When an endpoint of one of these has so little prefill left that more may be sent."""
        ahead_s, first = self.policy.pack.ahead_s, math.inf
        for model in models:
            for load in self._replicas.get(model, self._none).loads:
                # On the front all of it must be done.
                first = min(first, load.forecast.turn_at(ahead_s))
        return first if first < math.inf else None

    def gated(self, ask: Ask, now: float) -> bool:
        """Whether a request is not urgent, and keeps out of the way of urgent ones of higher classes."""
        return not self.urgent(ask) and any(self._urgent_lately(ask.model, now, above=self._priority(ask)))

    def behind(self, ask: Ask, turn: Turn) -> bool:
        """Whether a request may go anywhere but to the front."""
        need = self.need(ask, turn)
        places = (e for e in self.open_to(ask) if e.address not in turn.front)
        return any(e.lent if need.only_lent else not (need.not_lent and e.lent) for e in places)

    def _advanced(self, model: ModelKey, now: float) -> Sequence[Load]:
        """All endpoints of a model, as of now."""
        replicas = self._replicas.get(model, self._none)
        replicas.advance(now)
        return replicas.loads

    def _priority(self, ask: Ask) -> float:
        known = self.classes.get(ask.qos_class)
        # One that is relegated keeps out of the way of its own class, too.
        return known.priority - (ask.id in self.relegated) / 2 if known else -math.inf

    def _urgent_lately(self, model: ModelKey, now: float, above: float = -math.inf) -> Iterator[_Seen]:
        """What the urgent classes of a model did that were there lately, of those of a higher priority."""
        if not self.policy.pack.front:
            return
        for name, priority in self._awaited.items():
            seen = self._seen.get((model, name)) if priority > above else None
            if seen and now - seen.last < _RECENT_S and seen.prefill.value(0.0) > 0:
                yield seen

    def _front(self, model: ModelKey, replicas: Replicas, now: float) -> frozenset[str]:
        """The endpoints that urgent work of a model is packed on; none while nobody is urgent."""
        traffic = [
            front.Urgent(seen.believed(now), seen.prefill.value(0.0))
            for seen in self._urgent_lately(model, now)
        ]
        return replicas.front(front.size(traffic, self.policy.pack.utilisation))

    def in_burst(self, model: ModelKey, now: float) -> bool:
        """Whether more urgent requests come than lately, or did so a moment ago."""
        if not self.bursting(now):
            return False
        return any(now - seen.burst_s < _BURST_LASTS_S for seen in self._urgent_lately(model, now))

    def bursting(self, now: float) -> bool:
        """Whether that is so of any model: mostly it is of none, and this is cheap."""
        return now - self._burst_s < _BURST_LASTS_S

    def too_slow(self, load: Load) -> float | None:
        """What a step there may take for those who were promised a pace, where it takes longer; else None."""
        tpot_s = load.forecast.tightest_tpot_s()
        target_s = math.inf if tpot_s is None else self.policy.pack.recall_pace * tpot_s
        return target_s if load.forecast.decode_step_s() > target_s else None

    def fronted(self, model: ModelKey, now: float) -> list[Load]:
        """The endpoints of a model's front."""
        replicas = self._replicas.get(model, self._none)
        return [self.loads[address] for address in sorted(self._front(model, replicas, now))]

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
            not_lent=ask.streamed and turn.safe and (ask.subset is None or self._safe(ask)),
            only_lent=turn.passing,
            spill_s=math.inf if waits_s is None else self.policy.pack.spill * waits_s,
            adapter=ask.adapter,
        )

    def candidates(self, ask: Ask, turn: Turn, now: float, *, gated: bool) -> list[Candidate]:
        """The endpoints of its model as a request sees them; `gated`: it keeps out of urgent ones' way."""
        loads = self._advanced(ask.model, now)
        if gated and self.policy.pack.late:
            # Left out before anything dearer is reckoned: mostly it is all of them.
            most = {True: 0.0, False: self.policy.pack.ahead_s}
            loads = [x for x in loads if x.forecast.backlog_s <= most[x.address in turn.front]]
        kept = self._kept_clear(ask, turn, loads, now) if gated and self.policy.pack.clear else frozenset()
        if ask.subset is not None:
            loads = [load for load in loads if self.allows(ask, load.address)]
        return self._candidates(loads, ask, turn, now, kept, gated=gated)

    def _safe(self, ask: Ask) -> bool:
        """Whether an endpoint is open to it whose GPUs are not asked back."""
        return any(not e.lent for e in self.open_to(ask))

    def soon_done(self, ask: Ask, address: str, turn: Turn, now: float) -> bool:
        """Whether a patient prompt fits an endpoint of the front, and is computed within `Pack.short_s`."""
        load = self.loads[address]
        if load.forecast.prefill_s(ask.prompt_tokens) > self.policy.pack.short_s:
            return False
        at = self._candidates([load], ask, turn, now, frozenset(), gated=True)
        return not isinstance(pick.choose(self.need(ask, turn), at), NoRoom)

    def _candidates(
        self,
        loads: Iterable[Load],
        ask: Ask,
        turn: Turn,
        now: float,
        kept: frozenset[str],
        *,
        gated: bool,
    ) -> list[Candidate]:
        policy, pack, ranks, in_front = self.policy, self.policy.pack, self.ranks, turn.front
        keep = turn.keep.get(self.rank(ask), {})
        urgent, tokens, adapter = self.urgent(ask), ask.prompt_tokens, ask.adapter
        paced = pack.pace and (gated or (urgent and bool(in_front)))
        above = -math.inf if urgent else self._priority(ask)
        found = []
        for load in loads:
            address, forecast = load.address, load.forecast
            keep_slots, keep_tokens = keep.get(address, (0, 0))
            credit_s = math.inf
            if paced and address not in kept:
                credit_s = forecast.credit_s(tokens, above)
            elif paced:  # it is refused anyway
                forecast.give_up_lost()
            candidate = Candidate(
                address,
                load.lane,
                ranks.get(load.lane, len(ranks)),
                load.usable_slots(now, policy.report_grace_s, policy.report_stale_s),
                load.requests + load.foreign,
                load.kv_tokens,
                load.tokens + load.foreign_tokens,
                forecast.first_token_s(tokens) if urgent else 0.0,
                credit_s,
                address in in_front,
                address in kept,
                pack.margin_s,
                keep_slots,
                keep_tokens,
                load.ready,
                load.draining,
                load.lent,
                bool(adapter) and load.has_adapter(adapter),
            )
            found.append(candidate)
        return found

    def _kept_clear(self, ask: Ask, turn: Turn, clear: Iterable[Load], now: float) -> frozenset[str]:
        """Those of the front that get no patient work now; `clear` are the endpoints without prefill."""
        pack = self.policy.pack
        mine = [e for e in clear if e.address in turn.front]
        few = sum(e.ready for e in mine) <= max(1, int(pack.clear_share * len(turn.front)))
        # The one place that there is cannot be kept for ever.
        few = few and (len(turn.front) > 1 or self.behind(ask, turn))
        # What would be taken back again is not sent.
        burst = pack.recall and self.in_burst(ask.model, now)
        return frozenset(
            e.address
            for e in mine
            if few or e.patient >= pack.front_patient or (burst and self.too_slow(e) is not None)
        )

    def _headroom(self, model: ModelKey, replicas: Replicas, now: float) -> pick.Headroom:
        """What requests of each rank must leave free at each endpoint of a model."""
        if not self.policy.qos:
            return {}
        traffic, service, busy = [], {}, {}
        # A class seen here counts even when the model no longer lists it: its requests still run.
        for name, rank in self.ranks.items():
            busy[rank] = self._busy.get((model, name), 0)
            seen = self._seen.get((model, name))
            if seen is None:
                continue
            recent = now - seen.last < _RECENT_S
            traffic.append(Traffic(name, rank, seen.arrivals.value(now), seen.tokens.value(0.0), recent))
            service[rank] = seen.service.value(_PRIOR_SERVICE_S)
        return replicas.headroom(pick.demands(traffic, replicas.slots, service, busy))
