"""The parent of the supervisor: when the supervisor is gone, it kills whatever is left.

`python -m tidegate.local.guard [--parent PID] -- SUPERVISOR…`

Children of the supervisor carry a parent-death signal, but *their* children need not. The guard is
a child subreaper, so every orphan of the cluster ends up as its child, and it does not leave before
the last one is dead. With `--parent` it also ends everything when that process ends, however that
happens. It watches by pidfd: a parent-death signal would follow one thread of the parent.
Killed itself, its parent-death signal takes the supervisor, and the supervisor's takes the rest.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys

from tidegate.local.prctl import become_subreaper
from tidegate.local.process import bound_to_parent, children


def main(argv: list[str]) -> int:
    """Run the supervisor until it ends; returns its exit code (negative: the signal)."""
    split = argv.index("--")
    options, command = argv[:split], argv[split + 1 :]
    become_subreaper()
    watched = select.poll()
    parent = _watch_parent(int(options[1]), watched) if options else None
    # SIGTERM and SIGINT ask the supervisor to stop in order; it decides how long that takes.
    fds = [int(fd) for fd in os.environ.get("TIDEGATE_REPORT_FD", "").split()]
    supervisor = subprocess.Popen(bound_to_parent(command), pass_fds=fds)
    for fd in fds:
        os.close(fd)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: _ask_to_stop(supervisor.pid))
    ended = os.pidfd_open(supervisor.pid)
    watched.register(ended, select.POLLIN)
    while True:
        ready = {fd for fd, _ in watched.poll()}
        if parent is not None and parent in ready:
            supervisor.kill()
            break
        if ended in ready:
            break
    code = supervisor.wait()
    _kill_all_children()
    return code


def _watch_parent(pid: int, watched: select.poll) -> int:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        sys.exit("guard: the parent is gone")
    if os.getppid() != pid:
        sys.exit("guard: the parent is gone")
    watched.register(fd, select.POLLIN)
    return fd


def _ask_to_stop(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def _kill_all_children() -> None:
    """Kill and reap until no child is left; the children of a killed one become ours in turn."""
    while True:
        for pid in children(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
