"""What holds of every arm, whatever it decides: watched from outside, while a fleet runs.

Nothing is lost or served twice, no engine holds more than its slots and KV cache, and a seed gives the
same bytes. The watch keeps an account of its own and asks nobody whose account it is.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from inspect import Parameter, signature
from typing import Any, Final

from tidegate.core.flowtypes import Ask, Dispatch, Ended, Endpoint, Model, ModelKey, Refused
from tidegate.core.load import EngineReport
from tidegate.core.types import QoSClass
from tidegate.sim.fleet import Fleet, Run, Setting
from tidegate.sim.fleet_arms.registry import ARMS
from tidegate.sim.headline import CONFIG, Point, Raw, bound_per_s, mean_computed
from tidegate.sim.records import Record, State
from tidegate.sim.router import Arm, Build, Router, SiteEngine
from tidegate.sim.types import EngineConfig, Request, TokenEvent
from tidegate.sim.workload import summary_lengths

NUMBERS: Final = {
    "cap": "-2",
    "cooperating": "-1-2-1-4",
    "edf": "-256",
    "holdback": "-20",
    "packing": "-1",
    "packing-cap": "-1-1",
    "release": "-60",
    "silos": "-1-1-1",
    "tiers": "-1-0-1-1",
}
"""What comes after a family's name for a fleet of three."""
_LOOK_EVERY: Final = 64
"""Every so many-th step of an engine the tokens of all its requests are counted."""
_MOST_TOLD: Final = 10


def every_arm() -> list[str]:
    """One arm of every family that is registered, for a fleet of three.

    Raises:
        ValueError: a family takes numbers and `NUMBERS` has none for it.
    """
    for family, make in ARMS.items():
        asked = [p for p in signature(make).parameters.values() if p.default is Parameter.empty]
        if asked and family not in NUMBERS:
            raise ValueError(f"arm {family} takes numbers: add some to sim/invariants.NUMBERS")
    return sorted(family + NUMBERS.get(family, "") for family in ARMS)


class BrokenRunError(Exception):
    """A run that did not come to its end, and what was wrong before."""


