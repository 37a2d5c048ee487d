"""The demo as a benchmark: one load with QoS and in arrival order, figures as ratios of one run.

    python tests/perf/bench_demo.py [--quick] [--seeds N]

Every seed begins elsewhere in the traces. A run whose load generator was late claims nothing.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from report import record, row

OUT = Path("out/bench/demo")
QUICK = ("--calm", "4", "--rush", "8", "--after", "6", "--backlog", "64")


def run(seed: int, *, quick: bool) -> dict[str, Any]:
    """One demo; returns its summary."""
    command = [sys.executable, "-m", "tidegate", "demo", "--out", str(OUT), "--seed", str(seed)]
    command += ["--dir", ".tidegate/bench-demo", *(QUICK if quick else ())]
    subprocess.run(command, check=True)
    summary: dict[str, Any] = json.loads((OUT / "summary.json").read_text())
    return summary


def lost(summary: dict[str, Any]) -> int:
    """Requests that were neither answered nor refused with a reason, in both arms."""
    return sum(figures["lost"] for arm in ("qos", "fifo") for figures in summary[arm].values())


def main() -> None:
    """Run the seeds and record the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short run: that it works")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    runs = [run(seed, quick=options.quick) for seed in range(1, 2 if options.quick else options.seeds + 1)]
    claims = not options.quick and all(s["claims"] for s in runs)
    ratios = [s["ratios"] for s in runs]
    if any(value is None for one in ratios for value in one.values()):
        sys.exit(f"a ratio could not be formed: {ratios}")
    rows = [
        row(
            "interactive p99 TTFT, with QoS over in arrival order",
            [one["interactive_ttft_p99"] for one in ratios],
            "×",
            at_most=1 / 3,
            claims=claims,
        ),
        row(
            "batch tokens/s, with QoS over in arrival order",
            [one["batch_tokens_per_s"] for one in ratios],
            "×",
            at_least=0.85,
            claims=claims,
        ),
        row("requests lost, both arms", [float(lost(s)) for s in runs], "requests", at_most=0, claims=claims),
        row(
            "load generator late, at most", [s["load_lag_ms"] for s in runs], "ms", at_most=20, claims=claims
        ),
    ]
    rows += [
        row(action, [float(s[action]) for s in runs], "a run", at_least=1, claims=claims)
        for action in ("borrows", "reclaims", "rebalances")
    ]
    record("demo", rows)


if __name__ == "__main__":
    main()
