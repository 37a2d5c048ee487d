"""Which endpoint a request goes to, or why to none: filter, then score, then the first.

Everything is a plain value. Ranks count from 0, the most important class; tokens are KV tokens.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class NoRoom(StrEnum):
    """Why no endpoint can take a request now, from the least to the most that was found."""

    NO_ENDPOINT = "NoEndpoint"
    NOT_READY = "NotReady"
    DRAINING = "Draining"
    MAY_BE_TAKEN = "MayBeTaken"
    NO_SLOT = "NoSlot"
    NO_KV = "NoKV"
    KEPT_CLEAR = "KeptClear"
    WOULD_SLOW = "WouldSlow"


class Need(NamedTuple):
    """What a request asks of an endpoint. `urgent` is one whose first token is waited for.

    `not_lent`: only an endpoint will do whose GPUs are not asked back. `only_lent`: the others are
    waited for by a request that comes before this one. `spill_s`: how long an urgent one may wait
    for its first token before it is sent beyond the front.
    """

    qos_class: str
    rank: int
    prompt_tokens: int
    output_tokens: int
    urgent: bool = False
    not_lent: bool = False
    only_lent: bool = False
    spill_s: float = math.inf

    @property
    def tokens(self) -> int:
        """KV tokens that it may come to hold."""
        return self.prompt_tokens + self.output_tokens


class Candidate(NamedTuple):
    """An endpoint as one request sees it: what is used, and what others must find free.

    `slots` and `used` count concurrent requests, `kv_tokens` is None where the engine does not
    say. `keep_slots` and `keep_tokens` are the headroom of classes above the request's.

    As forecast, in seconds: `ttft_s` until this request's first token, `credit_s` how far those that
    were promised a pace would still be ahead of it. `front`: among those that urgent work is packed
    on; `kept_clear`: it is one of the last of these without patient prefill, or has its fill of
    patient requests.
    """

    address: str
    lane: str
    lane_rank: int
    slots: int
    used: int
    kv_tokens: int | None = None
    kv_used: int = 0
    ttft_s: float = 0.0
    credit_s: float = math.inf
    front: bool = False
    kept_clear: bool = False
    margin_s: float = -math.inf
    keep_slots: int = 0
    keep_tokens: int = 0
    ready: bool = True
    draining: bool = False
    lent: bool = False


Filter = Callable[[Need, Candidate], bool]
Score = Callable[[Need, Candidate], float]


def is_ready(_need: Need, at: Candidate) -> bool:
    """Its pod's probes pass."""
    return at.ready


def is_staying(_need: Need, at: Candidate) -> bool:
    """It is not being deleted, nor drained."""
    return not at.draining


def may_stand(need: Need, at: Candidate) -> bool:
    """Its GPUs are not asked back where that would cost the request its answer."""
    return at.lent if need.only_lent else not (need.not_lent and at.lent)


def has_slot(_need: Need, at: Candidate) -> bool:
    """A slot is free beyond those kept for higher classes.

    This is also what lets a lower class into a higher class's lane, and only then: the headroom
    of a class is kept on its own lanes first.
    """
    return at.slots - at.used - at.keep_slots >= 1


