"""GPUPool: which nodes' GPUs are shared, and how much of them each class has reserved."""

from datetime import timedelta
from typing import Annotated, Final, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from tidegate.api.common import (
    Conditions,
    Duration,
    Gpus,
    KubeObject,
    LabelKey,
    LabelName,
    LabelSelector,
    ObjectName,
    Percent,
    Spec,
    Status,
    rule,
    rules,
)

Mode = Literal["Observe", "Enforce"]
DEFAULT_RESOURCE: Final = "nvidia.com/gpu"


class Devices(Spec):
    """What a GPU is called on the pool's nodes."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "has(self.resourceName) != has(self.deviceClassName)",
                "spec.devices must set exactly one of resourceName and deviceClassName",
            )
        )
    )

    resource_name: LabelKey | None = Field(
        default=None, description="Extended resource of the device plugin, such as nvidia.com/gpu."
    )
    device_class_name: ObjectName | None = Field(
        default=None, description="DeviceClass of dynamic resource allocation (DRA)."
    )


class PoolReclaim(Spec):
    """How borrowed GPUs are taken back."""

    drain_timeout: Duration = Field(
        default=timedelta(seconds=30),
        description="How long a pod that is given up may finish what it does before it is killed.",
    )


class Reservation(Spec):
    """GPUs that a class may count on."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "has(self.gpus) != has(self.sharePercent)",
                "spec.reservations[] must set exactly one of gpus and sharePercent",
            ),
            rule(
                "!has(self.gpus) || !has(self.maxLend) || self.maxLend <= self.gpus",
                "spec.reservations[].maxLend must be at most spec.reservations[].gpus",
            ),
        )
    )

    name: LabelName = Field(description="Name of the reservation, unique in the pool.")
    qos_class: LabelName = Field(description="Name of the QoSClass that the GPUs are reserved for.")
    namespaces: LabelSelector | None = Field(
        default=None,
        description="Namespaces, by their labels, whose pods count against this reservation. Left out: all.",
    )
    gpus: Gpus | None = Field(
        default=None,
        description="How many GPUs are reserved; 0 with maxBorrow only limits borrowing.",
        json_schema_extra=rules(rule("self >= 0", "spec.reservations[].gpus must be at least 0")),
    )
    share_percent: Percent | None = Field(
        default=None,
        description="How much of the pool's capacity is reserved, in percent, rounded down to whole GPUs.",
    )
    max_lend: Gpus | None = Field(
        default=None,
        description="How many of these GPUs others may borrow while they are idle. Left out: all.",
    )
    max_borrow: Gpus | None = Field(
        default=None,
        description="How many GPUs beyond this reservation its pods may borrow. Left out: any number.",
    )

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.gpus is None) == (self.share_percent is None):
            raise ValueError("must set exactly one of gpus and sharePercent")
        return self

    def gpus_of(self, capacity: int) -> int:
        """GPUs reserved in a pool of this capacity."""
        return self.gpus if self.gpus is not None else capacity * (self.share_percent or 0) // 100


class GPUPoolSpec(Spec):
    """Which nodes' GPUs are shared and how."""

    mode: Mode = Field(
        default="Enforce",
        description=(
            "Observe plans, explains and measures but changes, taints and blocks nothing; Enforce does it."
        ),
    )
    node_selector: LabelSelector = Field(
        description="Labels of the nodes whose GPUs make the pool.",
        json_schema_extra=rules(
            rule(
                "(has(self.matchLabels) && size(self.matchLabels) > 0)"
                " || (has(self.matchExpressions) && size(self.matchExpressions) > 0)",
                "spec.nodeSelector must ask for at least one label: {} would take every node of the cluster",
            )
        ),
    )
    devices: Devices = Field(
        default_factory=lambda: Devices(resource_name=DEFAULT_RESOURCE),
        description="What a GPU is called on these nodes; nvidia.com/gpu when left out.",
    )
    topology_key: LabelKey | None = Field(
        default=None,
        description="Node label that names an NVLink or rack domain; nodes with one value belong together.",
    )
    taint: bool = Field(
        default=True,
        description=(
            "Taint the pool's nodes tidegate.dev/pool=<name>:NoSchedule, so that only Tidegate's scheduler"
            " places pods there."
        ),
    )
    reclaim: PoolReclaim = Field(default_factory=PoolReclaim, description="How borrowed GPUs are taken back.")
    reservations: Annotated[list[Reservation], Field(max_length=64)] = Field(
        default_factory=list,
        description=(
            "GPUs that classes may count on. A pod that several match counts against the first with room."
        ),
        json_schema_extra=rules(
            rule(
                "self.map(r, has(r.sharePercent) ? r.sharePercent : 0).sum() <= 100",
                "spec.reservations[].sharePercent must be at most 100 together",
            ),
            **{"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        ),
    )


class ReservationStatus(Status):
    """How one reservation stands, in GPUs."""

    name: str = Field(max_length=63, description="Name of the reservation.")
    qos_class: str = Field(default="", max_length=63, description="The class that it is for.")
    reserved: int = Field(default=0, ge=0, description="GPUs reserved.")
    in_use: int = Field(default=0, ge=0, description="Reserved GPUs that its own pods use.")
    borrowed: int = Field(default=0, ge=0, description="GPUs beyond the reservation that its pods borrow.")
    lent: int = Field(default=0, ge=0, description="Reserved GPUs that pods of other classes use.")
    unmet: int = Field(default=0, ge=0, description="Reserved GPUs that are asked for and not yet had.")


class FreeBlock(Status):
    """The most GPUs that are free on one node, among the nodes of one size."""

    node_gpus: int = Field(ge=0, description="GPUs that a node of this size has.")
    largest_free: int = Field(ge=0, description="Most GPUs free on one such node.")


class GPUPoolStatus(Status):
    """What the controller saw of a pool."""

    observed_generation: int = Field(
        default=0, ge=0, description="The metadata.generation that this status was decided from."
    )
    conditions: Conditions = Field(default_factory=list, description="Ready, and what stands in its way.")
    nodes: int = Field(default=0, ge=0, description="Nodes that the selector matches.")
    capacity: int = Field(default=0, ge=0, description="GPUs of the pool's schedulable nodes.")
    allocated: int = Field(default=0, ge=0, description="GPUs that pods of QoS classes use.")
    foreign: int = Field(default=0, ge=0, description="GPUs that pods of nobody's class use.")
    reservations: Annotated[list[ReservationStatus], Field(max_length=64)] = Field(
        default_factory=list,
        description="How each reservation stands.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    free_blocks: Annotated[list[FreeBlock], Field(max_length=32)] = Field(
        default_factory=list,
        description="Largest free block for each size of node.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["nodeGpus"]},
    )


class GPUPool(KubeObject):
    """Nodes whose GPUs classes share, and how much of them each has reserved."""

    kind: Literal["GPUPool"] = "GPUPool"
    spec: GPUPoolSpec
    status: GPUPoolStatus = Field(default_factory=GPUPoolStatus)
