"""Run every benchmark of this folder, then print all figures as one table.

`python tests/perf/run.py [--quick] [NAME …]`: with --quick each one shows that it runs, not how fast.
Figures are read from out/bench/NAME.json, a list of {figure, value, unit, spread, target, met, command}.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
OUT = Path("out/bench")


def main() -> int:
    """Run what was asked for; 1 when a benchmark failed or wrote no figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="which (default: all)")
    parser.add_argument("--quick", action="store_true", help="short runs: that they work, not how fast")
    options = parser.parse_args()
    known = {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}
    wanted = options.names or list(known)
    unknown = set(wanted) - set(known)
    if unknown:
        parser.error(f"no benchmark called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    failed = [name for name in wanted if not _run(name, known[name], quick=options.quick)]
    Console().print(_table(wanted))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run(name: str, path: Path, *, quick: bool) -> bool:
    print(f"==> {name}", flush=True)
    result = OUT / f"{name}.json"
    result.unlink(missing_ok=True)
    done = subprocess.run([sys.executable, str(path), *(["--quick"] if quick else [])], check=False)
    return done.returncode == 0 and result.exists()


def _table(names: list[str]) -> Table:
    table = Table(title="benchmarks", title_justify="left", pad_edge=False)
    table.add_column("benchmark")
    table.add_column("figure")
    for heading in ("value", "spread", "target", "met"):
        table.add_column(heading, justify="right")
    for name in names:
        path = OUT / f"{name}.json"
        rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        for row in rows:
            met = {True: "yes", False: "no"}.get(row["met"], "–")
            value = row["value"]
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            table.add_row(
                name, row["figure"], f"{shown} {row['unit']}", _text(row["spread"]), _text(row["target"]), met
            )
    return table


def _text(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
