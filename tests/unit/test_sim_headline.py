"""The headline setting, its figures, and the points that are run once and stored."""

import json
import math

import pytest

from tidegate.sim.headline import BATCH_ALONE, Point, Raw, bound_per_s, compare, run_point
from tidegate.sim.points import imported, run_points, stored, version

SHORT = {"replicas": 2, "seconds": 90.0, "warm_up_s": 10.0}
CAP = Point("cap-4", 1.0, 1, **SHORT)


def raw(p99_s=0.5, batch_per_s=1.0, attainment=1.0):
    return Raw(100, 0.1, p99_s, attainment, 0.02, 0.03, batch_per_s, 0, 0)


def test_the_backlog_is_larger_than_all_slots():
    setting = CAP.setting()
    by_class = {s.qos_class: s for s in setting.streams}
    assert by_class["batch"].outstanding == 640 > 2 * setting.config.max_num_seqs
    assert set(by_class) == {"interactive", "batch"}
    (alone,) = Point(BATCH_ALONE, 0.0, 1).setting().streams
    assert alone.qos_class == "batch", "no load, no people"


def test_figures_are_beside_references_of_the_same_seed_and_length():
    alone, batch = CAP.references
    assert (alone.arm, alone.load, alone.seed, alone.seconds) == ("alone", 1.0, 1, 90.0)
    assert (batch.arm, batch.load, batch.seed, batch.seconds) == (BATCH_ALONE, 0.0, 1, 90.0)
    most, most_alone = bound_per_s(1.0), bound_per_s(0.0)
    found = {CAP: raw(0.6, most / 2), alone: raw(0.5), batch: raw(math.nan, 0.9 * most_alone, math.nan)}
    figures = compare(CAP, found)
    assert figures.ttft_ratio == pytest.approx(1.2)
    assert figures.h_lp == pytest.approx(0.5)
    assert figures.h == pytest.approx(0.5 / 0.9)
    assert compare(batch, found).h == pytest.approx(1.0)
    assert math.isnan(compare(batch, found).ttft_ratio)
    with pytest.raises(KeyError):
        compare(CAP, {CAP: raw()})


def test_known_figures():
    """Batch alone reaches nine tenths of the bound, and people alone their first token in time."""
    batch = run_point(Point(BATCH_ALONE, 0.0, 1, replicas=2, seconds=400.0, warm_up_s=100.0))
    assert batch.batch_per_s / bound_per_s(0.0) == pytest.approx(0.92, abs=0.03)
    people = run_point(Point("alone", 1.0, 1, replicas=10, seconds=150.0, warm_up_s=10.0))
    assert people.ttft_p99_s == pytest.approx(0.458, rel=0.05)
    assert people.attainment > 0.99
    assert people.batch_per_s == 0.0


def test_a_point_is_run_once(tmp_path):
    path = tmp_path / "points.jsonl"
    lines: list[str] = []
    first = run_points([CAP], path, lines.append, workers=1)
    assert set(first) == {CAP, *CAP.references}
    assert [line.split("] ")[1].split(", seed")[0] for line in lines] == [
        "1/3 alone, load 1",
        "2/3 packing-0, load 0",
        "3/3 cap-4, load 1",
    ]
    again = run_points([CAP], path, lines.append)
    assert len(lines) == 3
    assert [repr(again[p]) for p in first] == [repr(first[p]) for p in first]


def test_what_was_cut_off_or_is_of_other_code_is_run_again(tmp_path):
    path = tmp_path / "points.jsonl"
    batch = Point(BATCH_ALONE, 0.0, 1, replicas=1, seconds=20.0, warm_up_s=5.0)
    run_points([batch], path, workers=1)
    (line,) = path.read_text().splitlines()
    old = json.loads(line) | {"version": "another"}
    path.write_text(json.dumps(old) + "\n" + line[: len(line) // 2])
    assert [key[1] for key in stored(path)] == ["another"]
    run_points([batch], path, workers=1)
    assert sorted(key[1] for key in stored(path)) == sorted(["another", version(BATCH_ALONE)])


def test_an_arm_depends_on_its_own_code():
    packing = imported("tidegate.sim.fleet_arms.packing")
    assert {"tidegate.sim.fleet_arms.central", "tidegate.sim.fleet_arms.site"} <= packing
    assert "tidegate.core.flow" not in packing
    assert {"tidegate.core.flow", "tidegate.core.pick"} <= imported("tidegate.sim.fleet_arms.production")
    assert version("packing-1") == version("silos-1-1-1") != version("fifo")


def test_a_wrong_name_is_an_error_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="no arm is named 'nobody'"):
        run_points([CAP, Point("nobody", 1.0, 1)], tmp_path / "points.jsonl")
