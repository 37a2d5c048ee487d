"""What the queue is told and what it answers: plain values. Times are seconds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from tidegate.core.steptime import LLAMA3_8B_A100, StepFit
from tidegate.core.subset import Subset
from tidegate.core.types import Objectives

ModelKey = tuple[str, str]
"""Namespace and name of a ModelDeployment."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A replica that can serve: where, for whom, and how much at once. `lane` is its class.

    `lent`: its GPUs may be asked back, and what it has begun to answer dies with it. `chunk`: the
    most tokens that a step computes (vLLM's max_num_batched_tokens).
    """

    address: str
    model: ModelKey
    lane: str
    slots: int
    ready: bool = True
    draining: bool = False
    lent: bool = False
    chunk: int = 2048


@dataclass(frozen=True, slots=True)
class Model:
    """A model as the queue sees it. `startable`: a replica is coming, or can be asked for.

    `objectives` are those of its own, by class: deadlines follow them and not the class's. `start_s` is
    what a start was seen to take, `starting_s` for how long the foremost replica has been starting
    when the queue was told; None where none was seen, or none is under way.
    """

    key: ModelKey
    classes: tuple[str, ...]
    startable: bool = False
    objectives: Mapping[str, Objectives] = field(default_factory=dict)
    start_s: float | None = None
    starting_s: float | None = None


@dataclass(frozen=True, slots=True)
class Pack:
    """How patient work is kept out of the way of who waits for a first token; see `core.front`.

    Each idea can be turned off, to see what it is worth.

    Attributes:
        front: what people wait for goes to as few replicas as it needs, the front, and beyond it
            only when it would wait there for more than `spill` of its objective.
        late: a prompt of patient work is sent when the prefill before it is done, behind the front
            `ahead_s` before that, so that the engine does not wait for it.
        clear: some of the front (`clear_share` of it, one at least) has no patient prefill at a time,
            and none of it more patient requests than `front_patient`.
        pace: no patient prefill where it would hold somebody up beyond the pace that was promised,
            less `margin_s`.
        short: the front takes, of the patient prompts near the head, the longest that is computed
            within `short_s`: who is behind it waits so long at most.
        recall: what was sent to a replica of the front and need not have been begun yet is taken back
            where a step of decodes takes longer than `recall_pace` of the promised time per token.
        utilisation: of the front's time, what the prefill of urgent work takes when the front is as
            small as it may be.
    """

    front: bool = True
    late: bool = True
    clear: bool = True
    pace: bool = True
    short: bool = True
    recall: bool = True
    spill: float = 0.35
    clear_share: float = 0.5
    front_patient: int = 11
    margin_s: float = 0.12
    utilisation: float = 0.48
    ahead_s: float = 0.1
    short_s: float = 0.12
    recall_pace: float = 0.55


@dataclass(frozen=True, slots=True)
class Policy:
    """What the queue obeys.

    `qos` False is the arm to compare with: one queue per model in arrival order, no headroom, and
    bounds so wide that neither arm refuses. `fallbacks`: how many further endpoints are named for a
    request, for a gateway that goes on to them by itself.
    """

    qos: bool = True
    max_bytes: int = 256 << 20
    fifo_max_requests: int = 100_000
    fifo_max_wait_s: float = 3600.0
    report_grace_s: float = 2.0
    report_stale_s: float = 5.0
    fallbacks: int = 0
    pack: Pack = field(default_factory=Pack)
    fit: StepFit = LLAMA3_8B_A100


@dataclass(frozen=True, slots=True)
class Ask:
    """A classified request. `size` is what the picker holds of it, in bytes.

    `streamed`: its answer goes out as it is made, so that it cannot be asked for again. `tenant` is
    of no account where its class is not shared by tenants. `recallable`: it comes again by itself when it
    is aborted before its answer has begun; `again`: it was sent before. `subset`: where alone it may go,
    None where its gateway says nothing. `adapter`: the LoRA adapter that it wants, by the engine's name.
    """

    id: int
    model: ModelKey
    qos_class: str
    prompt_tokens: int
    output_tokens: int
    size: int = 0
    streamed: bool = False
    tenant: str = ""
    recallable: bool = False
    again: bool = False
    subset: Subset | None = None
    adapter: str = ""

    @property
    def tokens(self) -> int:
        """KV tokens that it may come to hold."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class Dispatch:
    """A request that has its endpoint now, after `waited_s` in the queue.

    `fallbacks`: where else it may go if that one does not take it, the best first.
    """

    ask: Ask
    address: str
    lane: str
    waited_s: float
    fallbacks: tuple[str, ...] = ()


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
