"""The form that every benchmark writes: `out/bench/NAME.json`, a list of figures."""

import json
import sys
from pathlib import Path
from statistics import median
from typing import TypedDict

FOLDER = Path("out/bench")


class Row(TypedDict):
    """One figure. `met` is None where there is no target, or where a quick run claims nothing."""

    figure: str
    value: float
    unit: str
    spread: str
    target: str
    met: bool | None
    command: str


def row(
    figure: str,
    samples: list[float],
    unit: str,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    between: tuple[float, float] | None = None,
    claims: bool = True,
) -> Row:
    """The median of some samples with their range, held against a target.

    Args:
        figure: what was measured.
        samples: at least one.
        unit: of the samples and the target.
        at_most: the target, where less is better.
        at_least: the target, where more is better.
        between: the target, where being near is what counts: (least, most).
        claims: False for a quick run, which shows that it runs and claims nothing.
    """
    value = median(samples)
    met: bool | None = None
    target = ""
    if at_most is not None:
        target, met = f"≤ {at_most:g}", value <= at_most
    if at_least is not None:
        target, met = f"≥ {at_least:g}", value >= at_least
    if between is not None:
        target, met = f"{between[0]:.4g}–{between[1]:.4g}", between[0] <= value <= between[1]
    return Row(
        figure=figure,
        value=round(value, 4),
        unit=unit,
        spread=f"{min(samples):.4g}–{max(samples):.4g} of {len(samples)}",
        target=target,
        met=met if claims else None,
        command=" ".join(["python", *sys.argv]),
    )


def record(name: str, rows: list[Row], folder: Path = FOLDER) -> Path:
    """Write the figures of one benchmark, print them, and say where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    marks = {True: "met", False: "MISSED", None: "no claim"}
    for r in rows:
        print(f"{r['figure']}: {r['value']} {r['unit']} ({r['spread']}) {r['target']} {marks[r['met']]}")
    print(path)
    return path
