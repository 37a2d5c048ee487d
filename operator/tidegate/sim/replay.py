"""Replays a decision log: the calls that a live queue got, given to a fresh one of this program.

The queue is `core.flow.Flow`, which the picker runs and the simulator drives, and nothing of it is
made up here. So equal answers say that what is simulated decides as what served did.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tidegate.adapters.decisions import (
    AdmitCall,
    Answer,
    Call,
    DecisionsError,
    DispatchCall,
    ExpireCall,
    FinishCall,
    MeasuredCall,
    RecallCall,
    ReportCall,
    ServedCall,
    SetWorldCall,
    decode,
    decode_header,
)
from tidegate.core.flow import Flow, Policy

_KEPT: Final = 10
"""Differences that are kept: what follows the first is mostly its consequence."""


class LogError(Exception):
    """The log cannot be replayed; `line` counts from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(f"line {line}: {message}")
        self.line = line


@dataclass(frozen=True, slots=True)
class Difference:
    """A call that was answered otherwise.

    `expected` is the log's answer, `got` the replay's. Of a list, `nth` counts from 0 to the first
    entry that differs, and these are the entries, None where one list has ended. `raised`: the
    queue failed, and replay ended there.
    """

    line: int
    call: str
    expected: Any
    got: Any
    nth: int | None = None
    raised: bool = False


@dataclass(frozen=True, slots=True)
class Replayed:
    """What came of a log.

    `calls` were replayed, and the answer of each compared. `decisions` counts what the live queue
    decided in them: requests admitted, refused, dispatched, expired, recalled, ended. A round in which nobody
    went is compared as well, but not counted. `cut` is the number of an unfinished last line.
    """

    policy: Policy
    calls: int
    decisions: Mapping[str, int]
    different: int
    differences: tuple[Difference, ...]
    cut: int | None = None

    @property
    def compared(self) -> int:
        """Decisions of all kinds."""
        return sum(self.decisions.values())

    @property
    def first(self) -> Difference | None:
        """The first difference, the one to look at."""
        return next(iter(self.differences), None)


def replay(lines: Iterable[bytes]) -> Replayed:
    """Give a log's calls to a fresh Flow, one by one, and compare every answer.

    Args:
        lines: As a binary file yields them, with their ends.

    Raises:
        LogError: A line cannot be read. One that has no end because the picker was killed can only
            be the last, and is left out instead.
    """
    reading = _Reading(lines)
    flow = Flow(reading.policy)
    decisions: Counter[str] = Counter(admitted=0, refused=0, dispatched=0, expired=0, recalled=0, ended=0)
    calls = different = 0
    kept: list[Difference] = []
    for line, call in reading:
        calls += 1
        decisions.update(_decided(call))
        found = _compare(flow, line, call)
        if found is None:
            continue
        different += 1
        if len(kept) < _KEPT:
            kept.append(found)
        if found.raised:
            break
    return Replayed(reading.policy, calls, dict(decisions), different, tuple(kept), reading.cut)


class _Reading:
    """The calls of a log with the numbers of their lines. `cut` is known at the end."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._lines = enumerate(lines, 1)
        self.cut: int | None = None
        number, first = next(self._lines, (1, b""))
        try:
            self.policy = decode_header(first)
        except DecisionsError as error:
            raise LogError(number, "the log is empty" if not first else str(error)) from error

    def __iter__(self) -> Iterator[tuple[int, Call]]:
        for number, line in self._lines:
            try:
                call = decode(line)
            except DecisionsError as error:
                if line.endswith(b"\n") or next(self._lines, None) is not None:
                    raise LogError(number, str(error)) from error
                self.cut = number
                return
            yield number, call


def _compare(flow: Flow, line: int, call: Call) -> Difference | None:
    try:
        got = _tell(flow, call)
    except Exception as error:
        # A log that was not changed by hand cannot bring this about; one that was must not end replay badly.
        return Difference(line, call.call, call.answer, f"raised {error!r}", raised=True)
    if got == call.answer:
        return None
    if isinstance(got, tuple) and isinstance(call.answer, tuple):
        pairs = itertools.zip_longest(call.answer, got)
        nth, (expected, instead) = next((n, p) for n, p in enumerate(pairs) if p[0] != p[1])
        return Difference(line, call.call, expected, instead, nth)
    return Difference(line, call.call, call.answer, got)


def _tell(flow: Flow, call: Call) -> Answer:
    """Make the call; lists come back as tuples, as the log has them."""
    match call:
        case SetWorldCall():
            classes, models = {c.name: c for c in call.classes}, {m.key: m for m in call.models}
            flow.set_world(classes, models, call.endpoints, call.now)
        case ReportCall():
            flow.report(call.address, call.report, call.own_before, call.own_tokens_before)
        case AdmitCall():
            return flow.admit(call.ask, call.now)
        case FinishCall():
            return flow.finish(call.request, call.now, whole=call.whole)
        case MeasuredCall():
            flow.measured(call.request, call.prompt_tokens, call.output_tokens)
        case ServedCall():
            return flow.served(call.request, call.address, call.now)
        case _:
            return _list(flow, call)
    return None


def _list(flow: Flow, call: DispatchCall | ExpireCall | RecallCall) -> Answer:
    match call:
        case DispatchCall():
            return tuple(flow.dispatch(call.now))
        case ExpireCall():
            return tuple(flow.expire(call.now))
        case RecallCall():
            return tuple(flow.recall(call.now))


def _decided(call: Call) -> dict[str, int]:
    """How many decisions an answer holds, by kind."""
    match call:
        case AdmitCall(answer=answer):
            return {"admitted" if answer is None else "refused": 1}
        case DispatchCall(answer=sent):
            return {"dispatched": len(sent)}
        case ExpireCall(answer=gone):
            return {"expired": len(gone)}
        case RecallCall(answer=taken):
            return {"recalled": len(taken)}
        case FinishCall(answer=ended) if ended is not None:
            return {"ended": 1}
    return {}
