"""A cluster as its user sees it: up and down, again and again, and after each way to die."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.wait import wait_for
from tidegate.local.cluster import CONTROL_PLANE, ClusterError, LocalCluster
from tidegate.local.process import Identity, alive

FOREGROUND = """
import sys, time
from tidegate.local.cluster import CONTROL_PLANE, LocalCluster
with LocalCluster.start(sys.argv[1], parts=CONTROL_PLANE):
    print("ready", flush=True)
    time.sleep(300)
"""


def tidegate(*args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "tidegate", "local", *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def running(directory: Path) -> list[str]:
    """Command lines of all processes that were told of this state folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
        except (FileNotFoundError, NotADirectoryError, ProcessLookupError, PermissionError):
            continue
        if entry.name.isdigit() and str(directory) in command and int(entry.name) != os.getpid():
            found.append(command.replace("\0", " ")[:120])
    return found


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A state folder; deep, so that a socket's path in it is longer than the system allows."""
    folder = tmp_path / ("deep-" * 20) / "state"
    yield folder
    LocalCluster(folder).stop()
    assert running(folder) == []


def test_up_twice_down_twice(directory: Path) -> None:
    where = ("--dir", str(directory))
    control_plane = ("up", *where, "--parts", "control-plane")
    first = json.loads(tidegate(*control_plane, "-o", "json").stdout)
    assert first["phase"] == "ready"

    again = tidegate(*control_plane, "-o", "json")
    assert "already up" in again.stderr
    second = json.loads(again.stdout)
    assert second["components"] == first["components"]

    other = tidegate(*control_plane, "--nodes", "2", "--gpus", "8", check=False)
    assert other.returncode == 1
    assert "other settings (gpus_per_node, nodes)" in other.stderr

    assert tidegate("kubeconfig", *where).stdout.strip() == first["kubeconfig"]
    assert "kube-apiserver" in tidegate("status", *where).stdout
    unknown = tidegate("logs", "nope", *where, check=False)
    assert unknown.returncode == 1
    assert "there are: etcd, install, kube-apiserver" in unknown.stderr
    assert tidegate("logs", "supervisor", *where, "--tail", "0").stdout == ""

    assert tidegate("down", *where).stdout == f"stopped {directory}\n"
    assert running(directory) == []
    assert tidegate("down", *where).stdout == f"no cluster runs in {directory}\n"
    assert tidegate("status", *where, check=False).returncode == 1
    assert json.loads((directory / "state.json").read_text())["phase"] == "stopped"


