"""The arms of the gate: orders of prompts, chunks, and QoServe's relegation.

QoServe's are rebuilt from its published description (QoServe, ASPLOS 2026; Niyama, arXiv 2503.22562).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tidegate.core.steptime import StepFit
from tidegate.sim.sarathi import Batch, Chunk, Job, Order, Relegation, Sarathi


@dataclass(frozen=True, slots=True)
class Fcfs:
    """First come, first served."""

    def key(self, job: Job) -> float:
        """Arrival, seconds."""
        return job.arrival_s


@dataclass(frozen=True, slots=True)
class Edf:
    """The earliest deadline first."""

    def key(self, job: Job) -> float:
        """When it is due, seconds."""
        return job.due_s


@dataclass(frozen=True, slots=True)
class DeadlineAndWork:
    """QoServe's order: by deadline, and the longer later, so that overload costs few requests.

    `per_token_s` is its weight of a remaining token, 8 ms. Remaining are prompt tokens: outputs
    are not known, and of this trace a hundredth of the prompts.
    """

    per_token_s: float = 0.008

    def key(self, job: Job) -> float:
        """When it is due and what is left of it, seconds."""
        return job.due_s + self.per_token_s * job.remaining


@dataclass(frozen=True, slots=True)
class Static:
    """The same chunk in every step."""

    size: int

    def __post_init__(self) -> None:
        """Refuse a chunk with which nothing would ever run."""
        if self.size < 1:
            raise ValueError(f"chunk size must be at least 1, got {self.size}")

    def tokens(self, batch: Batch, now: float) -> int:  # noqa: ARG002  (the Protocol's arguments)
        """Its size."""
        return self.size


DYNAMIC_SIZES = (128, *range(256, 2049, 256), 2552)
"""QoServe's chunks; its fit of the step time ends at the last."""


@dataclass(frozen=True, slots=True)
class Dynamic:
    """QoServe's chunk: the largest with which no decode is late, by `margin` × the predicted time.

    Where even the least chunk makes one late, it is the least.
    """

    fit: StepFit
    margin: float = 1.2
    sizes: Sequence[int] = DYNAMIC_SIZES

    def tokens(self, batch: Batch, now: float) -> int:
        """The chunk of the step that starts at `now`."""
        slack_s = batch.least_due_s - now
        for size in reversed(self.sizes):
            prefill = max(0, min(size - batch.decodes, batch.prompt_tokens))
            seconds = self.fit.seconds(prefill, batch.decodes, batch.decode_context, batch.head_context)
            if self.margin * seconds <= slack_s:
                return size
        return self.sizes[0]


@dataclass(frozen=True, slots=True)
class Hopeless:
    """Relegates who would be late if served at once, alone and in the largest chunks."""

    fit: StepFit
    chunk: int = DYNAMIC_SIZES[-1]

    def doomed(self, job: Job, now: float) -> bool:
        """Whether its first token cannot come before it is due."""
        return now + job.remaining * self.fit.seconds(self.chunk, 0) / self.chunk > job.due_s


@dataclass(frozen=True, slots=True)
class Arm:
    """A named way to run one engine."""

    name: str
    order: Order
    chunk: Chunk
    relegation: Relegation | None = None

    def engine(self) -> Sarathi:
        """A new engine that runs so."""
        return Sarathi(self.order, self.chunk, self.relegation)


def gate_arms(fit: StepFit) -> dict[str, Arm]:
    """The arms of the gate, by name, for an engine whose step time policies believe to be `fit`."""
    dynamic = Dynamic(fit)
    arms = (
        Arm("FCFS-256", Fcfs(), Static(256)),
        Arm("FCFS-2048", Fcfs(), Static(2048)),
        Arm("EDF-256", Edf(), Static(256)),
        Arm("EDF-2048", Edf(), Static(2048)),
        Arm("EDF-dynamic", Edf(), dynamic),
        Arm("QoServe", DeadlineAndWork(), dynamic, Hopeless(fit)),
    )
    return {arm.name: arm for arm in arms}
