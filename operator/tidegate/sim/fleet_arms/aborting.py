"""Production's queue, and batch that is taken back from the front when people would wait for it everywhere.

A batch request that does not stream can be aborted and queued again: its client sees nothing of it, and
what was computed of it is lost. What the engine has launched runs to its end all the same.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from tidegate.core.flow import Flow
from tidegate.core.flowtypes import Ask, Dispatch, Ended, Pack, Policy
from tidegate.sim.router import Arm
from tidegate.sim.types import EngineConfig

_STEPS_UNDER_WAY: Final = 1.5
"""With async scheduling: the rest of one, half of it on average, and the one behind it."""
_LEAST_S: Final = 0.03
"""Less than this is not worth a prompt that was begun."""
_MOST: Final = 3
"""Who was aborted so often is left alone: it would never be done."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A batch prompt at an endpoint of the front.

    Attributes:
        request: Whose it is.
        left_s: How long until it is computed.
        takes_s: How long that takes in all.
        step_s: How long one step of it takes.
        aborted: How often it was aborted before.
    """

    request: int
    left_s: float
    takes_s: float
    step_s: float
    aborted: int = 0

    @property
    def stays_s(self) -> float:
        """What an abort does not save: the steps that are under way, none before it was begun."""
        return 0.0 if self.left_s >= self.takes_s else min(self.left_s, _STEPS_UNDER_WAY * self.step_s)

    @property
    def lost_s(self) -> float:
        """What an abort throws away."""
        return max(0.0, self.takes_s - self.left_s) + self.stays_s


def recalled(front: Mapping[str, Sequence[Prompt]]) -> list[int]:
    """Which batch prompts to abort for somebody who comes now; `front` holds them by endpoint.

    None while an endpoint has none, or nearly: who comes goes there. Else those of one endpoint, where the
    least is thrown away for it.
    """
    if not front:
        return []
    worth: list[tuple[float, str]] = []
    for address, prompts in front.items():
        saved_s = max((p.left_s for p in prompts), default=0.0) - max(
            (p.stays_s for p in prompts), default=0.0
        )
        if max((p.left_s for p in prompts), default=0.0) < _LEAST_S:
            return []
        if saved_s >= _LEAST_S and all(p.aborted < _MOST for p in prompts):
            worth.append((sum(p.lost_s for p in prompts), address))
    return [p.request for p in front[min(worth)[1]]] if worth else []


class Aborting(Flow):
    """`Flow` that takes back what it has sent."""

    def __init__(self, pack: Pack, step_tokens: int) -> None:
        super().__init__(Policy(pack=pack))
        self._step_tokens = step_tokens
        # Patient prompts by endpoint: when each is computed, and what it takes.
        self._prompts: dict[str, dict[int, tuple[float, float, int]]] = {}
        self._aborted: Counter[int] = Counter()

    def recall(self, now: float) -> list[tuple[Ask, str]]:
        """Whom to abort for the first of the urgent ones that wait, see `recalled`; else as `Flow` does."""
        running = self._room.running
        going = [(running[n].ask, running[n].address) for n in self._for_the_first(now)]
        return going or super().recall(now)

    def _for_the_first(self, now: float) -> list[int]:
        for (model, _), line in self._lines.items():
            head = line.head()
            if head is None or not self._room.urgent(head.ask):
                continue
            front = [load.address for load in self._room.fronted(model, now)]
            if any(not self._prompts.get(address) for address in front):
                continue
            going = recalled({address: self._waited_for(address, now) for address in front})
            self._aborted.update(going)
            if going:
                return going
        return []

    def dispatch(self, now: float) -> list[Dispatch]:
        """See `Flow`; and note where patient prompts went."""
        sent = super().dispatch(now)
        for each in sent:
            if self._room.running[each.ask.id].patient and not each.ask.streamed:
                forecast = self._room.loads[each.address].forecast
                note = (
                    forecast.turn_at(0.0),
                    forecast.prefill_s(each.ask.prompt_tokens),
                    each.ask.prompt_tokens,
                )
                self._prompts.setdefault(each.address, {})[each.ask.id] = note
        return sent

    def finish(self, request: int, now: float, *, whole: bool = True) -> Ended | None:
        """See `Flow`."""
        running = self._room.running.get(request)
        if running is not None:
            self._prompts.get(running.address, {}).pop(request, None)
            if whole:
                self._aborted.pop(request, None)
        return super().finish(request, now, whole=whole)

    def _waited_for(self, address: str, now: float) -> list[Prompt]:
        """The patient prompts at an endpoint that are not computed yet; forgets the others."""
        mine = self._prompts[address] = {
            request: note for request, note in self._prompts[address].items() if note[0] > now
        }
        forecast = self._room.loads[address].forecast
        return [
            Prompt(
                request,
                done - now,
                takes_s,
                forecast.prefill_s(min(self._step_tokens, tokens)),
                self._aborted[request],
            )
            for request, (done, takes_s, tokens) in mine.items()
        ]


def aborting(step_tokens: int = 2552, short_ms: int = 120) -> Arm:
    """Production's queue that aborts, engines with steps of so many tokens.

    Args:
        step_tokens: The engines' `max_num_batched_tokens`.
        short_ms: The longest that a batch prompt on the front may take, milliseconds.
    """
    pack, engine = _settings(step_tokens, short_ms)
    return Arm(f"aborting-{step_tokens}-{short_ms}", lambda: Aborting(pack, step_tokens), engine=engine)


def steps(step_tokens: int = 2552, short_ms: int = 120) -> Arm:
    """The same without aborting: what it is to be seen beside."""
    pack, engine = _settings(step_tokens, short_ms)
    return Arm(f"steps-{step_tokens}-{short_ms}", lambda: Flow(Policy(pack=pack)), engine=engine)


def _settings(step_tokens: int, short_ms: int) -> tuple[Pack, Callable[[str, EngineConfig], EngineConfig]]:
    if step_tokens < 1 or short_ms < 1:
        raise ValueError(f"it takes tokens and milliseconds above 0, got {step_tokens} and {short_ms}")
    pack = Pack(short_s=short_ms / 1000)
    return pack, lambda _lane, config: replace(config, max_num_batched_tokens=step_tokens)
