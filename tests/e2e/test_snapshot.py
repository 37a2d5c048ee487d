"""The running cluster as a scenario, and the answer to a what-if about it."""

import asyncio
import json
from pathlib import Path

import yaml
from typer.testing import CliRunner

from support.chat import Caller
from tidegate.cli.main import app
from tidegate.local.cluster import LocalCluster


async def test_a_snapshot_can_be_simulated_with_fewer_gpus(
    examples: LocalCluster, chat: Caller, tmp_path: Path
) -> None:
    path = tmp_path / "now.yaml"
    take = ["snapshot", "--kubeconfig", str(examples.kubeconfig), "--window", "3s", "--out", str(path)]
    take += ["--picker", examples.url("picker"), "--controller", examples.url("controller")]
    taken = asyncio.create_task(asyncio.to_thread(CliRunner().invoke, app, take))
    secret = "a secret of people"
    while not taken.done():
        answer = await chat.chat("chat-8b", prompt=secret, tokens=8)
        assert answer.status_code == 200
    assert (await taken).exit_code == 0, (await taken).stderr
    text = path.read_text()
    found = yaml.safe_load(text)
    assert {"interactive", "standard", "batch"} == set(found["classes"])
    replicas = {(g["model"], g["lane"]): g for g in found["replicas"]}
    assert replicas["team-a/chat-8b", "interactive"]["gpus"] == 2
    assert found["engine"]["num-gpu-blocks"] == 4096
    stream = next(s for s in found["streams"] if s["name"] == "team-a/chat-8b/interactive")
    assert stream["arrivals"]["poisson"]["perSecond"] > 0.3
    assert stream["lengths"]["meanOutput"] > 0
    assert any("16 GPUs" in note for note in found["notes"])
    assert secret not in text

    ask = ["simulate", str(path), "--seconds", "90", "-o", "json", "--quiet", "--compare", "ours,fifo"]
    for more in ([], ["--gpus", "+4"]):
        ended = await asyncio.to_thread(CliRunner().invoke, app, [*ask, *more])
        assert ended.exit_code == 0, ended.stderr
        result = json.loads(ended.stdout)
        assert set(result["arms"]) == {"ours", "fifo"}
        rows = {row["qos_class"]: row for row in result["arms"]["ours"]["classes"]}
        assert rows["interactive"]["requests"]["median"] > 0


async def test_without_a_picker_it_says_what_it_assumes(examples: LocalCluster) -> None:
    take = ["snapshot", "--kubeconfig", str(examples.kubeconfig), "-o", "json"]
    taken = await asyncio.to_thread(CliRunner().invoke, app, take)
    assert taken.exit_code == 0, taken.stderr
    assert any("1 request/s for each replica" in note for note in json.loads(taken.stdout)["notes"])
    assert "no --picker was given" in taken.stderr
