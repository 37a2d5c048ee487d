"""How long one plan takes: 200 models × 5 classes × 5,000 GPUs. `--quick` runs a small one."""

import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from report import record, row

from tidegate.core.plan import plan
from tidegate.core.plan.types import Demand, Lane, LaneKey, Memory, Model, Policy, Snapshot
from tidegate.core.types import Node, Pod, Pool, QoSClass, Reclaim, Reservation

TARGET_MS = 100.0
CLASSES = {
    q.name: q
    for q in (
        QoSClass("realtime", 2000),
        QoSClass("interactive", 1000),
        QoSClass("standard", 500, Reclaim.ABOVE_MINIMUM),
        QoSClass("bulk", 100, Reclaim.ALWAYS),
        QoSClass("batch", 0, Reclaim.ALWAYS),
    )
}
SIZES = (1, 2, 4, 8)


def pool(gpus: int) -> Pool:
    """Nodes of 8; four fifths reserved."""
    nodes = tuple(Node(f"node-{i:04d}", 8) for i in range(gpus // 8))
    share = {"realtime": 10, "interactive": 40, "standard": 20, "bulk": 10}
    kept = tuple(Reservation(name, name, gpus * n // 100) for name, n in share.items())
    return Pool("pool", nodes, kept)


def demand(rng: random.Random, qos: str, rush: float, replicas: float) -> Demand:
    """Load of about `replicas`; interactive is multiplied by `rush`; batch has a backlog."""
    if qos in {"bulk", "batch"}:
        return Demand(output_tokens_per_s=100, queued_requests=500, queued_tokens=rng.uniform(1e5, 1e6))
    factor = rush if qos == "interactive" else 1.0
    return Demand(arrival_rps=1, output_tokens_per_s=factor * replicas * rng.uniform(300, 1100))


def world(models: int, gpus: int, rush: float, seed: int) -> Snapshot:
    """An empty cluster with demand for it."""
    rng = random.Random(seed)
    made, load = [], {}
    each = gpus / models / len(CLASSES) / 3.75
    for i in range(models):
        size = SIZES[i % len(SIZES)]
        keys = [LaneKey("ns", f"model-{i:03d}", q) for q in CLASSES]
        lanes = tuple(Lane(k, size, min_replicas=int(k.qos_class == "interactive")) for k in keys)
        made.append(Model("ns", f"model-{i:03d}", "pool", lanes))
        load |= {k: demand(rng, k.qos_class, rush, each) for k in keys}
    return Snapshot(CLASSES, {"pool": pool(gpus)}, tuple(made), (), load)


def settled(snapshot: Snapshot, policy: Policy) -> Snapshot:
    """The same after its plan was applied: every replica a ready pod, first fit, largest first."""
    lanes = plan(snapshot, policy, Memory(), 0.0).lanes
    free = {n.name: n.gpus for n in snapshot.pools["pool"].nodes}
    pods, models = [], []
    wanted = sorted(
        ((x, i) for m in snapshot.models for x in m.lanes for i in range(lanes[x.key].replicas)),
        key=lambda pair: -pair[0].gpus,
    )
    counts: dict[LaneKey, int] = {}
    for x, i in wanted:
        node = next((n for n, left in free.items() if left >= x.gpus), None)
        if node is None:
            continue
        free[node] -= x.gpus
        counts[x.key] = counts.get(x.key, 0) + 1
        uid = f"{x.key}-{i}"
        pods.append(
            Pod(uid, uid, "ns", x.gpus, float(i), x.key.qos_class, x.key.model, node, float(i), ready=True)
        )
    for m in snapshot.models:
        done = tuple(
            Lane(x.key, x.gpus, x.min_replicas, replicas=counts.get(x.key, 0), ready=counts.get(x.key, 0))
            for x in m.lanes
        )
        models.append(Model(m.namespace, m.name, m.pool, done))
    return Snapshot(CLASSES, snapshot.pools, tuple(models), tuple(pods), snapshot.demand)


def timed(snapshot: Snapshot, policy: Policy, times: int) -> tuple[list[float], list[float]]:
    """Milliseconds by the clock and of CPU of each of several plans of the same snapshot.

    The two differ by what else ran on the machine meanwhile.
    """
    wall, cpu = [], []
    for _ in range(times):
        begin, begin_cpu = time.perf_counter(), time.process_time()
        plan(snapshot, policy, Memory(), 1000.0)
        wall.append((time.perf_counter() - begin) * 1000)
        cpu.append((time.process_time() - begin_cpu) * 1000)
    return wall, cpu


def main() -> None:
    """Measure three moments: an empty cluster, a full one at rest, and a rush into the full one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the size, claims nothing")
    parser.add_argument("--times", type=int, default=15, help="plans for each figure (default 15)")
    args = parser.parse_args()
    models, gpus, times = (20, 480, 3) if args.quick else (200, 5000, args.times)
    policy = Policy()
    calm = world(models, gpus, 1.0, seed=1)
    full = settled(calm, policy)
    rush = Snapshot(CLASSES, full.pools, full.models, full.pods, world(models, gpus, 3.0, seed=1).demand)
    size = f"{models} models × {len(CLASSES)} classes × {gpus} GPUs"
    rows = []
    for name, snapshot in (("empty", calm), ("at rest, full", full), ("rush into a full one", rush)):
        print(f"{name}: {len(snapshot.pods)} pods")
        wall, cpu = timed(snapshot, policy, times)
        rows.append(row(f"plan, {size}, {name}", wall, "ms", at_most=TARGET_MS, claims=not args.quick))
        rows.append(row(f"plan, {size}, {name}, CPU time", cpu, "ms"))
    record("plan", rows)


if __name__ == "__main__":
    main()
