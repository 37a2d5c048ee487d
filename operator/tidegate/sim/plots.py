"""Plots of simulated runs, arms beside each other. Needs matplotlib (extra `demo`)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from tidegate.sim.build import classes
from tidegate.sim.cluster.plot import gpus
from tidegate.sim.contest import Outcome, sample_times
from tidegate.sim.scenario import Scenario

_COLOURS: Final = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
"""Classes, by priority; from the palette of Okabe and Ito (2008), made for colour-blind readers."""
_STYLES: Final = ("-", "--", ":", "-.")
"""Arms, where they share an axis."""
_GREY: Final = "#777777"
_DPI: Final = 120
_MOST_POINTS: Final = 4000
"""Of one class in a scatter: more are drawn over each other."""


def write(scenario: Scenario, outcomes: Sequence[Outcome], out: Path) -> list[Path]:
    """Write ttft-cdf.png, ttft-time.png, in-flight.png, tokens.png and, where planned, gpus.png.

    Returns their paths.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        return [
            _cdf(scenario, outcomes, out / "ttft-cdf.png"),
            _over_time(scenario, outcomes, out / "ttft-time.png"),
            _in_flight(scenario, outcomes, out / "in-flight.png"),
            _tokens(scenario, outcomes, out / "tokens.png"),
            *([_gpus(scenario, outcomes, out / "gpus.png")] if all(o.usage for o in outcomes) else []),
        ]


def _arms(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    result: dict[str, list[Outcome]] = {}
    for one in outcomes:
        result.setdefault(one.arm, []).append(one)
    return result


def _colours(scenario: Scenario) -> dict[str, str]:
    """A colour for each class, the highest first."""
    names = sorted(scenario.classes, key=lambda n: (-scenario.classes[n].priority, n))
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}


def _there(scenario: Scenario, outcomes: Sequence[Outcome]) -> list[str]:
    """Classes that have requests, the highest first."""
    return [name for name in _colours(scenario) if any(name in o.points for o in outcomes)]


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
    return path


