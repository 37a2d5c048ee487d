"""Outcomes of several seeds together: as JSON for programs, as tables for people."""

import math
from collections.abc import Iterable, Sequence
from datetime import timedelta
from statistics import median
from typing import Any, Final, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tidegate.api.common import format_duration
from tidegate.sim.build import classes
from tidegate.sim.cluster import report
from tidegate.sim.cluster.build import problems
from tidegate.sim.cluster.usage import Usage
from tidegate.sim.contest import FIGURES, TOTALS, Outcome, promises_nothing
from tidegate.sim.records import deadline_s
from tidegate.sim.scenario import Scenario
from tidegate.sim.whatif import gpus

_COUNTS: Final = ("requests", "answered", "refused", "lost", "judged")
"""Figures whose range a table leaves out: there is no room, and the rates tell the same."""


class Spread(NamedTuple):
    """A figure over seeds. Infinite: more requests than the percentile leaves out never got there."""

    median: float
    least: float
    most: float

    def to_json(self) -> dict[str, float | None]:
        """Plain values; what is infinite or was not judged is null."""
        return {k: v if math.isfinite(v) else None for k, v in self._asdict().items()}


def spread(values: Iterable[float]) -> Spread:
    """Median and range; NaN where nothing was judged in any seed."""
    known = [v for v in values if not math.isnan(v)]
    return Spread(median(known), min(known), max(known)) if known else Spread(*3 * (math.nan,))


def summarise(scenario: Scenario, outcomes: Sequence[Outcome], *, whole: bool) -> dict[str, Any]:
    """Everything that was found, as plain values; times are seconds."""
    return {
        "seconds": scenario.seconds,
        "warm_up_s": scenario.warm_up.total_seconds(),
        "replicas": sum(g.count for g in scenario.replicas),
        "gpus": gpus(scenario),
        "complete": whole,
        "arms": {arm: _arm([o for o in outcomes if o.arm == arm]) for arm in _arms(outcomes)},
        "notes": [*scenario.notes, *problems(scenario), *unjudged(scenario)],
    }


def _arm(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "seeds": [o.seed for o in outcomes],
        **{name: spread(o.totals[name] for o in outcomes).to_json() for name in TOTALS},
        "classes": [
            {"qos_class": name, "tenant": tenant} | {figure: value.to_json() for figure, value in row.items()}
            for (name, tenant), row in _rows(outcomes).items()
        ],
        **({"gpus": report.to_json(usages)} if (usages := _usages(outcomes)) else {}),
    }


def _usages(outcomes: Iterable[Outcome]) -> list[Usage]:
    """Who had the GPUs, by seed; nothing where replicas were fixed."""
    return [o.usage for o in outcomes if o.usage is not None]


def _arms(outcomes: Iterable[Outcome]) -> list[str]:
    return list(dict.fromkeys(o.arm for o in outcomes))


def _rows(outcomes: Sequence[Outcome]) -> dict[tuple[str, str | None], dict[str, Spread]]:
    keys = dict.fromkeys(key for o in outcomes for key in o.rows)
    return {
        key: {figure: spread(o.rows[key][figure] for o in outcomes if key in o.rows) for figure in FIGURES}
        for key in keys
    }


def unjudged(scenario: Scenario) -> list[str]:
    """Sentences on classes of which this run cannot say whether promises are kept."""
    measured_s = scenario.seconds - scenario.warm_up.total_seconds()
    used = {s.qos_class for s in scenario.streams}
    sentences = []
    for name, found in classes(scenario).items():
        need_s = deadline_s(found.objectives)
        if name not in used and None not in used:
            continue
        if promises_nothing(found.objectives):
            sentences.append(f"class {name} is counted and not judged: it promises nothing")
        elif need_s >= measured_s:
            sentences.append(
                f"class {name} is counted and not judged: a request may take {_duration(need_s)} and keep its"
                f" promise, and only {_duration(measured_s)} are measured"
            )
    return sentences


def _duration(seconds: float) -> str:
    return format_duration(timedelta(seconds=seconds))


