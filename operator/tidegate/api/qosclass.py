"""QoSClass: how important a class of traffic is and what latency it is promised."""

from datetime import timedelta
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from tidegate.api.common import (
    Conditions,
    Duration,
    KubeObject,
    LabelSelector,
    Percent,
    PositiveDuration,
    Spec,
    Status,
    rule,
    rules,
)
from tidegate.api.names import ANNOTATION_DEFAULT_CLASS

Reclaim = Literal["Never", "AboveMinimum", "Always"]
TenantFrom = Literal["None", "Namespace", "User", "Header"]

_PERCENT_ATTAINED = Annotated[int, Field(ge=1, le=100)]


class ObjectiveOverrides(Spec):
    """Objectives of a class for one model; what is left out stays as the class says."""

    time_to_first_token: PositiveDuration | None = Field(
        default=None,
        description="Time from a request's arrival to its first token that is aimed at, such as 1s.",
    )
    per_thousand_prompt_tokens: Duration | None = Field(
        default=None,
        description="Added to timeToFirstToken for every thousand tokens of the prompt, such as 100ms.",
    )
    time_per_output_token: PositiveDuration | None = Field(
        default=None, description="Mean time between two output tokens that is aimed at, such as 50ms."
    )
    completion: PositiveDuration | None = Field(
        default=None,
        description="Time from a request's arrival to its last token that is aimed at, such as 60s.",
    )
    attainment_percent: _PERCENT_ATTAINED | None = Field(
        default=None, description="How many of a hundred requests must meet all objectives."
    )
    window: PositiveDuration | None = Field(
        default=None, description="The time over which attainmentPercent is measured, such as 720h."
    )


class Objectives(ObjectiveOverrides):
    """What is aimed at. They drive scaling, ordering by deadline and alerts."""

    attainment_percent: _PERCENT_ATTAINED = Field(
        default=99, description="How many of a hundred requests must meet all objectives."
    )
    window: PositiveDuration = Field(
        default=timedelta(hours=720),
        description="The time over which attainmentPercent is measured, such as 720h.",
    )

    def overridden(self, by: ObjectiveOverrides | None) -> "Objectives":
        """These objectives with those of one model laid over them."""
        given = by.model_dump(by_alias=False, exclude_none=True, mode="python") if by else {}
        return Objectives.model_validate(self.model_dump(by_alias=False) | given)


class Queue(Spec):
    """How much of a class may wait, and how long."""

    max_requests: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        default=1000,
        description="Requests of this class that may wait at once in a picker; more are refused with 429.",
    )
    max_wait: Duration = Field(
        default=timedelta(seconds=30),
        description="A request that has waited this long is refused with 429 and Retry-After.",
    )


class Tenant(Spec):
    """Who a tenant of this class is. Tenants of a class share it by tokens, weighted."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "(has(self.from) && self.from == 'Header') == has(self.header)",
                "spec.tenant.header must be set when spec.tenant.from is Header, and only then",
            )
        )
    )

    from_: TenantFrom = Field(
        default="None",
        alias="from",
        description=(
            "Who a tenant is: None (no sharing), Namespace (of the calling ServiceAccount, else of the"
            " ModelDeployment), User (the caller's name), or Header (the value of spec.tenant.header)."
        ),
    )
    header: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9-]+$")] | None = Field(
        default=None, description="Name of the request header that says who the tenant is."
    )
    weights: dict[str, Annotated[int, Field(ge=1, le=1000)]] = Field(
        default_factory=dict,
        max_length=256,
        description="Weight of a tenant by its name (1 … 1000); those not listed weigh 1.",
    )


class QoSClassSpec(Spec):
    """How important a class of traffic is and what it is promised."""

    priority: Annotated[int, Field(ge=0, le=1_000_000_000)] = Field(
        description=(
            "How important this class is, 0 … 1000000000; higher is more important. Immutable, since the"
            " PriorityClass tidegate-<name> made from it is."
        ),
        json_schema_extra=rules(
            rule(
                "self == oldSelf",
                "spec.priority is immutable; make a new QoSClass with the other priority and move to it",
            )
        ),
    )
    reclaim: Reclaim = Field(
        default="Never",
        description=(
            "Whose pods may be given up when a reservation is asked back: Never (none), AboveMinimum (those"
            " above their lane's minReplicas) or Always (all). Only classes other than Never may borrow."
        ),
    )
    min_runtime: Duration = Field(
        default=timedelta(0),
        description=(
            "A borrowed pod is not given up before it has run this long, except for a class whose own"
            " reclaim is Never."
        ),
    )
    objectives: Objectives = Field(
        default_factory=Objectives,
        description="What is aimed at. A ModelDeployment may override them for its model.",
    )
    minimum_share_percent: Percent = Field(
        default=0,
        description=(
            "Percent of GPU time that this class gets wherever it competes: a low class is slow but never"
            " starved."
        ),
    )
    queue: Queue = Field(default_factory=Queue, description="How much of this class may wait, and how long.")
    tenant: Tenant = Field(
        default_factory=Tenant, description="Who a tenant of this class is; tenants share it by tokens."
    )
    allowed_namespaces: LabelSelector | None = Field(
        default=None,
        description=(
            "Namespaces, by their labels, whose ModelDeployments and pods may carry this class. Left out:"
            " none may. {}: all may."
        ),
    )

    def allows_namespace(self, labels: "dict[str, str]") -> bool:
        """Whether objects of a namespace with these labels may carry the class."""
        return self.allowed_namespaces is not None and self.allowed_namespaces.matches(labels)


class QoSClassStatus(Status):
    """What the controller saw of a class."""

    observed_generation: int = Field(
        default=0, ge=0, description="The metadata.generation that this status was decided from."
    )
    conditions: Conditions = Field(default_factory=list, description="Ready, and what stands in its way.")
    used_by: int = Field(default=0, ge=0, description="How many ModelDeployments carry this class.")
    default: bool = Field(default=False, description="Whether this is the default class.")


class QoSClass(KubeObject):
    """A class of traffic: how important it is and what latency it is promised."""

    kind: Literal["QoSClass"] = "QoSClass"
    spec: QoSClassSpec
    status: QoSClassStatus = Field(default_factory=QoSClassStatus)

    @property
    def claims_default(self) -> bool:
        """Whether it carries the annotation that makes it the default class."""
        return self.metadata.annotations.get(ANNOTATION_DEFAULT_CLASS) == "true"
