"""ModelDeployment: a model, the engine that serves it, and the classes that it serves."""

from datetime import timedelta
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field

from tidegate.api.common import (
    Conditions,
    Duration,
    IntOrString,
    KubeObject,
    LabelName,
    ObjectName,
    PositiveDuration,
    Replicas,
    Spec,
    Status,
    rule,
    rules,
)
from tidegate.api.engine import Engine, Text
from tidegate.api.qosclass import ObjectiveOverrides

ServedName = Annotated[
    str, Field(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9]([-A-Za-z0-9_./:]*[A-Za-z0-9])?$")
]
_MAP: Final = "x-kubernetes-list-type"
_KEYS: Final = "x-kubernetes-list-map-keys"

_URI_PATTERN: Final = r"^(hf|s3|gs|oci|pvc)://[^\s]+$"
Uri = Annotated[
    str,
    Field(
        min_length=1,
        max_length=2048,
        pattern=_URI_PATTERN,
        json_schema_extra=rules(
            rule(
                "self.matches('^(hf|s3|gs|oci|pvc)://.+')",
                "must begin with hf://, s3://, gs://, oci:// or pvc://, such as hf://org/model",
            )
        ),
    ),
]


_HOSTNAME: Final = r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
Hostname = Annotated[
    str,
    Field(
        min_length=1,
        max_length=253,
        pattern=_HOSTNAME,
        json_schema_extra=rules(
            rule(
                f"self.matches('{_HOSTNAME.replace(chr(92), chr(92) * 2)}')",
                "must be a host name in lower case and without a port, such as llama.example.com or"
                " *.example.com",
            )
        ),
    ),
]


class Ref(Spec):
    """The name of another object."""

    name: ObjectName = Field(description="Name of the object.")


class Adapter(Spec):
    """A LoRA adapter that is served beside its model."""

    name: ServedName = Field(description="Name that clients ask for.")
    uri: Uri = Field(description="Where its weights are.")


class Model(Spec):
    """What is served, and by which names."""

    name: ServedName = Field(description="Name that clients ask for, such as meta-llama/Llama-3.1-8B.")
    aliases: Annotated[list[ServedName], Field(max_length=16)] = Field(
        default_factory=list,
        description="Further names that clients may ask for.",
        json_schema_extra={_MAP: "set"},
    )
    uri: Uri | None = Field(
        default=None, description="Where the weights are: hf://, s3://, gs://, oci:// or pvc://."
    )
    revision: Text | None = Field(default=None, description="Branch, tag or commit of the weights.")
    secret_ref: Ref | None = Field(
        default=None, description="Secret in this namespace with the credentials to read the weights."
    )
    adapters: Annotated[list[Adapter], Field(max_length=64)] = Field(
        default_factory=list,
        description="LoRA adapters that are served beside the model.",
        json_schema_extra={_MAP: "map", _KEYS: ["name"]},
    )

    @property
    def served_names(self) -> tuple[str, ...]:
        """Every name that a client may ask for: the model's, its aliases, its adapters."""
        return (self.name, *self.aliases, *(a.name for a in self.adapters))


class Parallelism(Spec):
    """How one replica is spread over GPUs."""

    tensor: Annotated[int, Field(ge=1, le=256)] = Field(default=1, description="Tensor-parallel GPUs.")
    pipeline: Annotated[int, Field(ge=1, le=256)] = Field(default=1, description="Pipeline stages.")
    data: Annotated[int, Field(ge=1, le=256)] = Field(default=1, description="Data-parallel copies.")

    @property
    def gpus(self) -> int:
        """GPUs that one replica needs."""
        return self.tensor * self.pipeline * self.data


