"""A frame as a table for a terminal, and as a line where there is none."""

import math
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tidegate.demo.facts import Frame
from tidegate.demo.settings import CLASSES

_OBJECTIVE = {"interactive": "1 s + 0.1 s/1k", "standard": "60 s to the end", "batch": "24 h to the end"}
_STYLE = {"borrow": "yellow", "reclaim": "magenta", "rebalance": "cyan", "scale": "green", "blocked": "red"}


def render(title: str, frame: Frame, seconds: float) -> RenderableType:
    """The live view: classes, GPUs, and what the operator just did and why."""
    return Group(_classes(title, frame, seconds), _decisions(frame))


def line(title: str, frame: Frame) -> str:
    """The same in one line, for logs."""
    parts = [f"{title} {frame.t:5.0f} s"]
    for name in CLASSES:
        seen = frame.load.get(name, {})
        used = frame.class_gpus.get(name, {}).get("used", 0)
        parts.append(
            f"{name}: {seen.get('sent_per_s') or 0:.1f}/s, p99 {seconds(seen.get('ttft_p99_s'))}, "
            f"queue {frame.queue.get(name, 0):.0f}, {used:.0f} GPUs"
        )
    parts.append(f"idle {frame.gpus.get('idle', 0):.0f}")
    return " · ".join(parts)


def seconds(value: Any) -> str:
    """A duration for people: `0.31 s`, `42 s`, or `–` where there is none."""
    if value is None or math.isnan(value) or math.isinf(value):
        return "–"
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"


def _classes(title: str, frame: Frame, length: float) -> RenderableType:
    table = Table(
        title=f"{title} · {frame.t:.0f} of {length:.0f} s",
        title_justify="left",
        title_style="bold",
        expand=True,
        pad_edge=False,
    )
    table.add_column("class")
    headings = (
        "requests/s",
        "queue",
        "TTFT p50",
        "p99",
        "objective",
        "tokens/s",
        "reserved",
        "used",
        "borrowed",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for name in CLASSES:
        seen, gpus = frame.load.get(name, {}), frame.class_gpus.get(name, {})
        table.add_row(
            name,
            f"{seen.get('sent_per_s') or 0:.1f}",
            f"{frame.queue.get(name, 0):.0f}",
            seconds(seen.get("ttft_p50_s")),
            seconds(seen.get("ttft_p99_s")),
            _OBJECTIVE[name],
            f"{seen.get('tokens_per_s') or 0:.0f}",
            f"{frame.reserved.get(name, 0):.0f}",
            f"{gpus.get('used', 0):.0f}",
            f"{gpus.get('borrowed', 0):.0f}",
        )
    capacity, idle = frame.gpus.get("capacity", 0), frame.gpus.get("idle", 0)
    table.caption = f"GPUs: {capacity:.0f}, idle {idle:.0f} · " + " · ".join(
        f"{name} {count:.0f}" for name, count in frame.actions.items()
    )
    table.caption_justify = "left"
    return table


def _decisions(frame: Frame, most: int = 8) -> RenderableType:
    text = Text()
    for decision in frame.decisions[-most:]:
        kind = decision.get("kind", "")
        text.append(f"{kind:<10}", style=_STYLE.get(kind, ""))
        text.append(
            f"{decision.get('object', '')}  {decision.get('reason', '')}: {decision.get('message', '')}\n"
        )
    text.rstrip()
    return Panel(text, title="what the operator did, and why", title_align="left", height=most + 2)
