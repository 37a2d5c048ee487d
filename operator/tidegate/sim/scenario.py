"""What to simulate, as YAML: classes as their manifests have them, replicas, streams, faults.

Read here and checked field by field; `sim.build` makes a `Setting` of it.
"""

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import yaml
from pydantic import AliasGenerator, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from tidegate.api.common import Duration, LabelName, PositiveDuration, Spec, parse_duration
from tidegate.api.problems import describe
from tidegate.api.qosclass import QoSClassSpec
from tidegate.core.steptime import LLAMA3_8B_A100
from tidegate.sim.cluster.fields import PlanSpec
from tidegate.sim.types import EngineConfig

_ENGINE: Final = EngineConfig()
TRACES: Final = ("chat", "code", "summaries")
"""Lengths that ship (sim/data)."""


class ScenarioError(ValueError):
    """A scenario that cannot be used; the message names the field and what it takes."""


def _span(value: object) -> float:
    """A number of seconds, or Go's duration syntax."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return parse_duration(value).total_seconds()


Seconds = Annotated[float, BeforeValidator(_span), Field(gt=0, le=1e7, allow_inf_nan=False)]
"""Seconds as a number, or a duration such as 10m."""
Positive = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
PerSecond = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Tokens = Annotated[int, Field(ge=1, le=10_000_000)]
ModelName = Annotated[str, Field(min_length=1, max_length=317, pattern=r"^[^/\s]+(/[^/\s]+)?$")]
"""`name`, or `namespace/name`."""


class Engine(Spec):
    """An engine's settings, under the names of vLLM's flags."""

    model_config = ConfigDict(
        alias_generator=AliasGenerator(lambda name: name.replace("_", "-")),
    )

    max_num_seqs: Count = _ENGINE.max_num_seqs
    max_num_batched_tokens: Tokens = _ENGINE.max_num_batched_tokens
    block_size: Count = _ENGINE.block_size
    num_gpu_blocks: Annotated[int, Field(ge=2, le=100_000_000)] = _ENGINE.num_blocks

    @model_validator(mode="after")
    def _room_for_decodes(self) -> Self:
        if self.max_num_batched_tokens <= self.max_num_seqs:
            raise ValueError(
                f"needs max-num-batched-tokens above max-num-seqs ({self.max_num_seqs}), not"
                f" {self.max_num_batched_tokens}: a step must have room for prompts beside the decodes"
            )
        return self

    def config(self) -> EngineConfig:
        """As the engine model takes it."""
        return EngineConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
            num_blocks=self.num_gpu_blocks,
        )


class Group(Spec):
    """Replicas that are alike. They are called MODEL-LANE-0, MODEL-LANE-1 and so on."""

    model: ModelName | None = None
    lane: LabelName | None = None
    """A class. Left out: the one with the highest priority."""
    count: Annotated[int, Field(ge=0, le=1_000_000)] = 1
    """0 only where replicas are planned: then it says what a model's would be like."""
    gpus: Annotated[int, Field(ge=1, le=1024)] = 1
    """Of one replica; for what-if questions about GPUs."""
    speed: Positive = 1.0
    """2 is twice as fast as `stepTime` says."""
    engine: Engine | None = None
    """Left out: the scenario's."""


class Lengths(Spec):
    """Prompts and outputs: of a trace, or scaled to other means."""

    trace: Annotated[str, Field(min_length=1)]
    """chat, code or summaries, or the path of a CSV with the columns prompt and output."""
    mean_prompt: Positive | None = None
    mean_output: Positive | None = None


class Rate(Spec):
    """Requests a second."""

    per_second: PerSecond


class Gamma(Rate):
    """Bursts: gaps from a gamma distribution with this coefficient of variation."""

    cv: Annotated[float, Field(gt=0, le=100)]


class Phase(Spec):
    """A stretch with one rate; the phases follow each other, over and over."""

    per_second: Annotated[float, Field(ge=0, le=1e6)]
    seconds: Seconds


