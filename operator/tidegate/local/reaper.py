"""Starts children and collects every child that ends, adopted orphans too."""

import asyncio
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tidegate.local.layout import set_aside
from tidegate.local.process import bound_to_parent, children, collected

_SETTLE_S = 0.02


class Reaper:
    """All children of this process. asyncio's own child watchers know nothing of orphans."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._known: dict[int, asyncio.Future[int]] = {}
        loop.add_signal_handler(signal.SIGCHLD, self._collect)

    def spawn(
        self, argv: Sequence[str], *, log: Path, env: Mapping[str, str]
    ) -> tuple[int, asyncio.Future[int]]:
        """Start a program in a session of its own; returns its pid and its coming exit code.

        Output is appended to `log`, which is set aside first when it is large. The program is
        killed when this process ends. An exit by a signal is negative.
        """
        set_aside(log)
        with log.open("ab") as output:
            process = subprocess.Popen(
                bound_to_parent(argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )
        # From here on this class waits for it, not Popen.
        process.returncode = 0
        ended: asyncio.Future[int] = self._loop.create_future()
        self._known[process.pid] = ended
        return process.pid, ended

    async def clear_orphans(self) -> None:
        """Kill adopted processes, whose parent, one of ours, has ended, and their children in turn.

        Nothing that a cluster runs makes itself a daemon, so an adopted process is a left-over.
        """
        while orphans := [pid for pid in children(os.getpid()) if pid not in self._known]:
            for pid in orphans:
                os.kill(pid, signal.SIGKILL)  # our own child, not yet waited for: the pid is its own
            await asyncio.sleep(_SETTLE_S)

    def _collect(self) -> None:
        for pid, code in collected():
            ended = self._known.pop(pid, None)
            if ended is not None and not ended.done():
                ended.set_result(code)
