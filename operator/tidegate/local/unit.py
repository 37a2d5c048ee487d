"""The life of one component: started, watched, restarted with back-off, stopped."""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tidegate.local.components import Component
from tidegate.local.probe import is_ready
from tidegate.local.process import identity
from tidegate.local.reaper import Reaper

log = logging.getLogger(__name__)

BACKOFF_S: Final = (0.1, 0.5, 1.0, 2.0, 5.0)
STEADY_S: Final = 10.0
"""A component that ran this long starts again at the shortest back-off."""
GIVE_UP_AFTER: Final = 4
"""Deaths before it was ever ready that make a start fail."""
_PROBE_EVERY_S = 0.1
_TAIL_LINES = 12


class StartError(Exception):
    """A component does not come up; the message holds the end of its log."""


def tail(path: Path, lines: int) -> str:
    """The last lines of a text file; empty when there is none."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 400 * lines))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


def child_environment(component: Component) -> dict[str, str]:
    """The component's environment: ours without proxies and foreign clusters."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.lower().endswith("_proxy") and name not in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST")
    }
    return inherited | dict(component.env)


class Unit:
    """One component and the process that it has now. `changed` is called after each change."""

    def __init__(
        self,
        component: Component,
        extra_args: tuple[str, ...],
        *,
        log_file: Path,
        reaper: Reaper,
        changed: Callable[[], None],
    ) -> None:
        self.component, self.extra_args, self.log_file = component, extra_args, log_file
        self.state = "stopped"
        self.restarts = 0
        self.pid = 0
        self.started_ticks = 0
        self._reaper, self._changed = reaper, changed
        self._wanted = False
        self._ready = asyncio.Event()
        self._ended: asyncio.Future[int] | None = None
        self._life: asyncio.Task[None] | None = None
        self._failure: StartError | None = None
        self._restarting = asyncio.Lock()

    @property
    def name(self) -> str:
        """The component's name."""
        return self.component.name

    def describe(self) -> dict[str, Any]:
        """What the state file says of it."""
        return {
            "state": self.state,
            "pid": self.pid,
            "started": self.started_ticks,
            "restarts": self.restarts,
            "log": str(self.log_file),
            "extra_args": list(self.extra_args),
        }

    async def start(self, timeout_s: float) -> None:
        """Start it and wait until it is ready. Raises StartError."""
        self._wanted = True
        self._failure = None
        self._ready.clear()
        self._life = asyncio.create_task(self._live(), name=self.name)
        await self.wait_ready(timeout_s)

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until it is ready. Raises StartError when that does not come."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            raise self._error(f"is not ready after {timeout_s:.0f} s") from None
        if self._failure is not None:
            raise self._failure

    async def stop(self) -> None:
        """SIGTERM, after `stop_s` SIGKILL; returns when it has ended. Twice is harmless."""
        self._wanted = False
        if self._life is None:
            return
        if self._ended is None:  # between two attempts, or a task that is done
            self._life.cancel()
        else:
            await self._terminate(self._ended)
        with contextlib.suppress(asyncio.CancelledError):
            await self._life
        self._life = None
        self._set("stopped")

    async def restart(self, extra_args: tuple[str, ...] | None, timeout_s: float) -> None:
        """Stop it and start it, with other extra arguments when some are given."""
        async with self._restarting:
            await self.stop()
            if extra_args is not None:
                self.extra_args = extra_args
            self.restarts += 1
            await self.start(timeout_s)

    async def _terminate(self, ended: asyncio.Future[int]) -> None:
        self._set("stopping")
        self._signal(signal.SIGTERM)
        done, _ = await asyncio.wait([ended], timeout=self.component.stop_s)
        if not done:
            log.warning("%s: still there %.0f s after SIGTERM; killed", self.name, self.component.stop_s)
            self._signal(signal.SIGKILL)
            await asyncio.wait([ended])

    def _signal(self, number: signal.Signals) -> None:
        if self._ended is not None and not self._ended.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)  # our own child, not yet waited for: the pid is its own

    async def _live(self) -> None:
        try:
            await self._keep_running()
        except OSError as error:  # no log file, no process: the machine's fault, not the component's
            self._fail(StartError(f"{self.name} cannot be started: {error}"))

    async def _keep_running(self) -> None:
        """Run it again and again, until nobody wants it any more."""
        deaths = 0
        while True:
            began = asyncio.get_running_loop().time()
            code = await self._run_once()
            await self._reaper.clear_orphans()
            if not self._wanted:
                return
            if self.component.task and code == 0:
                self._set("done")
                self._ready.set()
                return
            ran_s = asyncio.get_running_loop().time() - began
            deaths = 1 if ran_s >= STEADY_S else deaths + 1
            log.warning("%s: ended with %s after %.1f s", self.name, describe_exit(code), ran_s)
            if not self._ready.is_set() and deaths >= GIVE_UP_AFTER:
                self._fail(
                    self._error(f"ended {deaths} times before it was ready, with {describe_exit(code)}")
                )
                return
            self._set("waiting")
            await asyncio.sleep(BACKOFF_S[min(deaths, len(BACKOFF_S)) - 1])
            self.restarts += 1

    async def _run_once(self) -> int:
        """One process from start to end; returns its exit code."""
        argv = [*self.component.argv, *self.extra_args]
        self.pid, self._ended = self._reaper.spawn(
            argv, log=self.log_file, env=child_environment(self.component)
        )
        who = identity(self.pid)
        self.started_ticks = who.started if who else 0
        self._set("starting")
        watch = asyncio.create_task(self._watch_readiness())
        try:
            return await asyncio.shield(self._ended)
        finally:
            watch.cancel()
            self._ended = None
            self.pid = self.started_ticks = 0

    async def _watch_readiness(self) -> None:
        if self.component.task:
            return
        while self.component.probe is not None and not await is_ready(self.component.probe):  # noqa: ASYNC110
            await asyncio.sleep(_PROBE_EVERY_S)
        self._set("ready")
        self._ready.set()

    def _fail(self, error: StartError) -> None:
        self._failure = error
        self._set("failed")
        self._ready.set()

    def _error(self, what: str) -> StartError:
        end = tail(self.log_file, _TAIL_LINES)
        return StartError(f"{self.name} {what}; the end of {self.log_file}:\n{end}")

    def _set(self, state: str) -> None:
        if state != self.state:
            self.state = state
            log.info("%s: %s%s", self.name, state, f", pid {self.pid}" if state == "starting" else "")
            self._changed()


def describe_exit(code: int) -> str:
    """`exit code 3` or `SIGKILL`."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