class Account:
    """What was seen of one run, and what was wrong with it."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.queued: set[int] = set()
        self.sent: dict[int, str] = {}
        self.slots: dict[str, int] = {}
        self.busy: Counter[str] = Counter()
        self.served: set[str] = set()
        self.away: set[int] = set()
        """Taken back, and to come again."""
        self.prompts: dict[int, int] = {}
        self.parts: set[int] = set()
        """Of what runs, prefixes of a prompt."""

    def expect(self, holds: bool, what: str) -> None:
        """Note what does not hold; the first few are told."""
        if not holds and len(self.wrong) < _MOST_TOLD:
            self.wrong.append(what)


class WatchedRouter:
    """Passes everything on, and keeps account of who is where."""

    def __init__(self, router: Router, account: Account, *, bounded: bool) -> None:
        self._router, self._account, self._bounded = router, account, bounded

    def set_world(
        self,
        classes: Mapping[str, QoSClass],
        models: Mapping[ModelKey, Model],
        endpoints: Iterable[Endpoint],
        now: float,
    ) -> None:
        """Note the slots."""
        endpoints = list(endpoints)
        self._account.slots |= {e.address: e.slots for e in endpoints}
        self._router.set_world(classes, models, endpoints, now)

    def admit(self, ask: Ask, now: float) -> Refused | None:
        """Nobody comes twice."""
        known = ask.id in self._account.queued or ask.id in self._account.sent
        self._account.expect(not known, f"request {ask.id} came twice")
        self._account.away.discard(ask.id)
        self._account.prompts[ask.id] = ask.prompt_tokens
        refused = self._router.admit(ask, now)
        if refused is None:
            self._account.queued.add(ask.id)
        return refused

    def dispatch(self, now: float) -> list[Dispatch]:
        """Who is sent was waiting, and has a slot."""
        account, sent = self._account, self._router.dispatch(now)
        for each in sent:
            number, address = each.ask.id, each.address
            account.expect(number in account.queued, f"request {number} was sent though it did not wait")
            account.queued.discard(number)
            account.sent[number] = address
            if each.ask.prompt_tokens < account.prompts[number]:
                account.parts.add(number)
            account.busy[address] += 1
            full = self._bounded and account.busy[address] > account.slots[address]
            account.expect(not full, f"{address} was sent {account.busy[address]} requests at a time")
        return sent

    def expire(self, now: float) -> list[tuple[Ask, Refused]]:
        """Who is refused waits no more."""
        gone = self._router.expire(now)
        self._account.queued -= {ask.id for ask, _ in gone}
        return gone

    def recall(self, now: float) -> list[tuple[Ask, str]]:
        """Who is taken back runs where it is said to run."""
        account, taken = self._account, self._router.recall(now)
        for ask, address in taken:
            runs = account.sent.get(ask.id) == address and ask.id not in account.away
            account.expect(runs, f"request {ask.id} was taken back from {address} and did not run there")
            account.away.add(ask.id)
        return taken

    def finish(self, request: int, now: float, *, whole: bool = True) -> Ended | None:
        """Who ends was sent."""
        address = self._account.sent.pop(request, None)
        self._account.expect(address is not None, f"request {request} ended and was not sent")
        self._account.busy[address or ""] -= 1
        if request in self._account.parts:
            self._account.parts.discard(request)
            if whole:
                self._account.queued.add(request)  # the rest of its prompt waits
        return self._router.finish(request, now, whole=whole)

    def next_turn(self) -> float | None:
        """Passed on."""
        return self._router.next_turn()

    def report(self, address: str, report: EngineReport, own_before: int, own_tokens_before: int) -> None:
        """Passed on."""
        self._router.report(address, report, own_before, own_tokens_before)

    def held(self, address: str) -> tuple[int, int]:
        """The router's account is ours."""
        held, busy = self._router.held(address), self._account.busy[address]
        self._account.expect(held[0] == busy, f"{address} holds {busy} requests and not {held[0]}")
        return held

    def waiting(self) -> Iterator[Ask]:
        """Passed on."""
        return self._router.waiting()


class WatchedEngine:
    """Passes everything on, and sees that slots, KV cache and step hold what is in them."""

    def __init__(self, engine: SiteEngine, config: EngineConfig, account: Account) -> None:
        self._engine, self._account = engine, account
        self.config, self.counters = config, engine.counters
        self._lengths: dict[str, int] = {}
        self._begun: set[str] = set()
        self._steps = 0

    @property
    def waiting(self) -> int:
        """Passed on."""
        return self._engine.waiting

    @property
    def unfinished(self) -> int:
        """Passed on."""
        return self._engine.unfinished

    @property
    def kv_usage(self) -> float:
        """Passed on."""
        return self._engine.kv_usage

    def progress(self) -> Iterator[tuple[str, int]]:
        """Passed on."""
        return self._engine.progress()

    def add(self, request: Request, now: float) -> None:
        """Nobody who is here or was served is sent again."""
        again = request.id in self._lengths or request.id in self._account.served
        self._account.expect(not again, f"request {request.id} was sent to an engine twice")
        self._lengths[request.id] = request.prompt_tokens + request.output_tokens - 1
        self._engine.add(request, now)

    def abort(self, request_id: str) -> bool:
        """Who is dropped may come again, and begin again."""
        self._lengths.pop(request_id, None)
        self._begun.discard(request_id)
        return self._engine.abort(request_id)

    def schedule(self, now: float) -> Any:
        """After every step the engine holds what it can, and computes no more of anybody than there is."""
        plan, account, config = self._engine.schedule(now), self._account, self.config
        self._steps += 1
        running = self._engine.unfinished - self._engine.waiting
        account.expect(running <= config.max_num_seqs, f"{running} requests run in an engine")
        account.expect(self._engine.kv_usage <= 1, f"{self._engine.kv_usage:.3f} of a KV cache is used")
        if self._steps % _LOOK_EVERY == 0:
            held = dict(self._engine.progress())
            account.expect(held.keys() == self._lengths.keys(), "an engine lost or invented a request")
            over = [i for i, tokens in held.items() if tokens > self._lengths.get(i, 0)]
            account.expect(not over, f"more is computed of {over[:3]} than there is")
            total = sum(held.values())
            account.expect(total <= config.kv_tokens, f"an engine holds {total} tokens of KV")
        return plan

    def complete(self, plan: Any) -> list[TokenEvent]:
        """Every request has its first token and its last, once, in this order."""
        events = self._engine.complete(plan)
        for event in events:
            if event.nth == 0:
                self._account.expect(event.id not in self._begun, f"request {event.id} began twice")
                self._begun.add(event.id)
            if event.finished:
                known = self._lengths.pop(event.id, None) is not None and event.id in self._begun
                self._account.expect(known, f"request {event.id} ended and was not there, or had not begun")
                if int(event.id) in self._account.parts:
                    self._begun.discard(event.id)
                else:
                    self._account.served.add(event.id)
        return events


