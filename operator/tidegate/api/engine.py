"""The engine of a ModelDeployment: the program that serves the model, and how it is run."""

from typing import Annotated, Final, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from tidegate.api.common import LabelSelector, ObjectName, Quantity, Spec, rule, rules

EngineType = Literal["vLLM", "Triton", "External"]
Protocol = Literal["OpenAI", "KServeV2"]

DEFAULT_IMAGES: Final[dict[str, str]] = {
    # The versions whose scheduling and wire behaviour the design notes describe:
    # Triton 2.51 is release 24.10 of NVIDIA's containers.
    "vLLM": "vllm/vllm-openai:v0.32.0",
    "Triton": "nvcr.io/nvidia/tritonserver:24.10-py3",
}
ENGINE_PORTS: Final[dict[str, int]] = {"vLLM": 8000, "Triton": 8000}
METRICS_PORTS: Final[dict[str, int]] = {"vLLM": 8000, "Triton": 8002}

Text = Annotated[str, Field(min_length=1, max_length=1024)]
_MAP: Final = "x-kubernetes-list-type"
_KEYS: Final = "x-kubernetes-list-map-keys"


class KeyRef(Spec):
    """One key of a Secret or ConfigMap of this namespace."""

    name: ObjectName = Field(description="Name of the object.")
    key: Annotated[str, Field(min_length=1, max_length=253)] = Field(description="Key in it.")


class ValueFrom(Spec):
    """Where an environment variable's value comes from."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "has(self.secretKeyRef) != has(self.configMapKeyRef)",
                "spec.engine.env[].valueFrom must set exactly one of secretKeyRef and configMapKeyRef",
            )
        )
    )

    secret_key_ref: KeyRef | None = Field(default=None, description="A key of a Secret.")
    config_map_key_ref: KeyRef | None = Field(default=None, description="A key of a ConfigMap.")


class EnvVar(Spec):
    """An environment variable of the engine."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!(has(self.value) && has(self.valueFrom))",
                "spec.engine.env[] must not set both value and valueFrom",
            )
        )
    )

    name: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z][-._a-zA-Z0-9]*$")] = (
        Field(description="Name of the variable.")
    )
    value: Annotated[str, Field(max_length=8192)] | None = Field(default=None, description="Its value.")
    value_from: ValueFrom | None = Field(default=None, description="Where its value comes from instead.")


class Resources(Spec):
    """CPU, memory and the like of an engine's container. GPUs follow from spec.parallelism."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "(!has(self.requests) || !self.requests.exists(k, k.endsWith('/gpu')))"
                " && (!has(self.limits) || !self.limits.exists(k, k.endsWith('/gpu')))",
                "spec.engine.resources must not name GPUs: they follow from spec.parallelism",
            )
        )
    )

    requests: Annotated[dict[str, Quantity], Field(max_length=16)] = Field(
        default_factory=dict, description="What a replica is sure to get, such as cpu: 8 and memory: 64Gi."
    )
    limits: Annotated[dict[str, Quantity], Field(max_length=16)] = Field(
        default_factory=dict, description="What a replica may use at most."
    )


class Endpoints(Spec):
    """Pods that somebody else makes and that serve this model."""

    selector: LabelSelector = Field(
        description="Labels of the pods in this namespace.",
        json_schema_extra=rules(
            rule(
                "(has(self.matchLabels) && size(self.matchLabels) > 0)"
                " || (has(self.matchExpressions) && size(self.matchExpressions) > 0)",
                "spec.engine.endpoints.selector must ask for at least one label: {} would take every pod"
                " of the namespace",
            )
        ),
    )
    port: Annotated[int, Field(ge=1, le=65535)] = Field(description="Port that they serve on.")
    grpc_port: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        default=None,
        description="Port that they serve KServe v2 over gRPC on. Left out: the container port named grpc.",
    )


class Engine(Spec):
    """The program that serves the model."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "(self.type == 'External') == has(self.endpoints)",
                "spec.engine.endpoints (selector and port) must be set when spec.engine.type is External,"
                " and only then",
            ),
            rule(
                "self.type != 'External' || !(has(self.image) || has(self.args) || has(self.env)"
                " || has(self.resources) || (has(self.qosScheduler) && self.qosScheduler != 'Off'))",
                "spec.engine.image, args, env, resources and qosScheduler must be left out when"
                " spec.engine.type is External: pods that somebody else makes are never edited",
            ),
            rule(
                "!has(self.protocol) || self.type != 'vLLM' || self.protocol == 'OpenAI'",
                "spec.engine.protocol must be OpenAI when spec.engine.type is vLLM",
            ),
            rule(
                "!has(self.protocol) || self.type != 'Triton' || self.protocol == 'KServeV2'",
                "spec.engine.protocol must be KServeV2 when spec.engine.type is Triton",
            ),
            rule(
                "!has(self.qosScheduler) || self.qosScheduler == 'Off' || self.type == 'vLLM'",
                "spec.engine.qosScheduler must be Off unless spec.engine.type is vLLM",
            ),
        )
    )

    type: EngineType = Field(
        description=(
            "vLLM or Triton: Tidegate runs it. External: pods that somebody else makes, named by endpoints,"
            " are classified, queued and routed, but never scaled or edited."
        )
    )
    qos_scheduler: Literal["Off", "Auto"] = Field(
        default="Off",
        description=(
            "Auto: Tidegate's scheduler plugin enforces the class inside vLLM, where that version is known"
            " to be good. Off: the engine's own priorities are used."
        ),
    )
    image: Text | None = Field(
        default=None,
        description=(
            f"Container image. Left out: {DEFAULT_IMAGES['vLLM']} for vLLM and {DEFAULT_IMAGES['Triton']}"
            " for Triton."
        ),
    )
    args: Annotated[list[Annotated[str, Field(max_length=4096)]], Field(max_length=128)] | None = Field(
        default=None,
        description="Arguments added to those that Tidegate gives the engine, such as --max-num-seqs=64.",
        json_schema_extra={_MAP: "atomic"},
    )
    env: Annotated[list[EnvVar], Field(max_length=64)] | None = Field(
        default=None,
        description="Environment variables of the engine.",
        json_schema_extra={_MAP: "map", _KEYS: ["name"]},
    )
    resources: Resources | None = Field(
        default=None,
        description="CPU, memory and the like of a replica; GPUs follow from spec.parallelism.",
    )
    protocol: Protocol | None = Field(
        default=None,
        description=(
            "What the engine speaks: OpenAI or KServeV2. Left out: OpenAI for vLLM and External, KServeV2"
            " for Triton."
        ),
    )
    endpoints: Endpoints | None = Field(
        default=None, description="With type External: the pods that serve the model."
    )

    @model_validator(mode="after")
    def _endpoints_when_external(self) -> Self:
        if (self.type == "External") != (self.endpoints is not None):
            raise ValueError("must set endpoints when type is External, and only then")
        return self

    @property
    def external(self) -> bool:
        """Whether somebody else makes the pods: nothing of them may be touched."""
        return self.type == "External"

    @property
    def effective_protocol(self) -> Protocol:
        """What the engine speaks, after defaults."""
        return self.protocol or ("KServeV2" if self.type == "Triton" else "OpenAI")

    @property
    def effective_image(self) -> str:
        """The container's image after defaults; empty for External."""
        return self.image or DEFAULT_IMAGES.get(self.type, "")

    @property
    def port(self) -> int:
        """Port that the engine serves on."""
        return self.endpoints.port if self.endpoints else ENGINE_PORTS[self.type]
