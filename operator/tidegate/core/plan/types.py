"""What the planner reads and what it says. Plain values; times in seconds, GPUs whole devices."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from tidegate.core.types import Objectives, Pod, Pool, QoSClass


class LaneKey(NamedTuple):
    """A lane, or the traffic of one class of one model. Equal to `Pod.lane` of its pods."""

    namespace: str
    model: str
    qos_class: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.model}:{self.qos_class}"


@dataclass(frozen=True, slots=True)
class Lane:
    """One workload of a model: the replicas that one class pays for.

    `gpus` is what a replica needs on one node. `replicas` is what its Deployment asks for now (0
    when there is none yet). `max_replicas` None means as many as the pool holds. `pinned` is what a
    person fixed it to (`scaling.replicas`). `objectives` are those of this model, None the class's.
    `slots` are the requests that one replica runs at once, None where nobody says: then those of the
    model's ability.
    """

    key: LaneKey
    gpus: int
    min_replicas: int = 0
    max_replicas: int | None = None
    pinned: int | None = None
    replicas: int = 0
    ready: int = 0
    objectives: Objectives | None = None
    slots: int | None = None


@dataclass(frozen=True, slots=True)
class Ability:
    """What one replica serves: tokens/s of each kind if it did nothing else, and requests at once.

    The load of mixed traffic is the sum of the shares (a step's time is linear in its prefill and
    decode tokens); the defaults are rough and meant to be replaced by a fit.
    """

    prefill_tokens_per_s: float = 8000.0
    decode_tokens_per_s: float = 1000.0
    slots: int = 16

    def seconds(self, prompt_tokens: float, output_tokens: float) -> float:
        """Replica-seconds that this many tokens take."""
        return prompt_tokens / self.prefill_tokens_per_s + output_tokens / self.decode_tokens_per_s


@dataclass(frozen=True, slots=True)
class Model:
    """A ModelDeployment: its lanes in the order of `spec.classes`, and how it is scaled.

    `paused` (scaling.paused) and `external` (engine.type External) models are counted, never
    changed. None for a time means the policy's.
    """

    namespace: str
    name: str
    pool: str
    lanes: tuple[Lane, ...] = ()
    max_replicas: int | None = None
    paused: bool = False
    external: bool = False
    ability: Ability | None = None
    start_time_s: float | None = None
    scale_down_delay_s: float | None = None
    scale_to_zero_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Demand:
    """Traffic of one class of one model, as measured.

    Rates are of admitted arrivals; output tokens are expected ones. `queued_tokens` are prompt and
    expected output tokens of what waits. `inflight` is requests dispatched and not ended, on any
    lane. `fresh` is False when the figures are too old to act on. Of `judged` requests, over the
    class's window, `kept` met all objectives; nothing is planned by that.
    """

    arrival_rps: float = 0.0
    prompt_tokens_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    queued_requests: int = 0
    queued_tokens: float = 0.0
    inflight: int = 0
    fresh: bool = True
    kept: int = 0
    judged: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything one plan is made from.

    `demand` lacks a key where nothing could be measured: that is stale, not zero. A class that a
    picker answered for without any request so far is `Demand()`. `incomplete` says why the GPU
    budget cannot be trusted (for example "pods: not listed yet"); then nothing is changed at all.
    """

    classes: Mapping[str, QoSClass]
    pools: Mapping[str, Pool]
    models: tuple[Model, ...]
    pods: tuple[Pod, ...] = ()
    demand: Mapping[LaneKey, Demand] = field(default_factory=dict)
    incomplete: str = ""


@dataclass(frozen=True, slots=True)
class Policy:
    """How the planner behaves where the objects say nothing.

    Attributes:
        target_utilisation: share of a replica that planned load may fill; the rest absorbs
            what arrives between two plans.
        scale_down_delay_s: how long a lane must have been too large before it shrinks.
        start_time_s: how long a replica takes from creation to its first token.
        headroom: share of a lane that a lower class leaves free for the lane's own class.
        share_lanes: whether replicas of lower classes of the same model, which a higher class may
            use at once, count for its demand before new ones are started.
        weight_step: weights are multiples of this, and one step of change is not worth a write.
        ability: of a replica of a model that has none of its own.
    """

    target_utilisation: float = 0.7
    scale_down_delay_s: float = 60.0
    start_time_s: float = 60.0
    headroom: float = 0.2
    share_lanes: bool = True
    weight_step: int = 5
    ability: Ability = field(default_factory=Ability)


class Calm(NamedTuple):
    """What hysteresis knows of one lane: too large since when, and the most wanted since then."""

    since_s: float
    peak: int


class Weight(NamedTuple):
    """A share, in percent, of a class's requests for the lane of class `lane` of the same model."""

    lane: str
    weight: int


@dataclass(frozen=True, slots=True)
class Memory:
    """What one plan hands to the next. Losing it costs a delay, never a replica.

    An empty one starts every scale-down delay afresh. `to_json` and `from_json` are inverse.
    """

    calm: Mapping[LaneKey, Calm] = field(default_factory=dict)
    weights: Mapping[LaneKey, tuple[Weight, ...]] = field(default_factory=dict)
    blocked: Mapping[LaneKey, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Lists and dicts only, in a stable order."""
        return {
            "calm": [[*k, *v] for k, v in sorted(self.calm.items())],
            "weights": [[*k, [list(w) for w in v]] for k, v in sorted(self.weights.items())],
            "blocked": [[*k, v] for k, v in sorted(self.blocked.items())],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Memory":
        """What `to_json` wrote; parts that are missing are empty."""
        return Memory(
            calm={LaneKey(n, m, q): Calm(s, p) for n, m, q, s, p in data.get("calm", ())},
            weights={
                LaneKey(n, m, q): tuple(Weight(lane, w) for lane, w in ws)
                for n, m, q, ws in data.get("weights", ())
            },
            blocked={LaneKey(n, m, q): text for n, m, q, text in data.get("blocked", ())},
        )


@dataclass(frozen=True, slots=True)
class LanePlan:
    """What a lane gets, and why.

    `wanted` is what its demand asks for, before what exists is considered. Where `applied` is
    False (Observe, paused, External) `replicas` must not be written. `leaving` names the pods that
    stand where another lane's replica is to go: these are to go first.
    """

    replicas: int
    wanted: int
    reason: str
    message: str
    applied: bool = True
    leaving: tuple[str, ...] = ()


DecisionKind = Literal["borrow", "reclaim", "rebalance", "scale", "blocked"]


@dataclass(frozen=True, slots=True)
class Decision:
    """A change that the plan makes, or something it cannot do, once and with the figures.

    borrow: a lane is raised onto idle GPUs outside its reservation. reclaim: a lane is raised onto
    GPUs that are lent out, or a borrower is lowered after they went back. scale: any other change
    of replicas. rebalance: changed weights. blocked: something wanted has no place.
    """

    kind: DecisionKind
    object: str
    reason: str
    message: str
    lane: LaneKey
    pool: str
    applied: bool = True


@dataclass(frozen=True, slots=True)
class Unmet:
    """Replicas that a lane wants and cannot have now."""

    lane: LaneKey
    pool: str
    replicas: int
    gpus: int
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Replicas for every lane, shares for every class of a model, what was decided, what is short."""

    lanes: Mapping[LaneKey, LanePlan]
    weights: Mapping[LaneKey, tuple[Weight, ...]]
    decisions: tuple[Decision, ...]
    unmet: tuple[Unmet, ...]
    memory: Memory
