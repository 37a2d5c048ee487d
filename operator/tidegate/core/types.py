"""The plain values that decisions are made from. Times are seconds; GPUs are whole devices."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Reclaim(StrEnum):
    """Whose pods may be given up when a reservation is asked back."""

    NEVER = "Never"
    ABOVE_MINIMUM = "AboveMinimum"
    ALWAYS = "Always"


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a class is promised; None where it is promised nothing."""

    ttft_s: float | None = None
    per_thousand_prompt_tokens_s: float = 0.0
    tpot_s: float | None = None
    completion_s: float | None = None
    attainment: float = 0.99
    window_s: float = 30 * 86400.0


class TenantFrom(StrEnum):
    """What says who the tenant of a request is."""

    NONE = "None"
    NAMESPACE = "Namespace"
    USER = "User"
    HEADER = "Header"


@dataclass(frozen=True, slots=True)
class Tenants:
    """How tenants share a class: who they are, and what those weigh that do not weigh 1."""

    source: TenantFrom = TenantFrom.NONE
    header: str = ""
    weights: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class QoSClass:
    """A class of traffic: how important it is and what it is promised.

    `minimum_share` is the part of a model's GPU time that it gets while it has something waiting, 0…1.
    """

    name: str
    priority: int
    reclaim: Reclaim = Reclaim.NEVER
    min_runtime_s: float = 0.0
    objectives: Objectives = field(default_factory=Objectives)
    queue_max_requests: int = 1000
    queue_max_wait_s: float = 30.0
    tenants: Tenants = field(default_factory=Tenants)
    minimum_share: float = 0.0

    @property
    def may_borrow(self) -> bool:
        """Only what can be taken back may stand on somebody else's GPUs."""
        return self.reclaim is not Reclaim.NEVER


@dataclass(frozen=True, slots=True)
class Reservation:
    """GPUs of a pool that a class may count on. `namespaces` None means all of them."""

    name: str
    qos_class: str
    gpus: int
    namespaces: frozenset[str] | None = None
    max_lend: int | None = None
    max_borrow: int | None = None

    def covers(self, qos_class: str, namespace: str) -> bool:
        """Whether pods of this class and namespace count against this reservation."""
        return self.qos_class == qos_class and (self.namespaces is None or namespace in self.namespaces)


@dataclass(frozen=True, slots=True)
class Node:
    """A GPU node of a pool. `gpus` is what it can allocate; 0 when it is not schedulable."""

    name: str
    gpus: int
    domain: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that asks for GPUs.

    `qos_class` is None for a foreign pod, one that Tidegate did not place: it is counted as used
    and never given up. `lane_minimum` is its lane's minReplicas. `started_s` is when it was bound.
    `draining`: its lane gives it up once nothing is in flight there.
    """

    uid: str
    name: str
    namespace: str
    gpus: int
    created_s: float
    qos_class: str | None = None
    model: str | None = None
    node: str | None = None
    started_s: float | None = None
    ready: bool = False
    terminating: bool = False
    priority: int = 0
    lane_minimum: int = 0
    draining: bool = False

    @property
    def age_key(self) -> tuple[float, str]:
        """Older first; ties broken by the UID, which never changes."""
        return (self.created_s, self.uid)

    @property
    def lane(self) -> tuple[str, str | None, str | None]:
        """The lane that this pod is a replica of: namespace, model, class."""
        return (self.namespace, self.model, self.qos_class)


@dataclass(frozen=True, slots=True)
class Pool:
    """A GPUPool as decisions see it. `enforce` is False in Observe mode."""

    name: str
    nodes: tuple[Node, ...]
    reservations: tuple[Reservation, ...] = ()
    enforce: bool = True
    drain_timeout_s: float = 30.0

    @property
    def capacity(self) -> int:
        """GPUs that can be allocated on schedulable nodes."""
        return sum(n.gpus for n in self.nodes)