# ── for people ──────────────────────────────────────────────────────────────────────────────────


def tables(scenario: Scenario, outcomes: Sequence[Outcome]) -> RenderableType:
    """What every class and tenant got, arm under arm, what every arm did, and who had the GPUs."""
    found: list[RenderableType] = [_by_class(scenario, outcomes), _by_arm(scenario, outcomes)]
    by_arm = {arm: _usages(o for o in outcomes if o.arm == arm) for arm in _arms(outcomes)}
    if all(by_arm.values()):
        found.append(report.table(by_arm, sorted(scenario.classes, key=lambda n: _order(scenario, n))))
    return Group(*found)


def _by_class(scenario: Scenario, outcomes: Sequence[Outcome]) -> Table:
    seeds = len({o.seed for o in outcomes})
    title = f"{scenario.seconds:g} s, of which {scenario.warm_up.total_seconds():g} s to warm up"
    if seeds > 1:
        title += f"; medians of {seeds} seeds, and their range"
    rows = {arm: _rows([o for o in outcomes if o.arm == arm]) for arm in _arms(outcomes)}
    keys = {key for by_key in rows.values() for key in by_key}
    tenants = any(tenant is not None for _, tenant in keys)
    table = Table(title=title, title_justify="left", pad_edge=False, box=SIMPLE_HEAD)
    table.add_column("class")
    if tenants:
        table.add_column("tenant")
    table.add_column("arm")
    for heading in ("requests", "answered", "refused", "lost", "judged", "attained"):
        table.add_column(heading, justify="right")
    for heading in ("TTFT p50, s", "p99, s", "TPOT p50, ms", "p99, ms", "tokens/s"):
        table.add_column(heading, justify="right")
    for key in sorted(keys, key=lambda k: (_order(scenario, k[0]), k[1] or "")):
        here = [arm for arm in rows if key in rows[arm]]
        for arm in here:
            names = [key[0]] + ([key[1] if key[1] is not None else "all"] if tenants else [])
            shown = names if arm == here[0] else [""] * len(names)
            table.add_row(*shown, arm, *_cells(rows[arm][key], ranged=seeds > 1), end_section=arm == here[-1])
    return table


def _order(scenario: Scenario, qos_class: str) -> tuple[int, str]:
    return (-scenario.classes[qos_class].priority, qos_class)


def _cells(row: dict[str, Spread], *, ranged: bool) -> Iterable[Text]:
    for name in FIGURES:
        value = row[name]
        text = Text(_shown(name, value.median))
        least, most = _shown(name, value.least), _shown(name, value.most)
        if ranged and name not in _COUNTS and least != most:
            text.append(f"\n{least}–{most}", style="dim")
        yield text


def _shown(figure: str, value: float) -> str:
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    if figure == "attainment":
        return f"{100 * value:.1f}%"
    if figure.startswith("tpot"):
        return f"{1000 * value:.0f}"
    if figure.startswith("ttft"):
        return f"{value:.2f}" if value < 10 else f"{value:.0f}"
    return f"{value:,.0f}"


def _by_arm(scenario: Scenario, outcomes: Sequence[Outcome]) -> Table:
    table = Table(pad_edge=False, box=SIMPLE_HEAD)
    table.add_column("arm")
    headings = ("seeds", "preemptions", "recomputed tokens", "replicas used", "GPUs", "took")
    for heading in headings:
        table.add_column(heading, justify="right")
    total = sum(g.count for g in scenario.replicas)
    for arm in _arms(outcomes):
        mine = [o for o in outcomes if o.arm == arm]
        preempted, recomputed, used = (spread(o.totals[name] for o in mine) for name in TOTALS)
        table.add_row(
            arm,
            str(len(mine)),
            f"{preempted.median:,.0f}",
            f"{recomputed.median:,.0f}",
            f"{used.median:.0f}" + ("" if scenario.plan else f" of {total}"),
            str(gpus(scenario)),
            f"{sum(o.wall_s for o in mine):.1f} s",
        )
    return table
