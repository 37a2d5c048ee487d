"""The headline: how close people stay to having the GPUs alone, and how much of what is idle batch gets.

Ten replicas (Llama-3-8B on A100), chat at four loads beside a backlog of summaries, every arm of
`tidegate.sim.fleet_arms`. Runs are kept in out/bench/sim-points.jsonl and not made again while the code
that they depend on is the same: stop it and start it again as you like.

  --quick   two minutes: every arm, short, one load; that it runs and no arm exceeds bound B
  (none)    every arm at load 1; ours, its ablations, and the best static packing at all loads
  --full    every arm at every load with all seeds
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))

from report import FOLDER, Row, record, row

from tidegate.sim.fleet_arms.production import IDEAS
from tidegate.sim.headline import CONFIG, Figures, Point, bound_per_s, compare, mean_computed
from tidegate.sim.points import run_points
from tidegate.sim.workload import summary_lengths

LOADS = (0.25, 0.5, 1.0, 2.0)
PACKINGS = {
    0.25: ("1", "2", "3", "1-cap-1", "2-cap-1", "3-cap-1", "3-cap-2"),
    0.5: ("2", "3", "4", "2-cap-1", "3-cap-1", "3-cap-2"),
    1.0: ("3", "4", "5", "3-cap-1", "4-cap-1", "5-cap-2"),
    2.0: ("5", "6", "7", "8", "5-cap-1", "6-cap-1", "7-cap-2"),
}
"""Static packings worth trying at each load: fewer miss the objectives, more harvest less."""
OTHERS = (
    *("fifo", "priority", "shed", "probabilistic", "soft-reflective", "aimd"),
    *("holdback-10", "holdback-20", "holdback-30", "release-60", "release-50", "cap-4", "cap-16"),
    *("edf-256", "edf-2048", "edf-dynamic", "edf-clairvoyant", "qoserve", "ours-cooperating"),
    *("growing-512", "growing-1024", "aborting-2552-400", "steps-512-400", "aborting-512-400"),
)
TIERS = {
    0.25: ("cooperating-2-8-0-0", "cooperating-2-4-1-8", "tiers-2-0-1-2"),
    0.5: ("cooperating-2-16-1-16", "tiers-2-0-1-2"),
    1.0: ("cooperating-2-16-2-16", "tiers-2-0-3-2"),
    2.0: ("cooperating-3-6-4-6", "tiers-3-0-4-2"),
}
"""People in two tiers, with engines that cooperate and without; found by hand."""
ABLATIONS = tuple(f"ours-without-{idea}" for idea in IDEAS)
COLOURS = {"ours": "#0072B2", "packing": "#D55E00", "cooperating": "#009E73", "tiers": "#CC79A7"}
RATIO, ATTAINMENT = 1.10, 0.99
"""p99 TTFT by what it is alone, and the share that meets its objectives, within which harvest counts."""
WARM_UP_S, REQUESTS = 500.0, 20_000


@dataclass(frozen=True, slots=True)
class Grid:
    """Which points are run."""

    seeds: tuple[int, ...]
    requests: int
    warm_up_s: float
    loads: tuple[float, ...]
    full: bool

    def point(self, arm: str, load: float, seed: int) -> Point:
        """So long that enough requests are judged; the last 51 s are not (`records.deadline_s`)."""
        seconds = self.warm_up_s + self.requests / (10 * load) + 51
        return Point(arm, load, seed, seconds=seconds, warm_up_s=self.warm_up_s)

    def points(self) -> list[Point]:
        """All of them, the most wanted first."""
        wanted: list[tuple[str, float, tuple[int, ...]]] = []
        for load in self.loads:
            arms = ("ours", *(f"packing-{k}" for k in PACKINGS[load]))
            wanted += [(arm, load, self.seeds) for arm in arms]
            wanted += [(arm, load, self.seeds) for arm in TIERS[load]]
        wanted += [(arm, load, self.seeds) for arm in ABLATIONS for load in self.loads]
        for load in self.loads if self.full else (1.0,):
            wanted += [(arm, load, self.seeds if self.full else self.seeds[:2]) for arm in OTHERS]
        return [self.point(arm, load, seed) for arm, load, seeds in wanted for seed in seeds]


def main() -> None:
    """Print and record the headline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short runs, no claims")
    parser.add_argument("--full", action="store_true", help="every arm at every load")
    parser.add_argument("--seeds", type=int, default=5, help="seeds a figure (default 5)")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="interactive requests a run")
    args = parser.parse_args()
    if args.seeds < 1 or args.requests < 1:
        parser.error("--seeds and --requests must be at least 1")
    if args.quick:
        grid = Grid((1,), 600, 60.0, (1.0,), full=True)
    else:
        grid = Grid(tuple(range(1, args.seeds + 1)), args.requests, WARM_UP_S, LOADS, full=args.full)
    found = run_points(grid.points(), FOLDER / "sim-points.jsonl", print)
    figures = [compare(point, found) for point in grid.points()]
    above = [f for f in figures if f.raw.batch_per_s > bound_per_s(f.point.load) + stored_per_s(f.point)]
    if above:
        raise SystemExit(f"above bound B, so the instrument is wrong: {above}")
    claims = not args.quick and args.seeds >= 5 and args.requests >= REQUESTS
    record("sim", rows(figures, grid.loads, claims=claims))
    if not args.quick:
        plot(figures, FOLDER / "frontier.png")


def stored_per_s(point: Point) -> float:
    """What a run may be above bound B, which is of long ones: its caches may be fuller at the end."""
    return CONFIG.kv_tokens / mean_computed(summary_lengths()) / (point.seconds - point.warm_up_s)


def rows(figures: list[Figures], loads: tuple[float, ...], *, claims: bool) -> list[Row]:
    """Every arm's three figures by load; ours against the gap that the best static packing leaves."""
    result: list[Row] = []
    for load in loads:
        by_arm: dict[str, list[Figures]] = {}
        for each in figures:
            if each.point.load == load:
                by_arm.setdefault(each.point.arm, []).append(each)
        packing = best_packing(by_arm)
        target = None if packing is None else packing + (1 - packing) / 3
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


def best_packing(by_arm: dict[str, list[Figures]]) -> float | None:
    """The most that a static packing harvests within ratio and attainment; None where none is."""
    within = [
        median(f.h for f in runs)
        for arm, runs in by_arm.items()
        if arm.startswith("packing-")
        and median(f.ttft_ratio for f in runs) <= RATIO
        and median(f.raw.attainment for f in runs) >= ATTAINMENT
    ]
    return max(within, default=None)


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
