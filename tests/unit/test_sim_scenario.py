"""Scenarios: what is refused and in which words, and what becomes of what is accepted."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from tidegate.sim import build, whatif
from tidegate.sim.fleet import Fleet, Setting
from tidegate.sim.fleet_arms.registry import arm
from tidegate.sim.scenario import Scenario, ScenarioError

ROOT = Path(__file__).parents[2]
CHAT: dict[str, Any] = {
    "name": "chat",
    "class": "interactive",
    "lengths": "chat",
    "arrivals": {"poisson": {"perSecond": 2}},
}
BACKLOG: dict[str, Any] = {"name": "work", "class": "batch", "lengths": "summaries", "outstanding": 50}


def a_scenario(**changes: Any) -> dict[str, Any]:
    """A valid one, with fields changed, or taken out where None."""
    base: dict[str, Any] = {
        "seconds": 60,
        "classes": {
            "interactive": {"priority": 1000, "objectives": {"timeToFirstToken": "1s"}},
            "batch": {"priority": 0, "reclaim": "Always", "queue": {"maxWait": "24h"}},
        },
        "replicas": 2,
        "streams": [CHAT, BACKLOG],
    }
    return {k: v for k, v in (base | changes).items() if v is not None}


def stream(**changes: Any) -> dict[str, Any]:
    """The scenario with its first stream changed."""
    own = {k: v for k, v in (CHAT | changes).items() if v is not None}
    return a_scenario(streams=[own, BACKLOG])


def setting(raw: dict[str, Any], folder: Path = Path()) -> Setting:
    return build.setting(Scenario.read(raw, folder))


FAULT = {"kind": "death", "replica": "model-interactive-0", "start": "10s", "end": "20s"}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no time": (a_scenario(seconds=None), "seconds is required"),
    "time of nothing": (a_scenario(seconds=0), "seconds .*greater than 0"),
    "time without unit": (a_scenario(seconds="60"), "seconds must be a duration with a unit"),
    "warm-up as a number": (a_scenario(warmUp=20), "warmUp must be a duration with a unit.*not 20"),
    "warm-up of all": (a_scenario(warmUp="60s"), "warmUp of 60 s leaves nothing to measure in 60 s"),
    "no seed": (a_scenario(seeds=0), "seeds must be at least 1"),
    "misspelt field": (a_scenario(strems=[]), "strems is not a known field; did you mean streams?"),
    "no stream": (a_scenario(streams=[]), "streams .*at least 1 item"),
    "no class": (a_scenario(classes={}), "classes .*at least 1 item"),
    "misspelt field of a class": (
        a_scenario(classes={"interactive": {"priorty": 1}}),
        "classes.interactive.priorty is not a known field; did you mean priority?",
    ),
    "duration of a class": (
        a_scenario(classes={"interactive": {"priority": 1, "objectives": {"timeToFirstToken": 1}}}),
        "classes.interactive.objectives.timeToFirstToken must be a duration with a unit",
    ),
    "unknown class": (stream(**{"class": "interactve"}), "did you mean interactive?"),
    "no class of a stream": (stream(**{"class": None}), r"streams\[0\].class is required"),
    "unknown model": (
        a_scenario(replicas=[{"model": "a"}], streams=[CHAT | {"model": "b"}]),
        r"streams\[0\].model 'b' is not in the models of replicas; there: a",
    ),
    "two models, a count": (
        a_scenario(streams=[CHAT | {"model": "a"}, BACKLOG | {"model": "b"}]),
        r"replicas\[0\].model is required",
    ),
    "unknown lane": (a_scenario(replicas=[{"lane": "bach"}]), r"replicas\[0\].lane 'bach'.*mean batch"),
    "replicas of none": (a_scenario(replicas=0), r"must set replicas\[0\].count to at least 1"),
    "unknown flag": (a_scenario(engine={"max-num-seq": 1}), "engine.max-num-seq .*did you mean max-num-seqs"),
    "no room for prompts": (
        a_scenario(engine={"max-num-seqs": 512, "max-num-batched-tokens": 512}),
        r"engine needs max-num-batched-tokens above max-num-seqs \(512\), not 512",
    ),
    "cache too small": (
        a_scenario(engine={"num-gpu-blocks": 100}),
        "stream chat: its longest request holds .* tokens.*raise num-gpu-blocks to at least",
    ),
    "unknown step time": (a_scenario(stepTime="h100"), "stepTime 'h100' is not known; there is llama"),
    "no arrivals": (stream(arrivals=None), r"streams\[0\] must set one of arrivals"),
    "two kinds of arrivals": (stream(outstanding=3), r"streams\[0\] must set only one of arrivals"),
    "two shapes": (
        stream(arrivals={"poisson": {"perSecond": 1}, "trace": {"perSecond": 1}}),
        r"streams\[0\].arrivals must set exactly one of poisson, gamma, phases and trace",
    ),
    "no rate": (stream(arrivals={"poisson": {"perSecond": 0}}), r"streams\[0\].arrivals.poisson.perSecond"),
    "silent phases": (
        stream(arrivals={"phases": [{"perSecond": 0, "seconds": 9}]}),
        "needs a phase with perSecond above 0",
    ),
    "no lengths": (stream(lengths=None), r"streams\[0\] must set lengths: chat, code, summaries"),
    "unknown lengths": (stream(lengths="chta"), r"streams\[0\].lengths: chta is not there; it is chat, code"),
    "one name twice": (a_scenario(streams=[CHAT, CHAT]), "the name chat is there twice"),
    "unknown fault": (a_scenario(faults=[FAULT | {"kind": "ill"}]), r"faults\[0\].kind must be one of"),
    "fault at nobody": (a_scenario(faults=[FAULT | {"replica": "x"}]), r"faults\[0\].replica 'x' is not in"),
    "fault backwards": (a_scenario(faults=[FAULT | {"start": "30s"}]), r"faults\[0\] needs start before end"),
    "slow by what": (a_scenario(faults=[FAULT | {"kind": "slow"}]), r"faults\[0\] must set factor when kind"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_scenario_names_the_field_and_the_fix(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        setting(raw)


FILES = {
    "no YAML": ("seconds: [", "not YAML"),
    "a list": ("- 1", "must be a mapping"),
    "two errors": ("seconds: 0\n", "seconds .*; classes is required; replicas is required"),
}


@pytest.mark.parametrize(("text", "message"), FILES.values(), ids=FILES)
def test_an_unreadable_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(ScenarioError, match=f"s.yaml: .*{message}"):
        Scenario.load(path)
    with pytest.raises(ScenarioError, match=r"none.yaml: No such file"):
        Scenario.load(tmp_path / "none.yaml")


def test_the_smallest_scenario_has_one_model_and_the_highest_lane() -> None:
    found = setting(a_scenario())
    assert [r.address for r in found.replicas] == ["model-interactive-0", "model-interactive-1"]
    assert {s.model for s in found.streams} == {("default", "model")}


def test_specs_of_manifests_can_be_pasted() -> None:
    manifests = yaml.safe_load_all((ROOT / "examples/02-classes.yaml").read_text())
    pasted = {m["metadata"]["name"]: m["spec"] for m in manifests}
    found = setting(a_scenario(classes=pasted))
    assert found.classes["interactive"].objectives.ttft_s == 1.0
    assert found.classes["batch"].queue_max_wait_s == 3600.0


def test_replicas_by_lane_have_their_own_speed_and_engine() -> None:
    groups = [
        {"lane": "interactive", "count": 1, "speed": 0.5},
        {"lane": "batch", "count": 1, "engine": {"max-num-seqs": 8}},
        {"lane": "batch", "count": 1},
    ]
    fleet = setting(a_scenario(replicas=groups)).replicas
    assert [r.address for r in fleet] == ["model-interactive-0", "model-batch-0", "model-batch-1"]
    assert fleet[0].speed == 0.5
    assert fleet[1].config is not None
    assert (fleet[1].config.max_num_seqs, fleet[2].config) == (8, None)


def test_lengths_are_scaled_to_means() -> None:
    found = setting(stream(lengths={"trace": "chat", "meanPrompt": 300, "meanOutput": 90})).streams[0]
    assert sum(x.prompt for x in found.lengths) / len(found.lengths) == pytest.approx(300, rel=0.01)
    assert sum(x.output for x in found.lengths) / len(found.lengths) == pytest.approx(90, rel=0.01)


@pytest.mark.parametrize("path", sorted((ROOT / "examples/simulate").glob("*.yaml")), ids=lambda p: p.name)
def test_examples_can_be_simulated(path: Path) -> None:
    found = build.setting(Scenario.load(path))
    assert all(next(s.arrivals(1)).length.prompt > 0 for s in found.streams)


# ── recorded requests ───────────────────────────────────────────────────────────────────────────

RECORDED = """\
# who and when
timestamp,prompt,output,class,tenant,model
2026-05-01T12:00:04Z,40,4,interactive,web,m
2026-05-01T12:00:00Z,10,1,interactive,web,m
2026-05-01T12:00:01Z,20,2,batch,,m
2026-05-01T12:00:03Z,30,3,interactive,web,m
"""


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    (tmp_path / "r.csv").write_text(RECORDED)
    return tmp_path


def from_csv(**more: Any) -> dict[str, Any]:
    return a_scenario(replicas=[{"model": "m"}], streams=[{"name": "all", "csv": "r.csv"} | more])


def arrivals(raw: dict[str, Any], folder: Path, count: int) -> dict[str, list[tuple[float, int]]]:
    """By stream: time and prompt of the first so many."""
    return {
        s.name: [(a.time_s, a.length.prompt) for a in itertools.islice(s.arrivals(1), count)]
        for s in setting(raw, folder).streams
    }


def test_a_csv_is_replayed_by_class_and_tenant_as_it_was(recorded: Path) -> None:
    assert arrivals(from_csv(), recorded, 4) == {
        "all/batch//m": [(1.0, 20), (1 + 16 / 3, 20), (1 + 32 / 3, 20), (17.0, 20)],
        "all/interactive/web/m": [(0.0, 10), (3.0, 30), (4.0, 40), (16 / 3, 10)],
    }


def test_a_csv_can_be_stretched_to_a_rate(recorded: Path) -> None:
    # Four requests in 16/3 s are 0.75 a second.
    found = arrivals(from_csv(arrivals={"trace": {"perSecond": 1.5}}), recorded, 3)
    assert found["all/interactive/web/m"] == [(0.0, 10), (1.5, 30), (2.0, 40)]


def test_what_a_stream_sets_takes_the_place_of_columns(recorded: Path) -> None:
    found = setting(from_csv(**{"class": "batch", "tenant": "t", "outstanding": 3}), recorded).streams
    assert [(s.name, s.qos_class, s.tenant, s.outstanding) for s in found] == [("all", "batch", "t", 3)]
    several = setting(from_csv(arrivals={"poisson": {"perSecond": 4}}), recorded).streams
    assert [len(s.lengths) for s in several] == [1, 3]


CSVS = {
    "not there": (None, "r.csv: No such file"),
    "no prompts": ("timestamp,output\n1,2\n", "has no column prompt"),
    "no rows": ("prompt,output\n", "has no rows"),
    "not a number": ("prompt,output,class\n1,1,batch\n1,x,batch\n", "row 2: .*'x'"),
    "not a time": ("timestamp,prompt,output,class\nsoon,1,1,batch\n", "timestamp 'soon' is neither seconds"),
    "no class": ("timestamp,prompt,output\n1,1,1\n2,1,1\n", r"class is required, or a column class in"),
    "an empty class": ("timestamp,prompt,output,class\n1,1,1,\n2,1,1,\n", "row 1 has no class"),
    "no times": ("prompt,output,class\n1,1,batch\n", "has no column timestamp; set arrivals"),
    "one time": ("timestamp,prompt,output,class\n1,1,1,batch\n", "two rows with different timestamps"),
}


@pytest.mark.parametrize(("text", "message"), CSVS.values(), ids=CSVS)
def test_a_wrong_csv_names_the_row(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "r.csv").write_text(text)
    with pytest.raises(ScenarioError, match=rf"streams\[0\].*{message}"):
        setting(from_csv(), tmp_path)


# ── what if ─────────────────────────────────────────────────────────────────────────────────────

GROUPS = [
    {"model": "a", "lane": "interactive", "count": 2, "gpus": 2},
    {"model": "a", "lane": "batch", "count": 3, "gpus": 2},
    {"model": "b", "lane": "batch", "count": 2, "gpus": 4},
]
"""18 GPUs, seven replicas."""
OF_A = [CHAT | {"model": "a"}, BACKLOG | {"model": "b"}]
CHANGES = {
    "none fewer": ("gpus", 0, [2, 3, 2]),
    "the largest lane of the lowest class first": ("gpus", -4, [2, 3, 1]),
    "at least so many": ("gpus", -5, [2, 2, 1]),
    "each model keeps one": ("gpus", -12, [1, 0, 1]),
    "more, the smallest first": ("gpus", 4, [2, 5, 2]),
    "not more than fit": ("gpus", 1, [2, 3, 2]),
    "so many in all": ("replicas", 3, [2, 0, 1]),
    "more in all": ("replicas", 9, [2, 5, 2]),
}


@pytest.mark.parametrize(("how", "value", "counts"), CHANGES.values(), ids=CHANGES)
def test_the_lowest_class_gains_and_gives_first(how: str, value: int, counts: list[int]) -> None:
    before = Scenario.read(a_scenario(replicas=GROUPS, streams=OF_A))
    change = whatif.with_gpus if how == "gpus" else whatif.with_replicas
    after = change(before, value)
    found = {(g.model, g.lane): g.count for g in after.replicas}
    assert [found.get((g["model"], g["lane"]), 0) for g in GROUPS] == counts
    assert bool(whatif.difference(before, after)) == (counts != [2, 3, 2])


def test_a_model_keeps_its_last_replica() -> None:
    scenario = Scenario.read(a_scenario(replicas=GROUPS, streams=OF_A))
    with pytest.raises(ScenarioError, match=r"--gpus -13: of 7 replicas on 18 GPUs one has to stay"):
        whatif.with_gpus(scenario, -13)
    with pytest.raises(ScenarioError, match="--replicas 1"):
        whatif.with_replicas(scenario, 1)


# ── what was added to the fleet for it ──────────────────────────────────────────────────────────


def test_who_ran_where_a_replica_died_is_remembered() -> None:
    run = Fleet(setting(a_scenario(faults=[FAULT])), arm("ours"), 1).run()
    stays = [stay for r in run.records for stay in r.stays]
    assert stays
    assert {ended for _, ended in stays} == {10.0}
    assert all(0 <= sent <= 10.0 for sent, _ in stays)