class ClassLane(Spec):
    """A class that the model serves: one lane of replicas."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.maxReplicas) || !has(self.minReplicas) || self.maxReplicas >= self.minReplicas",
                "spec.classes[].maxReplicas must be at least spec.classes[].minReplicas",
            )
        )
    )

    qos_class: LabelName = Field(description="Name of the QoSClass.")
    min_replicas: Replicas = Field(
        default=0, description="Replicas that are kept even when nobody asks; 0 lets the lane go to zero."
    )
    max_replicas: Replicas | None = Field(
        default=None, description="Most replicas of this lane. Left out: as many as the pool holds."
    )
    objectives: ObjectiveOverrides | None = Field(
        default=None, description="The class's objectives for this model; what is left out stays as there."
    )


class Scaling(Spec):
    """How replicas follow demand."""

    scale_down_delay: Duration = Field(
        default=timedelta(minutes=5),
        description="A lane is made smaller only when less has sufficed for this long.",
    )
    scale_to_zero_after: PositiveDuration | None = Field(
        default=None,
        description=(
            "A lane with minReplicas 0 goes to zero after this long without requests. Left out: after"
            " scaleDownDelay."
        ),
    )
    paused: bool = Field(
        default=False, description="Leave every lane at the replicas that it has; nothing is changed."
    )
    replicas: Annotated[dict[str, Replicas], Field(max_length=16)] = Field(
        default_factory=dict,
        description="Pin of the replicas by class name, instead of following demand: {batch: 2}.",
    )


class Rollout(Spec):
    """How a changed lane is replaced."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.maxSurge) || !has(self.maxUnavailable) || !(string(self.maxSurge) in ['0', '0%'])"
                " || !(string(self.maxUnavailable) in ['0', '0%'])",
                "spec.rollout.maxSurge and spec.rollout.maxUnavailable must not both be 0:"
                " nothing could be replaced",
            )
        )
    )

    max_surge: IntOrString = Field(
        default=0,
        description="Replicas, or percent such as 25%, above the wanted number while a lane is replaced.",
    )
    max_unavailable: IntOrString = Field(
        default=1,
        description=(
            "Replicas, or percent such as 25%, that may be missing while a lane is replaced. GPUs are"
            " seldom free for more, and the model's other lanes take the traffic meanwhile."
        ),
    )


class ParentRef(Spec):
    """A Gateway that offers the model."""

    name: ObjectName = Field(description="Name of the Gateway.")
    namespace: LabelName | None = Field(default=None, description="Its namespace. Left out: this one.")
    section_name: ObjectName | None = Field(default=None, description="Name of one of its listeners.")


class EndpointPicker(Spec):
    """The Service of Tidegate's picker, by which gateways ask it."""

    service: LabelName = Field(
        default="tidegate-picker",
        description=(
            "Name of the Service, in the ModelDeployment's namespace: an InferencePool can name no other."
        ),
    )
    port: Annotated[int, Field(ge=1, le=65535)] = Field(
        default=9002, description="Its port for the external processing protocol."
    )
    failure_mode: Literal["FailClose", "FailOpen"] = Field(
        default="FailClose",
        description=(
            "What gateways do while the picker does not answer: refuse, or send requests to any replica,"
            " without classes and without a queue."
        ),
    )


class Exposure(Spec):
    """How gateways of the Gateway API offer the model.

    With parentRefs or endpointPicker an InferencePool is kept, with parentRefs an HTTPRoute to it.
    """

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.hostnames) || size(self.hostnames) == 0"
                " || (has(self.parentRefs) && size(self.parentRefs) > 0)",
                "spec.exposure.hostnames may only be set with spec.exposure.parentRefs: they are the route's",
            )
        )
    )

    parent_refs: Annotated[list[ParentRef], Field(max_length=16)] = Field(
        default_factory=list,
        description="Gateways that offer the model; an HTTPRoute to its InferencePool is kept for them.",
        json_schema_extra={_MAP: "atomic"},
    )
    hostnames: Annotated[list[Hostname], Field(max_length=16)] = Field(
        default_factory=list,
        description=(
            "Host names that are this model's alone. Left out: the route takes requests whose header"
            " X-Gateway-Model-Name, which body-based routers write, is one of its names; for KServe v2 those"
            " whose path has it."
        ),
        json_schema_extra={_MAP: "set"},
    )
    endpoint_picker: EndpointPicker | None = Field(
        default=None,
        description="The picker that its InferencePool names. Left out with parentRefs: the defaults below.",
    )


