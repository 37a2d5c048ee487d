"""Processes by identity: a pid means something only together with its start time."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_SHIM = Path(__file__).with_name("shim.py")


@dataclass(frozen=True, slots=True)
class Identity:
    """A process: its pid and when it started, in clock ticks since boot (proc(5), field 22)."""

    pid: int
    started: int


def _stat(pid: int) -> list[str] | None:
    """Fields 3 and on of /proc/PID/stat; None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text[text.rindex(")") + 2 :].split()  # the command's name may hold spaces and brackets


def identity(pid: int) -> Identity | None:
    """Who has this pid now; None when nobody, or only a zombie, has."""
    fields = _stat(pid)
    if fields is None or fields[0] in ("Z", "X"):
        return None
    return Identity(pid, int(fields[19]))


def alive(process: Identity) -> bool:
    """Whether this very process still runs; another one with the same pid does not count."""
    return identity(process.pid) == process


def send(process: Identity, number: signal.Signals) -> bool:
    """Send a signal to this very process; False when it is gone.

    Through a pidfd, opened before the start time is compared: so the pid cannot pass to another
    process between the look and the signal.
    """
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if not alive(process):
            return False
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True


def children(parent: int) -> list[int]:
    """Pids of the direct children of a process, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        fields = _stat(int(entry.name)) if entry.name.isdigit() else None
        if fields and int(fields[1]) == parent and fields[0] not in ("Z", "X"):
            found.append(int(entry.name))
    return found


def bound_to_parent(argv: Sequence[str]) -> list[str]:
    """The command that runs `argv` so that it is killed when this process' calling thread ends."""
    return [sys.executable, "-I", "-S", str(_SHIM), str(os.getpid()), *argv]


def collected() -> Iterator[tuple[int, int]]:
    """Wait for every child that has ended, adopted ones too: its pid and exit code, by a signal negative."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, os.waitstatus_to_exitcode(status)
