"""Emulated engines as processes of their own, as the local cluster runs them."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import httpx

LIMIT_S = 60.0
"""Longer than anything takes even on a machine that is busy with other things."""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class EngineProcess:
    """A running engine; its log is in `log`. Leaving the context ends it, by force if it must."""

    def __init__(self, module: str, args: list[str], log: Path, env: dict[str, str] | None = None) -> None:
        self.log = log
        self._file = log.open("wb")
        clean = {k: v for k, v in os.environ.items() if not k.startswith("TIDEGATE_") and k != "POD_IP"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"tidegate.local.engines.{module}", *args],
            env=clean | (env or {}),
            stdout=self._file,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> "EngineProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._file.close()

    def wait_for(self, url: str, timeout_s: float = LIMIT_S) -> None:
        """Wait until a GET answers 200."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(
                    f"the engine ended with {self.process.returncode}:\n{self.log.read_text()}"
                )
            try:
                if httpx.get(url, timeout=5.0).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.02)
        raise AssertionError(f"{url} does not answer:\n{self.log.read_text()}")

    def wait_for_log(self, text: str, timeout_s: float = LIMIT_S) -> None:
        """Wait until the engine has logged a text."""
        deadline = time.monotonic() + timeout_s
        while text not in self.log.read_text():
            assert time.monotonic() < deadline, f"{text!r} was not logged:\n{self.log.read_text()}"
            time.sleep(0.02)

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def exit_code(self, timeout_s: float = LIMIT_S) -> int:
        """Wait for the end."""
        return self.process.wait(timeout_s)


def samples(text: str) -> dict[str, float]:
    """Prometheus text as {name{labels}: value}; every line must be well-formed."""
    found = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r'([a-zA-Z_:][\w:]*\{(?:\w+="[^"]*",?)*\}) (\S+)', line)
        assert match, f"not Prometheus text: {line}"
        assert match[1] not in found, f"twice: {match[1]}"
        found[match[1]] = float(match[2])
    return found