def watched(arm: Arm, setting: Setting, seed: int) -> tuple[Run, list[str]]:
    """Run an arm, and say what was wrong. Without faults: a replica that dies loses what it holds.

    Raises:
        BrokenRunError: it did not come to its end.
    """
    account = Account()
    own = replace(arm, router=_router(arm, account), build=_build(arm.build, account))
    fleet = Fleet(setting, own, seed)
    try:
        run = fleet.run()
    except (KeyError, ValueError) as error:
        raise BrokenRunError("; ".join([*account.wrong, f"the run stopped: {error!r}"])) from error
    waits = {ask.id for ask in fleet.router.waiting()}
    lost = len(waits ^ account.queued)
    account.expect(not lost, f"{lost} requests were lost in the queue, or wait there though they were sent")
    for record in run.records:
        _settled(record, account)
    opened = {r.number for r in run.records if r.state is State.OPEN}
    here = account.queued | set(account.sent) | account.away
    account.expect(opened == here, f"{len(opened ^ here)} requests are neither open nor over")
    numbers = [r.number for r in run.records]
    account.expect(len(numbers) == len(set(numbers)), "a request has two records")
    return run, account.wrong


def above_bound(point: Point, raw: Raw) -> str | None:
    """What is wrong where a run harvests more than bound B; None where it does not.

    The bound is of long runs: in a short one an engine may be the fuller at the end, by its cache.
    """
    stored = CONFIG.kv_tokens / mean_computed(summary_lengths()) / (point.seconds - point.warm_up_s)
    most = bound_per_s(point.load) + stored
    if raw.batch_per_s <= most:
        return None
    return f"{point.arm}: {raw.batch_per_s:.3f} batch requests/s a replica is above bound B, {most:.3f}"


def digest(run: Run) -> str:
    """Of every record of a run."""
    return hashlib.sha256(repr(run.records).encode()).hexdigest()


def _router(arm: Arm, account: Account) -> Callable[[], Router]:
    def make() -> Router:
        router = arm.router()
        # An arm that keeps no queue of its own leaves it to the engine's.
        return WatchedRouter(router, account, bounded=getattr(router, "bounded", True))

    return make


def _build(build: Build, account: Account) -> Build:
    return lambda config: WatchedEngine(build(config), config, account)


def _settled(record: Record, account: Account) -> None:
    """What a record says fits together."""
    if record.state is State.ANSWERED:
        first, last = record.first_s, record.finish_s
        whole = first is not None and last is not None and record.arrival_s <= first <= last
        account.expect(whole, f"request {record.number} was answered without having been served")
        account.expect(
            str(record.number) in account.served, f"request {record.number} was answered by nobody"
        )
