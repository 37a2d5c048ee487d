"""The guard ends whatever is left, however the supervisor or the one who started it dies."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.wait import wait_for
from tidegate.local.process import Identity, alive, identity

# A supervisor whose grandchild has a session of its own and no parent-death signal, and ignores SIGTERM.
SUPERVISOR = """
import pathlib, subprocess, sys, time
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(120)"
child = subprocess.Popen(["/bin/sh", "-c", f"{sys.executable} -c '{code}' & echo $! > {sys.argv[1]}; wait"],
                         start_new_session=True)
time.sleep(120)
"""
# One who starts a guard and waits.
PARENT = """
import os, subprocess, sys
guard = subprocess.Popen([sys.executable, "-m", "tidegate.local.guard", "--parent", str(os.getpid()), "--",
                          sys.executable, "-c", sys.argv[1], sys.argv[2]], start_new_session=True)
print(guard.pid, flush=True)
guard.wait()
"""


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[dict[str, Identity]]:
    """Parent, guard, supervisor and grandchild, all running."""
    pid_file = tmp_path / "pid"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, SUPERVISOR, str(pid_file)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    guard = int(parent.stdout.readline())
    wait_for(lambda: pid_file.exists() and pid_file.read_text().strip(), "the grandchild")
    supervisor = int(Path(f"/proc/{guard}/task/{guard}/children").read_text())
    pids = {
        "parent": parent.pid,
        "guard": guard,
        "supervisor": supervisor,
        "grandchild": int(pid_file.read_text()),
    }
    found = {name: identity(pid) for name, pid in pids.items()}
    assert None not in found.values()
    yield found  # type: ignore[misc]
    for process in found.values():
        if process is not None and alive(process):
            os.kill(process.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()


@pytest.mark.parametrize("victim", ["parent", "supervisor"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGTERM], ids=lambda n: n.name)
def test_nothing_is_left(tree: dict[str, Identity], victim: str, number: signal.Signals) -> None:
    os.kill(tree[victim].pid, number)
    rest = ["guard", "supervisor", "grandchild"]
    wait_for(lambda: not any(alive(tree[name]) for name in rest), f"the end of {rest}")


def test_the_guard_killed_takes_the_supervisor(tree: dict[str, Identity]) -> None:
    os.kill(tree["guard"].pid, signal.SIGKILL)
    wait_for(lambda: not alive(tree["supervisor"]), "the end of the supervisor")
