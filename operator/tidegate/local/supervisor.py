"""One process for each cluster, parent of everything that runs in it.

`python -m tidegate.local.supervisor DIR`, run by `tidegate.local.guard`; use `LocalCluster`.

It takes an address and ports, writes certificates and configurations, starts the components wave by
wave, restarts what dies, and answers on the control socket. What it says to who started it goes to
the pipe $TIDEGATE_REPORT_FD, one JSON line each: `{"progress": text}`, then `{"ready": state}` or
`{"error": text}`.
"""

import asyncio
import contextlib
import fcntl
import itertools
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tidegate.adapters.logs import configure
from tidegate.local import control, network
from tidegate.local.certs import write_secret
from tidegate.local.components import LISTENERS, Component, Context, components
from tidegate.local.layout import Layout, Settings
from tidegate.local.prctl import become_subreaper
from tidegate.local.prepare import prepare
from tidegate.local.process import identity
from tidegate.local.reaper import Reaper
from tidegate.local.unit import StartError, Unit

log = logging.getLogger(__name__)

START_S = 120.0
"""Bound for one component to become ready: generous, since the machine may be busy."""
_URLS = {
    "api": ("api", "https"),
    "gateway": ("gateway", "http"),
    "controller": ("controller", "http"),
    "picker": ("picker", "http"),
    "extender": ("extender", "http"),
    "envoy": ("envoy-admin", "http"),
}


class Report:
    """The pipe to who started the cluster; after the last word it is closed."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd

    def say(self, **message: Any) -> None:
        """Send one message; a listener that has gone is no reason to stop."""
        if self._fd is not None:
            try:
                os.write(self._fd, json.dumps(message).encode() + b"\n")
            except OSError:
                self.close()

    def close(self) -> None:
        """Say no more."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class Supervisor:
    """The components of one cluster and the file that says how they are."""

    def __init__(self, context: Context, report: Report) -> None:
        self._context, self._report = context, report
        self._layout = context.layout
        self._phase = "starting"
        self._since = time.time()
        self._stopping = asyncio.Event()
        reaper = Reaper(asyncio.get_running_loop())
        self._units = [self._unit(component, reaper) for component in components(context)]

    def _unit(self, component: Component, reaper: Reaper) -> Unit:
        extra = self._context.settings.extra_args.get(component.name, ())
        log_file = self._layout.log(component.name)
        return Unit(component, extra, log_file=log_file, reaper=reaper, changed=self._write_state)

    async def run(self) -> None:
        """Start everything, serve until asked to stop, stop everything. Raises StartError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        listening = control.listen(self._layout.socket)
        server = await asyncio.start_unix_server(self._serve, sock=listening)
        self._write_state()
        try:
            if await self._start_unless_stopped():
                self._phase = "ready"
                self._write_state()
                self._report.say(ready=self.state())
                self._report.close()
                await self._stopping.wait()
        finally:
            self._phase = "stopping"
            await self._stop_all()
            self._phase = "stopped"
            self._write_state()
            self._layout.socket.unlink(missing_ok=True)
            server.close()

    async def _start_unless_stopped(self) -> bool:
        """True when everything is ready, False when told to stop meanwhile."""
        starting = asyncio.create_task(self._start_all())
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not starting.done():
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError, StartError):
                await starting
            return False
        await starting
        return True

    async def _start_all(self) -> None:
        for _, wave in itertools.groupby(self._units, key=lambda unit: unit.component.wave):
            units = list(wave)
            self._report.say(progress=f"starting {', '.join(unit.name for unit in units)}")
            try:
                async with asyncio.TaskGroup() as group:
                    for unit in units:
                        group.create_task(unit.start(START_S))
            except* StartError as errors:
                raise errors.exceptions[0] from None

    async def _stop_all(self) -> None:
        reverse = sorted(self._units, key=lambda unit: -unit.component.wave)
        for _, wave in itertools.groupby(reverse, key=lambda unit: unit.component.wave):
            await asyncio.gather(*(unit.stop() for unit in wave))

    def state(self) -> dict[str, Any]:
        """What runs, where: the content of the state file."""
        context = self._context
        listeners = [name for part in context.settings.parts for name in LISTENERS.get(part, ())]
        urls = {name: context.url(*at) for name, at in _URLS.items() if at[0] in listeners}
        return {
            "phase": self._phase,
            "since": self._since,
            "guard": _who(os.getppid()),
            "supervisor": _who(os.getpid()),
            "network": f"{context.prefix}.0.0/16",
            "address": context.address,
            "ports": {name: context.ports[name] for name in sorted(listeners)},
            "urls": urls,
            "kubeconfig": str(self._layout.kubeconfig),
            "settings": context.settings.to_json(),
            "components": {unit.name: unit.describe() for unit in self._units},
        }

    def _write_state(self) -> None:
        write_secret(self._layout.state, json.dumps(self.state(), indent=1).encode() + b"\n")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = json.loads(await reader.readline())
            answer = await self._answer(request)
        except (ValueError, KeyError, StartError) as error:
            answer = {"error": str(error)}
        with contextlib.suppress(ConnectionError):
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        writer.close()

    async def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        operation = request["op"]
        if operation == "status":
            return self.state()
        if operation == "stop":
            self._stopping.set()
            return {"stopping": True}
        if operation == "restart":
            unit = self._find(request["component"])
            args = request.get("args")
            log.info("%s: restart asked for", unit.name)
            await unit.restart(None if args is None else tuple(args), START_S)
            return unit.describe()
        raise ValueError(f"no operation {operation!r}; there are status, stop, restart")

    def _find(self, name: str) -> Unit:
        for unit in self._units:
            if unit.name == name:
                return unit
        running = ", ".join(unit.name for unit in self._units)
        raise ValueError(f"no component {name!r} in this cluster; there are {running}")


def _who(pid: int) -> dict[str, int]:
    process = identity(pid)
    return {"pid": pid, "started": process.started if process else 0}


def _previous_network(layout: Layout) -> int | None:
    """The network that this folder's cluster had last, to keep its addresses when it can."""
    try:
        address = json.loads(layout.state.read_text())["address"]
        return int(address.split(".")[1])
    except (OSError, ValueError, KeyError, IndexError):
        return None


