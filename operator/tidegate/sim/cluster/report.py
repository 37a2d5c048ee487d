"""Who had the GPUs, over seeds: as JSON for programs, as a table for people."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tidegate.sim.cluster.usage import Usage

IDLE: Final = "(idle)"


def to_json(usages: Sequence[Usage]) -> dict[str, Any]:
    """Medians over seeds, and the timeline of the first."""
    plain = [u.to_json() for u in usages]
    seconds = [p["gpu_seconds"] for p in plain]
    names = sorted({n for p in plain for n in p["starts"]})

    def middle(kind: str, of: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        return {n: median(one[kind].get(n, 0) for one in of) for n in names}

    return {
        "gpu_seconds": {
            "idle": median(s["idle"] for s in seconds),
            **{kind: middle(kind, seconds) for kind in ("used", "borrowed", "starting")},
        },
        **{kind: middle(kind, plain) for kind in ("evictions", "thrown_away", "starts")},
        "timeline": plain[0]["timeline"],
    }


def table(by_arm: Mapping[str, Sequence[Usage]], order: Sequence[str]) -> Table:
    """A line for every arm and class, of medians: GPUs are means over the window."""
    found = Table(title="GPUs", title_justify="left", pad_edge=False, box=SIMPLE_HEAD)
    found.add_column("arm")
    found.add_column("class")
    for heading in (
        "GPUs",
        "of all",
        "borrowed",
        "starting",
        "pods started",
        "evicted",
        "tokens thrown away",
    ):
        found.add_column(heading, justify="right")
    for arm, usages in by_arm.items():
        plain = to_json(usages)
        span_s = usages[0].end_s - usages[0].begin_s
        seconds = plain["gpu_seconds"]
        total = sum(seconds["used"].values()) + seconds["idle"]
        shown = [name for name in order if name in seconds["used"]]
        for name in shown:
            means = [seconds[k][name] / span_s for k in ("used", "borrowed", "starting")]
            found.add_row(
                arm if name == shown[0] else "",
                name,
                f"{means[0]:.1f}",
                f"{100 * seconds['used'][name] / total:.0f}%",
                f"{means[1]:.1f}",
                f"{means[2]:.1f}",
                f"{plain['starts'][name]:,.0f}",
                f"{plain['evictions'][name]:,.0f}",
                f"{plain['thrown_away'][name]:,.0f}",
            )
        idle = seconds["idle"]
        found.add_row("", IDLE, f"{idle / span_s:.1f}", f"{100 * idle / total:.0f}%", end_section=True)
    return found
