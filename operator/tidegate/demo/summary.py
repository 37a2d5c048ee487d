"""The two arms beside each other: as JSON for programs, as a table for people."""

import math
from typing import Any

from rich.table import Table

from tidegate.demo.arms import Arm
from tidegate.demo.settings import CLASSES, LAG_LIMIT_MS, Settings
from tidegate.demo.view import seconds


def summarise(qos: Arm, fifo: Arm, settings: Settings, phases: dict[str, float]) -> dict[str, Any]:
    """Everything that the demo claims, counted by the client. Infinite percentiles are null."""
    lag = max(qos.lag_ms["max"], fifo.lag_ms["max"])
    return {
        "qos": _finite(qos.figures),
        "fifo": _finite(fifo.figures),
        **qos.actions,
        "backlog": settings.outstanding,
        "load_lag_ms": lag,
        "load_lag": {"qos": qos.lag_ms, "fifo": fifo.lag_ms},
        "claims": lag <= LAG_LIMIT_MS,
        "ratios": ratios(qos, fifo),
        "seconds": settings.seconds,
        "seed": settings.seed,
        "phase_seconds": {name: round(value, 1) for name, value in phases.items()},
    }


def ratios(qos: Arm, fifo: Arm) -> dict[str, float | None]:
    """With QoS over without: interactive p99 TTFT (lower is better), batch tokens a second."""
    return {
        "interactive_ttft_p99": _ratio(qos, fifo, "interactive", "ttft_p99_s"),
        "batch_tokens_per_s": _ratio(qos, fifo, "batch", "tokens_per_s"),
    }


def table(summary: dict[str, Any]) -> Table:
    """The summary for a terminal."""
    result = Table(title="The same load, with QoS and in arrival order", title_justify="left", pad_edge=False)
    result.add_column("class")
    result.add_column("")
    for heading in ("TTFT p50", "TTFT p99", "sent", "answered", "refused", "lost", "tokens/s"):
        result.add_column(heading, justify="right")
    for name in CLASSES:
        for arm, label in (("qos", "with QoS"), ("fifo", "without")):
            row = summary[arm].get(name)
            if row is None:
                continue
            counts = (f"{row[k]:.0f}" for k in ("requests_sent", "answered", "refused", "lost"))
            result.add_row(
                name if arm == "qos" else "",
                label,
                seconds(row["ttft_p50_s"]),
                seconds(row["ttft_p99_s"]),
                *counts,
                f"{row['tokens_per_s']:.0f}",
                end_section=arm == "fifo",
            )
    return result


def verdict(summary: dict[str, Any]) -> list[str]:
    """What may be said of this run, in plain sentences."""
    if not summary["claims"]:
        late = f"up to {summary['load_lag_ms']:.0f} ms late (limit {LAG_LIMIT_MS:.0f} ms)"
        return [f"The load generator was {late}: the machine was too busy, and this run claims nothing."]
    ttft, tokens = (summary["ratios"][k] for k in ("interactive_ttft_p99", "batch_tokens_per_s"))
    lost = sum(int(c["lost"]) for arm in ("qos", "fifo") for c in summary[arm].values())
    said = []
    if ttft is not None:
        said.append(f"Interactive p99 TTFT with QoS is {ttft:.2f} of that without.")
    if tokens is not None:
        said.append(f"Batch kept {100 * tokens:.0f}% of its tokens.")
    said.append("No request was lost." if not lost else f"{lost} requests were lost.")
    said.append(
        f"The operator made {summary['borrows']} borrows, {summary['reclaims']} reclaims "
        f"and {summary['rebalances']} rebalances."
    )
    return said


def _ratio(qos: Arm, fifo: Arm, name: str, figure: str) -> float | None:
    over, under = (arm.figures.get(name, {}).get(figure) for arm in (qos, fifo))
    if not over or not under or math.isinf(over) or math.isinf(under):
        return None
    return round(over / under, 3)


def _finite(figures: dict[str, dict[str, float]]) -> dict[str, dict[str, float | None]]:
    return {name: {k: v if _is_finite(v) else None for k, v in row.items()} for name, row in figures.items()}


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
