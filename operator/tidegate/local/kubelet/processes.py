"""Starts and ends the processes of pods, through the template, and reaps every one of them."""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence

from tidegate.local.kubelet.images import Command, EntryPoint, Program
from tidegate.local.kubelet.sessions import MARK, kill_marked, kill_sessions
from tidegate.local.kubelet.template import MAX_MESSAGE, LaunchError
from tidegate.local.prctl import become_subreaper
from tidegate.local.process import collected

log = logging.getLogger(__name__)

_TEMPLATE = "tidegate.local.kubelet.template"


class Process:
    """The first process of a container (or of a hook or probe beside it)."""

    def __init__(self, pid: int, mark: str, exited: asyncio.Future[int]) -> None:
        self.pid, self.mark = pid, mark
        self.exited = exited
        """Resolves to the exit code: 0–255, 128 + n when signal n ended it."""

    def terminate(self) -> None:
        """SIGTERM to the first process only, as a container runtime does."""
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the process and all that came of it."""
        if not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        kill_marked(self.mark, self.pid)

    def kill_session(self) -> None:
        """SIGKILL to this process and its session only, not to others with the same mark."""
        kill_sessions({self.pid})


class Processes:
    """The kubelet's child processes. Must be used from the main thread's event loop."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._modules = tuple(modules)
        self._ids = itertools.count()
        self._asked: dict[int, asyncio.Future[int]] = {}
        self._waited: dict[int, asyncio.Future[int]] = {}
        self._reaped: dict[int, int] = {}
        self._template = -1
        self._channel: socket.socket | None = None
        self._closing = False

    def open(self) -> None:
        """Take in orphans, watch for children that end, and start the template."""
        become_subreaper()
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._reap)
        self._start_template()

    def close(self) -> None:
        """Let the template go: it kills what is left of the sessions that it started."""
        self._closing = True
        self._drop_channel()
        asyncio.get_running_loop().remove_signal_handler(signal.SIGCHLD)

    async def start(self, program: Program, env: Mapping[str, str], out: int) -> Process:
        """Start a program with stdout and stderr on `out`. Raises LaunchError.

        The environment must carry the container's mark.
        """
        entry = program.target if isinstance(program, EntryPoint) else ""
        if isinstance(program, Command) and not program.argv:
            raise LaunchError("no command is given: set `command`")
        number = next(self._ids)
        request = {"id": number, "entry": entry, "argv": program.argv, "env": dict(env)}
        message = json.dumps(request).encode()
        if len(message) > MAX_MESSAGE:
            raise LaunchError(f"args and env take {len(message)} bytes; at most {MAX_MESSAGE} can be passed")
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        try:
            await self._send(message, out)
            pid = await answer
        finally:
            self._asked.pop(number, None)
        return Process(pid, env[MARK], self._exit_of(pid))

    def forget(self, process: Process) -> None:
        """Tell the template that a session has ended, so that its number may be used again."""
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.send(json.dumps({"forget": process.pid}).encode())

    async def _send(self, message: bytes, out: int) -> None:
        while True:
            if self._channel is None:
                raise LaunchError("the process that starts engines is gone; it is being started again")
            try:
                socket.send_fds(self._channel, [message], [out])
            except BlockingIOError:
                await asyncio.sleep(0.01)
            except OSError as error:
                raise LaunchError(f"the process that starts engines cannot be reached: {error}") from error
            else:
                return

    def _start_template(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        argv = [sys.executable, "-m", _TEMPLATE, str(theirs.fileno()), *self._modules]
        # The duplicate is inheritable; the original, and every other descriptor of ours, is not.
        inherited = (os.POSIX_SPAWN_DUP2, theirs.fileno(), theirs.fileno())
        self._template = os.posix_spawn(argv[0], argv, os.environ, file_actions=[inherited], setsid=True)
        theirs.close()
        self._channel = ours
        asyncio.get_running_loop().add_reader(ours, self._answered)

    def _drop_channel(self) -> None:
        if self._channel is None:
            return
        asyncio.get_running_loop().remove_reader(self._channel)
        self._channel.close()
        self._channel = None
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(LaunchError("the process that starts engines ended"))

    def _answered(self) -> None:
        if self._channel is None:
            return
        try:
            data = self._channel.recv(MAX_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop_channel()
            return
        answer = json.loads(data)
        asked = self._asked.get(answer["id"])
        if asked is None or asked.done():
            if "pid" in answer:  # nobody waits for it any more
                with contextlib.suppress(ProcessLookupError):
                    os.kill(answer["pid"], signal.SIGKILL)
        elif "error" in answer:
            asked.set_exception(LaunchError(answer["error"]))
        else:
            asked.set_result(answer["pid"])

    def _exit_of(self, pid: int) -> asyncio.Future[int]:
        exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        if pid in self._reaped:  # it ended before we heard that it had begun
            exited.set_result(self._reaped.pop(pid))
        else:
            self._waited[pid] = exited
        return exited

    def _reap(self) -> None:
        for pid, ended in collected():
            code = ended if ended >= 0 else 128 - ended
            if pid == self._template:
                self._template_ended(code)
            elif (exited := self._waited.pop(pid, None)) is not None:
                if not exited.done():
                    exited.set_result(code)
            elif self._asked:  # a child of ours that was not announced yet, or an orphan
                self._reaped[pid] = code
            else:
                self._reaped.clear()

    def _template_ended(self, code: int) -> None:
        self._drop_channel()
        if not self._closing:
            log.error("the template process ended with %d; starting it again", code)
            asyncio.get_running_loop().call_later(0.2, self._start_template)
