"""`tidegate simulate`, end to end: what it prints, writes and refuses."""

import json
import math
import os
import signal
import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from support.wait import wait_for
from tidegate.cli.main import app
from tidegate.sim.contest import FIGURES
from tidegate.sim.fleet_arms.registry import ARMS, arm
from tidegate.sim.parallel import Job, Progress, contest
from tidegate.sim.scenario import Scenario
from tidegate.sim.summary import spread

SCENARIO: dict[str, Any] = {
    "seconds": 60,
    "warmUp": "5s",
    "classes": {
        "interactive": {"priority": 1000, "objectives": {"timeToFirstToken": "2s"}},
        "batch": {"priority": 0, "reclaim": "Always", "queue": {"maxWait": "24h"}},
    },
    "replicas": [{"lane": "interactive", "count": 1}, {"lane": "batch", "count": 2}],
    "engine": {"max-num-batched-tokens": 512},
    "streams": [
        {
            "name": "chat",
            "class": "interactive",
            "tenant": "web",
            "lengths": "chat",
            "arrivals": {"poisson": {"perSecond": 2}},
        },
        {"name": "work", "class": "batch", "lengths": "summaries", "outstanding": 500, "streamed": False},
    ],
}


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(SCENARIO))
    return path


def simulate(*args: object) -> Result:
    return CliRunner().invoke(app, ["simulate", *(str(a) for a in args)])


def test_arms_beside_each_other_as_json_with_plots(scenario: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = simulate(scenario, "--compare", "ours,fifo", "-o", "json", "--seeds", 2, "--out", out)
    assert ended.exit_code == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found == json.loads((out / "result.json").read_text())
    assert (found["seconds"], found["replicas"], found["complete"]) == (60, 3, True)
    for name in ("ours", "fifo"):
        assert found["arms"][name]["seeds"] == [1, 2]
        assert found["arms"][name]["replicas_used"]["median"] == 3
    rows = {
        (name, row["qos_class"], row["tenant"]): row
        for name, by in found["arms"].items()
        for row in by["classes"]
    }
    assert {key[1:] for key in rows} == {("interactive", None), ("interactive", "web"), ("batch", None)}
    ours, fifo = rows["ours", "interactive", None], rows["fifo", "interactive", None]
    assert tuple(name for name in ours if name in FIGURES) == FIGURES
    assert ours["requests"]["median"] == pytest.approx(110, rel=0.3)
    assert ours["ttft_p50_s"]["median"] < 1 < (fifo["ttft_p50_s"]["median"] or math.inf)
    assert rows["ours", "batch", None]["tokens_per_s"]["median"] > 1000
    assert rows["ours", "batch", None]["judged"]["most"] == 0
    assert found["notes"] == ["class batch is counted and not judged: it promises nothing"]
    images = sorted(out.glob("*.png"))
    assert [p.stem for p in images] == ["in-flight", "tokens", "ttft-cdf", "ttft-time"]
    assert all(p.stat().st_size > 10_000 for p in images)


def test_a_table_for_people_and_the_answer_to_what_if(scenario: Path) -> None:
    ended = simulate(scenario, "--seconds", "20s", "--gpus", "-1")
    assert ended.exit_code == 0, ended.stderr
    assert "what if: replicas batch of default/model: 2 → 1" in ended.stderr
    lines = [line.split() for line in ended.stdout.splitlines() if line.strip()]
    assert lines[1][:6] == ["class", "tenant", "arm", "requests", "answered", "refused"]
    assert [line[:3] for line in lines if "ours" in line[1:3]] == [
        ["interactive", "all", "ours"],
        ["interactive", "web", "ours"],
        ["batch", "all", "ours"],
    ]
    assert "2 of 2" in ended.stdout


REFUSED = {
    "no such file": (["none.yaml"], "none.yaml: No such file or directory"),
    "no such arm": (["s.yaml", "--compare", "ours,theirs"], "no arm is named 'theirs'; there are aborting, "),
    "no arm": (["s.yaml", "--compare", ","], "no arm is named ''"),
    "too short": (["s.yaml", "--seconds", "5"], "warmUp of 5 s leaves nothing to measure in 5 s"),
    "no time": (["s.yaml", "--seconds", "soon"], "--seconds must be above 0, such as 600 or 10m"),
    "too few GPUs": (["s.yaml", "--gpus", "-3"], "of 3 replicas on 3 GPUs one has to stay"),
    "two what-ifs": (["s.yaml", "--gpus", "1", "--replicas", "2"], "give one of them"),
}


@pytest.mark.parametrize(("args", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_two_and_a_sentence(
    scenario: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.chdir(scenario.parent)
    ended = simulate(*args)
    assert ended.exit_code == 2
    assert message in ended.stderr
    assert ended.stdout == ""


def test_without_matplotlib_plots_name_the_extra(
    scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *a: None if name == "matplotlib" else known(name, *a))
    ended = simulate(scenario, "--out", tmp_path / "out")
    assert ended.exit_code == 2
    assert "pip install 'tidegate[demo]'" in ended.stderr


def test_ctrl_c_keeps_what_has_ended(scenario: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.ended:
            raise KeyboardInterrupt

    plan = Scenario.load(scenario).model_copy(update={"seconds": 30.0})
    jobs = [Job("ours", 1), *(Job("ours", seed) for seed in range(2, 40))]
    outcomes, whole = contest(plan, jobs, interrupt, workers=1)
    assert not whole
    assert 1 <= len(outcomes) < len(jobs)
    assert outcomes[0].rows["interactive", None]["requests"] > 0


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "killed"])
def test_no_process_outlives_the_command(scenario: Path, sent: signal.Signals) -> None:
    more = ["--seconds", "10m", "--seeds", "40"]
    command = [sys.executable, "-m", "tidegate", "simulate", str(scenario), *more]
    pipe = subprocess.PIPE
    # SIGINT is ignored in the background of a shell, and so by what tests start there.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    signal.signal(signal.SIGINT, before)
    with process:
        wait_for(lambda: len(children(process.pid)) >= 2, "workers")
        started = children(process.pid)
        # As a terminal does it: Ctrl-C goes to all of them.
        (os.killpg if sent is signal.SIGINT else os.kill)(process.pid, sent)
        _, said = process.communicate(timeout=60)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started), "their end")
    if sent is signal.SIGINT:
        assert process.returncode == 130
        assert "simulate: stopped; " in said


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_the_same_seed_gives_the_same_figures(scenario: Path) -> None:
    plan = Scenario.load(scenario).model_copy(update={"seconds": 20.0})
    (one, two, other), whole = contest(plan, [Job("ours", 1), Job("ours", 1), Job("ours", 2)])
    assert whole
    assert repr((one.rows, one.totals)) == repr((two.rows, two.totals))
    assert repr(one.rows) != repr(other.rows)


def test_ours_is_productions_queue() -> None:
    from tidegate.core.flow import Flow

    assert {"ours", "fifo"} <= set(ARMS)
    assert type(arm("ours").router()) is Flow


def test_a_spread_leaves_out_seeds_that_judged_nothing() -> None:
    assert spread([math.nan, 2.0, 1.0, math.inf]) == (2.0, 1.0, math.inf)
    assert spread([math.inf]).to_json() == {"median": None, "least": None, "most": None}
    assert all(math.isnan(v) for v in spread([math.nan]))
