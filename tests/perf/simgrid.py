"""Which points of the headline are run, and what they are expected to cost."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from tidegate.sim.fleet_arms.production import IDEAS
from tidegate.sim.headline import Figures, Point

LOADS = (0.25, 0.5, 1.0, 2.0)
RATIO, ATTAINMENT = 1.10, 0.99
"""p99 TTFT by what it is alone, and the share that meets its objectives, within which harvest counts."""
WARM_UP_S, REQUESTS, SEEDS = 500.0, 20_000, 5
FEW = 2
"""Seeds of what is searched, turned off, or only shown beside: the grid's, not a claim's."""
PACKINGS = {
    0.25: ("1", "2", "3", "1-cap-1", "2-cap-1", "3-cap-1", "3-cap-2"),
    0.5: ("2", "3", "4", "2-cap-1", "3-cap-1", "3-cap-2"),
    1.0: ("3", "4", "5", "3-cap-1", "4-cap-1", "5-cap-2"),
    2.0: ("5", "6", "7", "8", "5-cap-1", "6-cap-1", "7-cap-2"),
}
"""Static packings worth trying at each load: fewer miss the objectives, more harvest less."""
BEST_OTHERS = ("aimd", "cap-4")
"""At load 1 the only ones of the others that keep 99% of the chats within their objectives."""
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
COST = {
    "": 0.0025,
    "cooperating": 0.0043,
    "edf": 0.0093,
    "fifo": 0.0068,
    "ours": 0.0168,
    "priority": 0.022,
    "qoserve": 0.01,
}
"""CPU seconds for a second of ten replicas, by the longest beginning of a name. Measured at 1 chat/s a
replica, and about the same at other loads, since what costs is the steps of engines that always work."""


@dataclass(frozen=True, slots=True)
class Grid:
    """How long points are, with which seeds, and at which loads; `full` is every arm at every load."""

    seeds: tuple[int, ...]
    requests: int
    warm_up_s: float = WARM_UP_S
    loads: tuple[float, ...] = LOADS
    full: bool = False

    def first(self) -> list[Point]:
        """All that does not depend on what another came to, the most wanted first."""
        few = self.seeds if self.full else self.seeds[:FEW]
        wanted: list[tuple[str, float, tuple[int, ...]]] = []
        for load in self.loads:
            wanted.append(("ours", load, self.seeds))
            wanted += [(f"packing-{k}", load, few) for k in PACKINGS[load]]
            wanted += [(arm, load, self.seeds) for arm in BEST_OTHERS]
        for load in self.loads:
            wanted += [(arm, load, few) for arm in (*TIERS[load], *ABLATIONS)]
        for load in self.loads if self.full else (1.0,):
            wanted += [(arm, load, few) for arm in OTHERS if arm not in BEST_OTHERS]
        return self._points(wanted)

    def second(self, figures: Iterable[Figures]) -> list[Point]:
        """The best static packings, by k and by k and c, with all seeds."""
        best = [
            (arm, load, self.seeds)
            for load in self.loads
            for capped in (False, True)
            if (arm := best_packing([f for f in figures if f.point.load == load], capped=capped))
        ]
        return self._points(best)

    def best_s(self) -> float:
        """CPU seconds that `second` will take: two packings at each load, with the seeds that they lack."""
        few = self.seeds if self.full else self.seeds[:FEW]
        lacks = tuple(seed for seed in self.seeds if seed not in few)
        return 2 * cost_s(self._points([("packing-1", load, lacks) for load in self.loads]))

    def _points(self, wanted: list[tuple[str, float, tuple[int, ...]]]) -> list[Point]:
        """So long that enough requests are judged; the last 51 s are not (`records.deadline_s`)."""
        return [
            Point(
                arm,
                load,
                seed,
                seconds=self.warm_up_s + self.requests / (10 * load) + 51,
                warm_up_s=self.warm_up_s,
            )
            for arm, load, seeds in wanted
            for seed in seeds
        ]


def best_packing(figures: Iterable[Figures], *, capped: bool) -> str | None:
    """The static packing that harvests the most within ratio and attainment; None where none is within.

    `capped`: of those that have a cap beside people, too.
    """
    by_arm: dict[str, list[Figures]] = {}
    for each in figures:
        if each.point.arm.startswith("packing-") and (capped or "cap" not in each.point.arm):
            by_arm.setdefault(each.point.arm, []).append(each)
    within = {
        arm: median(f.h for f in runs)
        for arm, runs in by_arm.items()
        if median(f.ttft_ratio for f in runs) <= RATIO
        and median(f.raw.attainment for f in runs) >= ATTAINMENT
    }
    return max(within, key=lambda arm: within[arm], default=None)


def cost_s(points: Iterable[Point]) -> float:
    """CPU seconds that these points take."""
    return sum(_per_second(point.arm) * point.seconds * point.replicas / 10 for point in points)


def _per_second(arm: str) -> float:
    return COST[max((name for name in COST if arm.startswith(name)), key=len, default="")]
