"""Events of a pod: what `kubectl describe` tells of what happened (which, pure; and writing them)."""

import asyncio
import logging
import uuid
from typing import Any, Final, NamedTuple

from tidegate.adapters.kube import ApiError, Kube
from tidegate.adapters.kube.kinds import EVENT
from tidegate.local.kubelet.clock import Clock, rfc3339_micro
from tidegate.local.kubelet.model import Pod
from tidegate.local.kubelet.state import (
    ContainerState,
    Decision,
    Event,
    Exited,
    NotStarted,
    Phase,
    PodState,
    Probed,
    ProbeKind,
    Signal,
    Started,
)

log = logging.getLogger(__name__)

_MAX_NOTE: Final = 1000
"""The API server refuses notes of 1,024 bytes and more."""


class Note(NamedTuple):
    """An event's type (Normal or Warning), reason in the kubelet's words, and message."""

    type: str
    reason: str
    message: str


def note_of(before: ContainerState, after: ContainerState, event: Event) -> Note | None:
    """Say what is worth telling of a container's change by an event."""
    match event:
        case Started():
            return Note("Normal", "Started", f"Container started: {event.container}")
        case NotStarted() if (before.reason, before.message) != (after.reason, after.message):
            return Note("Warning", "Failed", f"{event.reason}: {event.message}")
        case Exited() if event.reason == "StartError":
            return Note("Warning", "Failed", f"Error: {event.message}")
        case Probed() if before.ready and not after.ready and not after.stop:
            return Note("Warning", "Unhealthy", f"Readiness probe failed: {event.message}")
        case Probed() if after.stop and not before.stop:
            kind = "liveness" if event.kind is ProbeKind.LIVENESS else "startup"
            text = f"Container {event.container} failed {kind} probe, will be restarted: {event.message}"
            return Note("Warning", "Unhealthy", text)
    return None


def notes_of_decision(before: PodState, decision: Decision) -> list[Note]:
    """Say what is worth telling of what was decided: back-off and signals."""
    notes = []
    for name, cs in decision.state.containers.items():
        if cs.phase is Phase.WAITING and before.containers[name].phase is Phase.EXITED:
            text = f"Back-off {cs.delay_s:g} s restarting failed container {name}"
            notes.append(Note("Warning", "BackOff", text))
    for action in decision.actions:
        if isinstance(action, Signal):
            how = "with SIGKILL: the grace period is over" if action.kill else "with SIGTERM"
            notes.append(Note("Normal", "Killing", f"Stopping container {action.container} {how}"))
    return notes


class Recorder:
    """Writes events without waiting; one that cannot be written is lost, as with the kubelet."""

    def __init__(self, kube: Kube, clock: Clock) -> None:
        self._kube, self._clock = kube, clock
        self._tasks: set[asyncio.Task[None]] = set()

    def record(self, pod: Pod, note: Note) -> None:
        """Write one event about a pod."""
        task = asyncio.create_task(self._write(pod, note))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Give up what is not written yet."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _write(self, pod: Pod, note: Note) -> None:
        body: dict[str, Any] = {
            "apiVersion": EVENT.api_version,
            "kind": EVENT.name,
            "metadata": {"name": f"{pod.name}.{uuid.uuid4().hex[:16]}", "namespace": pod.namespace},
            "eventTime": rfc3339_micro(self._clock.now()),
            "reportingController": "tidegate.dev/process-kubelet",
            "reportingInstance": pod.node,
            "action": note.reason,
            "reason": note.reason,
            "type": note.type,
            "note": note.message[:_MAX_NOTE],
            "regarding": {
                "apiVersion": "v1",
                "kind": "Pod",
                "name": pod.name,
                "namespace": pod.namespace,
                "uid": pod.uid,
            },
        }
        try:
            await self._kube.create(EVENT, body)
        except ApiError as error:
            level = logging.ERROR if error.status == 403 else logging.DEBUG
            log.log(level, "event %s of pod %s/%s is lost: %s", note.reason, pod.namespace, pod.name, error)
