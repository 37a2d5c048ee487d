"""Which processes belong to a container, read from /proc, and how all of them are killed."""

import contextlib
import os
import signal
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Final

MARK: Final = "TIDEGATE_CONTAINER_ID"
"""Environment variable that marks a container's processes: it survives a setsid()."""


def kill_sessions(sessions: Set[int]) -> int:
    """SIGKILL every process of these sessions; returns how many there were."""
    return _kill(pid for pid, session in _sessions() if session in sessions) if sessions else 0


def kill_marked(mark: str, session: int) -> int:
    """SIGKILL a container's processes: those of its session, and those that left it."""
    marker = f"{MARK}={mark}".encode()
    return _kill(pid for pid, sid in _sessions() if sid == session or _has(pid, marker))


def kill_strays(state_dir: str) -> int:
    """SIGKILL processes of pods that an earlier kubelet on this state folder left behind."""
    marker = f"TIDEGATE_KUBELET={state_dir}".encode()
    return _kill(pid for pid, _ in _sessions() if _has(pid, marker))


def _kill(pids: Iterator[int]) -> int:
    count = 0
    for pid in list(pids):
        if pid == os.getpid():
            continue
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
            count += 1
    return count


def _sessions() -> Iterator[tuple[int, int]]:
    """Every live process and its session; zombies are left out."""
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            stat = Path(entry.path, "stat").read_bytes()
        except OSError:
            continue
        # The name, in parentheses, may hold anything; the state is the first field after it.
        fields = stat[stat.rindex(b")") + 2 :].split()
        if fields[0] != b"Z":
            yield int(entry.name), int(fields[3])


def _has(pid: int, marker: bytes) -> bool:
    try:
        return marker in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
