"""One pod's life: feeds the state machine with what happens and carries out what it decides."""

import asyncio
import base64
import contextlib
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tidegate.adapters.kube import ApiError, Kube
from tidegate.adapters.kube.kinds import CONFIG_MAP, SECRET
from tidegate.local.kubelet import images, machine
from tidegate.local.kubelet.clock import Clock
from tidegate.local.kubelet.env import EnvError, environment, expand, sources
from tidegate.local.kubelet.events import Recorder, note_of, notes_of_decision
from tidegate.local.kubelet.handlers import Handlers
from tidegate.local.kubelet.logs import LogWriter, log_path, pump
from tidegate.local.kubelet.model import Container, Object, Pod, read_pod
from tidegate.local.kubelet.processes import Process, Processes
from tidegate.local.kubelet.publisher import Publisher
from tidegate.local.kubelet.sessions import MARK
from tidegate.local.kubelet.state import (
    Action,
    Deleted,
    Event,
    Exited,
    Finalize,
    HookDone,
    ImageChanged,
    NotStarted,
    Phase,
    PodState,
    Probed,
    RunHook,
    RunProbe,
    Signal,
    Start,
    Started,
)
from tidegate.local.kubelet.status import render
from tidegate.local.kubelet.template import LaunchError

log = logging.getLogger(__name__)

_LAST_WORDS_S: Final = 0.5
"""How long a pipe may stay open after its process ended (somebody escaped with it)."""


@dataclass(frozen=True, slots=True)
class Services:
    """What all pods share. `base_env` is in every container's environment."""

    kube: Kube
    processes: Processes
    handlers: Handlers
    recorder: Recorder
    clock: Clock
    images: Mapping[str, images.Image]
    base_env: Mapping[str, str]
    host_ip: str
    state_dir: Path


@dataclass(frozen=True, slots=True)
class Place:
    """What the node gave a pod: its address, and its GPUs by index."""

    ip: str
    gpus: tuple[int, ...] = ()


@dataclass(slots=True)
class _Run:
    """A run of a container that has a process."""

    process: Process
    env: Mapping[str, str]
    tasks: set[asyncio.Task[None]]


