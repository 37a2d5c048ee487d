"""Every part of the simulator's benchmark, one after the other: `make bench-sim`.

Each part keeps its runs in out/bench and does not make them again while the code that they depend on is the
same: stop this and start it again as you like. What it will take is said before it begins.

  (none)    the stated grid, within 90 minutes on two cores
  --full    every arm at every load with all seeds, and every part at its full length
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

from report import FOLDER
from simgrid import REQUESTS, SEEDS, Grid, cost_s

from tidegate.sim.points import pending

HERE = Path(__file__).resolve().parent


class Part(NamedTuple):
    """A benchmark: its file, its arguments, and the CPU seconds and cores that it takes, as measured."""

    name: str
    arguments: tuple[str, ...]
    cpu_s: float
    cores: int = 2


PARTS = (
    Part("bench_gate", (), 360, cores=1),
    Part("bench_sim_wave", (), 300),
    Part("bench_sim_errors", (), 400),
    Part("bench_sim_promises", ("--seeds", "2"), 900),
    Part("bench_sim_saving", ("--seconds", "900", "--peak", "20"), 900),
)
"""After the headline. Reduced: promises have two seeds and not five, the saving's day lasts 15 minutes and
has at most 20 chats/s."""
FULL = (
    Part("bench_gate", (), 360, cores=1),
    Part("bench_sim_wave", ("--seeds", "5"), 500),
    Part("bench_sim_errors", ("--seeds", "5"), 1000),
    Part("bench_sim_promises", (), 2250),
    Part("bench_sim_saving", (), 7200),
)


def main() -> int:
    """Run all parts; 1 when one of them failed. The others are run all the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--full", action="store_true", help="everything, as long as it takes")
    parser.add_argument("--estimate", action="store_true", help="only say what it would take")
    args = parser.parse_args()
    flags = ("--full",) if args.full else ()
    grid = Grid(tuple(range(1, SEEDS + 1)), REQUESTS, full=args.full)
    cpu_s = cost_s(pending(grid.first(), FOLDER / "sim-points.jsonl")) + grid.best_s()
    headline = Part("bench_sim", flags, cpu_s)
    parts = (headline, *(FULL if args.full else PARTS))
    tell(parts)
    if args.estimate:
        return 0
    failed, began_s = [], time.monotonic()
    for part in parts:
        print(f"==> [{time.monotonic() - began_s:5.0f} s] {part.name} {' '.join(part.arguments)}", flush=True)
        file = str(HERE / f"{part.name}.py")
        if subprocess.run([sys.executable, file, *part.arguments], check=False).returncode:
            failed.append(part.name)
    print(f"[{time.monotonic() - began_s:5.0f} s] done; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def tell(parts: tuple[Part, ...]) -> None:
    """What is about to be run, and how long it takes where nothing of it is kept yet."""
    cores = len(os.sched_getaffinity(0))
    total_s = 0.0
    for part in parts:
        took_s = part.cpu_s / min(cores, part.cores)
        total_s += took_s
        command = " ".join([part.name, *part.arguments])
        print(f"{command:<50} about {part.cpu_s:6.0f} s CPU, {took_s / 60:5.1f} minutes")
    total = f"all, on {cores} cores"
    print(
        f"{total:<50} about {sum(part.cpu_s for part in parts):6.0f} s CPU, {total_s / 60:5.1f} minutes",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
