"""How gateways of others find a model: an InferencePool that names our picker, and an HTTPRoute to it.

Field names are those published with the Gateway API (gateway.networking.k8s.io/v1) and its Inference
Extension (inference.networking.k8s.io/v1).
"""

from typing import Any, Final

from tidegate.api import names
from tidegate.api.modeldeployment import EndpointPicker, Exposure, ModelDeployment
from tidegate.render.engine import http_port
from tidegate.render.lane import owner_reference
from tidegate.render.service import service_name

Object = dict[str, Any]

MODEL_HEADER: Final = "X-Gateway-Model-Name"
"""What body-based routers of gateways write the body's `model` into."""
_INFERENCE: Final = "inference.networking.k8s.io"
_MATCHES: Final = 64
"""Of one rule, at most."""


class NotExposableError(ValueError):
    """An InferencePool cannot say what the spec asks for; the message says which field and why."""


def exposed(model: ModelDeployment) -> Exposure | None:
    """How the model is exposed, None where it is not asked for."""
    exposure = model.spec.exposure
    wanted = exposure is not None and bool(exposure.parent_refs or exposure.endpoint_picker)
    return exposure if wanted else None


def inference_pool(model: ModelDeployment) -> Object:
    """The model's replicas, of all lanes, and who chooses between them.

    Raises:
        NotExposableError: The pods of an External engine are selected by more than equal labels.
    """
    exposure = model.spec.exposure
    picker = (exposure.endpoint_picker if exposure else None) or EndpointPicker()
    labels, port = _selected(model)
    return {
        "metadata": _metadata(model),
        "spec": {
            "selector": {"matchLabels": labels},
            "targetPorts": [{"number": port}],
            "endpointPickerRef": {
                "name": picker.service,
                "port": {"number": picker.port},
                "failureMode": picker.failure_mode,
            },
        },
    }


def http_route(model: ModelDeployment) -> Object:
    """The way from the gateways of `parentRefs` to the model's InferencePool.

    By host name where there are any. Else by the model's names: in the path for KServe v2, in the
    header that a gateway's body-based router writes for OpenAI.

    Raises:
        NotExposableError: A name cannot stand in a path.
    """
    exposure = model.spec.exposure or Exposure()
    backend = {"group": _INFERENCE, "kind": "InferencePool", "name": service_name(model.metadata.name)}
    forever = {"request": "0s", "backendRequest": "0s"}  # a queue and a stream take as long as they take
    matches = [_ANY] if exposure.hostnames else _by_name(model)
    rules = [
        {"matches": matches[at : at + _MATCHES], "backendRefs": [backend], "timeouts": forever}
        for at in range(0, len(matches), _MATCHES)
    ]
    parents = []
    for ref in exposure.parent_refs:
        parent = {"name": ref.name, "namespace": ref.namespace, "sectionName": ref.section_name}
        parents.append({key: value for key, value in parent.items() if value is not None})
    spec: Object = {"parentRefs": parents, "rules": rules}
    if exposure.hostnames:
        spec["hostnames"] = list(exposure.hostnames)
    return {"metadata": _metadata(model), "spec": spec}


_ANY: Final[Object] = {"path": {"type": "PathPrefix", "value": "/"}}


def _by_name(model: ModelDeployment) -> list[Object]:
    served = model.spec.model.served_names
    if model.spec.engine.effective_protocol == "KServeV2":
        if slashed := next((name for name in served if "/" in name), None):
            raise NotExposableError(
                f"spec.model: the name {slashed} has a '/', which no route matches in a path; set"
                " spec.exposure.hostnames"
            )
        return [{"path": {"type": "PathPrefix", "value": f"/v2/models/{name}"}} for name in served]
    return [{"headers": [{"type": "Exact", "name": MODEL_HEADER, "value": n}]} for n in served]


def _selected(model: ModelDeployment) -> tuple[dict[str, str], int]:
    external = model.spec.engine.endpoints
    if external is None:
        return {names.LABEL_MODEL: names.bounded(model.metadata.name)}, http_port(model)
    if external.selector.match_expressions or not external.selector.match_labels:
        raise NotExposableError(
            "spec.engine.endpoints.selector must have matchLabels and no matchExpressions where spec.exposure"
            " is set: an InferencePool selects by equal labels only"
        )
    return dict(external.selector.match_labels), external.port


def _metadata(model: ModelDeployment) -> Object:
    return {
        "name": service_name(model.metadata.name),
        "namespace": model.metadata.namespace,
        "labels": {
            names.LABEL_MODEL: names.bounded(model.metadata.name),
            names.LABEL_MANAGED_BY: names.FIELD_MANAGER,
        },
        "ownerReferences": [owner_reference(model)],
    }
