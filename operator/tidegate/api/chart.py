"""The chart's values: what may be set, with its defaults. Their schema is generated from here."""

from typing import Annotated, Any, Literal

from pydantic import Field

from tidegate.api.common import LabelName, ObjectName, Spec
from tidegate.api.identity import IdentitySources

Schema = dict[str, Any]


class Gateway(Spec):
    """Envoy in front of the picker, with JWTs and API keys checked as `identity` says."""

    enabled: bool = Field(default=False, description="Install it.")
    replicas: Annotated[int, Field(ge=0, le=1000)] = 2
    image: str = Field(
        default="", max_length=512, description="Image with `tidegate`, which writes Envoy's configuration."
    )
    envoy_image: str = Field(default="envoyproxy/envoy:v1.40.0", max_length=512)
    picker: str = Field(
        default="tidegate-picker:9002",
        max_length=300,
        pattern=r"^\S+:[0-9]+$",
        description="HOST:PORT of the picker's ext_proc.",
    )
    measure_port: Annotated[int, Field(ge=0, le=65535)] = Field(
        default=9004,
        description="The picker's --measure-port, on the same host; 0: answers are not measured.",
    )
    behind_trusted_proxy: bool = Field(
        default=False,
        description="Nobody but a proxy that takes identity.trustedHeaders away from clients reaches this "
        "gateway (a NetworkPolicy). Without it the two are refused together.",
    )
    api_key_secrets: tuple[ObjectName, ...] = Field(
        default=(),
        max_length=64,
        description="Secrets with API keys: an entry is named as its client, each of its lines is a key.",
    )
    watch_seconds: Annotated[int, Field(ge=1, le=3600)] = Field(
        default=5, description="How often mounted keys are looked at for changes."
    )
    access_log: str = Field(default="/dev/stderr", max_length=512)
    service_type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    service_port: Annotated[int, Field(ge=1, le=65535)] = 80
    resources: dict[str, dict[str, str | int]] = Field(
        default={"requests": {"cpu": "500m", "memory": "256Mi"}, "limits": {"memory": "1Gi"}},
        description="Of the Envoy container.",
    )
    pull_secrets: tuple[LabelName, ...] = Field(default=(), max_length=16)


class Monitoring(Spec):
    """What watches the request path."""

    alerts: bool = Field(default=False, description="A PrometheusRule: attainment, refusals, measuring.")
    dashboard: bool = Field(default=False, description="A ConfigMap with the Grafana dashboard.")


class Values(Spec):
    """All values of the chart."""

    identity: IdentitySources = Field(
        default=IdentitySources(),
        description="Where a caller's identity may come from (docs/tasks/identity.md).",
    )
    gateway: Gateway = Field(default=Gateway())
    monitoring: Monitoring = Field(default=Monitoring())
    # Helm's own, of a parent chart.
    global_: dict[str, Any] | None = Field(default=None, alias="global")


def values_schema() -> Schema:
    """JSON Schema of the values, for Helm."""
    schema = _plain(Values.model_json_schema(by_alias=True))
    return {"$schema": "http://json-schema.org/draft-07/schema#", **schema}


def _plain(node: Any) -> Any:
    """Without what only Kubernetes understands, and without titles."""
    if isinstance(node, dict):
        # A property may be called title too: what is a schema has a type, a reference or alternatives.
        return {
            k: _plain(v) for k, v in node.items() if not k.startswith("x-kubernetes-") and not _title(k, v)
        }
    return [_plain(v) for v in node] if isinstance(node, list) else node


def _title(key: str, value: Any) -> bool:
    return key == "title" and isinstance(value, str)
