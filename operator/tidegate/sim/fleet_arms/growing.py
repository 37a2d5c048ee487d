"""Production's queue, and batch prompts that the front takes in growing prefixes.

Each prefix is a request for one token, the last one the request itself; what came before is found in the
engine's prefix cache. So the router has its say after each: while somebody's prompt is computed there, the
rest waits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from tidegate.core import pick
from tidegate.core.flow import Flow
from tidegate.core.flowtypes import Ask, Dispatch, Ended, ModelKey, Pack, Policy
from tidegate.core.line import Waiting
from tidegate.core.pick import NoRoom
from tidegate.core.room import Turn
from tidegate.sim.router import Arm

BLOCK = 16
"""Of the engine's KV cache: only whole blocks are found again."""


@dataclass(frozen=True, slots=True)
class Grown:
    """A request that is sent in prefixes: all of it, the tokens sent so far, and where to."""

    whole: Ask
    tokens: int
    address: str


def prefix(whole: Ask, done: int, chunk: int) -> Ask:
    """The next prefix of a request of which so many tokens are done; itself where no more is left."""
    tokens = done + chunk
    return whole if tokens >= whole.prompt_tokens else replace(whole, prompt_tokens=tokens, output_tokens=1)


def rest(sent: Ask, done: int) -> Ask:
    """What a prefix adds to the one before it: what the engine has to compute."""
    return replace(sent, prompt_tokens=sent.prompt_tokens - done)


class Growing(Flow):
    """`Flow` that sends batch prompts to the front `chunk` tokens at a time."""

    def __init__(self, chunk: int, pack: Pack) -> None:
        super().__init__(Policy(pack=pack))
        self._chunk = chunk
        self._grown: dict[int, Grown] = {}
        # Who waits for its next prefix, since when.
        self._paused: dict[int, float] = {}
        self._pending: Ask | None = None

    def dispatch(self, now: float) -> list[Dispatch]:
        """See `Flow`; who is begun goes on before others begin, and nobody before the urgent."""
        heads = (line.head() for line in self._lines.values())
        if any(head is not None and self._room.urgent(head.ask) for head in heads):
            return super().dispatch(now)
        return self._go_on(now) + super().dispatch(now)

    def finish(self, request: int, now: float, *, whole: bool = True) -> Ended | None:
        """See `Flow`; of a request whose prefix has ended the rest is to be sent."""
        ended = super().finish(request, now, whole=whole)
        grown = self._grown.get(request)
        if grown is None:
            return ended
        if whole and ended is Ended.DISPATCHED and grown.tokens < grown.whole.prompt_tokens:
            self._paused[request] = now
            return ended
        del self._grown[request]
        self._paused.pop(request, None)
        return ended or Ended.QUEUED

    def next_turn(self) -> float | None:
        """See `Flow`; who is begun waits too."""
        if not self._paused:
            return super().next_turn()
        models = {self._grown[request].whole.model for request in self._paused}
        return self._room.next_turn(models | {key[0] for key, line in self._lines.items() if line})

    def waiting(self) -> Iterator[Ask]:
        """See `Flow`; and those whose next prefix is to be sent."""
        yield from super().waiting()
        yield from (self._grown[request].whole for request in self._paused)

    # ── inside ──────────────────────────────────────────────────────────────────────────────────

    def _choose(self, waits: Waiting, turn: Turn, now: float, *, gated: bool) -> tuple[Waiting, str | NoRoom]:
        """Behind the front whole; on it the first prefix of the head."""
        self._pending = None
        if not (gated and turn.front):
            return super()._choose(waits, turn, now, gated=gated)
        room, head = self._room, waits.ask
        found = room.candidates(head, turn, now, gated=gated)
        chosen = pick.choose(room.need(head, turn), (c for c in found if not c.front))
        if not isinstance(chosen, NoRoom) or all(c.kept_clear for c in found if c.front):
            return waits, chosen
        first = prefix(head, 0, self._chunk)
        ahead = (c for c in room.candidates(first, turn, now, gated=gated) if c.front)
        chosen = pick.choose(room.need(first, turn), ahead)
        self._pending = first
        return waits, chosen

    def _send(self, one: Waiting, address: str, now: float) -> Dispatch:
        first, self._pending = self._pending, None
        if first is None or first.id != one.ask.id or first is one.ask:
            return super()._send(one, address, now)
        self._grown[first.id] = Grown(one.ask, first.prompt_tokens, address)
        return super()._send(replace(one, ask=first), address, now)

    def _go_on(self, now: float) -> list[Dispatch]:
        """Send the next prefix of those who were begun, where nothing is in the way."""
        sent: list[Dispatch] = []
        turns: dict[ModelKey, Turn] = {}
        for request in list(self._paused):
            grown = self._grown[request]
            model, line = grown.whole.model, self._lines.get(self._line_key(grown.whole))
            if line is None:
                continue  # its model is gone
            waits = Waiting(grown.whole, self._paused[request])
            gated = self._room.gated(grown.whole, now) and not self._starves(waits, now)
            if gated and self._prefills(grown.address, now):
                continue
            if model not in turns:
                turns[model] = self._room.turn(model, now)
            following = self._following(grown, turns[model], now, gated=gated)
            if following is not None:
                del self._paused[request]
                line.sent_s = now
                self._grown[request] = replace(grown, tokens=following.prompt_tokens)
                load = self._room.take(rest(following, grown.tokens), grown.address, now)
                sent.append(Dispatch(following, grown.address, load.lane, 0.0))
        return sent

    def _prefills(self, address: str, now: float) -> bool:
        """Whether it waits there for prefill anyway: mostly it is so, and this is cheap."""
        load = self._room.loads.get(address)
        if load is None:
            return True  # it is gone
        forecast = load.forecast
        forecast.advance(now)
        return self.policy.pack.late and forecast.backlog_s > self.policy.pack.ahead_s

    def _following(self, grown: Grown, turn: Turn, now: float, *, gated: bool) -> Ask | None:
        """What to send now of a request that was begun; None: nothing. Off the front it is all the rest."""
        room = self._room
        apart = grown.address in turn.front
        following = prefix(grown.whole, grown.tokens, self._chunk) if apart else grown.whole
        more = rest(following, grown.tokens)
        here = (c for c in room.candidates(more, turn, now, gated=gated) if c.address == grown.address)
        return None if isinstance(pick.choose(room.need(more, turn), here), NoRoom) else following


def growing(chunk: int = 512, front_patient: int = 11) -> Arm:
    """Production's queue that sends prefixes, engines with a prefix cache.

    Args:
        chunk: Tokens that a prefix adds; whole blocks.
        front_patient: Batch requests that a replica of the front has at most.
    """
    if chunk < BLOCK or chunk % BLOCK:
        raise ValueError(f"growing takes whole blocks of {BLOCK} tokens, got {chunk}")
    return Arm(
        f"growing-{chunk}-{front_patient}",
        partial(Growing, chunk, Pack(front_patient=front_patient)),
        engine=lambda _lane, config: replace(config, enable_prefix_caching=True),
    )
