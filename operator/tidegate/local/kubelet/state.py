"""The plain values of the pod state machine: states, what happens, what is to be done.

Times are seconds of one clock that never goes back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from tidegate.local.kubelet.model import Container, Probe
from tidegate.local.kubelet.probes import ProbeState


class Phase(StrEnum):
    """Where a container is."""

    WAITING = "waiting"
    STARTING = "starting"
    RUNNING = "running"
    EXITED = "exited"


class ProbeKind(StrEnum):
    """The three probes of a container."""

    STARTUP = "startup"
    READINESS = "readiness"
    LIVENESS = "liveness"


class Hook(StrEnum):
    """Where the preStop hook of a container that is being stopped is."""

    DUE = "due"
    RUNNING = "running"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Termination:
    """How a run ended."""

    exit_code: int
    reason: str
    message: str
    started_s: float
    finished_s: float
    container_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """A container being stopped; SIGKILL falls at `deadline_s`."""

    deadline_s: float
    hook: Hook = Hook.DUE
    term_sent: bool = False
    kill_sent: bool = False


@dataclass(frozen=True, slots=True)
class ContainerState:
    """One container. `runs` counts the processes started so far; `ended` is how the last ended."""

    phase: Phase = Phase.WAITING
    runs: int = 0
    reason: str = "ContainerCreating"
    message: str = ""
    since_s: float = 0.0
    retry_s: float = 0.0
    delay_s: float = 0.0
    started_s: float = 0.0
    container_id: str = ""
    started: bool = False
    ready: bool = False
    probes: Mapping[ProbeKind, ProbeState] = field(default_factory=dict)
    stop: Stop | None = None
    ended: Termination | None = None
    before: Termination | None = None


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why the node would not have the pod."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class PodState:
    """All of a pod. `delete_by_s` is set once the pod is being deleted."""

    containers: Mapping[str, ContainerState]
    admitted_s: float
    delete_by_s: float | None = None
    finalized: bool = False
    rejection: Rejection | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """The process of a run stands."""

    container: str
    container_id: str


@dataclass(frozen=True, slots=True)
class NotStarted:
    """No process came to be, for a reason that shows while the container waits."""

    container: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Exited:
    """The process of a run ended: exit code 0–255, 128 + n for signal n."""

    container: str
    exit_code: int
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Probed:
    """A probe of the run numbered `runs` came back."""

    container: str
    runs: int
    kind: ProbeKind
    ok: bool
    message: str = ""


@dataclass(frozen=True, slots=True)
class HookDone:
    """The preStop hook of the run numbered `runs` ended, well or not."""

    container: str
    runs: int


@dataclass(frozen=True, slots=True)
class Deleted:
    """The pod is to end within `grace_s`; a later, shorter word wins."""

    grace_s: float


@dataclass(frozen=True, slots=True)
class ImageChanged:
    """The container's image was changed in the spec: it is stopped and starts anew."""

    container: str


Event = Started | NotStarted | Exited | Probed | HookDone | Deleted | ImageChanged


@dataclass(frozen=True, slots=True)
class Start:
    """Start a process; `run` numbers it from 0."""

    container: Container
    run: int


@dataclass(frozen=True, slots=True)
class RunProbe:
    """Run a probe and report it with `runs`."""

    container: Container
    runs: int
    kind: ProbeKind
    probe: Probe


@dataclass(frozen=True, slots=True)
class RunHook:
    """Run the preStop hook for at most `timeout_s`."""

    container: Container
    runs: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Signal:
    """SIGTERM to the container's first process, or SIGKILL to all of them."""

    container: str
    kill: bool


@dataclass(frozen=True, slots=True)
class Finalize:
    """All is over: delete the pod's object."""


Action = Start | RunProbe | RunHook | Signal | Finalize


@dataclass(frozen=True, slots=True)
class Decision:
    """The state with the actions noted in it, and when to decide again if nothing happens."""

    state: PodState
    actions: tuple[Action, ...]
    wake_s: float | None