def test_up_while_it_comes_up(directory: Path) -> None:
    command = ["up", "--dir", str(directory), "--parts", "control-plane", "-o", "json"]
    with subprocess.Popen(
        [sys.executable, "-m", "tidegate", "local", *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as first:
        assert first.stderr is not None
        assert any("starting kube-apiserver" in line for line in first.stderr)
        second = tidegate(*command)
        first.communicate(timeout=60)
    assert first.returncode == 0
    assert "already up" in second.stderr
    assert json.loads(second.stdout)["phase"] == "ready"


def test_side_by_side(control_plane: LocalCluster, directory: Path) -> None:
    with LocalCluster.start(directory, parts=CONTROL_PLANE) as other:
        mine, theirs = control_plane.status(), other.status()
        assert mine["network"] != theirs["network"]
        assert mine["urls"]["api"] != theirs["urls"]["api"]
        control_plane.kubectl("create", "namespace", "only-here")
        assert other.kubectl("get", "namespace", "only-here", check=False).returncode == 1
        with pytest.raises(ClusterError, match=r"runs in .* already"):
            LocalCluster.start(directory, parts=CONTROL_PLANE)
    assert control_plane.kubectl("get", "namespace", "only-here").returncode == 0


def test_a_port_asked_for_and_taken(directory: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ClusterError) as caught:
            LocalCluster.start(directory, parts=CONTROL_PLANE, ports={"api": port})
    assert "api cannot listen on 127." in str(caught.value)
    assert f":{port}: the port is taken" in str(caught.value)
    assert f"leave out --port api={port}" in str(caught.value)


def test_a_component_that_does_not_start(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "fake"
    fake.mkdir()
    version = '[ "$1" = --version ] && echo etcd Version: 3.7.0 && echo Kubernetes v1.36.0 && exit\n'
    for name in ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"):
        (fake / name).write_text(f"#!/bin/sh\n{version}echo the disk is on fire; exit 3\n")
        (fake / name).chmod(0o755)
    monkeypatch.setenv("TIDEGATE_BIN", str(fake))
    with pytest.raises(ClusterError) as caught:
        LocalCluster.start(directory, parts=CONTROL_PLANE)
    assert "etcd ended 4 times before it was ready, with exit code 3" in str(caught.value)
    assert "the disk is on fire" in str(caught.value)
    assert running(directory) == []


@pytest.mark.parametrize("victim", ["parent", "guard", "supervisor"])
def test_whoever_is_killed_nothing_is_left_and_the_data_is(directory: Path, victim: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", FOREGROUND, str(directory)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent.stdout:
        assert parent.stdout.readline() == "ready\n"
    cluster = LocalCluster.attach(directory)
    cluster.kubectl("create", "namespace", "kept")
    state = cluster.status()
    processes = [Identity(c["pid"], c["started"]) for c in state["components"].values() if c["pid"]]
    assert len(processes) == 4
    assert all(alive(process) for process in processes)

    os.kill(parent.pid if victim == "parent" else state[victim]["pid"], signal.SIGKILL)
    wait_for(lambda: not any(alive(process) for process in processes), "the end of all components")
    parent.kill()
    parent.wait()
    wait_for(lambda: running(directory) == [], "the end of everything")

    # What the crash left in the state file must mislead nobody: pids may belong to others by now.
    wait_for(lambda: not cluster.is_running(), "init to collect what was killed")
    with pytest.raises(ClusterError, match="no cluster runs"):
        cluster.status()
    if victim == "supervisor":
        with LocalCluster.start(directory, parts=CONTROL_PLANE) as again:
            assert again.status()["network"] == state["network"]
            again.kubectl("get", "namespace", "kept")
    else:
        cluster.stop()
        assert json.loads((directory / "state.json").read_text())["phase"] == "stopped"


def test_a_stale_state_file_names_a_living_stranger(directory: Path) -> None:
    """A pid of an old cluster that belongs to another process now is left alone."""
    directory.mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"]) as stranger:
        who = {"pid": stranger.pid, "started": 1}
        stale = {
            "phase": "ready",
            "guard": who,
            "supervisor": who,
            "components": {"etcd": {**who, "state": "ready"}},
        }
        (directory / "state.json").write_text(json.dumps(stale))
        tidegate("down", "--dir", str(directory))
        assert stranger.poll() is None
        stranger.kill()


def test_what_dies_is_restarted(control_plane: LocalCluster) -> None:
    control_plane.kubectl("create", "namespace", "before-the-crash")
    before = control_plane.status()["components"]
    for name in ("kube-apiserver", "kube-controller-manager", "etcd"):
        os.kill(before[name]["pid"], signal.SIGKILL)
        wait_for(lambda name=name: control_plane.pid(name) not in (0, before[name]["pid"]), f"a new {name}")
        control_plane.wait_ready(name)
    control_plane.wait_ready("kube-apiserver")
    wait_for(
        lambda: control_plane.kubectl("get", "--raw", "/readyz", check=False).returncode == 0,
        "the API server",
    )
    control_plane.kubectl("get", "namespace", "before-the-crash")
    after = control_plane.status()["components"]
    assert after["etcd"]["restarts"] == before["etcd"]["restarts"] + 1
    assert after["kube-scheduler"] == before["kube-scheduler"]


def test_restart_with_other_arguments_and_of_one_that_hangs(control_plane: LocalCluster) -> None:
    pid = control_plane.pid("kube-scheduler")
    os.kill(pid, signal.SIGSTOP)  # it hears no SIGTERM
    control_plane.restart("kube-scheduler", ["--v=0"])
    now = control_plane.status()["components"]["kube-scheduler"]
    assert now["state"] == "ready"
    assert now["pid"] != pid
    assert now["extra_args"] == ["--v=0"]
    assert Path(f"/proc/{now['pid']}/cmdline").read_bytes().endswith(b"--v=0\0")
    control_plane.restart("kube-scheduler", [])


def test_restart_that_fails_says_why(control_plane: LocalCluster) -> None:
    with pytest.raises(ClusterError, match="unknown flag: --nope"):
        control_plane.restart("kube-scheduler", ["--nope"])
    control_plane.restart("kube-scheduler", [])
    with pytest.raises(ClusterError, match="no component 'nope' in this cluster; there are etcd"):
        control_plane.restart("nope")


def test_parts_act_under_their_own_account(control_plane: LocalCluster) -> None:
    for part in ("controller", "extender", "picker"):
        kubeconfig = control_plane.kubeconfig_for(f"tidegate-{part}")
        who = control_plane.kubectl("--kubeconfig", str(kubeconfig), "auth", "whoami", "-o", "json")
        user = json.loads(who.stdout)["status"]["userInfo"]["username"]
        assert user == f"system:serviceaccount:tidegate-system:tidegate-{part}"
        secrets = control_plane.kubectl(
            "--kubeconfig", str(kubeconfig), "auth", "can-i", "delete", "namespaces", check=False
        )
        assert secrets.stdout.strip() == "no"


def test_files_with_secrets_are_the_owners_only(control_plane: LocalCluster) -> None:
    root = control_plane.layout.root
    secret = [*root.glob("pki/*"), *root.glob("kubeconfigs/*"), control_plane.kubeconfig]
    assert secret
    assert [path for path in secret if path.stat().st_mode & 0o077] == []


def test_ctrl_c_while_starting_leaves_nothing(directory: Path) -> None:
    command = [sys.executable, "-m", "tidegate", "local", "up", "--dir", str(directory)]
    with subprocess.Popen([*command, "--parts", "control-plane"], stderr=subprocess.PIPE, text=True) as up:
        assert up.stderr is not None
        assert any("starting kube-apiserver" in line for line in up.stderr)
        up.send_signal(signal.SIGINT)
        assert up.wait(30) != 0
    assert running(directory) == []


def test_ctrl_c_ends_the_foreground(directory: Path) -> None:
    command = [sys.executable, "-m", "tidegate", "local", "up", "--foreground", "--dir", str(directory)]
    with subprocess.Popen(
        [*command, "--parts", "control-plane"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as up:
        assert up.stderr is not None
        assert any("Ctrl-C stops the cluster" in line for line in up.stderr)
        up.send_signal(signal.SIGINT)
        assert up.wait(30) == 0
    assert running(directory) == []
    assert json.loads((directory / "state.json").read_text())["phase"] == "stopped"
