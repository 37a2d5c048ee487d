"""The Service of a model: every lane's replicas under one name."""

from typing import Any

from tidegate.api import names
from tidegate.api.modeldeployment import ModelDeployment
from tidegate.render.lane import owner_reference


def service_name(model: str) -> str:
    """Name of a model's Service: a DNS label that begins with a letter (RFC 1035)."""
    name = model.replace(".", "-")
    return names.bounded(name if name[0].isalpha() else f"model-{name}")


def service(model: ModelDeployment) -> dict[str, Any]:
    """A ClusterIP Service with the port `http`."""
    identity = {names.LABEL_MODEL: names.bounded(model.metadata.name)}
    port = {
        "name": names.ENGINE_PORT_NAME,
        "port": 8000,
        "protocol": "TCP",
        "targetPort": names.ENGINE_PORT_NAME,
    }
    return {
        "metadata": {
            "name": service_name(model.metadata.name),
            "namespace": model.metadata.namespace,
            "labels": identity | {names.LABEL_MANAGED_BY: names.FIELD_MANAGER},
            "ownerReferences": [owner_reference(model)],
        },
        "spec": {"type": "ClusterIP", "selector": identity, "ports": [port]},
    }
