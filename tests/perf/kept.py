"""Runs tasks over all cores and keeps what came of them, so that a benchmark that was stopped goes on.

A task is a frozen dataclass of plain values. What it came to is appended to a file, one JSON object a line,
and taken from there as long as the code that it depends on is what it was.
"""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from tidegate.sim.points import code_digest

T = TypeVar("T")
R = TypeVar("R")


class Kept:
    """Results in a file, of the code of `modules` and all that these import."""

    def __init__(self, path: Path, *modules: str) -> None:
        self.path = path
        self._version = code_digest(*modules)
        self._found: dict[str, Any] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off when a run was stopped
            if row["version"] == self._version:
                self._found[row["task"]] = _thawed(row["result"])

    def get(self, task: Any) -> Any:
        """What a task came to, as plain values; None when it was not run."""
        return self._found.get(_key(task))

    def put(self, task: Any, result: Any) -> None:
        """Keep what it came to."""
        # A dataclass or a NamedTuple.
        plain = result._asdict() if isinstance(result, tuple) else asdict(result)
        self._found[_key(task)] = plain
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut_off = (
            self.path.exists() and self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n")
        )
        row = {"task": _key(task), "version": self._version, "result": _frozen(plain)}
        with self.path.open("a") as file:
            file.write(("\n" if cut_off else "") + json.dumps(row) + "\n")


def run_kept(
    tasks: Sequence[T],
    run: Callable[[T], R],
    made: Callable[..., R],
    kept: Kept,
    told: Callable[[T, R], str],
    workers: int | None = None,
) -> dict[T, R]:
    """What every task came to, in their order; those that are kept are not run again.

    Args:
        tasks: Without repeats.
        run: Runs one, in a process of its own: a function of a module.
        made: Makes a result from its fields.
        kept: Where results are.
        told: What is said of each that was run.
        workers: Processes; as many as there are cores to use by default.
    """
    found = {task: made(**plain) for task in tasks if (plain := kept.get(task)) is not None}
    todo = [task for task in tasks if task not in found]
    if len(todo) < len(tasks):
        print(f"{len(tasks) - len(todo)} of {len(tasks)} are kept in {kept.path}", flush=True)
    began_s = time.monotonic()
    # Spawned, not forked: a fork of a process with threads may hang.
    most = min(workers or len(os.sched_getaffinity(0)), max(1, len(todo)))
    with ProcessPoolExecutor(most, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(run, task): task for task in todo}
        try:
            for done, future in enumerate(as_completed(futures), 1):
                task, result = futures[future], future.result()
                kept.put(task, result)
                found[task] = result
                spent_s = time.monotonic() - began_s
                print(f"[{spent_s:4.0f} s] {done}/{len(todo)} {told(task, result)}", flush=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return {task: found[task] for task in tasks}


def _key(task: Any) -> str:
    return type(task).__name__ + json.dumps(asdict(task), sort_keys=True)


def _frozen(value: Any) -> Any:
    """JSON has no infinity: what is not finite becomes an object."""
    if isinstance(value, dict):
        return {key: _frozen(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_frozen(each) for each in value]
    return {"float": str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, list):
        return [_thawed(each) for each in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"float"}:
        return float(value["float"])
    return {key: _thawed(each) for key, each in value.items()}