class Worker:
    """Runs one pod until its object is gone and its processes have ended."""

    def __init__(
        self, services: Services, obj: Object, state: PodState, place: Place, on_over: Callable[[], None]
    ) -> None:
        self.pod: Pod = read_pod(obj)
        self.state = state
        self.place = place
        self.obj = obj
        self._services, self._on_over = services, on_over
        self._publisher = Publisher(services.kube, self.pod)
        self._conditions = list((obj.get("status") or {}).get("conditions") or ())
        # A pod that ended before this kubelet began keeps the status that it has.
        self._silent = (obj.get("status") or {}).get("phase") in {"Succeeded", "Failed"}
        self._inbox: list[Event] = []
        self._awake = asyncio.Event()
        self._runs: dict[str, _Run] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._gone = False
        self._halted = False
        self._deleting_s: float | None = None

    async def run(self) -> None:
        """Live until the object is gone and the processes have ended."""
        clock = self._services.clock
        told = False
        try:
            while not (self._gone and self.state.finalized):
                if self._halted:  # nothing is restarted any more; wait to be cancelled
                    await asyncio.get_running_loop().create_future()
                now = clock.now()
                events, self._inbox = self._inbox, []
                for event in events:
                    self._observe(event, now)
                decision = machine.decide(self.pod, self.state, now)
                for note in notes_of_decision(self.state, decision):
                    self._services.recorder.record(self.pod, note)
                self.state = decision.state
                for action in decision.actions:
                    self._do(action)
                if not told and machine.over(self.pod, self.state):
                    told = True
                    self._on_over()
                self._publish(now)
                await self._sleep(None if decision.wake_s is None else decision.wake_s - clock.now())
        finally:
            self._publisher.stop()
            for task in self._tasks:
                task.cancel()
            for run in self._runs.values():
                run.process.kill()

    def update(self, obj: Object) -> None:
        """Take in a new version of the object."""
        fresh = read_pod(obj)
        images_before = {c.name: c.image for c in self.pod.containers}
        self.pod, self.obj = fresh, obj
        for container in fresh.containers:
            if container.image != images_before.get(container.name, container.image):
                self._tell(ImageChanged(container.name))
        meta = obj["metadata"]
        if meta.get("deletionTimestamp"):
            grace = float(meta.get("deletionGracePeriodSeconds") or 0)
            if self._deleting_s is None or grace < self._deleting_s:
                self._deleting_s = grace
                self._tell(Deleted(grace))

    def removed(self) -> None:
        """The object is gone: whatever still runs is killed at once."""
        self._gone = True
        self._publisher.stop()
        self._tell(Deleted(0.0))

    def forget_files(self) -> None:
        """Remove the pod's logs."""
        shutil.rmtree(self._services.state_dir / "pods" / self.pod.uid, ignore_errors=True)

    async def stop(self, grace_s: float) -> None:
        """End the processes because the kubelet stops: SIGTERM, then SIGKILL."""
        self._halted = True
        self._publisher.stop()
        runs = list(self._runs.values())
        for run in runs:
            run.process.terminate()
        if runs:
            await asyncio.wait([run.process.exited for run in runs], timeout=grace_s)
        for run in runs:
            run.process.kill()

    def log_of(self, container: str, *, previous: bool) -> tuple[Path | None, Callable[[], bool], str]:
        """Log of a container, whether more may come, and, when there is none, why."""
        cs = self.state.containers.get(container)
        if cs is None:
            return None, lambda: False, f'container "{container}" is not part of pod "{self.pod.name}"'
        # The last run that began; while it runs, the one before it is the previous.
        live = cs.phase is Phase.RUNNING or cs.phase is Phase.EXITED
        last = cs.runs - 1
        run = last - 1 if previous and live else last
        if run < 0:
            what = "previous terminated container" if previous else "container"
            why = f"{cs.reason}: {cs.message}" if cs.message else cs.reason
            return (
                None,
                lambda: False,
                (
                    f'{what} "{container}" in pod "{self.pod.name}" has no log: it is waiting to start: {why}'
                    if not previous
                    else f'previous terminated container "{container}" in pod "{self.pod.name}" not found'
                ),
            )
        runs = cs.runs

        def alive() -> bool:
            now = self.state.containers[container]
            return not previous and now.phase is Phase.RUNNING and now.runs == runs

        return log_path(self._services.state_dir, self.pod.uid, container, run), alive, ""

    # --- the loop's hands ------------------------------------------------------------------

    def _observe(self, event: Event, now: float) -> None:
        before = self.state.containers
        self.state = machine.observe(self.pod, self.state, event, now)
        if isinstance(event, Deleted) or event.container not in before:
            return
        note = note_of(before[event.container], self.state.containers[event.container], event)
        if note is not None:
            self._services.recorder.record(self.pod, note)

    def _tell(self, event: Event) -> None:
        self._inbox.append(event)
        self._awake.set()

    async def _sleep(self, delay_s: float | None) -> None:
        if delay_s is not None and delay_s <= 0:
            return
        if not self._inbox:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._awake.wait()
        self._awake.clear()

    def _publish(self, now: float) -> None:
        if self._silent or self._gone:
            return
        status = render(
            self.pod,
            self.state,
            pod_ip=self.place.ip,
            host_ip=self._services.host_ip,
            previous=self._conditions,
            now=now,
        )
        self._conditions = status.get("conditions", self._conditions)
        self._publisher.publish(status)

    def _do(self, action: Action) -> None:
        match action:
            case Start():
                self._spawn(self._start(action.container, action.run), self._tasks)
            case RunProbe():
                self._beside(action.container.name, self._probe(action))
            case RunHook():
                self._beside(action.container.name, self._hook(action))
            case Signal():
                if run := self._runs.get(action.container):
                    run.process.kill() if action.kill else run.process.terminate()
            case Finalize():
                self._spawn(self._finalize(), self._tasks)

    def _beside(self, container: str, work: Coroutine[Any, Any, None]) -> None:
        """Work that ends with the run of its container."""
        if run := self._runs.get(container):
            self._spawn(work, run.tasks)
        else:
            work.close()

    def _spawn(self, work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
        task = asyncio.create_task(work)
        for group in (tasks, self._tasks):
            group.add(task)
            task.add_done_callback(group.discard)

    async def _finalize(self) -> None:
        await self._publisher.finalize()

    async def _probe(self, action: RunProbe) -> None:
        run = self._runs[action.container.name]
        ok, message = await self._services.handlers.run(
            action.probe.handler, pod_ip=self.place.ip, env=run.env, timeout_s=action.probe.timeout_s
        )
        if not ok:
            log.debug("pod %s: %s probe failed: %s", self.pod.name, action.kind, message)
        self._tell(Probed(action.container.name, action.runs, action.kind, ok, message))

    async def _hook(self, action: RunHook) -> None:
        run = self._runs[action.container.name]
        if action.container.pre_stop is not None:
            ok, message = await self._services.handlers.run(
                action.container.pre_stop, pod_ip=self.place.ip, env=run.env, timeout_s=action.timeout_s
            )
            if not ok:
                log.warning("pod %s/%s: preStop failed: %s", self.pod.namespace, self.pod.name, message)
        self._tell(HookDone(action.container.name, action.runs))

    # --- a run of a container ----------------------------------------------------------------

    async def _start(self, container: Container, number: int) -> None:
        name, mark = container.name, uuid.uuid4().hex
        try:
            env, program = await self._prepare(container, mark)
        except (EnvError, ApiError) as error:
            self._tell(NotStarted(name, "CreateContainerConfigError", str(error)))
            return
        except images.UnknownImageError as error:
            self._tell(NotStarted(name, "ErrImagePull", str(error)))
            return
        except images.BadCommandError as error:
            self._tell(NotStarted(name, "CreateContainerError", str(error)))
            return
        path = log_path(self._services.state_dir, self.pod.uid, name, number)
        writer = LogWriter(path, self._services.clock)
        out, into = os.pipe()
        logging_task = asyncio.create_task(pump(out, writer))
        try:
            process = await self._services.processes.start(program, env, into)
        except LaunchError as error:
            self._tell(Exited(name, 128, "StartError", str(error)))
            return
        finally:
            os.close(into)
        _keep_two_logs(path.parent, number)
        run = self._runs[name] = _Run(process, env, set())
        self._tell(Started(name, f"process://{mark}"))
        await self._attend(name, run, logging_task)

    async def _attend(self, name: str, run: _Run, logging_task: asyncio.Task[None]) -> None:
        """Wait for the end of a run, then clear up after it."""
        try:
            code = await asyncio.shield(run.process.exited)
        except asyncio.CancelledError:
            logging_task.cancel()
            raise
        run.process.kill()  # what it left behind ends with it, as with a container's first process
        self._services.processes.forget(run.process)
        await asyncio.wait([logging_task], timeout=_LAST_WORDS_S)
        logging_task.cancel()
        for task in run.tasks:
            task.cancel()
        if self._runs.get(name) is run:
            del self._runs[name]
        self._tell(Exited(name, code))

    async def _prepare(self, container: Container, mark: str) -> tuple[dict[str, str], images.Program]:
        if container.problem:
            raise EnvError(container.problem)
        base = {
            **self._services.base_env,
            "HOSTNAME": self.pod.name,
            "POD_IP": self.place.ip,
            "NVIDIA_VISIBLE_DEVICES": ",".join(map(str, self.place.gpus)) or "void",
        }
        data = {key: await self._fetch(*key) for key in sources(container)}
        env = environment(
            self.pod,
            container,
            pod_ip=self.place.ip,
            host_ip=self._services.host_ip,
            base=base,
            data=data,
        )
        expanded = replace(
            container,
            command=tuple(expand(part, env) for part in container.command),
            args=tuple(expand(part, env) for part in container.args),
        )
        program = images.resolve(expanded, self.place.ip, self._services.images)
        return env | {MARK: mark}, program

    async def _fetch(self, kind: str, name: str) -> dict[str, str] | None:
        try:
            obj = await self._services.kube.get(
                SECRET if kind == "Secret" else CONFIG_MAP, name, self.pod.namespace
            )
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        data: dict[str, str] = obj.get("data") or {}
        if kind == "Secret":
            return {k: base64.b64decode(v).decode(errors="replace") for k, v in data.items()}
        return data


def _keep_two_logs(folder: Path, number: int) -> None:
    """Remove the logs of runs before the previous one."""
    for path in folder.iterdir():
        run = path.name.split(".", 1)[0]
        if run.isdigit() and int(run) < number - 1:
            path.unlink(missing_ok=True)
