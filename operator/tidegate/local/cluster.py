"""A cluster on this machine, as an object: start it, ask it, stop it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tidegate.api import names
from tidegate.local import binaries, control, kubeconfig
from tidegate.local.certs import write_secret
from tidegate.local.components import PROGRAMS
from tidegate.local.layout import CONTROL_PLANE, EVERYTHING, NODES, Layout, Settings, set_aside
from tidegate.local.process import Identity, alive, send
from tidegate.local.unit import tail

__all__ = ["CONTROL_PLANE", "EVERYTHING", "NODES", "ClusterError", "LocalCluster"]

Progress = Callable[[str], None]

_STOP_S = 60.0


class ClusterError(Exception):
    """The cluster cannot be started, found or asked; the message says why and what to do."""


class LocalCluster:
    """A running cluster. Use `start` or `attach`; as a context manager it stops at the end."""

    def __init__(self, directory: Path) -> None:
        self.layout = Layout(directory)
        self.kubeconfig = self.layout.kubeconfig
        self._guard: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(  # noqa: PLR0913  one argument a setting reads better at the call
        cls,
        directory: Path | str,
        settings: Settings | None = None,
        *,
        nodes: int = 4,
        gpus_per_node: int = 4,
        parts: Iterable[str] = EVERYTHING,
        ports: Mapping[str, int] | None = None,
        engine_env: Mapping[str, str] | None = None,
        images: Mapping[str, str] | None = None,
        extra_args: Mapping[str, Sequence[str]] | None = None,
        keep: bool = False,
        progress: Progress = lambda _text: None,
    ) -> Self:
        """Start a cluster in `directory` and return when everything in it is ready.

        Args:
            directory: State folder; made when missing. What an earlier cluster stored is used again.
            settings: All of what follows in one value, instead of it.
            nodes: Number of GPU nodes.
            gpus_per_node: GPUs on each.
            parts: What runs: CONTROL_PLANE, NODES, EVERYTHING, or any set of component names.
            ports: Ports that must be these, by listener (`network.DEFAULT_PORTS`); others are chosen.
            engine_env: Environment for every emulated engine.
            images: Further image names and the commands that they stand for.
            extra_args: Arguments appended to a component's command, by component.
            keep: Outlive this process. Without it the cluster ends with this process, however that ends.
            progress: Called with a line of text for each step.

        Raises:
            ClusterError: it does not come up, or one runs in that folder already.
        """
        if sys.platform != "linux":
            raise ClusterError("a local cluster needs Linux (child subreapers, pidfds, 127.0.0.0/8)")
        wanted = settings or Settings(
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            parts=frozenset(parts),
            ports=dict(ports or {}),
            engine_env=dict(engine_env or {}),
            images=dict(images or {}),
            extra_args={name: tuple(args) for name, args in (extra_args or {}).items()},
        )
        cluster = cls(Path(directory).absolute())
        if cluster.is_running():
            raise ClusterError(f"a cluster runs in {cluster.layout.root} already; stop it, or attach to it")
        programs = cluster._find_programs(wanted, progress)
        cluster._write_settings(wanted, programs)
        cluster._launch(keep=keep, progress=progress)
        return cluster

    @classmethod
    def attach(cls, directory: Path | str) -> Self:
        """The cluster that runs in `directory`. Raises ClusterError when none does."""
        cluster = cls(Path(directory).absolute())
        if not cluster.is_running():
            raise ClusterError(
                f"no cluster runs in {cluster.layout.root}; start one with `tidegate local up`"
            )
        return cluster

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- what is running -------------------------------------------------------------------

    def is_running(self) -> bool:
        """Whether this folder's supervisor or its guard lives."""
        state = self._saved_state()
        return any(alive(who) for who in _keepers(state)) if state else False

    def status(self) -> dict[str, Any]:
        """What runs where, as the supervisor says it now. Raises ClusterError when none runs."""
        return self._ask({"op": "status"}, timeout_s=10)

    def settings(self) -> Settings:
        """What the running cluster was asked to be. Raises ClusterError when none runs."""
        return Settings.from_json(self.status()["settings"])

    def pid(self, component: str) -> int:
        """Pid of a component's process; 0 while there is none."""
        return int(self._component(component)["pid"])

    def url(self, name: str) -> str:
        """Base URL of `api`, `gateway`, `controller`, `picker`, `extender` or `envoy` (its admin port)."""
        urls = self.status()["urls"]
        if name not in urls:
            raise ClusterError(f"this cluster has no {name!r}; it has {', '.join(urls)}")
        return str(urls[name])

    def log(self, component: str) -> Path:
        """A component's log file."""
        return self.layout.log(component)

    # --- acting on it ----------------------------------------------------------------------

    def stop(self) -> None:
        """Stop everything in order and return when nothing of it is left. Twice is harmless."""
        state = self._saved_state()
        if state is not None:
            with contextlib.suppress(control.ControlError):
                control.ask(self.layout.socket, {"op": "stop"}, timeout_s=5)
            _wait_gone(_keepers(state), _STOP_S)
            # Only after a crash is there something to end here, and only by pid and start time.
            current = self._saved_state() or state
            left = [*_keepers(state), *_processes(state), *_processes(current)]
            _kill(left)
            self._mark_stopped(current)
        if self._guard is not None:
            self._guard.wait()
            self._guard = None

    def restart(self, component: str, args: Sequence[str] | None = None) -> None:
        """Restart a component and wait until it is ready; `args` replace its extra arguments."""
        request: dict[str, Any] = {"op": "restart", "component": component}
        if args is not None:
            request["args"] = list(args)
        self._ask(request, timeout_s=180)

    def wait_up(self, *, timeout_s: float = 300) -> None:
        """Wait while somebody else's `start` is under way. Raises ClusterError when it fails."""
        deadline = time.monotonic() + timeout_s
        while (phase := self.status()["phase"]) != "ready":
            if phase != "starting" or time.monotonic() > deadline:
                raise ClusterError(f"the cluster in {self.layout.root} is {phase}")
            time.sleep(0.1)

    def wait_ready(self, component: str, *, timeout_s: float = 60) -> int:
        """Wait until a component (again) is ready; returns its pid."""
        deadline = time.monotonic() + timeout_s
        while (now := self._component(component))["state"] != "ready":
            if time.monotonic() > deadline:
                end = tail(self.log(component), 8)
                raise ClusterError(f"{component} is {now['state']} after {timeout_s:.0f} s:\n{end}")
            time.sleep(0.05)
        return int(now["pid"])

    def kubectl(
        self, *args: str, stdin: str | None = None, check: bool = True, timeout_s: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run kubectl as the administrator. With `check`, failure is ClusterError with its words."""
        command = [binaries.find_tool("kubectl"), "--kubeconfig", str(self.kubeconfig), *args]
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if check and done.returncode != 0:
            raise ClusterError(f"kubectl {' '.join(args)}: {done.stderr.strip()}")
        return done

    def token(self, account: str, namespace: str) -> str:
        """A token of a ServiceAccount, good for a day."""
        return self.kubectl("create", "token", account, "-n", namespace, "--duration=24h").stdout.strip()

    def kubeconfig_for(self, account: str, namespace: str = names.SYSTEM_NAMESPACE) -> Path:
        """A kubeconfig with which one acts as a ServiceAccount; a part's own is there already."""
        part = self.layout.kubeconfig_of(account)
        if namespace == names.SYSTEM_NAMESPACE and part.exists():
            return part
        path = self.layout.kubeconfig_of(f"{namespace}.{account}")
        kubeconfig.write(
            path,
            server=self.url("api"),
            ca=self.layout.pki / "ca.crt",
            user=account,
            token=self.token(account, namespace),
            namespace=namespace,
        )
        return path

    # --- inside ----------------------------------------------------------------------------

    def _find_programs(self, settings: Settings, progress: Progress) -> dict[str, str]:
        wanted = {PROGRAMS[part] for part in settings.parts if part in PROGRAMS}
        try:
            return binaries.find_all(sorted(wanted), progress)
        except binaries.BinaryError as error:
            raise ClusterError(str(error)) from error

    def _write_settings(self, settings: Settings, programs: Mapping[str, str]) -> None:
        self.layout.logs.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self.layout.root / ".gitignore").write_text("*\n")
        content = {"settings": settings.to_json(), "programs": programs}
        self.layout.settings.write_text(json.dumps(content, indent=1))

    def _launch(self, *, keep: bool, progress: Progress) -> None:
        hears, says = os.pipe()
        parent = [] if keep else ["--parent", str(os.getpid())]
        supervisor = [sys.executable, "-P", "-m", "tidegate.local.supervisor", str(self.layout.root)]
        set_aside(self.layout.log("supervisor"))
        with self.layout.log("supervisor").open("ab") as output:
            self._guard = subprocess.Popen(
                [sys.executable, "-P", "-m", "tidegate.local.guard", *parent, "--", *supervisor],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TIDEGATE_REPORT_FD": str(says)},
                pass_fds=[says],
                start_new_session=True,
                cwd="/",
            )
        os.close(says)
        try:
            self._hear(hears, progress)
        except BaseException:  # Ctrl-C too: nothing may be left behind
            self._guard.terminate()
            self._guard.wait()
            self._guard = None
            raise
        finally:
            os.close(hears)
        if keep:
            # It is nobody's child from now on; Popen must not warn that it still runs.
            self._guard.returncode = 0
            self._guard = None

    def _hear(self, fd: int, progress: Progress) -> None:
        """Follow the supervisor's report until it says `ready`."""
        with os.fdopen(os.dup(fd), "rb") as lines:
            for line in lines:
                message = json.loads(line)
                if "progress" in message:
                    progress(message["progress"])
                elif "error" in message:
                    raise ClusterError(message["error"])
                elif "ready" in message:
                    return
        log = self.layout.log("supervisor")
        raise ClusterError(f"the supervisor ended while starting; the end of {log}:\n{tail(log, 12)}")

    def _ask(self, request: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        try:
            return control.ask(self.layout.socket, request, timeout_s=timeout_s)
        except control.ControlError as error:
            if self.is_running():
                raise ClusterError(str(error)) from error
            raise ClusterError(
                f"no cluster runs in {self.layout.root}; start one with `tidegate local up`"
            ) from error

    def _component(self, name: str) -> dict[str, Any]:
        found = self.status()["components"]
        if name not in found:
            raise ClusterError(f"no component {name!r} in this cluster; there are {', '.join(found)}")
        component: dict[str, Any] = found[name]
        return component

    def _saved_state(self) -> dict[str, Any] | None:
        try:
            state: dict[str, Any] = json.loads(self.layout.state.read_text())
        except (OSError, ValueError):
            return None
        return state

    def _mark_stopped(self, state: dict[str, Any]) -> None:
        """Correct what a crash left in the state file."""
        if state["phase"] != "stopped":
            state["phase"] = "stopped"
            for component in state["components"].values():
                component.update(state="stopped", pid=0, started=0)
            write_secret(self.layout.state, json.dumps(state, indent=1).encode() + b"\n")
        self.layout.socket.unlink(missing_ok=True)


def _keepers(state: Mapping[str, Any]) -> list[Identity]:
    return [Identity(state[name]["pid"], state[name]["started"]) for name in ("supervisor", "guard")]


def _processes(state: Mapping[str, Any]) -> list[Identity]:
    return [Identity(c["pid"], c["started"]) for c in state["components"].values() if c["pid"]]


def _wait_gone(processes: Iterable[Identity], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while any(alive(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _kill(processes: Iterable[Identity]) -> None:
    left = [process for process in processes if send(process, signal.SIGKILL)]
    _wait_gone(left, 10)
