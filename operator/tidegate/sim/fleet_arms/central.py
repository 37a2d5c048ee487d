"""What all arms share: a queue for each class, counts for each endpoint, and the best one of those allowed.

An arm is a subclass that says which endpoints a request may go to now. All else is the same for
all, and as good as it can be made: the first in the line of the most important class, to where its
first token is predicted soonest, or, if nobody waits for it, to where the fewest tokens are held.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from tidegate.core.flowtypes import Ask, Dispatch, Ended, Endpoint, Model, ModelKey, Refused
from tidegate.core.load import EngineReport
from tidegate.core.steptime import LLAMA3_8B_A100, StepFit
from tidegate.core.types import QoSClass, Reclaim
from tidegate.sim.fleet_arms.site import Site
from tidegate.sim.types import EngineConfig

_GRACE_S: Final = 2.0
"""How long batch waits for an engine's first report, as production does (core/flowtypes.py)."""


@dataclass(frozen=True, slots=True)
class _Running:
    ask: Ask
    site: Site
    batch: bool


class Central(ABC):
    """A router that queues centrally and refuses nobody: the settings' queues are wide for all arms.

    Args:
        fit: What it believes an engine's step to take.
        step_tokens: The engine's `max_num_batched_tokens`, which is known from its flags.
    """

    bounded: ClassVar[bool] = True
    """Whether it keeps to an endpoint's slots; else the engine's own queue holds the rest."""

    def __init__(
        self, fit: StepFit = LLAMA3_8B_A100, step_tokens: int = EngineConfig().max_num_batched_tokens
    ) -> None:
        self.classes: Mapping[str, QoSClass] = {}
        self.sites: dict[str, Site] = {}
        self._fit, self._step_tokens = fit, step_tokens
        self._ranks: dict[str, int] = {}
        self._queues: dict[tuple[ModelKey, str], OrderedDict[int, tuple[Ask, float]]] = {}
        self._where: dict[int, tuple[ModelKey, str]] = {}
        self._running: dict[int, _Running] = {}
        self._changed = False

    # ── an arm's idea ───────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def among(self, ask: Ask, sites: Sequence[Site], now: float) -> Iterable[Site]:
        """Those of `sites` that the request may go to now; it is the first in its line.

        `sites` serve its model, are ready, and have a slot free if the arm is bounded.
        """

    def best(self, ask: Ask, firsts: Sequence[tuple[float, Site]]) -> Site | None:  # noqa: ARG002
        """Where somebody who waits is sent, given the predicted time to first token at each endpoint."""
        soonest = min(firsts, key=lambda f: (f[0], f[1].requests, f[1].facts.address), default=None)
        return soonest[1] if soonest else None

    def ahead_s(self, site: Site, rank: int, now: float) -> float:
        """Prefill that is computed at an endpoint before a new prompt of this rank."""
        return site.wait_s(rank, now)

    def on_send(self, ask: Ask, site: Site, now: float) -> None:  # noqa: B027  (a hook)
        """A request is about to be counted at an endpoint."""

    def on_report(self, site: Site) -> None:  # noqa: B027  (a hook)
        """An engine's word was taken."""

    # ── what arms ask ───────────────────────────────────────────────────────────────────────────

    def rank(self, qos_class: str) -> int:
        """0 for the most important class; unknown ones come last."""
        return self._ranks.get(qos_class, len(self._ranks))

    def is_batch(self, qos_class: str) -> bool:
        """Whether this is a class that nobody waits for: all its pods may be taken at any time."""
        known = self.classes.get(qos_class)
        return known is None or known.reclaim is Reclaim.ALWAYS

    def active(self) -> list[str]:
        """The classes that have ever asked, the most important first."""
        return sorted({name for _, name in self._queues}, key=lambda name: (self.rank(name), name))

    def look_again(self) -> None:
        """Ask for the next `dispatch` to decide though nothing will have happened until then."""
        self._changed = True

    # ── the Protocol `Router` ───────────────────────────────────────────────────────────────────

    def set_world(
        self,
        classes: Mapping[str, QoSClass],
        models: Mapping[ModelKey, Model],  # noqa: ARG002  (the Protocol's arguments)
        endpoints: Iterable[Endpoint],
        now: float,
    ) -> None:
        """Replace what exists. Counts stay; a vanished endpoint goes once it is empty."""
        self.classes = classes
        ordered = sorted(classes.values(), key=lambda c: (-c.priority, c.name))
        self._ranks = {c.name: index for index, c in enumerate(ordered)}
        fresh = {e.address: e for e in endpoints}
        for address in [a for a in self.sites if a not in fresh]:
            self.sites[address].gone = True
            self._forget_if_empty(self.sites[address])
        for address, facts in sorted(fresh.items()):
            site = self.sites.get(address)
            if site is None:
                site = self.sites[address] = Site(facts, self._fit, self._step_tokens, now)
            site.facts, site.gone = facts, False
        self._changed = True

    def admit(self, ask: Ask, now: float) -> Refused | None:
        """Queue a request."""
        key = (ask.model, ask.qos_class)
        self._queues.setdefault(key, OrderedDict())[ask.id] = (ask, now)
        self._where[ask.id] = key
        self._changed = True
        return None

    def dispatch(self, now: float) -> list[Dispatch]:
        """Send from every line, the most important first, until its head may go nowhere."""
        if not self._changed:
            return []
        # A picker looks when something has happened, and while it waits for a first report.
        self._changed = any(not self._heard(site, now) for site in self.sites.values())
        sent: list[Dispatch] = []
        lines = [key for key, queue in self._queues.items() if queue]
        for key in sorted(lines, key=lambda k: (self.rank(k[1]), k)):
            queue = self._queues[key]
            while queue:
                ask, since = next(iter(queue.values()))
                site = self._choose(ask, now)
                if site is None:
                    break
                sent.append(self._send(ask, since, site, now))
        return sent

    def expire(self, now: float) -> list[tuple[Ask, Refused]]:  # noqa: ARG002  (the Protocol's arguments)
        """Nobody is refused."""
        return []

    def finish(self, request: int, now: float, *, whole: bool = True) -> Ended | None:  # noqa: ARG002
        """A request is over, wherever it was; None when it is not known any more."""
        running = self._running.pop(request, None)
        if running is not None:
            running.site.give_back(running.ask, batch=running.batch)
            self._forget_if_empty(running.site)
            self._changed = True
            return Ended.DISPATCHED
        key = self._where.pop(request, None)
        if key is None:
            return None
        del self._queues[key][request]
        return Ended.QUEUED

    def report(self, address: str, report: EngineReport, own_before: int, own_tokens_before: int) -> None:
        """Take an engine's own counts; of one that is not there any more they say nothing."""
        site = self.sites.get(address)
        if site is None:
            return
        site.hear(report, own_before, own_tokens_before)
        self.on_report(site)
        self._changed = True

    def recall(self, now: float) -> list[tuple[Ask, str]]:  # noqa: ARG002
        """These arms abort nothing."""
        return []

    def next_turn(self) -> float | None:
        """These arms wait for nothing but what happens."""
        return None

    def held(self, address: str) -> tuple[int, int]:
        """Requests and KV tokens in flight at an endpoint."""
        site = self.sites.get(address)
        return (site.requests, site.tokens) if site else (0, 0)

    def waiting(self) -> Iterator[Ask]:
        """Everything that is queued."""
        for queue in self._queues.values():
            yield from (ask for ask, _ in queue.values())

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _choose(self, ask: Ask, now: float) -> Site | None:
        batch = self.is_batch(ask.qos_class)
        sites = [
            s
            for s in self.sites.values()
            if s.takes_more
            and s.facts.model == ask.model
            and (s.free_slots > 0 or not self.bounded)
            and (not batch or self._heard(s, now))
        ]
        allowed = self.among(ask, sites, now)
        if batch:
            return min(allowed, key=lambda s: (s.tokens, s.requests, s.facts.address), default=None)
        rank = self.rank(ask.qos_class)
        firsts = [(self.ahead_s(s, rank, now) + s.prefill_s(ask.prompt_tokens), s) for s in allowed]
        return self.best(ask, firsts)

    def _send(self, ask: Ask, since: float, site: Site, now: float) -> Dispatch:
        del self._queues[self._where.pop(ask.id)][ask.id]
        batch = self.is_batch(ask.qos_class)
        self.on_send(ask, site, now)
        site.take(ask, self.rank(ask.qos_class), now, batch=batch)
        self._running[ask.id] = _Running(ask, site, batch)
        return Dispatch(ask, site.facts.address, site.facts.lane, now - since)

    def _forget_if_empty(self, site: Site) -> None:
        if site.gone and not site.requests:
            self.sites.pop(site.facts.address, None)

    @staticmethod
    def _heard(site: Site, now: float) -> bool:
        """Whether the engine has spoken, or has had its time to."""
        return site.report is not None or now - site.known_since_s >= _GRACE_S
