"""The channel to a supervisor: one JSON line asks, one answers, over a socket in the state folder."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class ControlError(Exception):
    """No supervisor answers there, or it answered that it could not do it."""


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A path of a few characters to the same file, for as long as the context lasts.

    Addresses of Unix sockets end at 107 characters, and state folders may lie deeper than that.
    """
    fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


def listen(path: Path) -> socket.socket:
    """A listening socket at `path`; one left by a dead supervisor is replaced."""
    path.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with short_path(path) as short:
        server.bind(short)
    path.chmod(0o600)
    server.listen(16)
    server.setblocking(False)
    return server


def ask(path: Path, request: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
    """Send a request (`{"op": …}`) and return the answer.

    Raises:
        ControlError: nothing listens, no answer came in time, or the answer is an error.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client, short_path(path) as short:
            client.settimeout(timeout_s)
            client.connect(short)
            client.sendall(json.dumps(request).encode() + b"\n")
            with client.makefile("rb") as answers:
                line = answers.readline()
    except OSError as error:
        raise ControlError(f"the supervisor at {path} does not answer: {error}") from error
    if not line:
        raise ControlError(f"the supervisor at {path} ended before it answered")
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise ControlError(answer["error"])
    return answer
