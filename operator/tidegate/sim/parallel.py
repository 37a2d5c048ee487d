"""Runs of a scenario on all cores, one process a core; Ctrl-C keeps what has ended."""

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from typing import Any, Final, NamedTuple

from tidegate.sim import build
from tidegate.sim.cluster.build import cluster
from tidegate.sim.cluster.run import PlannedFleet
from tidegate.sim.contest import Outcome, outcome
from tidegate.sim.fleet import Fleet
from tidegate.sim.fleet_arms.registry import arm
from tidegate.sim.scenario import Scenario, ScenarioError

_LOOK_S: Final = 0.2
"""How often progress is told, and Ctrl-C heard."""


class Job(NamedTuple):
    """One run."""

    arm: str
    seed: int


class Progress(NamedTuple):
    """How far all runs are together. Seconds are of virtual time."""

    seconds: float
    of_seconds: float
    ended: int
    runs: int


class _StoppedError(Exception):
    """The run was asked to end."""


@dataclass(slots=True)
class _Shared:
    """What a worker was given when it began. `done_s` and `stop` are in memory that all share."""

    scenario: Scenario
    done_s: Any
    stop: Any


_shared: list[_Shared] = []


def contest(
    scenario: Scenario,
    jobs: Sequence[Job],
    tell: Callable[[Progress], None] = lambda _progress: None,
    workers: int | None = None,
) -> tuple[list[Outcome], bool]:
    """Run every job; returns outcomes in the order of the jobs, and whether all of them are there.

    Args:
        scenario: What to simulate.
        jobs: Arms, by their names in `fleet_arms.registry`, and seeds.
        tell: Is told how far it is, a few times a second.
        workers: Processes; as many as there are cores when left out.

    Raises:
        ScenarioError: As `build.setting` does, or the fleet does not suit an arm.
    """
    # Spawned, not forked: a progress bar has a thread, and a fork with threads may hang.
    context = multiprocessing.get_context("spawn")
    done_s, stop = context.RawArray("d", len(jobs)), context.RawValue("b", 0)
    ended: dict[int, Outcome] = {}
    whole = True
    with ProcessPoolExecutor(
        max_workers=max(1, min(len(jobs), workers or _cores())),
        mp_context=context,
        initializer=_begin,
        initargs=(_Shared(scenario, done_s, stop),),
    ) as pool:
        try:
            with _ctrl_c_later():
                futures = {pool.submit(_run, number, *job): number for number, job in enumerate(jobs)}
            _collect(futures, ended, lambda: tell(_progress(scenario, done_s, len(ended))))
        except BaseException as error:
            stop.value = 1
            pool.shutdown(wait=True, cancel_futures=True)
            if not isinstance(error, KeyboardInterrupt):
                raise
            whole = False
    return [ended[number] for number in sorted(ended)], whole


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Hold Ctrl-C back while workers are started; they inherit that, and never hear it.

    A terminal sends it to all of them: the parent hears it, and tells them through `stop`.
    """
    resource_tracker.ensure_running()  # started later, it would lift the mask
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _cores() -> int:
    # Not cpu_count: a container or taskset may allow fewer. macOS has no affinity.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _collect(
    futures: dict[Future[Outcome], int], ended: dict[int, Outcome], tell: Callable[[], None]
) -> None:
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=_LOOK_S, return_when=FIRST_COMPLETED)
        for future in done:
            ended[futures[future]] = future.result()
        tell()


def _progress(scenario: Scenario, done_s: Sequence[float], ended: int) -> Progress:
    return Progress(sum(done_s), scenario.seconds * len(done_s), ended, len(done_s))


# ── in the workers ──────────────────────────────────────────────────────────────────────────────


def _begin(shared: _Shared) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _shared[:] = [shared]


def _end_with_parent() -> None:
    """A parent that was killed told nobody: without this its workers would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _run(number: int, name: str, seed: int) -> Outcome:
    shared = _shared[0]

    def note(now_s: float) -> None:
        if shared.stop.value:
            raise _StoppedError
        shared.done_s[number] = now_s

    setting = build.setting(shared.scenario)
    spec, usage = cluster(shared.scenario, setting), None
    try:
        fleet = PlannedFleet(setting, spec, arm(name), seed) if spec else Fleet(setting, arm(name), seed)
    except ValueError as error:
        raise ScenarioError(f"arm {name}: {error}") from error
    began = time.perf_counter()
    # Nothing here is garbage before the run's end; looking for it takes a tenth of the time.
    gc.disable()
    try:
        if isinstance(fleet, PlannedFleet):
            run, usage = fleet.run(note)
        else:
            run = fleet.run(note)
    finally:
        gc.enable()
    result = outcome(run, name, time.perf_counter() - began, usage)
    shared.done_s[number] = shared.scenario.seconds
    return result