def has_kv(need: Need, at: Candidate) -> bool:
    """Its KV tokens fit beside what is held and kept.

    A request larger than half the cache counts as half: waiting for an empty engine would stop
    the queue behind it, and the engine itself makes room or says that it never can.
    """
    if at.kv_tokens is None:
        return True
    wanted = min(need.tokens, at.kv_tokens // 2)
    return at.kv_tokens - at.kv_used - at.keep_tokens >= wanted


def is_kept_clear(need: Need, at: Candidate) -> bool:
    """It is not one that the next urgent request must find free of patient prefill."""
    return need.urgent or not at.kept_clear


def keeps_pace(need: Need, at: Candidate) -> bool:
    """Nobody there falls behind the pace that was promised."""
    return need.urgent or at.credit_s >= at.margin_s


FILTERS: tuple[tuple[NoRoom, Filter], ...] = (
    (NoRoom.NOT_READY, is_ready),
    (NoRoom.DRAINING, is_staying),
    (NoRoom.MAY_BE_TAKEN, may_stand),
    (NoRoom.NO_SLOT, has_slot),
    (NoRoom.NO_KV, has_kv),
    (NoRoom.KEPT_CLEAR, is_kept_clear),
    (NoRoom.WOULD_SLOW, keeps_pace),
)


def spilt(need: Need, at: Candidate) -> float:
    """The front first, while the first token comes there in good time."""
    return 0 if at.front and at.ttft_s <= need.spill_s else 1


def slows(need: Need, at: Candidate) -> float:
    """Not where somebody would fall behind the promised pace, while the first token is soon elsewhere."""
    return 1 if at.credit_s < 0 and at.ttft_s <= need.spill_s else 0


def first_token(_need: Need, at: Candidate) -> float:
    """The soonest first token."""
    return at.ttft_s


def behind_front(_need: Need, at: Candidate) -> float:
    """Away from where people are served."""
    return at.front


def foreign_lane(need: Need, at: Candidate) -> float:
    """Own lane first, then lanes of lower classes, then higher ones, the least important first."""
    if at.lane == need.qos_class:
        return 0
    above = max(0, need.rank - at.lane_rank)
    return 1 + above


def tokens_in_flight(_need: Need, at: Candidate) -> float:
    """The emptiest by KV tokens: decode steps grow with the context that they read."""
    return at.kv_used


def requests_in_flight(_need: Need, at: Candidate) -> float:
    """The emptiest by requests, where tokens do not tell."""
    return at.used / max(1, at.slots)


URGENT_SCORES: tuple[Score, ...] = (
    spilt,
    slows,
    first_token,
    foreign_lane,
    tokens_in_flight,
    requests_in_flight,
)
"""What somebody waits for goes where prefill begins soonest."""
PATIENT_SCORES: tuple[Score, ...] = (behind_front, foreign_lane, tokens_in_flight, requests_in_flight)
"""What nobody watches stays out of the lanes above it while its own have room."""


def choose(need: Need, candidates: Iterable[Candidate]) -> str | NoRoom:
    """Return the address to use, or the furthest reason why there is none.

    The order of `candidates` does not matter: ties go to the lowest address.
    """
    left: Sequence[Candidate] = list(candidates)
    if not left:
        return NoRoom.NO_ENDPOINT
    for reason, keep in FILTERS:
        left = [c for c in left if keep(need, c)]
        if not left:
            return reason
    for score in URGENT_SCORES if need.urgent else PATIENT_SCORES:
        if len(left) == 1:
            break
        scores = [score(need, c) for c in left]
        best = min(scores)
        left = [c for c, found in zip(left, scores, strict=True) if found == best]
    return min(c.address for c in left)


def others(need: Need, candidates: Iterable[Candidate], first: str, most: int) -> tuple[str, ...]:
    """Where a request may go if the endpoint that was chosen does not take it, the best first.

    Those with room come before those without: what is full is still better than an error.
    """
    conditions = (is_ready, is_staying, may_stand)
    left = [c for c in candidates if c.address != first and all(keep(need, c) for keep in conditions)]
    scores = URGENT_SCORES if need.urgent else PATIENT_SCORES

    def place(c: Candidate) -> tuple[bool, tuple[float, ...], str]:
        full = not (has_slot(need, c) and has_kv(need, c))
        return (full, tuple(score(need, c) for score in scores), c.address)

    return tuple(c.address for c in sorted(left, key=place)[:most])


# ── headroom ────────────────────────────────────────────────────────────────────────────────────

SIGMAS = 2.33
"""99% of a normal distribution: arrivals between two finishes are exceeded once in a hundred."""
MINIMUM_SLOTS = 2
"""Kept by a class with recent traffic however little it is: one in use, one for the next."""


class Traffic(NamedTuple):
    """What a class was seen to do at one model lately.

    `rate` arrivals/s; `tokens` the mean KV tokens of one request; `recent` False once it is quiet.
    """

    qos_class: str
    rank: int
    rate: float
    tokens: float
    recent: bool


@dataclass(frozen=True, slots=True)
class Place:
    """Where headroom can be kept."""

    address: str
    lane: str
    slots: int


def slots_needed(rate: float, service_s: float, lower_slots: int) -> int:
    """Slots to keep free for arrivals until a lower-class request finishes.

    With `lower_slots` of them in use, each for `service_s`, one finishes every
    service_s / lower_slots seconds. Poisson arrivals in that time: mean m, deviation √m.
    """
    mean = rate * service_s / max(1, lower_slots)
    return max(MINIMUM_SLOTS, math.ceil(mean + SIGMAS * math.sqrt(mean)))


def allot(needed: int, qos_class: str, places: Iterable[Place]) -> dict[str, int]:
    """Spread slots over endpoints: own lanes first, one at a time, at most half of each endpoint.

    Kept on few replicas the others run lower classes at full width; half, so that a small
    endpoint stays of use to those.
    """
    ordered = sorted(places, key=lambda p: (p.lane != qos_class, p.address))
    kept = dict.fromkeys((p.address for p in ordered), 0)
    for own in (True, False):
        ring = [p for p in ordered if (p.lane == qos_class) is own]
        while needed > 0 and any(kept[p.address] < p.slots // 2 for p in ring):
            for place in ring:
                if needed > 0 and kept[place.address] < place.slots // 2:
                    kept[place.address] += 1
                    needed -= 1
    return kept


Headroom = Mapping[int, Mapping[str, tuple[int, int]]]
"""By rank of the request that must leave it: address → (slots, KV tokens) to leave free."""


def headroom(
    traffic: Iterable[Traffic],
    places: Sequence[Place],
    service_s: Mapping[int, float],
    busy: Mapping[int, int],
) -> dict[int, dict[str, tuple[int, int]]]:
    """Work out what every rank must leave free for those above it, at one model.

    Args:
        traffic: What each class did lately.
        places: The endpoints that are ready.
        service_s: By rank, how long a request holds its slot.
        busy: By rank, how many are in flight.
    """
    return reserve(demands(traffic, sum(p.slots for p in places), service_s, busy), places)


class Demand(NamedTuple):
    """What a class wants kept free for it: slots, each with room for so many tokens. 0 slots: nothing."""

    qos_class: str
    rank: int
    slots: int = 0
    tokens: float = 0.0


def demands(
    traffic: Iterable[Traffic], slots: int, service_s: Mapping[int, float], busy: Mapping[int, int]
) -> list[Demand]:
    """What every class wants kept free, by rank, where there are so many slots; the rest as `headroom`."""
    found: list[Demand] = []
    longest_s: float | None = None  # of those below
    for one in sorted(traffic, key=lambda t: t.rank, reverse=True):
        if one.recent and longest_s is not None:
            held = sum(count for rank, count in busy.items() if rank <= one.rank)
            needed = slots_needed(one.rate, longest_s, slots - held)
            found.append(Demand(one.qos_class, one.rank, needed, one.tokens))
        else:  # it is quiet, or nobody is below it
            found.append(Demand(one.qos_class, one.rank))
        if one.rank in service_s:
            longest_s = max(longest_s or 0.0, service_s[one.rank])
    return found[::-1]


def reserve(wanted: Iterable[Demand], places: Sequence[Place]) -> dict[int, dict[str, tuple[int, int]]]:
    """What every rank must leave free for those above it; `wanted` comes by rank."""
    room = {p.address: max(0, p.slots - 1) for p in places}
    kept = {p.address: (0, 0) for p in places}
    result: dict[int, dict[str, tuple[int, int]]] = {}
    for one in wanted:
        result[one.rank] = dict(kept)
        if not one.slots:
            continue
        for address, slots in allot(one.slots, one.qos_class, places).items():
            have, tokens = kept[address]
            more = min(slots, room[address] - have)  # a slot of every endpoint stays for the lowest
            kept[address] = (have + more, tokens + math.ceil(more * one.tokens))
    return result
