"""The square wave raised until EDF-2048 misses 10%: missed by all, and by the important fifth.

One replica, the gate's workload (2 and 5 requests/s in turn, times 1.115, four hours; `tidegate.sim.wave`).
Runs are kept in out/bench/sim-kept.jsonl. `--quick` is half an hour of it and claims nothing.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kept import Kept, run_kept
from report import FOLDER, Row, record, row

from tidegate.sim.wave import Missed, Wave, run

ARMS = ("EDF-2048", "EDF-dynamic", "QoServe", "relief", "ours", "ours-cooperating", "priority")
ALL, IMPORTANT = 2.0, 0.0
"""What may be missed, in percent: of all requests, and of the important ones."""
OURS = ("ours", "ours-cooperating", "relief")
"""Whom the targets are for: production's queue, with an engine's cooperation, and inside the engine."""


def main() -> None:
    """Print and record the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short runs, no claims")
    parser.add_argument("--seeds", type=int, default=3, help="seeds a figure (default 3)")
    parser.add_argument("--factor", type=float, default=Wave("", 0).factor, help="raises the wave")
    args = parser.parse_args()
    if args.seeds < 1 or args.factor <= 0:
        parser.error("--seeds must be at least 1, and --factor above 0")
    seeds, hours = (1, 0.5) if args.quick else (args.seeds, 4.0)
    waves = [Wave(arm, seed, args.factor, hours) for seed in range(1, seeds + 1) for arm in ARMS]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kept.jsonl" if args.quick else FOLDER / "sim-kept.jsonl"
        found = run_kept(waves, run, Missed, Kept(path, "tidegate.sim.wave"), told)
    record("sim_wave", rows(found, claims=not args.quick and args.seeds >= 3))


def told(wave: Wave, missed: Missed) -> str:
    """A line of progress."""
    return (
        f"{wave.arm}, wave × {wave.factor:g}, seed {wave.seed}: missed {missed.overall:.2%} of"
        f" {missed.requests}, important {missed.of_important:.2%} ({missed.cpu_s:.1f} s CPU)"
    )


def rows(found: dict[Wave, Missed], *, claims: bool) -> list[Row]:
    """What every arm misses."""
    result: list[Row] = []
    for arm in ARMS:
        mine = [missed for wave, missed in found.items() if wave.arm == arm]
        bounds = ({"at_most": ALL}, {"at_most": IMPORTANT}) if arm in OURS else ({}, {})
        overall, important = [100 * m.overall for m in mine], [100 * m.of_important for m in mine]
        result += [
            row(f"{arm}: missed by all", overall, "%", claims=claims, **bounds[0]),
            row(f"{arm}: missed by important ones", important, "%", claims=claims, **bounds[1]),
        ]
    return result


if __name__ == "__main__":
    main()
