"""The template: a small warmed process from which all processes of pods are forked.

`python -m tidegate.local.kubelet.template FD MODULE…` imports the modules once, then serves
requests on the socket FD (one JSON message each, with the file descriptors of the child's stdout
and stderr). It has one thread and no event loop, so that a fork is a whole copy.

A child is forked twice, so that it becomes the child of the kubelet (a child subreaper), which
alone waits for it; only then does it ask to be killed when the kubelet ends. When the socket
closes, the kubelet is gone: what is left of the sessions that were started is killed.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from tidegate.local.kubelet.sessions import kill_sessions

MAX_MESSAGE = 160 * 1024
"""A request must fit one datagram: the kernel's default socket buffer is 208 KiB."""


_LIBC = ctypes.CDLL(None)  # loaded here, so that children have it already
_PR_SET_PDEATHSIG = 1


class LaunchError(Exception):
    """No process came to be; the message is for the pod's status."""


def main(argv: list[str]) -> int:
    """Serve until the kubelet closes the socket."""
    channel = socket.socket(fileno=int(argv[0]))
    kubelet = os.getppid()
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)  # the kubelet decides; its end is ours
    _warm(argv[1:])
    sessions: set[int] = set()
    while True:
        try:
            data, fds, _, _ = socket.recv_fds(channel, MAX_MESSAGE, 4)
        except ConnectionError:
            data, fds = b"", []
        if not data:
            kill_sessions(sessions)
            return 0
        request = json.loads(data)
        if "forget" in request:
            sessions.discard(request["forget"])
            continue
        answer: dict[str, Any] = {"id": request["id"]}
        try:
            answer["pid"] = _launch(request, fds, channel, kubelet)
            sessions.add(answer["pid"])
        except LaunchError as error:
            answer["error"] = str(error)
        finally:
            for fd in fds:
                os.close(fd)
        with contextlib.suppress(ConnectionError):
            channel.send(json.dumps(answer).encode())


def _warm(modules: list[str]) -> None:
    """Import what engines need; one that cannot be imported is told of when it is asked for."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            print(f"template: {module} cannot be imported: {error}", file=sys.stderr, flush=True)
    gc.collect()
    gc.freeze()  # keeps the collector from touching, and so copying, shared pages


def _entry_point(target: str) -> Callable[[list[str]], int]:
    module, _, function = target.partition(":")
    try:
        found: Callable[[list[str]], int] = getattr(importlib.import_module(module), function)
    except Exception as error:
        raise LaunchError(f"{target} cannot be loaded: {type(error).__name__}: {error}") from error
    return found


def _launch(request: dict[str, Any], fds: list[int], channel: socket.socket, kubelet: int) -> int:
    """Fork the child; returns its process id, which is also its session's."""
    function = _entry_point(request["entry"]) if request.get("entry") else None
    pid_out, pid_in = os.pipe()
    go_out, go_in = os.pipe()
    failed_out, failed_in = os.pipe()  # closed by a successful exec, else tells the error
    between = os.fork()
    if between == 0:
        try:
            if child := os.fork():
                os.write(pid_in, child.to_bytes(4, "little"))
                os._exit(0)
            for fd in (pid_out, pid_in, go_in, failed_out):
                os.close(fd)
            _child(request, fds, channel, kubelet, function, go_out, failed_in)
        finally:
            os._exit(1)
    os.waitpid(between, 0)  # from here on the child is the kubelet's
    for fd in (go_out, pid_in, failed_in):
        os.close(fd)
    pid = int.from_bytes(os.read(pid_out, 4), "little")
    if pid:
        os.write(go_in, b"!")
    error = os.read(failed_out, 4096) if pid else b"no process could be forked"
    for fd in (pid_out, go_in, failed_out):
        os.close(fd)
    if error:
        raise LaunchError(error.decode())
    return pid


def _child(
    request: dict[str, Any],
    fds: list[int],
    channel: socket.socket,
    kubelet: int,
    function: Callable[[list[str]], int] | None,
    go: int,
    failed: int,
) -> NoReturn:
    """Become the process of a pod: own session, output, environment; then run."""
    try:
        os.read(go, 1)
        os.close(go)
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != kubelet:
            os._exit(1)
        os.setsid()
        channel.close()
        _redirect(fds)
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(name, signal.SIG_DFL)
        argv: list[str] = request["argv"]
        if function is None:
            _execute(argv, request["env"], failed)
        # As in any Python: a client that has gone is an error of one write, not the end of the engine.
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        os.environ.clear()
        os.environ.update(request["env"])
        sys.argv = [request["entry"], *argv]
        _rename(request["entry"])
        os.close(failed)
        _call(function, argv)
    finally:
        os._exit(1)


def _rename(entry: str) -> None:
    """Show the engine's name, and not the template's, in `ps` and `top`."""
    name = entry.partition(":")[0].rpartition(".")[2]
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(name)


def _redirect(fds: list[int]) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(fds[0], 1)
    os.dup2(fds[0], 2)
    for fd in {null, *fds} - {0, 1, 2}:
        os.close(fd)


def _execute(argv: list[str], env: dict[str, str], failed: int) -> NoReturn:
    try:
        os.execvpe(argv[0], argv, env)  # noqa: S606 - no shell is wanted
    except (OSError, ValueError) as error:
        what = "executable file not found in $PATH" if isinstance(error, FileNotFoundError) else str(error)
        os.write(failed, f'exec: "{argv[0]}": {what}'.encode()[:4096])
    os._exit(128)


def _call(function: Callable[[list[str]], int], argv: list[str]) -> NoReturn:
    """Run an entry point to its end, with the exit code that Python would give."""
    # Pipes are block-buffered otherwise, and the log would lag behind.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)
    code = 1
    try:
        code = int(function(argv) or 0)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code & 0xFF)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