class ModelDeploymentSpec(Spec):
    """A model, its engine, and the classes that it serves."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "self.engine.type == 'External' || has(self.model.uri)",
                "spec.model.uri must be set unless spec.engine.type is External",
            ),
            rule(
                "self.engine.type != 'Triton' || !has(self.model.revision)"
                " && (!has(self.model.adapters) || size(self.model.adapters) == 0)",
                "spec.model.adapters and revision must be left out when spec.engine.type is Triton:"
                " its repository says what it serves",
            ),
            rule(
                "self.engine.type != 'External' || !has(self.podOverrides)",
                "spec.podOverrides must be left out when spec.engine.type is External: pods that somebody"
                " else makes are never edited",
            ),
            rule(
                "!has(self.maxReplicas) || !has(self.classes) || self.maxReplicas >="
                " self.classes.map(c, has(c.minReplicas) ? c.minReplicas : 0).sum()",
                "spec.maxReplicas must be at least the sum of spec.classes[].minReplicas",
            ),
            rule(
                "!has(self.scaling) || !has(self.scaling.replicas) || self.scaling.replicas.all(k,"
                " has(self.classes) && self.classes.exists(c, c.qosClass == k))",
                "spec.scaling.replicas may only name classes of spec.classes",
            ),
        )
    )

    pool_refs: Annotated[list[Ref], Field(max_length=8)] = Field(
        default_factory=list,
        description="The GPUPool to run in, at most one. Left out: the only pool there is.",
        json_schema_extra=rules(
            rule("size(self) <= 1", "spec.poolRefs may name at most one pool in v1alpha1"),
            **{_MAP: "map", _KEYS: ["name"]},
        ),
    )
    model: Model = Field(description="What is served, and by which names.")
    engine: Engine = Field(description="The program that serves the model.")
    parallelism: Parallelism = Field(
        default_factory=Parallelism,
        description="How one replica is spread over GPUs: tensor × pipeline × data of them.",
    )
    profile_ref: Ref | None = Field(
        default=None, description="ConfigMap in this namespace with a fitted step-time profile of the engine."
    )
    classes: Annotated[list[ClassLane], Field(max_length=16)] = Field(
        default_factory=list,
        description="Classes that the model serves, one lane of replicas each. Left out: the default class.",
        json_schema_extra={_MAP: "map", _KEYS: ["qosClass"]},
    )
    max_replicas: Replicas | None = Field(
        default=None, description="Most replicas of all lanes together. Left out: no such limit."
    )
    scaling: Scaling = Field(default_factory=Scaling, description="How replicas follow demand.")
    rollout: Rollout = Field(default_factory=Rollout, description="How a changed lane is replaced.")
    exposure: Exposure | None = Field(
        default=None, description="How gateways of the Gateway API offer the model."
    )
    pod_overrides: dict[str, Any] | None = Field(
        default=None,
        description=(
            "A small strategic merge patch of the pod template for what is not modelled here, such as"
            " {spec: {nodeSelector: …}}. It cannot weaken the security context or mount host paths."
        ),
        json_schema_extra={"type": "object", "x-kubernetes-preserve-unknown-fields": True},
    )


class Weight(Status):
    """The share of a class's requests that one lane gets."""

    lane: str = Field(max_length=63, description="Class of the lane.")
    weight: int = Field(ge=0, le=1_000_000, description="Its share relative to the others.")


class ClassStatus(Status):
    """How one class of the model stands."""

    qos_class: str = Field(max_length=63, description="Name of the QoSClass.")
    desired: int = Field(default=0, ge=0, description="Replicas of its lane that are wanted.")
    ready: int = Field(default=0, ge=0, description="Replicas of its lane that serve.")
    weights: Annotated[list[Weight], Field(max_length=16)] = Field(
        default_factory=list,
        description="Which lanes this class's requests go to.",
        json_schema_extra={_MAP: "map", _KEYS: ["lane"]},
    )
    headroom: int = Field(
        default=0, ge=0, description="Slots of a replica kept free for arrivals of this class."
    )
    attainment_percent: int | None = Field(
        default=None, ge=0, le=100, description="How many of a hundred requests met all objectives."
    )
    reason: str = Field(default="", max_length=1024, description="Why it is so, in one CamelCase word.")
    message: str = Field(default="", max_length=4096, description="Why it is so, with numbers, for people.")


class ModelDeploymentStatus(Status):
    """What the controller saw and did."""

    observed_generation: int = Field(
        default=0, ge=0, description="The metadata.generation that this status was decided from."
    )
    conditions: Conditions = Field(default_factory=list, description="Ready, and what stands in its way.")
    classes: Annotated[list[ClassStatus], Field(max_length=16)] = Field(
        default_factory=list,
        description="How each class of the model stands.",
        json_schema_extra={_MAP: "map", _KEYS: ["qosClass"]},
    )
    replicas: str = Field(
        default="",
        max_length=2048,
        description="Ready and desired replicas of each class in one line: interactive 2/2, batch 1/3.",
    )
    url: str | None = Field(default=None, max_length=2048, description="Where the model answers.")


class ModelDeployment(KubeObject):
    """A model, the engine that serves it, and the classes that it serves."""

    kind: Literal["ModelDeployment"] = "ModelDeployment"
    spec: ModelDeploymentSpec
    status: ModelDeploymentStatus = Field(default_factory=ModelDeploymentStatus)

    @property
    def gpus_per_replica(self) -> int:
        """GPUs that one replica needs."""
        return self.spec.parallelism.gpus


def replicas_line(classes: list[ClassStatus]) -> str:
    """`status.replicas`, which `kubectl get` shows: `interactive 2/2, batch 1/3`."""
    return ", ".join(f"{c.qos_class} {c.ready}/{c.desired}" for c in classes)
