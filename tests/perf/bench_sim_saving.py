"""The saving: GPUs of a shared pool against silos sized for the objective, over a mixed day in virtual time.

Chat over a day of ServeGen (Gamma arrivals of CV 3.5) beside as much batch as fits, by the fluid measure,
into what chat leaves idle; Llama-3-8B on A100 (`tidegate.sim.saving` says it all). A day is scaled to an
hour: its ten-minute bins last 25 s, while pods still take 40 to 100 s to start, so a start costs what
16 to 40 minutes cost in a real day.

  --quick   seconds: a day of five minutes on a few GPUs; that it runs
  (none)    both days, one seed
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kept import Kept, run_kept
from report import FOLDER, Row, record, row

from tidegate.sim.saving import REAL_DAY_S, Day, Saving, saving

CATEGORIES = ("m-mid", "m-small")
NEAR = 0.03
"""How near to the fluid ceiling the saving is to come."""


def main() -> None:
    """Print and record the saving."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short day, no claims")
    parser.add_argument("--seeds", type=int, default=1, help="seeds a day (default 1)")
    parser.add_argument("--seconds", type=float, default=3600.0, help="a day's length (default 3600)")
    parser.add_argument("--peak", type=float, default=40.0, help="chats/s in the busiest bin (default 40)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    args = parser.parse_args()
    if min(args.seeds, args.seconds, args.peak, args.workers) <= 0:
        parser.error("--seeds, --seconds, --peak and --workers must be above 0")
    if args.quick:
        days = [Day(CATEGORIES[0], seconds=300.0, peak_per_s=6.0)]
    else:
        days = [
            Day(category, args.seconds, args.peak, seed=seed)
            for seed in range(1, args.seeds + 1)
            for category in CATEGORIES
        ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kept.jsonl" if args.quick else FOLDER / "sim-kept.jsonl"
        kept = Kept(path, "tidegate.sim.saving")
        found = run_kept(days, partial(saving, tell=say), Saving, kept, told, args.workers)
    print(
        f"a day of {days[0].seconds:g} s ({REAL_DAY_S / days[0].seconds:g} times as fast), at most"
        f" {days[0].peak_per_s:g} chats/s; silos: arms alone and packing-0; shared: ours, planned; engines:"
        " priorities, max-num-seqs 256, max-num-batched-tokens 2048, 400,000 KV tokens"
    )
    record("sim_saving", rows(found, claims=not args.quick))


def told(day: Day, found: Saving) -> str:
    """A line of progress."""
    return f"{day.category}, seed {day.seed}: {found.people} + {found.batch} in silos, {found.shared} shared"


def say(line: str) -> None:
    """From a worker to the terminal."""
    print(line, flush=True)


def rows(found: dict[Day, Saving], *, claims: bool) -> list[Row]:
    """GPUs of each part, the saving, and what the fluid measure allows."""
    result: list[Row] = []
    for category in dict.fromkeys(day.category for day in found):
        mine = {day: one for day, one in found.items() if day.category == category}
        ceiling = next(iter(mine)).ceiling
        for what, values in (
            ("interactive silo", [one.people for one in mine.values()]),
            ("batch silo", [one.batch for one in mine.values()]),
            ("shared", [one.shared for one in mine.values()]),
        ):
            result.append(row(f"{category}: {what}", [float(v) for v in values], "GPUs", claims=claims))
        result.append(
            row(
                f"{category}: saving, fluid ceiling {ceiling:.3f}",
                [one.saving for one in mine.values()],
                "",
                at_least=round(ceiling - NEAR, 4),
                claims=claims,
            )
        )
    return result


if __name__ == "__main__":
    main()