class Arrivals(Spec):
    """When requests come; exactly one of the four."""

    poisson: Rate | None = None
    gamma: Gamma | None = None
    phases: Annotated[list[Phase], Field(min_length=1)] | None = None
    trace: Rate | None = None
    """The times of the stream's CSV, or else of the shipped chat trace, stretched to this rate."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError("must set exactly one of poisson, gamma, phases and trace")
        if self.phases and all(p.per_second == 0 for p in self.phases):
            raise ValueError("needs a phase with perSecond above 0")
        return self


def _lengths(value: object) -> object:
    return {"trace": value} if isinstance(value, str) else value


class StreamSpec(Spec):
    """One kind of traffic. What is left out comes from the columns of `csv`, where that is set."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    qos_class: LabelName | None = Field(default=None, alias="class")
    model: ModelName | None = None
    tenant: str | None = None
    csv: Path | None = None
    """Recorded requests: the columns timestamp, prompt, output, and class, tenant, model."""
    lengths: Annotated[Lengths | None, BeforeValidator(_lengths)] = None
    arrivals: Arrivals | None = None
    outstanding: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """So many requests at all times, instead of arrivals."""
    expected_output: Tokens = 256
    """What the picker takes an answer's length to be: `max_tokens`, or its own default."""
    streamed: bool = True

    @model_validator(mode="after")
    def _one_kind_of_arrivals(self) -> Self:
        if self.arrivals is not None and self.outstanding is not None:
            raise ValueError("must set only one of arrivals (open loop) and outstanding (closed loop)")
        if self.csv is None and self.arrivals is None and self.outstanding is None:
            raise ValueError("must set one of arrivals (open loop), outstanding (closed loop) and csv")
        if self.csv is None and self.lengths is None:
            raise ValueError("must set lengths: chat, code, summaries or a CSV with prompt and output")
        return self


class FaultSpec(Spec):
    """What goes wrong at a replica, from start to end."""

    kind: Literal["death", "slow", "deaf"]
    """death: gone, back empty at the end; slow: steps take `factor` times as long; deaf: no metrics."""
    replica: str
    start: Duration = timedelta(0)
    end: PositiveDuration
    factor: Positive | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.start >= self.end:
            raise ValueError("needs start before end")
        if (self.kind == "slow") != (self.factor is not None):
            raise ValueError("must set factor when kind is slow, and only then")
        return self


def _groups(value: object) -> object:
    return [{"count": value}] if isinstance(value, int) and not isinstance(value, bool) else value


class Scenario(Spec):
    """A whole simulation. Paths in it are beside its file."""

    notes: list[str] = Field(default_factory=list)
    """Shown with the results: what was assumed."""
    seconds: Seconds
    warm_up: Duration = timedelta(0)
    seeds: Annotated[int, Field(ge=1, le=1000)] = 1
    classes: Annotated[dict[LabelName, QoSClassSpec], Field(min_length=1)]
    replicas: Annotated[list[Group], BeforeValidator(_groups), Field(min_length=1)]
    engine: Engine = Field(default_factory=Engine)
    step_time: str = LLAMA3_8B_A100.name
    scrape_age: Duration = timedelta(milliseconds=50)
    streams: Annotated[list[StreamSpec], Field(min_length=1)]
    faults: list[FaultSpec] = Field(default_factory=list)
    plan: PlanSpec | None = None
    """Set: replicas are planned and placed, and `replicas` are those that stand at the beginning."""

    @model_validator(mode="after")
    def _somebody_serves(self) -> Self:
        for index, group in enumerate(self.replicas):
            if self.plan is None and group.count == 0:
                raise ValueError(f"must set replicas[{index}].count to at least 1, or plan")
        return self

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a scenario from YAML or JSON. Raises ScenarioError naming the field."""
        try:
            raw = yaml.safe_load(path.read_text())
        except OSError as error:
            raise ScenarioError(f"{path}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ScenarioError(f"{path}: not YAML: {error}") from error
        try:
            return cls.read(raw, path.parent)
        except ScenarioError as error:
            raise ScenarioError(f"{path}: {error}") from error

    @classmethod
    def read(cls, raw: Any, folder: Path = Path()) -> Self:
        """Read a scenario's parsed document; paths in it are relative to `folder`.

        Raises:
            ScenarioError: A sentence for every wrong field.
        """
        if not isinstance(raw, dict):
            raise ScenarioError("must be a mapping with seconds, classes, replicas and streams")
        try:
            found = cls.model_validate(raw)
        except ValidationError as error:
            raise ScenarioError("; ".join(describe(cls, error))) from error
        return found._beside(folder)

    def _beside(self, folder: Path) -> Self:
        """The same with the paths of files made relative to where we are."""
        streams = []
        for stream in self.streams:
            own: dict[str, Any] = {}
            if stream.csv is not None:
                own["csv"] = folder / stream.csv
            if stream.lengths is not None and stream.lengths.trace not in TRACES:
                trace = str(folder / stream.lengths.trace)
                own["lengths"] = stream.lengths.model_copy(update={"trace": trace})
            streams.append(stream.model_copy(update=own))
        step_time = str(folder / self.step_time) if self.step_time.endswith(".json") else self.step_time
        return self.model_copy(update={"streams": streams, "step_time": step_time})
