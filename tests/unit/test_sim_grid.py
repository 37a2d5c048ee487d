"""The grid of `make bench-sim`, and results that are kept so that a run which was stopped goes on."""

import json
import math
from dataclasses import replace

from tests.perf.kept import Kept, run_kept
from tests.perf.simgrid import ATTAINMENT, COST, LOADS, OTHERS, RATIO, Grid, best_packing, cost_s

from tidegate.sim.fleet_arms.registry import ARMS, arm, factory
from tidegate.sim.headline import Figures, Point, Raw
from tidegate.sim.wave import Missed, Wave, run

TASKS = (Wave("EDF-2048", 1, hours=0.5), Wave("EDF-2048", 2, hours=0.5))


def all_of(kept: Kept) -> tuple[dict[Wave, Missed], list[int]]:
    told: list[int] = []

    def tell(task: Wave, result: Missed) -> str:
        told.append(task.seed)
        return f"{task.seed}: {result.overall}"

    return run_kept(TASKS, run, Missed, kept, tell, workers=1), told


def test_what_is_kept_is_not_run_again_and_what_was_cut_off_is(tmp_path):
    path = tmp_path / "kept.jsonl"
    first, told = all_of(Kept(path, "tidegate.sim.wave"))
    assert [*first] == [*TASKS]
    assert told == [1, 2]
    assert all_of(Kept(path, "tidegate.sim.wave")) == (first, [])
    lines = path.read_text().splitlines()
    path.write_text(lines[0] + "\n" + lines[1][:-5])
    again, told = all_of(Kept(path, "tidegate.sim.wave"))
    assert [replace(one, cpu_s=0.0) for one in again.values()] == [
        replace(one, cpu_s=0.0) for one in first.values()
    ]
    assert told == [2]
    assert all_of(Kept(path, "tidegate.sim.wave")) == (again, [])


def test_results_of_other_code_are_not_taken(tmp_path):
    path, result = tmp_path / "kept.jsonl", Missed(10, 2, 0.1, math.nan, {"a": math.inf})
    Kept(path, "tidegate.sim.wave").put(TASKS[0], result)
    kept = Kept(path, "tidegate.sim.wave").get(TASKS[0])
    assert repr(Missed(**kept)) == repr(result), "what is not finite too"
    assert Kept(path, "tidegate.sim.saving").get(TASKS[0]) is None
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {"version": "another"}))
    assert Kept(path, "tidegate.sim.wave").get(TASKS[0]) is None


def figures(name: str, h: float, ratio: float = 1.0, attainment: float = 1.0) -> Figures:
    raw = Raw(100, 0.1, 0.5, attainment, 0.02, 0.03, 1.0, 0, 0)
    return Figures(Point(name, 1.0, 1), raw, ratio, h, h)


def test_the_best_packing_is_within_the_limits_and_harvests_the_most():
    found = [
        figures("packing-3", 0.8, ratio=RATIO + 0.01),
        figures("packing-4", 0.7),
        figures("packing-5", 0.6),
        figures("packing-4-cap-1", 0.75),
        figures("packing-4-cap-9", 0.9, attainment=ATTAINMENT - 0.01),
        figures("ours", 0.95),
    ]
    assert best_packing(found, capped=False) == "packing-4"
    assert best_packing(found, capped=True) == "packing-4-cap-1"
    assert best_packing(found[:1], capped=True) is None


def test_the_grid_is_as_stated():
    grid = Grid((1, 2, 3, 4, 5), 20_000)
    points = grid.first()
    assert len(points) == len(set(points))
    seeds = {(load, name): 0 for load in LOADS for name in ("ours", "aimd", "cap-4", "ours-without-pace")}
    for point in points:
        arm(point.arm)
        if (point.load, point.arm) in seeds:
            seeds[point.load, point.arm] += 1
    assert {n for (_, name), n in seeds.items() if name != "ours-without-pace"} == {5}
    assert {n for (_, name), n in seeds.items() if name == "ours-without-pace"} == {2}
    at_one = {p.arm for p in points if p.load == 1.0}
    assert set(OTHERS) <= at_one
    families = {factory(name)[0] for name in at_one} | {ARMS["alone"], ARMS["silos"]}
    assert families == set(ARMS.values()), "silos are for three classes, and the headline has two"
    best = [replace(f, point=replace(f.point, load=1.0)) for f in (figures("packing-4", 0.7),)]
    assert [p.seed for p in grid.second(best)] == [1, 2, 3, 4, 5] * 2


def test_the_full_grid_has_every_arm_at_every_load_and_costs_more():
    grid = Grid((1, 2, 3, 4, 5), 20_000)
    full = replace(grid, full=True)
    assert set(grid.first()) <= set(full.first())
    assert {(p.arm, p.load) for p in full.first()} >= {(name, load) for name in OTHERS for load in LOADS}
    assert cost_s(full.first()) > 2 * cost_s(grid.first()) > 0


def test_every_arm_has_a_cost():
    assert all(any(name.startswith(known) for known in COST) for name in OTHERS)
