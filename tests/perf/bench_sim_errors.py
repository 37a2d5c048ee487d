"""Errors in what the policy knows, each against ours without it: step times, late scrapes, unknown lengths.

The headline at 1 chat/s a replica (`tidegate.sim.errors`). Ratios are taken in one run, by seed. Runs are
kept in out/bench/sim-kept.jsonl. `--quick` is short and claims nothing.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kept import Kept, run_kept
from report import FOLDER, Row, record, row

from tidegate.sim.errors import LATE_S, OURS, Wrong, compare, run
from tidegate.sim.headline import Raw

LOAD, WARM_UP_S, REQUESTS = 1.0, 500.0, 6000
KEPT = 0.1
"""What an error may cost: of p99 TTFT, of attainment, and of harvest."""


def main() -> None:
    """Print and record the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short runs, no claims")
    parser.add_argument("--seeds", type=int, default=2, help="seeds a figure (default 2)")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="chats a run (default 6,000)")
    args = parser.parse_args()
    if args.seeds < 1 or args.requests < 1:
        parser.error("--seeds and --requests must be at least 1")
    seeds = range(1, 2 if args.quick else args.seeds + 1)
    replicas, requests, warm_up_s = (2, 100, 20.0) if args.quick else (10, args.requests, WARM_UP_S)
    # The last 51 s are not judged (`records.deadline_s`).
    seconds = warm_up_s + requests / (LOAD * replicas) + 51
    plain = [Wrong(OURS, LOAD, seed, seconds, warm_up_s, replicas=replicas) for seed in seeds]
    pairs = {what: [(of(p), beside(p)) for p in plain] for what, of, beside in ERRORS}
    both = [one for found in pairs.values() for pair in found for one in pair]
    wanted = list(dict.fromkeys(x for one in both for x in (*one.references, one)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kept.jsonl" if args.quick else FOLDER / "sim-kept.jsonl"
        found = run_kept(wanted, run, Raw, Kept(path, "tidegate.sim.errors"), told)
    record("sim_errors", rows(pairs, found, claims=not args.quick))


ERRORS = (
    (
        "engines 30% slower",
        lambda p: replace(p, scale=1.3),
        lambda p: replace(p, scale=1.3, knows=True),
    ),
    (
        "engines 30% faster",
        lambda p: replace(p, scale=0.7),
        lambda p: replace(p, scale=0.7, knows=True),
    ),
    ("scrapes 5 s late", lambda p: replace(p, late_s=LATE_S), lambda p: p),
    ("lengths unknown", lambda p: p, lambda p: replace(p, lengths=True)),
)
"""What is wrong, ours with it, and ours without."""


def told(wrong: Wrong, raw: Raw) -> str:
    """A line of progress."""
    what = f"{wrong.arm}, steps × {wrong.scale:g}{', knows' if wrong.knows else ''}"
    late = f", scrapes {wrong.late_s:g} s late" if wrong.late_s else ""
    lengths = ", lengths known" if wrong.lengths else ""
    return (
        f"{what}{late}{lengths}, seed {wrong.seed}: p99 TTFT {raw.ttft_p99_s:.3f} s, kept"
        f" {raw.attainment:.2%}, batch {raw.batch_per_s:.2f}/s a replica ({raw.cpu_s:.1f} s CPU)"
    )


def rows(pairs: dict[str, list[tuple[Wrong, Wrong]]], found: dict[Wrong, Raw], *, claims: bool) -> list[Row]:
    """Of every error the three figures with it, and by what they are without."""
    result: list[Row] = []
    for what, runs in pairs.items():
        with_it = [compare(one, found) for one, _ in runs]
        without = [compare(other, found) for _, other in runs]
        both = list(zip(with_it, without, strict=True))
        for name, values, ratios, bound in (
            (
                "p99 TTFT by alone",
                [f.ttft_ratio for f in with_it],
                [a.ttft_ratio / b.ttft_ratio for a, b in both],
                {"at_most": 1 + KEPT},
            ),
            (
                "attainment",
                [f.attainment for f in with_it],
                [a.attainment / b.attainment for a, b in both],
                {"at_least": 1 - KEPT},
            ),
            ("H", [f.h for f in with_it], [a.h / b.h for a, b in both], {"at_least": 1 - KEPT}),
        ):
            result.append(row(f"{what}: {name}", values, ""))
            result.append(row(f"{what}: {name}, by ours without", ratios, "×", claims=claims, **bound))
    return result


if __name__ == "__main__":
    main()
