"""What a simulated cluster is made of, and how long things take there. Seconds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tidegate.core.flowtypes import ModelKey
from tidegate.core.plan.types import Model, Policy
from tidegate.core.types import Pool
from tidegate.sim.types import EngineConfig


@dataclass(frozen=True, slots=True)
class Delays:
    """How late everybody is.

    Attributes:
        period_s: Between two plans (`tidegate controller --period`).
        metric_age_s: How old the pickers' figures are when a plan is made from them.
        start_s: Least and most that a replica takes from being bound to its first token; drawn evenly.
        schedule_s: From a change until kube-scheduler has placed what can be placed.
        stop_s: How long a replica that is deleted goes on at least: its preStop, so that pickers hear
            of it (`render/engine.py`).
    """

    period_s: float = 1.0
    metric_age_s: float = 0.05
    start_s: tuple[float, float] = (40.0, 100.0)
    schedule_s: float = 0.1
    stop_s: float = 2.0

    def __post_init__(self) -> None:
        """Refuse times that cannot be."""
        least, most = self.start_s
        if self.period_s <= 0 or self.metric_age_s < 0 or self.schedule_s < 0 or self.stop_s < 0:
            raise ValueError("delays: period_s must be above 0, and no other below 0")
        if not 0 <= least <= most:
            raise ValueError(f"delays: start_s must be least and most, from 0 on, not {least:g} and {most:g}")


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """Pools and models, as the planner knows them.

    A lane's `replicas` are those that stand there, ready, when the run begins, as far as they find a
    place. `engines` and `speeds` are by model; what is left out is the setting's, and 1.
    """

    pools: Sequence[Pool]
    models: Sequence[Model]
    policy: Policy = field(default_factory=Policy)
    delays: Delays = field(default_factory=Delays)
    engines: Mapping[ModelKey, EngineConfig] = field(default_factory=dict)
    speeds: Mapping[ModelKey, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse names that are not there or there twice."""
        pools = [p.name for p in self.pools]
        nodes = [n.name for p in self.pools for n in p.nodes]
        if len(set(pools)) < len(pools) or len(set(nodes)) < len(nodes):
            raise ValueError("pools and nodes need names of their own")
        for model in self.models:
            if model.pool not in pools:
                raise ValueError(f"model {model.namespace}/{model.name}: no pool is named {model.pool!r}")

    @property
    def capacity(self) -> int:
        """GPUs of all pools."""
        return sum(p.capacity for p in self.pools)
