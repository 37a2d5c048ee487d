"""Field names and bounds that other projects publish for their kinds, as far as we write them.

Written from the published references, not copied from their CRDs: gateway.networking.k8s.io/v1,
inference.networking.k8s.io/v1, and the policies of Istio, Envoy Gateway and GKE in the examples. A
field that is not here is an error: look whether it exists, and add it.
"""

import re
from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

_NAME = {"type": "string", "minLength": 1, "maxLength": 253}
_LABEL = {"type": "string", "minLength": 1, "maxLength": 63, "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
_GROUP = {"type": "string", "maxLength": 253}
_PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
_DURATION = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
_HOSTNAME = {
    "type": "string",
    "minLength": 1,
    "maxLength": 253,
    "pattern": r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
}
_FREE: Schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}


def _object(required: str = "", **properties: Schema) -> Schema:
    made: Schema = {"type": "object", "properties": properties}
    return made | ({"required": required.split()} if required else {})


def _list(items: Schema, least: int = 0, most: int = 16) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def _enum(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


_PARENT = _object("name", group=_GROUP, kind=_LABEL | {"pattern": "^[A-Z]"}, name=_NAME, namespace=_LABEL,
                  port=_PORT, sectionName=_NAME)  # fmt: skip
_PATH = {
    "type": "string",
    "maxLength": 1024,
    "pattern": r"^/(?!.*(//|/\./|/\.\./|%2f|%2F|#))[-A-Za-z0-9/._~!$&'()*+,;=:@%]*$",
}
_HEADER = {"type": "string", "minLength": 1, "maxLength": 256, "pattern": r"^[A-Za-z0-9!#$%&'*+\-.^_`|~]+$"}
_MATCH = _object(
    path=_object("type value", type=_enum("Exact", "PathPrefix", "RegularExpression"), value=_PATH),
    headers=_list(
        _object(
            "name value",
            type=_enum("Exact", "RegularExpression"),
            name=_HEADER,
            value={"type": "string", "minLength": 1, "maxLength": 4096},
        )
    ),
)  # fmt: skip
_BACKEND = _object("name", group=_GROUP, kind={"type": "string"}, name=_NAME, namespace=_LABEL, port=_PORT)

INFERENCE_POOL = _object(
    "selector targetPorts",
    selector=_object(
        "matchLabels",
        matchLabels={
            "type": "object",
            "minProperties": 1,
            "maxProperties": 64,
            "additionalProperties": {"type": "string", "maxLength": 63},
        },
    ),
    targetPorts=_list(_object("number", number=_PORT), 1, 8),
    appProtocol=_enum("http", "kubernetes.io/h2c"),
    endpointPickerRef=_object(
        "name",
        group=_GROUP,
        kind={"type": "string", "minLength": 1, "maxLength": 63},
        name=_NAME,
        port=_object("number", number=_PORT),
        failureMode=_enum("FailOpen", "FailClose"),
    ),
)
HTTP_ROUTE = _object(
    parentRefs=_list(_PARENT, most=32),
    hostnames=_list(_HOSTNAME),
    rules=_list(
        _object(
            matches=_list(_MATCH, most=64),
            backendRefs=_list(_BACKEND),
            timeouts=_object(request=_DURATION, backendRequest=_DURATION),
        ),
        1,
    ),
)
_LISTENER = _object(
    "name port protocol", name=_NAME, port=_PORT, protocol={"type": "string"}, hostname=_HOSTNAME
)
_TARGET = _object("group kind name", group=_GROUP, kind={"type": "string"}, name=_NAME)
_COUNT = {"type": "integer", "minimum": 0, "maximum": 4294967295}

SPECS: dict[tuple[str, str], Schema] = {
    ("inference.networking.k8s.io/v1", "InferencePool"): INFERENCE_POOL,
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): HTTP_ROUTE,
    ("gateway.networking.k8s.io/v1", "GatewayClass"): _object("controllerName", controllerName=_NAME),
    ("gateway.networking.k8s.io/v1", "Gateway"): _object(
        "gatewayClassName listeners", gatewayClassName=_NAME, listeners=_list(_LISTENER, 1, 64)
    ),
    ("networking.istio.io/v1", "DestinationRule"): _object(
        "host",
        host=_NAME,
        trafficPolicy=_object(
            tls=_object("mode", mode=_enum("DISABLE", "SIMPLE", "MUTUAL", "ISTIO_MUTUAL")),
            connectionPool=_object(http=_object(http2MaxRequests=_COUNT)),
        ),
    ),
    ("gateway.envoyproxy.io/v1alpha1", "BackendTrafficPolicy"): _object(
        targetRefs=_list(_TARGET, 1),
        circuitBreaker=_object(maxConnections=_COUNT, maxParallelRequests=_COUNT, maxPendingRequests=_COUNT),
    ),
    ("networking.gke.io/v1", "HealthCheckPolicy"): _object(
        "targetRef default",
        targetRef=_TARGET,
        default=_object(
            config=_object(
                "type",
                type=_enum("HTTP", "HTTPS", "HTTP2", "TCP", "GRPC"),
                httpHealthCheck=_object(requestPath={"type": "string", "pattern": "^/"}, port=_PORT),
            )
        ),
    ),
    ("networking.gke.io/v1", "GCPBackendPolicy"): _object(
        "targetRef default",
        targetRef=_TARGET,
        default=_object(
            timeoutSec={"type": "integer", "minimum": 1, "maximum": 2147483647},
            logging=_object(enabled={"type": "boolean"}),
        ),
    ),
}

