"""Runs many points of the headline setting over all cores, and never the same one twice.

What a run came to is appended to a file, one JSON object a line. A point is taken from there as
long as the code that it depends on is what it was: its arm's module, the fleet's, and all that
those import.
"""

import ast
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import cache
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tidegate.sim import headline
from tidegate.sim.fleet_arms.registry import arm, factory
from tidegate.sim.headline import Point, Raw, run_point

Key = tuple[str, str]
"""A point as text, and the version of the code that ran it."""


def run_points(
    points: Iterable[Point],
    path: Path,
    progress: Callable[[str], None] = lambda _line: None,
    workers: int | None = None,
) -> dict[Point, Raw]:
    """What the points and their references came to; those that are in the file are not run again.

    Args:
        points: What is wanted.
        path: Where results are kept; its folder exists.
        progress: Is told of every point that has been run.
        workers: Processes; as many as there are cores to use by default.

    Raises:
        ValueError: there is no such arm, or its numbers do not suit the fleet.
    """
    wanted = with_references(points)
    for point in wanted:
        arm(point.arm)  # a wrong name shows before anything has run
    known = stored(path)
    found = {p: known[_key(p)] for p in wanted if _key(p) in known}
    todo = [p for p in wanted if p not in found]
    began_s = time.monotonic()
    for point, raw in _run(todo, workers or len(os.sched_getaffinity(0))):
        _append(path, point, raw)
        found[point] = raw
        done = len(found) - len(wanted) + len(todo)
        progress(f"[{time.monotonic() - began_s:4.0f} s] {done}/{len(todo)} {_told(point, raw)}")
    return found


def with_references(points: Iterable[Point]) -> list[Point]:
    """The points, each after what it is held against, and none twice."""
    return list(dict.fromkeys(p for point in points for p in (*point.references, point)))


def pending(points: Iterable[Point], path: Path) -> list[Point]:
    """Those of the points and their references that are not in the file."""
    known = stored(path)
    return [p for p in with_references(points) if _key(p) not in known]


def _run(todo: list[Point], workers: int) -> Iterator[tuple[Point, Raw]]:
    if not todo:
        return
    # Spawned, not forked: the caller may have threads.
    with ProcessPoolExecutor(min(workers, len(todo)), mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(run_point, point): point for point in todo}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _told(point: Point, raw: Raw) -> str:
    people = f"p99 TTFT {raw.ttft_p99_s:.3f} s, kept {raw.attainment:.2%}, " if point.load else ""
    return (
        f"{point.arm}, load {point.load:g}, seed {point.seed}: {people}"
        f"batch {raw.batch_per_s:.2f}/s a replica ({raw.cpu_s:.1f} s CPU)"
    )


# ── the file ────────────────────────────────────────────────────────────────────────────────────


def stored(path: Path) -> dict[Key, Raw]:
    """What the file holds. A line that was cut off when a run was stopped is passed over."""
    found: dict[Key, Raw] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        raw: dict[str, Any] = {k: float(v) if isinstance(v, str) else v for k, v in row["raw"].items()}
        found[json.dumps(row["point"], sort_keys=True), row["version"]] = Raw(**raw)
    return found


def _append(path: Path, point: Point, raw: Raw) -> None:
    # JSON has no infinity: what is not finite is text.
    values = {
        k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(raw).items()
    }
    row: dict[str, Any] = {"point": asdict(point), "version": version(point.arm), "raw": values}
    cut_off = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(("\n" if cut_off else "") + json.dumps(row, sort_keys=True) + "\n")


def _key(point: Point) -> Key:
    return json.dumps(asdict(point), sort_keys=True), version(point.arm)


# ── the code ────────────────────────────────────────────────────────────────────────────────────


def version(name: str) -> str:
    """A digest of the code and data that a run of this arm depends on.

    Raises:
        ValueError: no arm has this name.
    """
    return _digest(factory(name)[0].__module__)


@cache
def _digest(module: str) -> str:
    # The setting itself, but not what it imports: that is every arm there is.
    return _digest_of([Path(headline.__file__)], imported(module, "tidegate.sim.fleet"))


def code_digest(*modules: str) -> str:
    """A digest of these modules of ours, all of ours that they import, and the data of the simulator."""
    return _digest_of([], imported(*modules))


def _digest_of(more: list[Path], modules: set[str]) -> str:
    here = Path(headline.__file__).parent
    files = [*more, *(here / "data").glob("*.csv"), *map(_source, modules)]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def imported(*modules: str) -> set[str]:
    """These modules of ours, and all of ours that they import, directly or not."""
    found: set[str] = set()
    todo = list(modules)
    while todo:
        name = todo.pop()
        if name in found or not name.startswith("tidegate."):
            continue
        found.add(name)
        tree = ast.parse(_source(name).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                inner = (f"{node.module}.{alias.name}" for alias in node.names)
                todo += [node.module, *(m for m in inner if _is_module(m))]
            elif isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
    return found


def _is_module(name: str) -> bool:
    if not name.startswith("tidegate."):
        return False
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False  # a name within a module


def _source(module: str) -> Path:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"module {module} has no source")
    return Path(spec.origin)
