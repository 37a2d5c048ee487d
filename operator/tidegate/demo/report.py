"""Plots of the two arms, as PNG and in one HTML page that needs nothing else."""

import base64
import html
from pathlib import Path
from typing import Any

from tidegate.demo.arms import Arm
from tidegate.demo.settings import CLASSES, Settings

_COLOUR = {"interactive": "#0072b2", "standard": "#009e73", "batch": "#e69f00", "idle": "#d9d9d9"}
"""From the palette of Okabe and Ito (2008), which colour-blind readers can tell apart."""
_TITLES = {"qos": "with QoS", "fifo": "in arrival order"}


def write(arms: list[Arm], summary: dict[str, Any], settings: Settings) -> list[Path]:
    """Write ttft.png, gpus.png and report.html; returns their paths."""
    import matplotlib as mpl

    mpl.use("Agg")
    out = settings.out
    plots = [_ttft(arms, settings, out / "ttft.png"), _gpus(arms, settings, out / "gpus.png")]
    page = out / "report.html"
    page.write_text(_page(arms, summary, plots))
    return [*plots, page]


def _ttft(arms: list[Arm], settings: Settings, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(arms), figsize=(11, 4), sharey=True, layout="constrained")
    for axis, arm in zip(axes, arms, strict=True):
        for name in ("standard", "interactive"):
            points = [
                (r["scheduled_s"], r["first_token_s"] - r["scheduled_s"])
                for r in arm.requests
                if r["qos_class"] == name and r["first_token_s"] is not None
            ]
            if points:
                axis.scatter(*zip(*points, strict=True), s=6, color=_COLOUR[name], label=name)
        axis.axhline(1.0, color="#999", lw=0.8, ls="--")
        axis.axvspan(settings.calm_s, settings.calm_s + settings.rush_s, color="#f2f2f2", zorder=0)
        axis.set(title=_TITLES[arm.name], yscale="log", xlabel="seconds", xlim=(0, settings.seconds))
        axis.grid(visible=True, which="major", color="#eee")
    axes[0].set_ylabel("time to first token, seconds")
    axes[0].legend(loc="upper left", frameon=False)
    figure.suptitle("Time to first token (grey: the rush; dashed: the objective)")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _gpus(arms: list[Arm], settings: Settings, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(arms), figsize=(11, 3.6), sharey=True, layout="constrained")
    for axis, arm in zip(axes, arms, strict=True):
        frames = [f for f in arm.frames if f.gpus]
        layers = [[f.class_gpus.get(c, {}).get("used", 0.0) for f in frames] for c in CLASSES]
        layers.append([f.gpus.get("idle", 0.0) for f in frames])
        names = [*CLASSES, "idle"]
        times = [f.t for f in frames]
        axis.stackplot(times, *layers, labels=names, colors=[_COLOUR[n] for n in names], step="post")
        axis.axvspan(settings.calm_s, settings.calm_s + settings.rush_s, fill=False, ec="#777", ls=":")
        axis.set(title=_TITLES[arm.name], xlabel="seconds", xlim=(0, settings.seconds))
    axes[0].set_ylabel("GPUs")
    axes[0].legend(loc="lower left", ncols=4, fontsize=8)
    figure.suptitle("GPUs by class (dotted: the rush)")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _page(arms: list[Arm], summary: dict[str, Any], plots: list[Path]) -> str:
    from tidegate.demo.summary import verdict

    images = "".join(
        f'<img alt="{p.stem}" src="data:image/png;base64,{base64.b64encode(p.read_bytes()).decode()}">'
        for p in plots
    )
    said = "".join(f"<li>{html.escape(s)}</li>" for s in verdict(summary))
    return _TEMPLATE.format(
        said=said,
        images=images,
        rows="".join(_row(arm, name, summary) for name in CLASSES for arm in ("qos", "fifo")),
        decisions="".join(_decision(d) for a in arms if a.name == "qos" for d in a.decisions),
        seconds=f"{summary['seconds']:.0f}",
        lag=f"{summary['load_lag_ms']:.1f}",
    )


def _row(arm: str, name: str, summary: dict[str, Any]) -> str:
    row = summary[arm].get(name)
    if row is None:
        return ""
    figures = ("ttft_p50_s", "ttft_p99_s", "requests_sent", "answered", "refused", "lost", "tokens_per_s")
    cells = "".join(f"<td>{'–' if row[f] is None else f'{row[f]:.4g}'}</td>" for f in figures)
    return f"<tr><td>{name}</td><td>{_TITLES[arm]}</td>{cells}</tr>"


def _decision(decision: dict[str, Any]) -> str:
    cells = "".join(f"<td>{html.escape(str(decision.get(k, '')))}</td>" for k in ("kind", "object", "reason"))
    return f"<tr>{cells}<td class=text>{html.escape(str(decision.get('message', '')))}</td></tr>"


_TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Tidegate: one load, with QoS and without</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem; color: #222 }}
img {{ width: 100%; margin: 1rem 0 }}
table {{ border-collapse: collapse; font-size: .9rem }}
td, th {{ padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: right }}
td:nth-child(-n+2), td.text, th {{ text-align: left }}
</style>
<h1>One load, with QoS and in arrival order</h1>
<ul>{said}</ul>
<table>
<tr><th>class<th><th>TTFT p50 (s)<th>p99 (s)<th>sent<th>answered<th>refused<th>lost<th>tokens/s</tr>
{rows}</table>
{images}
<h2>What the operator did, and why (with QoS)</h2>
<table><tr><th>kind<th>object<th>reason<th>message</tr>{decisions}</table>
<p>Both arms: the same requests at the same times for {seconds} s, the same engines, plan and backlog.
Without QoS there is one queue a model in arrival order, equal priority in the engine, and no headroom.
All figures were counted by the client; it was at most {lag} ms late.</p>
</html>
"""