def _hold(path: Path) -> int:
    """Lock the state folder until this process ends. Raises StartError when it is in use."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StartError(f"another cluster runs in {path.parent}; `tidegate local down` stops it") from None
    return fd


async def supervise(layout: Layout, report: Report) -> None:
    """Make the cluster that the settings file describes and keep it. Raises StartError, NetworkError."""
    lock = _hold(layout.lock)
    asked = json.loads(layout.settings.read_text())
    settings = Settings.from_json(asked["settings"])
    try:
        with network.Network.take(_previous_network(layout)) as net:
            listeners = [name for part in settings.parts for name in LISTENERS.get(part, ())]
            ports = network.choose_ports(net.address, settings.ports, sorted(listeners))
            context = Context(layout, settings, net.prefix, net.address, ports, asked["programs"])
            report.say(progress=f"preparing certificates and configuration on {net.prefix}.0.0/16")
            prepare(context)
            await Supervisor(context, report).run()
    finally:
        os.close(lock)


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    fd = os.environ.pop("TIDEGATE_REPORT_FD", None)
    report = Report(int(fd) if fd else None)
    configure("info")
    become_subreaper()
    try:
        asyncio.run(supervise(Layout(Path(argv[0])), report))
    except (StartError, network.NetworkError) as error:
        log.error("%s", error)  # noqa: TRY400  the message is whole without a traceback
        report.say(error=str(error))
        return 1
    except Exception as error:
        log.exception("the supervisor failed")
        report.say(error=f"the supervisor failed: {type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
