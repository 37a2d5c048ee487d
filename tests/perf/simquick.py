"""What `bench_sim.py --quick` does: every arm on a small fleet, watched, and what must hold of it held.

No request is lost or served twice, no slot or KV block is given twice, no arm is above bound B, and a seed
gives the same bytes. Claims nothing about how good an arm is.
"""

import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from report import Row, row

from tidegate.sim.fleet import Fleet
from tidegate.sim.fleet_arms.registry import arm
from tidegate.sim.headline import Point, bound_per_s, summarise
from tidegate.sim.invariants import BrokenRunError, above_bound, digest, every_arm, watched

LOAD, REPLICAS, SECONDS, WARM_UP_S = 1.0, 3, 300.0, 60.0
AGAIN = ("cooperating-1-2-1-4", "ours", "ours-cooperating", "packing-1", "qoserve")
"""Arms that are run twice, the second time not watched: each kind of router and engine."""


@dataclass(frozen=True, slots=True)
class Held:
    """What was seen of an arm: what was wrong, batch requests/s a replica, and chats and batch served."""

    name: str
    wrong: list[str]
    batch_per_s: float
    served: int
    cpu_s: float


def quick_point(name: str, seconds: float = SECONDS) -> Point:
    """A run of some seconds of a core."""
    return Point(name, LOAD, seed=1, replicas=REPLICAS, seconds=seconds, warm_up_s=WARM_UP_S)


def hold(point: Point) -> Held:
    """Run an arm, and see what does not hold."""
    began_s, chosen = time.process_time(), arm(point.arm)
    try:
        run, wrong = watched(chosen, point.setting(), point.seed)
    except BrokenRunError as error:
        return Held(point.arm, [str(error)], 0.0, 0, time.process_time() - began_s)
    raw = summarise(run)
    if above := above_bound(point, raw):
        wrong.append(above)
    if point.arm in AGAIN and digest(run) != digest(Fleet(point.setting(), chosen, point.seed).run()):
        wrong.append("the same seed gave other records")
    served = sum(r.finish_s is not None for r in run.records)
    if not served:
        wrong.append("nobody was served")
    return Held(point.arm, wrong, raw.batch_per_s, served, time.process_time() - began_s)


def quick() -> list[Row]:
    """Every arm there is; its rows, and an end with all that was wrong if anything was.

    Raises:
        SystemExit: something does not hold.
    """
    points = [quick_point(name) for name in every_arm()]
    # The dearest first, so that no core waits for the last.
    points.sort(key=lambda p: not p.arm.startswith("ours"))
    began_s, found = time.monotonic(), list[Held]()
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        for held in pool.map(hold, points):
            found.append(held)
            state = "; ".join(held.wrong) or "holds"
            print(
                f"[{time.monotonic() - began_s:4.0f} s] {len(found)}/{len(points)} {held.name}: {state}"
                f" ({held.served} served, {held.cpu_s:.1f} s CPU)",
                flush=True,
            )
    broken = {held.name: held.wrong for held in found if held.wrong}
    if broken:
        raise SystemExit(f"these do not hold: {broken}")
    return [
        row(f"load {LOAD:g}, {held.name}: batch, of bound B", [held.batch_per_s / bound_per_s(LOAD)], "")
        for held in sorted(found, key=lambda h: h.name)
    ]