_TYPES = {"string": str, "integer": int, "boolean": bool, "object": dict, "array": list}


def problems(schema: Schema, value: Any, path: str = "spec") -> Iterator[str]:
    """What of a value the schema does not allow; unknown fields are not."""
    kind = _TYPES[schema["type"]]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        yield f"{path} must be of type {schema['type']}, not {value!r}"
    elif kind is dict:
        yield from _in_object(schema, value, path)
    elif kind is list:
        if not schema["minItems"] <= len(value) <= schema["maxItems"]:
            yield f"{path} has {len(value)} items"
        for index, item in enumerate(value):
            yield from problems(schema["items"], item, f"{path}[{index}]")
    elif kind is str:
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 1 << 20):
            yield f"{path} has {len(value)} characters"
        if value not in schema.get("enum", [value]):
            yield f"{path} must be one of {schema['enum']}, not {value!r}"
        if "pattern" in schema and not re.search(schema["pattern"], value):
            yield f"{path} must match {schema['pattern']}, not {value!r}"
    elif kind is int and not schema.get("minimum", 0) <= value <= schema.get("maximum", 1 << 62):
        yield f"{path} is out of bounds: {value}"


def _in_object(schema: Schema, value: dict[str, Any], path: str) -> Iterator[str]:
    yield from (f"{path}.{name} is missing" for name in schema.get("required", ()) if name not in value)
    if not schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", 1 << 20):
        yield f"{path} has {len(value)} entries"
    for name, inner in value.items():
        known = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
        if known is None:
            yield f"{path}.{name} is no published field"
        else:
            yield from problems(known, inner, f"{path}.{name}")


def check(obj: dict[str, Any]) -> list[str]:
    """What is wrong with an object of one of `SPECS`."""
    schema = SPECS.get((obj["apiVersion"], obj["kind"]))
    if schema is None:
        return [f"{obj['apiVersion']} {obj['kind']} is not known here"]
    extra = obj.keys() - {"apiVersion", "kind", "metadata", "spec"}
    return [f"{name} is no published field" for name in extra] + list(problems(schema, obj["spec"]))


def crd(group: str, kind: str, plural: str) -> dict[str, Any]:
    """A CustomResourceDefinition with that schema, for an API server that has not the real one."""
    spec = SPECS[f"{group}/v1", kind]
    schema = {"type": "object", "properties": {"spec": _without_lookahead(spec), "status": _FREE}}
    names = {"kind": kind, "listKind": f"{kind}List", "plural": plural, "singular": kind.lower()}
    version = {
        "name": "v1", "served": True, "storage": True,
        "schema": {"openAPIV3Schema": schema}, "subresources": {"status": {}},
    }  # fmt: skip
    approved = "https://github.com/kubernetes-sigs/gateway-api/pull/1"
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}", "annotations": {"api-approved.kubernetes.io": approved}},
        "spec": {"group": group, "names": names, "scope": "Namespaced", "versions": [version]},
    }


def _without_lookahead(value: Any) -> Any:
    """Go's regular expressions have no lookahead."""
    if isinstance(value, dict):
        return {
            k: v for k, inner in value.items() if (v := _without_lookahead(inner)) != "" or k != "pattern"
        }
    if isinstance(value, list):
        return [_without_lookahead(item) for item in value]
    return "" if isinstance(value, str) and "(?!" in value else value
