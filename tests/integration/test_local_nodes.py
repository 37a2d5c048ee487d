"""GPU nodes in a cluster: pods are processes of this machine, and go with it."""

import json
import os
import signal
import time
from pathlib import Path

from tidegate.local.cluster import NODES, LocalCluster
from tidegate.local.process import Identity, alive, identity

# Starts a process in a session of its own, with no parent-death signal, that ignores SIGTERM; then waits.
STUBBORN = """
import os, pathlib, signal, sys, time
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(300)
"""


def pod(program: Path, pid_file: Path) -> str:
    container = {
        "name": "engine",
        "image": "tidegate/shell",
        "command": ["python3", str(program), str(pid_file)],
        "resources": {"limits": {"nvidia.com/gpu": "1"}},
    }
    tolerations = [{"operator": "Exists"}]
    metadata = {"name": "stubborn", "namespace": "default"}
    spec = {"containers": [container], "tolerations": tolerations}
    return json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})


def test_pods_and_what_they_started_die_with_the_supervisor(tmp_path: Path) -> None:
    program, pid_file = tmp_path / "stubborn.py", tmp_path / "pid"
    program.write_text(STUBBORN)
    with LocalCluster.start(tmp_path / "state", nodes=2, gpus_per_node=2, parts=NODES) as cluster:
        cluster.kubectl("wait", "--for=condition=Ready", "node", "--all", "--timeout=60s")
        nodes = json.loads(cluster.kubectl("get", "nodes", "-o", "json").stdout)["items"]
        assert [node["status"]["allocatable"]["nvidia.com/gpu"] for node in nodes] == ["2", "2"]
        cluster.kubectl("apply", "-f", "-", stdin=pod(program, pid_file))
        cluster.kubectl("wait", "--for=condition=Ready", "pod/stubborn", "--timeout=60s")
        orphan = _identity_in(pid_file)

        os.kill(cluster.status()["supervisor"]["pid"], signal.SIGKILL)
        deadline = time.monotonic() + 10
        while alive(orphan) or cluster.is_running():
            assert time.monotonic() < deadline, "something outlived the supervisor"
            time.sleep(0.05)


def _identity_in(pid_file: Path) -> Identity:
    deadline = time.monotonic() + 20
    while not pid_file.exists() or not pid_file.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    found = identity(int(pid_file.read_text()))
    assert found is not None
    return found