def _cdf(scenario: Scenario, outcomes: Sequence[Outcome], path: Path) -> Path:
    """Which share of a class has its first token after so long; all seeds together."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import PercentFormatter

    figure, axis = plt.subplots(figsize=(8, 4.8), layout="constrained")
    colours, promised = _colours(scenario), classes(scenario)
    curves = []
    for style, (arm, mine) in zip(_cycle(), _arms(outcomes).items(), strict=False):
        for name in _there(scenario, outcomes):
            values = sorted(t for o in mine if name in o.points for t in o.points[name].judged_ttft_s)
            shown = [t for t in values if math.isfinite(t)]
            if shown:
                shares = [(i + 1) / len(values) for i in range(len(shown))]
                curves.append((shown, shares, style, colours[name], f"{name}, {arm}"))
    longest = max((shown[-1] for shown, *_ in curves), default=0.0)
    for shown, shares, style, colour, label in curves:
        # Drawn on to the right: where it stays below 100%, the rest never got a first token.
        ends = ([*shown, 1.3 * longest], [*shares, shares[-1]])
        axis.step(*ends, style, color=colour, label=label, where="post")
    for name in _there(scenario, outcomes):
        ttft_s = promised[name].objectives.ttft_s
        if ttft_s is not None:
            axis.axvline(ttft_s, color=colours[name], lw=0.8, alpha=0.6)
            axis.annotate(
                f" promised to {name}", (ttft_s, 0.02), color=colours[name], fontsize=8, va="bottom"
            )
    axis.set(
        xscale="log", xlabel="time to first token, seconds", ylabel="requests that have it", ylim=(0, 1.01)
    )
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    _seconds_axis(axis.xaxis)
    axis.grid(visible=True, which="major", color="#eeeeee")
    if curves:
        axis.legend(frameon=False, loc="upper left", fontsize=9)
    else:
        axis.text(0.5, 0.5, "no class is judged in so short a run", transform=axis.transAxes, ha="center")
    axis.set_title("Time to first token of the requests that are judged")
    return _save(figure, path)


def _cycle() -> Iterator[str]:
    while True:
        yield from _STYLES


def _seconds_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _over_time(scenario: Scenario, outcomes: Sequence[Outcome], path: Path) -> Path:
    """Every request of the first seed: when it came, and how long it waited."""
    figure, axes = _row(scenario, outcomes, height=4.4)
    colours, promised = _colours(scenario), classes(scenario)
    for axis, (arm, mine) in zip(axes, _arms(outcomes).items(), strict=True):
        for order, name in enumerate(_there(scenario, outcomes)):
            points = mine[0].points.get(name)
            if points is None:
                continue
            some = points.ttft[:: max(1, len(points.ttft) // _MOST_POINTS)]
            if some:
                axis.scatter(
                    *zip(*some, strict=True), s=7, lw=0, alpha=0.6, color=colours[name], label=name,
                    zorder=9 - order,
                )  # fmt: skip
            if points.turned_away_s:
                axis.plot(
                    points.turned_away_s, [1.0] * len(points.turned_away_s), "x", ms=5, color=colours[name],
                    transform=axis.get_xaxis_transform(), clip_on=False, label=f"{name}: refused or lost",
                )  # fmt: skip
            ttft_s = promised[name].objectives.ttft_s
            if ttft_s is not None:
                axis.axhline(ttft_s, color=colours[name], lw=0.8, ls="--")
        axis.set(yscale="log", title=arm)
        _seconds_axis(axis.yaxis)
        axis.grid(visible=True, which="major", color="#eeeeee")
    axes[0].set_ylabel("time to first token, seconds")
    _legend(figure, axes)
    figure.suptitle("Time to first token by arrival (dashed: promised; grey: warm-up, faults)")
    return _save(figure, path)


def _in_flight(scenario: Scenario, outcomes: Sequence[Outcome], path: Path) -> Path:
    """Requests in engines, classes on top of each other; the first seed."""
    figure, axes = _row(scenario, outcomes, height=4.0)
    colours, times = _colours(scenario), sample_times(scenario.seconds)
    names = _there(scenario, outcomes)
    for axis, (arm, mine) in zip(axes, _arms(outcomes).items(), strict=True):
        layers = [mine[0].points[n].in_flight if n in mine[0].points else [0] * len(times) for n in names]
        axis.stackplot(times, *layers, labels=names, colors=[colours[n] for n in names], alpha=0.85, lw=0)
        axis.set(title=arm)
    axes[0].set_ylabel("requests in engines")
    axes[0].set_ylim(bottom=0)
    _legend(figure, axes)
    figure.suptitle("Requests in flight by class")
    return _save(figure, path)


def _gpus(scenario: Scenario, outcomes: Sequence[Outcome], path: Path) -> Path:
    """Who had which GPUs; the first seed."""
    figure, axes = _row(scenario, outcomes, height=4.0)
    for axis, (arm, mine) in zip(axes, _arms(outcomes).items(), strict=True):
        usage = mine[0].usage
        if usage is not None:
            gpus(axis, usage, _colours(scenario))
        axis.set(title=arm)
    axes[0].set_ylabel("GPUs")
    _legend(figure, axes)
    figure.suptitle("GPUs by class (hatched: borrowed; pale: the replica starts)")
    return _save(figure, path)


def _row(scenario: Scenario, outcomes: Sequence[Outcome], height: float) -> tuple[Any, Any]:
    """One axis an arm, over time; what is not measured, and faults, in grey."""
    import matplotlib.pyplot as plt

    arms = _arms(outcomes)
    size = (min(16, 2.5 + 4.5 * len(arms)), height)
    figure, grid = plt.subplots(1, len(arms), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis in grid[0]:
        axis.set(xlabel="seconds", xlim=(0, scenario.seconds))
        axis.axvspan(0, scenario.warm_up.total_seconds(), color="#f0f0f0", zorder=0, lw=0)
        for fault in scenario.faults:
            begin, end = fault.start.total_seconds(), fault.end.total_seconds()
            axis.axvspan(begin, min(end, scenario.seconds), color="#e4e4e4", zorder=0, lw=0)
            axis.annotate(
                f" {fault.kind}", (begin, 0.99), xycoords=("data", "axes fraction"), color=_GREY, fontsize=8,
                va="top",
            )  # fmt: skip
    return figure, grid[0]


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    """One for all axes, below them; each name once."""
    found: Mapping[str, Any] = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if found:
        figure.legend(
            found.values(), found.keys(), loc="outside lower center", ncols=4, frameon=False, markerscale=1.8
        )


def _tokens(scenario: Scenario, outcomes: Sequence[Outcome], path: Path) -> Path:
    """What was computed for whom, a bar an arm; lines reach over the seeds."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import StrMethodFormatter

    colours, names, arms = _colours(scenario), _there(scenario, outcomes), _arms(outcomes)
    figure, axis = plt.subplots(figsize=(3 + 0.9 * len(arms) * len(names), 4.2), layout="constrained")
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        places = [arm + (index - (len(names) - 1) / 2) * width for arm in range(len(arms))]
        seen = [
            [o.rows[name, None]["tokens_per_s"] for o in mine if (name, None) in o.rows] or [0.0]
            for mine in arms.values()
        ]
        middles = [median(values) for values in seen]
        reach = [
            [m - min(values) for m, values in zip(middles, seen, strict=True)],
            [max(values) - m for m, values in zip(middles, seen, strict=True)],
        ]
        several = any(len(values) > 1 for values in seen)
        bars = axis.bar(
            places, middles, width * 0.92, color=colours[name], label=name,
            yerr=reach if several else None, ecolor="#333333", capsize=3,
        )  # fmt: skip
        axis.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=9)
    axis.set_xticks(range(len(arms)), list(arms))
    axis.set_ylabel("prompt and output tokens a second")
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.margins(y=0.12)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axis.set_title("Tokens computed by class")
    return _save(figure, path)
