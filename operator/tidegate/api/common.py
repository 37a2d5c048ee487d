"""What the three kinds share: metadata, durations, selectors, conditions, and reading raw objects."""

import re
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AliasGenerator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
)
from pydantic.alias_generators import to_camel

from tidegate.api.names import API_VERSION
from tidegate.api.problems import describe


class InvalidObject(ValueError):  # noqa: N818 - reads as what it says
    """An object that cannot be read. The message names each field and what to write instead."""


def rule(expression: str, message: str, **more: Any) -> dict[str, Any]:
    """One entry of `x-kubernetes-validations`: a CEL expression and what a user reads when it is false."""
    return {"rule": expression, "message": message, **more}


def rules(*entries: dict[str, Any], **more: Any) -> dict[str, Any]:
    """`json_schema_extra` of a field or a model that carries CEL rules."""
    return {"x-kubernetes-validations": list(entries), **more}


# --------------------------------------------------------------------------------- durations

DURATION_PATTERN: Final = r"^(0|([0-9]{1,6}(\.[0-9]{1,3})?(us|ms|s|m|h))+)$"
"""Go's duration syntax without signs and nanoseconds. Six digits and 20 characters keep the sum
below the 292 years that Go, and so CEL's duration(), can hold."""
DURATION_MAX_LENGTH: Final = 20
_DURATION: Final = re.compile(DURATION_PATTERN)
_PART: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(us|ms|s|m|h)")
_UNIT_US: Final = {"us": 1, "ms": 1_000, "s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000}
_DURATION_HELP: Final = "must be a duration with a unit, such as 500ms, 5s, 2m or 24h"


def parse_duration(text: object) -> timedelta:
    """Read Go's duration syntax (`1h30m`, `500ms`). Raises ValueError saying what is allowed."""
    if isinstance(text, timedelta):
        return text
    if not isinstance(text, str) or len(text) > DURATION_MAX_LENGTH or not _DURATION.match(text):
        raise ValueError(f"{_DURATION_HELP}, not {text!r}")
    return timedelta(microseconds=sum(float(n) * _UNIT_US[unit] for n, unit in _PART.findall(text)))


def format_duration(value: timedelta) -> str:
    """Write a duration in Go's syntax, in the largest unit that divides it."""
    whole_us = round(value / timedelta(microseconds=1))
    if whole_us == 0:
        return "0s"
    unit = next(u for u in ("h", "m", "s", "ms", "us") if whole_us % _UNIT_US[u] == 0)
    return f"{whole_us // _UNIT_US[unit]}{unit}"


def _duration_schema(*extra: dict[str, Any]) -> WithJsonSchema:
    first = rule(f"self.matches('{DURATION_PATTERN.replace(chr(92), chr(92) * 2)}')", _DURATION_HELP)
    return WithJsonSchema(
        {
            "type": "string",
            "pattern": DURATION_PATTERN,
            "minLength": 1,
            "maxLength": DURATION_MAX_LENGTH,
            **rules(first, *extra),
        }
    )


def _positive(value: timedelta) -> timedelta:
    if value <= timedelta(0):
        raise ValueError("must be longer than 0s")
    return value


_READ: Final = BeforeValidator(parse_duration)
_WRITE: Final = PlainSerializer(format_duration, return_type=str)
Duration = Annotated[timedelta, _READ, _WRITE, _duration_schema()]
"""Go's syntax in JSON, a timedelta in Python."""

_LONGER: Final = rule(
    f"!self.matches('{DURATION_PATTERN.replace(chr(92), chr(92) * 2)}') || duration(self) > duration('0s')",
    "must be longer than 0s; leave it out to aim at nothing",
)
PositiveDuration = Annotated[
    timedelta, BeforeValidator(lambda v: _positive(parse_duration(v))), _WRITE, _duration_schema(_LONGER)
]

# --------------------------------------------------------------------------- names and quantities

LABEL_NAME: Final = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
SUBDOMAIN: Final = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
LABEL_KEY: Final = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"

_LABEL_RULE: Final = rule(
    f"self.matches('{LABEL_NAME}')",
    "must be a lower-case name of letters, digits and '-', such as team-a, at most 63 characters",
)
LabelName = Annotated[
    str, Field(min_length=1, max_length=63, pattern=LABEL_NAME, json_schema_extra=rules(_LABEL_RULE))
]
"""A DNS label: QoSClass names are label values and parts of child names, so they are one too."""
ObjectName = Annotated[str, Field(min_length=1, max_length=253, pattern=SUBDOMAIN)]
LabelKey = Annotated[str, Field(min_length=1, max_length=317, pattern=LABEL_KEY)]
LabelValue = Annotated[str, Field(max_length=63, pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$")]
Percent = Annotated[int, Field(ge=0, le=100)]
Gpus = Annotated[int, Field(ge=0, le=1_000_000)]
Replicas = Annotated[int, Field(ge=0, le=10_000)]

IntOrString = Annotated[
    int | str,
    Field(union_mode="left_to_right"),
    WithJsonSchema({"x-kubernetes-int-or-string": True, "maxLength": 32, "pattern": "^[0-9]{1,3}%$"}),
]
"""A number, or a share such as 25%. The pattern holds for strings only."""
Quantity = Annotated[
    int | str,
    Field(union_mode="left_to_right"),
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "maxLength": 32,
            # As in Kubernetes' own OpenAPI, without signs.
            "pattern": r"^([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][-+]?[0-9]+)?$",
        }
    ),
]
"""A Kubernetes quantity: `8`, `500m`, `64Gi`."""

# ------------------------------------------------------------------------------------ models


class Spec(BaseModel):
    """Base of everything that a user writes: unknown fields are errors."""

    model_config = ConfigDict(
        alias_generator=AliasGenerator(to_camel),
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
        extra="forbid",
        frozen=True,
    )

    def to_json(self) -> dict[str, Any]:
        """As Kubernetes writes it: camelCase, without what is not set."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class Status(Spec):
    """Base of everything that the controller writes: fields of other versions are passed over."""

    model_config = ConfigDict(extra="ignore")


class OwnerReference(Status):
    """The object that this one is deleted with."""

    api_version: str = ""
    kind: str = ""
    name: str = ""
    uid: str = ""
    controller: bool = False


class ObjectMeta(Status):
    """The parts of Kubernetes' metadata that are read here."""

    name: str = ""
    namespace: str | None = None
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    finalizers: list[str] = Field(default_factory=list)
    owner_references: list[OwnerReference] = Field(default_factory=list)
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None


class MatchExpression(Spec):
    """One requirement on a label."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "self.operator in ['In', 'NotIn'] ? has(self.values) && size(self.values) > 0"
                " : !has(self.values) || size(self.values) == 0",
                "values must list at least one value for In and NotIn, and be left out for Exists and"
                " DoesNotExist",
            )
        )
    )

    key: LabelKey = Field(description="Key of the label.")
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"] = Field(
        description="How the label is compared: In and NotIn with values, Exists and DoesNotExist without."
    )
    values: list[LabelValue] = Field(
        default_factory=list,
        max_length=32,
        description="Values that the label must have (In) or must not have (NotIn).",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether these labels satisfy it. As in Kubernetes, NotIn holds where the label is absent."""
        tests: dict[str, Callable[[], bool]] = {
            "In": lambda: self.key in labels and labels[self.key] in self.values,
            "NotIn": lambda: self.key not in labels or labels[self.key] not in self.values,
            "Exists": lambda: self.key in labels,
            "DoesNotExist": lambda: self.key not in labels,
        }
        return tests[self.operator]()


class LabelSelector(Spec):
    """A label selector: every requirement must hold. The empty selector `{}` matches everything."""

    match_labels: dict[str, LabelValue] = Field(
        default_factory=dict,
        max_length=32,
        description="Labels that must be present with exactly these values.",
        json_schema_extra=rules(
            rule(
                f"self.all(k, size(k) <= 317 && k.matches('{LABEL_KEY}'))",
                "matchLabels: each key must be a label key, such as tidegate.dev/tier",
            )
        ),
    )
    match_expressions: list[MatchExpression] = Field(
        default_factory=list,
        max_length=16,
        description="Requirements that must all hold.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )

    @property
    def empty(self) -> bool:
        """Whether it is `{}` and so matches everything."""
        return not self.match_labels and not self.match_expressions

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether these labels satisfy every requirement."""
        return all(labels.get(k) == v for k, v in self.match_labels.items()) and all(
            e.matches(labels) for e in self.match_expressions
        )


class Condition(Status):
    """One condition of an object, as in metav1.Condition."""

    type: str = Field(max_length=316, description="Name of the condition, such as Ready.")
    status: Literal["True", "False", "Unknown"] = Field(description="True, False or Unknown.")
    observed_generation: int = Field(
        default=0, ge=0, description="The metadata.generation that this condition was decided from."
    )
    last_transition_time: datetime | None = Field(
        default=None, description="When the condition's status last changed."
    )
    reason: str = Field(
        default="", max_length=1024, description="One CamelCase word from the catalogue of reasons."
    )
    message: str = Field(default="", max_length=32768, description="What is so, with numbers, for people.")


Conditions = Annotated[
    list[Condition],
    Field(
        max_length=16,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    ),
]


class KubeObject(Spec):
    """Base of the three kinds."""

    model_config = ConfigDict(extra="ignore")

    api_version: str = API_VERSION
    metadata: ObjectMeta

    @classmethod
    def from_object(cls, raw: Mapping[str, Any]) -> Self:
        """Read a raw Kubernetes object.

        Raises:
            InvalidObject: the message names every wrong field and what to write instead.
        """
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise InvalidObject("; ".join(describe(cls, error))) from error
