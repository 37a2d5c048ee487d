"""The headline: how close people stay to having the GPUs alone, and how much of what is idle batch gets.

Ten replicas (Llama-3-8B on A100), chat at four loads beside a backlog of summaries, every arm of
`tidegate.sim.fleet_arms`. Runs are kept in out/bench/sim-points.jsonl and not made again while the code
that they depend on is the same: stop it and start it again as you like.

  --quick   every arm that there is, short and watched: what must hold of each does; claims nothing
  (none)    ours and the two best others at all loads, five seeds; static packings searched with two, the best
            with five; tiers and ablations at all loads with two; every other arm at load 1 with two
  --full    every arm at every load with all seeds
"""

import argparse
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))

from report import FOLDER, Row, record, row
from simgrid import ABLATIONS, ATTAINMENT, RATIO, REQUESTS, SEEDS, Grid, best_packing, cost_s
from simquick import quick

from tidegate.sim.headline import Figures, compare
from tidegate.sim.invariants import above_bound
from tidegate.sim.points import pending, run_points

COLOURS = {"ours": "#0072B2", "packing": "#D55E00", "cooperating": "#009E73", "tiers": "#CC79A7"}
POINTS = FOLDER / "sim-points.jsonl"


def main() -> None:
    """Print and record the headline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short runs, no claims")
    parser.add_argument("--full", action="store_true", help="every arm at every load")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="seeds a figure (default 5)")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="interactive requests a run")
    args = parser.parse_args()
    if args.seeds < 1 or args.requests < 1:
        parser.error("--seeds and --requests must be at least 1")
    if args.quick:
        record("sim", quick())
        return
    grid = Grid(tuple(range(1, args.seeds + 1)), args.requests, full=args.full)
    figures = run_grid(grid)
    claims = args.seeds >= SEEDS and args.requests >= REQUESTS
    record("sim", rows(figures, grid.loads, claims=claims))
    plot(figures, FOLDER / "frontier.png")


def run_grid(grid: Grid) -> list[Figures]:
    """Everything that is in it.

    Raises:
        SystemExit: an arm harvests more than can be.
    """
    points = grid.first()
    todo = pending(points, POINTS)
    print(
        f"{len(points)} points; {len(todo)} runs are to be made, about {cost_s(todo):.0f} s CPU", flush=True
    )
    found = run_points(points, POINTS, print)
    figures = [compare(point, found) for point in points]
    more = [point for point in grid.second(figures) if point not in set(points)]
    if more:
        print(f"the best static packings: {len(more)} more, about {cost_s(pending(more, POINTS)):.0f} s CPU")
        found = run_points(more, POINTS, print)
        figures += [compare(point, found) for point in more]
    above = [wrong for f in figures if (wrong := above_bound(f.point, f.raw))]
    if above:
        raise SystemExit(f"above bound B, so the instrument is wrong: {above}")
    return figures


def rows(figures: list[Figures], loads: tuple[float, ...], *, claims: bool) -> list[Row]:
    """Every arm's three figures by load; ours against the gap that the best static packing leaves."""
    result: list[Row] = []
    for load in loads:
        by_arm: dict[str, list[Figures]] = {}
        for each in figures:
            if each.point.load == load:
                by_arm.setdefault(each.point.arm, []).append(each)
        best = best_packing((f for runs in by_arm.values() for f in runs), capped=True)
        h = median(f.h for f in by_arm[best]) if best else None
        target = None if h is None else h + (1 - h) / 3
        for arm, runs in sorted(by_arm.items()):
            bounds = ({"at_least": target}, {"at_most": RATIO}, {"at_least": ATTAINMENT})
            figures_of = (
                ("H", [f.h for f in runs], ""),
                ("p99 TTFT by alone", [f.ttft_ratio for f in runs], "×"),
                ("attainment", [f.raw.attainment for f in runs], ""),
            )
            for (what, samples, unit), bound in zip(figures_of, bounds, strict=True):
                held = bound if arm == "ours" else {}
                result.append(row(f"load {load:g}, {arm}: {what}", samples, unit, claims=claims, **held))
    return result


def plot(figures: list[Figures], path: Path) -> None:
    """The frontier: p99 TTFT by alone against harvest, a panel a load, every arm."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    loads = sorted({f.point.load for f in figures})
    grid, axes = plt.subplots(1, len(loads), figsize=(4.2 * len(loads), 4.4), sharey=True, squeeze=False)
    for axis, load in zip(axes[0], loads, strict=True):
        by_arm: dict[str, list[Figures]] = {}
        for each in figures:
            if each.point.load == load:
                by_arm.setdefault(each.point.arm, []).append(each)
        for arm, runs in sorted(by_arm.items()):
            x, y = median(f.ttft_ratio for f in runs), median(f.h for f in runs)
            # Ablations crowd around ours, and are in the table.
            if x > 4 or arm in ABLATIONS:
                continue
            kept = median(f.raw.attainment for f in runs) >= ATTAINMENT
            colour = COLOURS.get(arm.split("-")[0], "#999999")
            axis.plot(x, y, "o" if kept else "x", color=colour, markersize=9 if arm == "ours" else 6)
            axis.annotate(arm, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=7, color=colour)
        axis.axvline(RATIO, color="#000000", linewidth=0.6, linestyle=":")
        axis.set(title=f"chat {load:g}/s a replica", xlabel="p99 TTFT by alone", xlim=(0.95, 4))
        axis.set_xscale("log")
        axis.set_xticks([1, 1.1, 1.25, 1.5, 2, 3, 4], ["1", "1.1", "1.25", "1.5", "2", "3", "4"], fontsize=7)
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0][0].set(ylabel="harvest, of what batch alone gets", ylim=(0, 1.05))
    grid.suptitle("up and left is better; o meets the objectives of 99% of the chats, x does not", fontsize=9)
    grid.tight_layout()
    grid.savefig(path, dpi=130)
    print(path)


if __name__ == "__main__":
    main()
