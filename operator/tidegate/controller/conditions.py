"""Conditions as kstatus and Argo CD read them, kept steady. Pure."""

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

Object = dict[str, Any]

MESSAGE_LIMIT: Final = 4000

_IDLE: Final = {
    "ready": "nothing is under way: what the spec asks for is there",
    "blocked": "nothing is under way: see Ready for what is in the way",
    "stalled": "nothing is under way: see Stalled for what must change",
}
"""Why an object is not reconciling, by its state."""
_GOES_ON: Final = {"ready": "nothing is in the way", "working": "it is under way"}
_RETRY: Final = "tried again; a change elsewhere may help"


class Verdict(NamedTuple):
    """How an object stands. `state`: ready, working, blocked (a retry may help) or stalled (none will)."""

    state: str
    reason: str
    message: str


class Extra(NamedTuple):
    """A condition that is there only while it is so."""

    type: str
    reason: str
    message: str


def conditions(
    verdict: Verdict, extras: Iterable[Extra], old: Iterable[Mapping[str, Any]], generation: int, now: str
) -> list[Object]:
    """Ready, Reconciling and Stalled, and what else is so; times change only with a status.

    While working Ready is Unknown and Reconciling True; Ready is False only when blocked; Stalled
    is True when no retry will help.

    Args:
        verdict: The summary.
        extras: Conditions beyond the three, True while present.
        old: The object's conditions as they are.
        generation: The metadata.generation that was decided from.
        now: RFC 3339, for what changes.
    """
    state, reason, message = verdict
    ready = {"ready": "True", "working": "Unknown"}.get(state, "False")
    working, stalled = state == "working", state == "stalled"
    wanted = [
        ("Ready", ready, reason, message),
        ("Reconciling", str(working), reason, message if working else _IDLE[state]),
        ("Stalled", str(stalled), reason, message if stalled else _GOES_ON.get(state, _RETRY)),
        *((e.type, "True", e.reason, e.message) for e in sorted(extras)),
    ]
    before = {c.get("type"): c for c in old}
    result = []
    for kind, status, why, text in wanted:
        known = before.get(kind)
        same = known is not None and known.get("status") == status
        since = known.get("lastTransitionTime", now) if known and same else now
        result.append(
            {
                "type": kind,
                "status": status,
                "observedGeneration": generation,
                "lastTransitionTime": since,
                "reason": why,
                "message": text[:MESSAGE_LIMIT],
            }
        )
    return result


def changed(old: Iterable[Mapping[str, Any]], new: Iterable[Mapping[str, Any]]) -> list[Object]:
    """Conditions whose status or reason is new, Ready first; those that are worth an event."""
    before = {c.get("type"): (c.get("status"), c.get("reason")) for c in old}
    found = [dict(c) for c in new if before.get(c["type"]) != (c["status"], c["reason"])]
    return [c for c in found if c["type"] not in ("Reconciling", "Stalled")]
