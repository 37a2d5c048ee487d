"""What the queue is told and what it answers: plain values. Times are seconds."""

from dataclasses import dataclass
from enum import StrEnum

ModelKey = tuple[str, str]
"""Namespace and name of a ModelDeployment."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A replica that can serve: where, for whom, and how much at once. `lane` is its class.

    `lent`: its GPUs may be asked back, and what it has begun to answer dies with it.
    """

    address: str
    model: ModelKey
    lane: str
    slots: int
    ready: bool = True
    draining: bool = False
    lent: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """A model as the queue sees it. `startable`: a replica is coming, or can be asked for."""

    key: ModelKey
    classes: tuple[str, ...]
    startable: bool = False


@dataclass(frozen=True, slots=True)
class Policy:
    """What the queue obeys.

    `qos` False is the arm to compare with: one queue per model in arrival order, no headroom, and
    bounds so wide that neither arm refuses.
    """

    qos: bool = True
    max_bytes: int = 256 << 20
    fifo_max_requests: int = 100_000
    fifo_max_wait_s: float = 3600.0
    report_grace_s: float = 2.0
    report_stale_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Ask:
    """A classified request. `size` is what the picker holds of it, in bytes.

    `streamed`: its answer goes out as it is made, so that it cannot be asked for again.
    """

    id: int
    model: ModelKey
    qos_class: str
    prompt_tokens: int
    output_tokens: int
    size: int = 0
    streamed: bool = False


@dataclass(frozen=True, slots=True)
class Dispatch:
    """A request that has its endpoint now, after `waited_s` in the queue."""

    ask: Ask
    address: str
    lane: str
    waited_s: float


class Reason(StrEnum):
    """Why a request is refused."""

    QUEUE_FULL = "QueueFull"
    WAITED_TOO_LONG = "WaitedTooLong"
    MEMORY_FULL = "MemoryFull"
    NO_ENDPOINT = "NoReadyEndpoint"


@dataclass(frozen=True, slots=True)
class Refused:
    """What a client is told: an HTTP status, why, and when it is worth trying again."""

    status: int
    reason: Reason
    message: str
    retry_after_s: int


class Ended(StrEnum):
    """Where a request stood when it ended."""

    QUEUED = "Queued"
    DISPATCHED = "Dispatched"
