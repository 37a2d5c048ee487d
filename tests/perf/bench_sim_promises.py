"""Whose promises are kept when more is asked than there is: a flooding tenant, overload, a burst.

Ten simulated replicas (Llama-3-8B on A100), production's queue in virtual time, beside arrival order and
the engines' own priorities; see `tidegate.sim.contention`. Runs are kept in out/bench/sim-kept.jsonl.
`--quick` is short and claims nothing.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kept import Kept, run_kept
from report import FOLDER, Row, record, row

from tidegate.sim.contention import CASES, Case, Found, run

ARMS = ("ours", "fifo", "priority")
OTHERS_RATIO = 1.2
"""p99 TTFT of the tenants beside the one that floods, by what it is without that one."""
SECONDS = {"tenants": 600.0, "overload": 1000.0, "burst": 900.0}
"""Long enough for 5,000 important requests, a batch that is due in ten minutes, two whole bursts."""
Runs = dict[Case, Found]


def main() -> None:
    """Print and record the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short runs, no claims")
    parser.add_argument("--seeds", type=int, default=5, help="seeds a figure (default 5)")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error("--seeds must be at least 1")
    seeds = range(1, 2 if args.quick else args.seeds + 1)
    small = {"replicas": 2, "seconds": 150.0, "warm_up_s": 20.0}
    cases = [
        Case(name, arm, seed, alone=alone, **(small if args.quick else {"seconds": SECONDS[name]}))
        for name in CASES
        for seed in seeds
        for arm, alone in (("ours", True), *((arm, False) for arm in ARMS))
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kept.jsonl" if args.quick else FOLDER / "sim-kept.jsonl"
        kept = Kept(path, "tidegate.sim.contention")
        found = run_kept(cases, run, Found, kept, told)
    record("sim_promises", rows(found, claims=not args.quick and args.seeds >= 5))


def told(case: Case, found: Found) -> str:
    """A line of progress."""
    missed = " ".join(f"{name} {share:.2%}" for name, share in found.missed.items())
    what = f"{case.name}, {case.arm}{' alone' if case.alone else ''}, seed {case.seed}"
    return f"{what}: p99 TTFT {found.ttft_p99_s:.3f} s, missed {missed} ({found.cpu_s:.1f} s CPU)"


def rows(found: Runs, *, claims: bool) -> list[Row]:
    """The figures of every setting and arm; targets are for ours."""
    result: list[Row] = []
    for name in CASES:
        by_arm = {arm: [c for c in found if (c.name, c.arm, c.alone) == (name, arm, False)] for arm in ARMS}
        alone = [found[replace(c, alone=True)] for c in by_arm["ours"]]
        share = [100 * found[c].important for c in by_arm["ours"]]
        result.append(row(f"{name}: share of important requests", share, "%"))
        result.append(
            row(f"{name}, alone: important missed", [100 * f.missed["important"] for f in alone], "%")
        )
        for arm, cases in by_arm.items():
            runs = [found[c] for c in cases]
            ratio = [f.ttft_p99_s / a.ttft_p99_s for f, a in zip(runs, alone, strict=True)]
            what = f"{name}, {arm}: important"
            first = {"at_most": OTHERS_RATIO} if (name, arm) == ("tenants", "ours") else {}
            kept = {"at_most": 0.0} if arm == "ours" and name != "tenants" else {}
            result += [
                row(f"{what}, p99 TTFT by alone", ratio, "×", claims=claims, **first),
                row(f"{what}, first token late", [100 * f.late for f in runs], "%", claims=claims, **kept),
                row(
                    f"{what}, missed", [100 * f.missed["important"] for f in runs], "%", claims=claims, **kept
                ),
            ]
            for qos_class in runs[0].missed if name != "tenants" else ():
                if qos_class not in ("important", "interactive"):
                    missed = [100 * f.missed[qos_class] for f in runs]
                    result.append(row(f"{name}, {arm}: {qos_class} missed", missed, "%"))
    return result


if __name__ == "__main__":
    main()
