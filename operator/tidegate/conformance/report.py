"""Results as text and as JSON. Pure."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tidegate.conformance.rules import Level, Rule
from tidegate.conformance.run import Result, Verdict

_MARKS = {Verdict.KEPT: "ok", Verdict.BROKEN: "BROKEN", Verdict.NOT_RUN: "not run"}


def line(result: Result) -> str:
    """One result as a line or two."""
    mark = _MARKS[result.verdict]
    if result.verdict is Verdict.BROKEN and result.rule.level is Level.SHOULD:
        mark = "advice"
    text = f"{mark:<8}{result.rule.level:<7}{result.rule.id}"
    return text if not result.message else f"{text}\n{'':15}{result.rule.text}\n{'':15}→ {result.message}"


def summary(results: Sequence[Result]) -> str:
    """What it comes to."""
    count = Counter(r.verdict for r in results)
    failed = [r.rule.id for r in results if r.failed]
    advice = count[Verdict.BROKEN] - len(failed)
    parts = [f"{count[Verdict.KEPT]} rules kept"]
    if advice:
        parts.append(f"{advice} SHOULD not kept")
    if count[Verdict.NOT_RUN]:
        parts.append(f"{count[Verdict.NOT_RUN]} not run")
    if failed:
        parts.append(f"{len(failed)} MUST broken: {', '.join(failed)}")
    return "; ".join(parts)


def as_object(address: str, results: Sequence[Result]) -> dict[str, Any]:
    """All of it for programs."""
    return {
        "address": address,
        "conforms": not any(r.failed for r in results),
        "rules": [
            {
                **describe(r.rule),
                "verdict": r.verdict.value,
                "message": r.message,
                "seconds": round(r.seconds, 3),
            }
            for r in results
        ],
    }


def describe(rule: Rule) -> dict[str, str]:
    """A rule for programs."""
    return {"id": rule.id, "level": rule.level.value, "text": rule.text, "source": rule.source}
