"""Scenarios whose replicas are planned: what is refused, what-ifs, what is told, snapshots of clusters."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from support import builders
from tidegate.api.gpupool import GPUPool
from tidegate.api.modeldeployment import ModelDeployment
from tidegate.cli.main import app
from tidegate.core.types import Reservation
from tidegate.sim import build, whatif
from tidegate.sim.cluster.build import cluster, problems
from tidegate.sim.cluster.spec import ClusterSpec
from tidegate.sim.cluster.survey import plan_of
from tidegate.sim.scenario import Scenario, ScenarioError

RESERVED = {"name": "chat", "qosClass": "interactive", "gpus": 2}
POOL: dict[str, Any] = {
    "name": "gpus",
    "nodes": [{"gpus": 4}, {"count": 2, "gpus": 2}],
    "reservations": [RESERVED],
}


def a_scenario(**changes: Any) -> dict[str, Any]:
    """A valid one, with fields changed, or taken out where None."""
    base: dict[str, Any] = {
        "seconds": 60,
        "warmUp": "10s",
        "classes": {
            "interactive": {"priority": 1000, "objectives": {"timeToFirstToken": "1s"}},
            "batch": {"priority": 0, "reclaim": "Always", "queue": {"maxWait": "24h"}},
        },
        "replicas": [
            {"model": "chat", "lane": "interactive", "count": 1},
            {"model": "docs", "lane": "batch", "count": 3, "gpus": 2, "speed": 1.5},
        ],
        "plan": {"pools": [POOL], "startTime": {"least": "5s", "most": "10s"}},
        "streams": [
            {
                "name": "chat",
                "class": "interactive",
                "model": "chat",
                "lengths": "chat",
                "arrivals": {"poisson": {"perSecond": 3}},
            },
            {"name": "work", "class": "batch", "model": "docs", "lengths": "summaries", "outstanding": 50},
        ],
    }
    return {k: v for k, v in (base | changes).items() if v is not None}


def plan(**changes: Any) -> dict[str, Any]:
    return a_scenario(plan={"pools": [POOL]} | changes)


def pool(**changes: Any) -> dict[str, Any]:
    return plan(pools=[POOL | changes])


def made(raw: dict[str, Any]) -> ClusterSpec:
    scenario = Scenario.read(raw)
    found = cluster(scenario, build.setting(scenario))
    assert found is not None
    return found


def test_pools_lanes_and_engines_are_what_the_fields_say() -> None:
    found = made(a_scenario())
    (only,) = found.pools
    assert [(n.name, n.gpus) for n in only.nodes] == [("gpus-0-0", 4), ("gpus-1-0", 2), ("gpus-1-1", 2)]
    assert only.reservations == (Reservation("chat", "interactive", 2),)
    lanes = [(*x.key, x.gpus, x.replicas) for m in found.models for x in m.lanes]
    assert lanes == [("default", "chat", "interactive", 1, 1), ("default", "docs", "batch", 2, 3)]
    assert found.speeds["default", "docs"] == 1.5
    assert found.delays.start_s == (5.0, 10.0)
    assert cluster(Scenario.read(a_scenario(plan=None)), build.setting(Scenario.read(a_scenario()))) is None


def test_models_are_as_their_kind_says() -> None:
    classes = [{"qosClass": "interactive", "minReplicas": 1, "maxReplicas": 2}, {"qosClass": "batch"}]
    scaling = {"scaleDownDelay": "9s", "scaleToZeroAfter": "1m", "replicas": {"batch": 1}}
    model = {"name": "chat", "classes": classes, "maxReplicas": 3, "scaling": scaling}
    chat = made(plan(models=[model])).models[0]
    assert (chat.max_replicas, chat.scale_down_delay_s, chat.scale_to_zero_after_s) == (3, 9.0, 60.0)
    assert [(x.min_replicas, x.max_replicas, x.pinned) for x in chat.lanes] == [(1, 2, None), (0, None, 1)]


def test_a_share_is_of_the_pools_nodes() -> None:
    share = {"name": "chat", "qosClass": "interactive", "sharePercent": 50, "maxLend": 3}
    assert made(pool(reservations=[share])).pools[0].reservations[0] == Reservation(
        "chat", "interactive", 4, max_lend=3
    )


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no node": (pool(nodes=[]), r"plan.pools\[0\].nodes"),
    "a misspelt field": (pool(reservatons=[]), "did you mean reservations?"),
    "two of a name": (pool(reservations=[RESERVED, RESERVED]), "names of their own"),
    "labels": (
        pool(reservations=[RESERVED | {"namespaces": {"matchLabels": {"a": "b"}}}]),
        "selects by labels",
    ),
    "a reservation of nobody": (pool(reservations=[RESERVED | {"qosClass": "interactve"}]), "did you mean"),
    "a model that is not there": (plan(models=[{"name": "chatt"}]), "replicas has no entry of chatt"),
    "a pool that is not there": (plan(models=[{"name": "chat", "pool": "gpu"}]), "did you mean gpus?"),
    "a class that is not there": (
        plan(models=[{"name": "chat", "classes": [{"qosClass": "interactve"}]}]),
        "did you mean interactive?",
    ),
    "a lane that is not served": (
        plan(models=[{"name": "chat", "classes": [{"qosClass": "batch"}]}]),
        "lane 'interactive' is not in the classes of chat",
    ),
    "pools to choose from": (plan(pools=[POOL, POOL | {"name": "more"}]), "pool of chat is required"),
    "pools of one name": (
        plan(pools=[POOL, POOL], models=[{"name": m, "pool": "gpus"} for m in ("chat", "docs")]),
        "names of their own",
    ),
    "replicas that differ": (
        a_scenario(replicas=[{"model": "chat"}, {"model": "docs"}, {"model": "docs", "gpus": 2}]),
        "the same gpus, speed and engine",
    ),
    "a start that ends before it begins": (plan(startTime={"least": "2m"}), "least to be at most most"),
    "no replica and no plan": (
        a_scenario(plan=None, replicas=[{"model": "chat"}, {"model": "docs", "count": 0}]),
        r"replicas\[1\].count to at least 1, or plan",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_plan_names_the_field_and_the_fix(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        made(raw)


def test_a_model_may_begin_with_nothing() -> None:
    none = [{"model": "chat", "count": 0, "gpus": 2}, {"model": "docs", "lane": "batch"}]
    lane = made(a_scenario(replicas=none)).models[0].lanes[0]
    assert (lane.gpus, lane.replicas) == (2, 0)


# ── what if ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "nodes"),
    [
        (-1, [4, 2, 1]),
        (-2, [4, 2]),
        (-3, [4, 1]),
        (-5, [3]),
        (1, [4, 2, 2, 1]),
        (5, [4, 2, 2, 2, 2, 1]),
    ],
)
def test_gpus_go_and_come_by_nodes(change: int, nodes: list[int]) -> None:
    after = whatif.with_gpus(Scenario.read(a_scenario()), change)
    assert after.plan is not None
    assert [g.gpus for g in after.plan.pools[0].nodes for _ in range(g.count)] == nodes
    assert whatif.gpus(after) == 8 + change
    before = Scenario.read(a_scenario())
    assert whatif.difference(before, after) == [
        f"gpus: 8 GPUs (interactive 2 reserved) → {8 + change} GPUs (interactive 2 reserved)"
    ]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("interactive=6", [("chat", "interactive", 6)]),
        ("interactive=0", []),
        ("batch=3", [("chat", "interactive", 2), ("batch", "batch", 3)]),
    ],
)
def test_a_reservation_is_set_added_or_taken_away(text: str, kept: list[tuple[str, str, int]]) -> None:
    after = whatif.with_reservation(Scenario.read(a_scenario()), text)
    assert after.plan is not None
    assert [(r.name, r.qos_class, r.gpus) for r in after.plan.pools[0].reservations] == kept


def test_more_reserved_than_there_is_is_noted_and_simulated() -> None:
    """As in production: reservations are kept as they are written, and served by priority."""
    after = whatif.with_gpus(Scenario.read(a_scenario()), -7)
    (note,) = problems(after)
    assert "ask for 2 GPUs together (chat 2); the pool's 1 schedulable nodes have 1" in note
    assert problems(Scenario.read(a_scenario())) == problems(Scenario.read(a_scenario(plan=None))) == []


def test_what_cannot_be_asked_is_said() -> None:
    scenario, fixed = Scenario.read(a_scenario()), Scenario.read(a_scenario(plan=None))
    for wrong, message in (
        (lambda: whatif.with_gpus(scenario, -8), "pool gpus has 8 GPUs"),
        (lambda: whatif.with_replicas(scenario, 3), "the plan says how many"),
        (lambda: whatif.with_reservation(fixed, "batch=3"), "needs a scenario with plan"),
        (lambda: whatif.with_reservation(scenario, "bulk=3"), "CLASS=GPUS with one of interactive, batch"),
        (lambda: whatif.with_reservation(scenario, "batch"), "CLASS=GPUS"),
    ):
        with pytest.raises(ScenarioError, match=message):
            wrong()


# ── what is told ────────────────────────────────────────────────────────────────────────────────


def test_who_had_the_gpus_is_in_the_json_the_table_and_a_plot(tmp_path: Path) -> None:
    path, out = tmp_path / "s.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(a_scenario(seconds=30)))
    asked = ["simulate", str(path), "--reserve", "interactive=4", "--gpus", "+2", "--out", str(out)]
    ended = CliRunner().invoke(app, asked)
    assert ended.exit_code == 0, ended.stderr
    assert (
        "what if: pool gpus: 8 GPUs (interactive 2 reserved) → 10 GPUs (interactive 4 reserved)"
        in ended.stderr
    )
    assert "tokens thrown away" in ended.stdout
    assert "(idle)" in ended.stdout
    assert (out / "gpus.png").stat().st_size > 5000
    found = json.loads((out / "result.json").read_text())
    gpus = found["arms"]["ours"]["gpus"]
    assert found["gpus"] == 10
    assert sum(gpus["gpu_seconds"]["used"].values()) + gpus["gpu_seconds"]["idle"] == pytest.approx(10 * 20)
    assert gpus["timeline"][0]["ready"] == {"default/chat:interactive": 1, "default/docs:batch": 3}


def test_an_arm_that_parts_replicas_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(a_scenario()))
    ended = CliRunner().invoke(app, ["simulate", str(path), "--compare", "packing-2", "-q"])
    assert (ended.exit_code, "here the plan does" in ended.stderr) == (2, True)


# ── of a cluster ────────────────────────────────────────────────────────────────────────────────


def a_node(name: str, gpus: int, *, ready: bool = True) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "labels": {"gpu": "yes"}},
        "spec": {},
        "status": {
            "allocatable": {"nvidia.com/gpu": str(gpus)},
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


NODES = [a_node("a", 4), a_node("b", 4), a_node("c", 8), a_node("d", 8, ready=False)]


def seen(
    nodes: list[dict[str, Any]] | None = NODES, pools: list[dict[str, Any]] | None = None, **spec: Any
) -> tuple[dict[str, Any] | None, str]:
    notes: list[str] = []
    objects = [GPUPool.from_object(p) for p in (pools if pools is not None else [builders.pool()])]
    lanes = [{"qosClass": "batch"}, {"qosClass": "chat", "minReplicas": 1}, {"qosClass": "gone"}]
    model = ModelDeployment.from_object(builders.mdep(**{"classes": lanes, **spec}))
    found = plan_of(objects, nodes, [model], ["chat", "batch"], None, notes)
    return found, "\n".join(notes)


def test_pools_and_models_of_a_cluster_are_written_as_they_are() -> None:
    reservations = [
        {"name": "chat", "qosClass": "chat", "gpus": 6, "namespaces": {"matchLabels": {"team": "secret"}}},
        {"name": "old", "qosClass": "gone", "gpus": 1},
    ]
    raw = builders.pool(reservations=reservations, reclaim={"drainTimeout": "45s"})
    found, notes = seen(pools=[raw], maxReplicas=9, scaling={"scaleDownDelay": "2m"})
    assert found is not None
    assert found["pools"] == [
        {
            "name": "p",
            "nodes": [{"count": 2, "gpus": 4}, {"count": 1, "gpus": 8}],
            "reservations": [{"name": "chat", "qosClass": "chat", "gpus": 6}],
            "reclaim": {"drainTimeout": "45s"},
        }
    ]
    (model,) = found["models"]
    assert (model["name"], model["pool"], model["maxReplicas"]) == ("m", "p", 9)
    assert [c["qosClass"] for c in model["classes"]] == ["batch", "chat"]
    assert model["scaling"]["scaleDownDelay"] == "2m"
    assert "reservation chat is for all namespaces here" in notes
    assert "reservation old is left out: its class does not exist" in notes
    assert "secret" not in json.dumps(found)


@pytest.mark.parametrize(
    ("nodes", "pools", "note"),
    [
        (None, None, "nodes could not be listed"),
        ([], None, "m runs in no pool with nodes"),
        (NODES, [], "m runs in no pool with nodes"),
    ],
)
def test_without_pools_or_nodes_replicas_stay_as_they_are(nodes: Any, pools: Any, note: str) -> None:
    found, notes = seen(nodes, pools)
    assert found is None
    assert f"{note}: replicas stay as they are" in notes


def test_a_pool_that_only_observes_is_noted() -> None:
    assert "pool p only observes" in seen(pools=[builders.pool(mode="Observe")])[1]
