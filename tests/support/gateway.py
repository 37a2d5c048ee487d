"""A picker and an Envoy as processes of their own, on free ports."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from support.ports import free_ports
from support.wait import PATIENCE_S, wait_for
from tidegate.local import binaries
from tidegate.render.envoy import bootstrap
from tidegate.render.envoy_auth import GatewayAuth


@dataclass
class PickerProcess:
    """`tidegate picker` with these flags; `kill` and `start` again as a crash would."""

    folder: Path
    kubeconfig: Path
    flags: Sequence[str] = ()
    ports: list[int] = field(default_factory=lambda: free_ports(4))
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[2]}"

    @property
    def log(self) -> str:
        return (self.folder / "picker.log").read_text()

    def start(self) -> "PickerProcess":
        ext_proc, health, http, measure = (str(p) for p in self.ports)
        command = [sys.executable, "-m", "tidegate", "picker", "--kubeconfig", str(self.kubeconfig)]
        command += [
            "--ext-proc-port",
            ext_proc,
            "--health-port",
            health,
            "--http-port",
            http,
            "--measure-port",
            measure,
        ]
        command += self.flags
        with (self.folder / "picker.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ})
        self._wait()
        return self

    def _wait(self) -> None:
        def ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, f"the picker ended: {self.log}"
            return _ok(f"{self.url}/readyz")

        wait_for(ready, "the picker")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def terminate(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=PATIENCE_S)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def state(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/debug/state").raise_for_status().json()

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples that carry these labels."""
        from tidegate.adapters.metrics import parse

        samples = parse(httpx.get(f"{self.url}/metrics").raise_for_status().text, name)
        return sum(s.value for s in samples if s.name == name and labels.items() <= dict(s.labels).items())


@dataclass
class EnvoyProcess:
    """Envoy in front of a picker."""

    folder: Path
    picker_port: int
    measure_port: int | None = None
    auth: GatewayAuth | None = None
    ports: list[int] = field(default_factory=lambda: free_ports(2))
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    def start(self) -> "EnvoyProcess":
        config = bootstrap(
            listen_host="127.0.0.1",
            listen_port=self.ports[0],
            admin_port=self.ports[1],
            picker_host="127.0.0.1",
            picker_port=self.picker_port,
            measure_port=self.measure_port,
            auth=self.auth,
        )
        path = self.folder / "envoy.json"
        path.write_text(json.dumps(config))
        command = [binaries.find_tool("envoy"), "-c", str(path), "--disable-hot-restart"]
        command += ["--concurrency", "1", "--log-level", "error"]
        with (self.folder / "envoy.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        process = self.process

        def ready() -> bool:
            assert process.poll() is None, (self.folder / "envoy.log").read_text()
            return _ok(f"http://127.0.0.1:{self.ports[1]}/ready")

        wait_for(ready, "Envoy")
        return self

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _ok(url: str) -> bool:
    try:
        return httpx.get(url, timeout=1.0).status_code == 200
    except httpx.HTTPError:
        return False
