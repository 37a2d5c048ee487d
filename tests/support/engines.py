"""Emulated engines as processes of their own, as the local cluster runs them."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import httpx

from support.wait import PATIENCE_S, wait_for

LIMIT_S = PATIENCE_S


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

        def answers() -> bool:
            code = self.process.poll()
            assert code is None, f"the engine ended with {code}:\n{self.log.read_text()}"
            try:
                return httpx.get(url, timeout=5.0).status_code == 200
            except httpx.TransportError:
                return False

        wait_for(answers, f"{url} to answer", timeout_s)

    def wait_for_log(self, text: str, timeout_s: float = LIMIT_S) -> None:
        """Wait until the engine has logged a text."""
        wait_for(lambda: text in self.log.read_text(), f"{text!r} in {self.log}", timeout_s)

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
