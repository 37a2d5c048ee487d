"""`plan` of a scenario: pools and models under the names of their kinds, and how late everybody is."""

from datetime import timedelta
from typing import Annotated, Self

from pydantic import Field, model_validator

from tidegate.api.common import Duration, LabelName, PositiveDuration, Spec
from tidegate.api.gpupool import PoolReclaim, Reservation
from tidegate.api.modeldeployment import ClassLane, Scaling
from tidegate.sim.cluster.spec import Delays

_DELAYS = Delays()
_MODEL = Annotated[str, Field(min_length=1, max_length=317, pattern=r"^[^/\s]+(/[^/\s]+)?$")]


class NodeGroup(Spec):
    """Nodes that are alike."""

    count: Annotated[int, Field(ge=1, le=10_000)] = 1
    gpus: Annotated[int, Field(ge=1, le=1024)]
    """Of one node."""
    domain: str = ""
    """What the pool's topologyKey names there."""


class PoolSpec(Spec):
    """A GPUPool: its nodes, and `spec.reservations` and `spec.reclaim` as the kind has them."""

    name: LabelName = "gpus"
    nodes: Annotated[list[NodeGroup], Field(min_length=1)]
    reservations: list[Reservation] = Field(default_factory=list)
    reclaim: PoolReclaim = Field(default_factory=PoolReclaim)

    @model_validator(mode="after")
    def _known_here(self) -> Self:
        names = [r.name for r in self.reservations]
        if len(set(names)) < len(names):
            raise ValueError("reservations need names of their own")
        if any(r.namespaces and not r.namespaces.empty for r in self.reservations):
            raise ValueError(
                "reservations[].namespaces selects by labels, and a scenario has none; leave it out"
            )
        return self

    @property
    def capacity(self) -> int:
        """GPUs of all nodes."""
        return sum(g.count * g.gpus for g in self.nodes)


class ModelSpec(Spec):
    """A ModelDeployment: `spec.classes`, `spec.scaling` and `spec.maxReplicas` as the kind has them."""

    name: _MODEL
    pool: LabelName | None = None
    """Left out: the only one."""
    classes: list[ClassLane] = Field(default_factory=list)
    """Left out: a lane for every class that replicas or streams of this model name."""
    max_replicas: Annotated[int, Field(ge=0, le=100_000)] | None = None
    scaling: Scaling = Field(default_factory=Scaling)


class StartTime(Spec):
    """How long a replica takes from being bound to its first token, drawn evenly between the two."""

    least: Duration = timedelta(seconds=_DELAYS.start_s[0])
    most: Duration = timedelta(seconds=_DELAYS.start_s[1])

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.least > self.most:
            raise ValueError("needs least to be at most most")
        return self


class PlanSpec(Spec):
    """Replicas are planned and placed as in production; `replicas` are those that stand at the beginning."""

    pools: Annotated[list[PoolSpec], Field(min_length=1)]
    models: list[ModelSpec] = Field(default_factory=list)
    period: PositiveDuration = timedelta(seconds=_DELAYS.period_s)
    metric_age: Duration = timedelta(seconds=_DELAYS.metric_age_s)
    start_time: StartTime = Field(default_factory=StartTime)

    @property
    def capacity(self) -> int:
        """GPUs of all pools."""
        return sum(p.capacity for p in self.pools)

    def delays(self) -> Delays:
        """As the cluster takes them."""
        least, most = self.start_time.least.total_seconds(), self.start_time.most.total_seconds()
        return Delays(self.period.total_seconds(), self.metric_age.total_seconds(), (least, most))
