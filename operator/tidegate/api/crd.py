"""CustomResourceDefinitions from the pydantic models.

Pydantic writes `$defs`, `anyOf: […, null]` and titles; Kubernetes wants structural schemas, which
have none of these. So the models are walked by `structural`, which resolves references, takes null
out, joins CEL rules of a field with those of its model, and fills in what pydantic leaves out
(defaults made by factories, integer formats).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from pydantic import BaseModel

from tidegate.api.common import LABEL_NAME, KubeObject, format_duration, rule, rules
from tidegate.api.gpupool import GPUPool
from tidegate.api.modeldeployment import ModelDeployment
from tidegate.api.names import CATEGORY, GROUP, VERSION
from tidegate.api.problems import model_in
from tidegate.api.qosclass import QoSClass

Schema = dict[str, Any]

_RULES: Final = "x-kubernetes-validations"
_DROPPED: Final = frozenset({"title", "$defs", "const", "additionalProperties", "anyOf", "$ref"})
_NULL: Final = {"type": "null"}


@dataclass(frozen=True, slots=True)
class Column:
    """A column that `kubectl get` prints. Priority 1 is shown with `-o wide` only."""

    name: str
    path: str
    type: str = "string"
    priority: int = 0
    description: str = ""


@dataclass(frozen=True, slots=True)
class Definition:
    """What a CRD says beside its schema."""

    model: type[KubeObject]
    plural: str
    short: str
    scope: str
    columns: tuple[Column, ...]


_READY: Final = '.status.conditions[?(@.type=="Ready")]'
_FIRST: Final = Column("Ready", f"{_READY}.status", description="True, False (blocked) or Unknown (working)")
_LAST: Final = (
    Column("Age", ".metadata.creationTimestamp", "date"),
    Column("Reason", f"{_READY}.reason", priority=1, description="Why Ready is what it is"),
    Column("Message", f"{_READY}.message", priority=1, description="The same with numbers"),
)

DEFINITIONS: Final = (
    Definition(
        QoSClass,
        "qosclasses",
        "qos",
        "Cluster",
        (
            _FIRST,
            Column("Priority", ".spec.priority", "integer", description="Higher is more important"),
            Column("Reclaim", ".spec.reclaim", description="Whose pods may be given up"),
            Column("Default", ".status.default", "boolean", description="Whether it is the default class"),
            Column("Used-By", ".status.usedBy", "integer", description="ModelDeployments that carry it"),
            *_LAST,
        ),
    ),
    Definition(
        GPUPool,
        "gpupools",
        "gpool",
        "Cluster",
        (
            _FIRST,
            Column("Mode", ".spec.mode", description="Observe or Enforce"),
            Column("GPUs", ".status.capacity", "integer", description="GPUs of schedulable nodes"),
            Column("Allocated", ".status.allocated", "integer", description="GPUs that classes use"),
            Column("Foreign", ".status.foreign", "integer", description="GPUs that others use"),
            *_LAST,
        ),
    ),
    Definition(
        ModelDeployment,
        "modeldeployments",
        "mdep",
        "Namespaced",
        (
            _FIRST,
            Column("Model", ".spec.model.name", description="What clients ask for"),
            Column("Engine", ".spec.engine.type", description="Who serves it"),
            Column("Replicas", ".status.replicas", description="Ready and desired of each class"),
            *_LAST,
        ),
    ),
)


def definition(of: Definition) -> Schema:
    """One CustomResourceDefinition."""
    kind = of.model.__name__
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{of.plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": of.plural,
                "singular": kind.lower(),
                "shortNames": [of.short],
                "categories": [CATEGORY],
            },
            "scope": of.scope,
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": root_schema(of.model)},
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [_column(c) for c in of.columns],
                }
            ],
        },
    }


def _column(column: Column) -> Schema:
    parts = {"name": column.name, "type": column.type, "jsonPath": column.path}
    more = {"priority": column.priority, "description": column.description}
    return parts | {k: v for k, v in more.items() if v}


def root_schema(model: type[KubeObject]) -> Schema:
    """The schema of a whole object of this kind."""
    parts = {n: model.model_fields[n].annotation for n in ("spec", "status")}
    spec, status = (structural(m) for m in parts.values() if isinstance(m, type))
    name_rule = rule(
        f"self.metadata.name.size() <= 63 && self.metadata.name.matches('{LABEL_NAME}')",
        "metadata.name must be a lower-case name of letters, digits and '-', at most 63 characters:"
        " it becomes the value of a label",
    )
    return {
        "type": "object",
        "description": _sentence(model),
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": "Version of this kind's schema."},
            "kind": {"type": "string", "description": f"Always {model.__name__}."},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": _without_defaults(status),
        },
        **rules(name_rule),
    }


def _without_defaults(schema: Schema) -> Schema:
    """A status says what the controller wrote and nothing else.

    A default filled in by the API server would look like a change, and be written again for ever.
    """
    out = {k: v for k, v in schema.items() if k != "default"}
    if "properties" in out:
        out["properties"] = {k: _without_defaults(v) for k, v in out["properties"].items()}
    if "items" in out:
        out["items"] = _without_defaults(out["items"])
    return out


def structural(model: type[BaseModel]) -> Schema:
    """The structural schema of a model: no references, no null, no titles."""
    raw = model.model_json_schema(by_alias=True, mode="validation")
    return _convert(raw, raw.get("$defs", {}), model)


def _convert(schema: Mapping[str, Any], defs: Mapping[str, Any], model: type[BaseModel] | None) -> Schema:
    """One node of the schema. `model` is the model whose fields the node's properties are, if any."""
    node = _flat(schema, defs)
    out = {k: v for k, v in node.items() if k not in _DROPPED and v is not None}
    if out.get("type") == "integer":
        out["format"] = "int64"
    if "properties" in node:
        out["properties"] = {k: _property(k, v, defs, model) for k, v in node["properties"].items()}
    if "items" in node:
        out["items"] = _convert(node["items"], defs, model)
    if isinstance(node.get("additionalProperties"), dict):
        out["additionalProperties"] = _convert(node["additionalProperties"], defs, None)
    return {k: out[k] for k in sorted(out, key=_place)}


def _place(key: str) -> tuple[int, str]:
    """Where a key of a schema stands: what it is first, what is in it after that, rules last."""
    first = ("description", "type", "format", "default", "enum", "required")
    last = ("items", "properties", "additionalProperties", _RULES)
    place = first.index(key) if key in first else 90 + last.index(key) if key in last else 50
    return (place, key)


def _property(
    alias: str, schema: Mapping[str, Any], defs: Mapping[str, Any], model: type[BaseModel] | None
) -> Schema:
    field = next((f for f in model.model_fields.values() if f.alias == alias), None) if model else None
    out = _convert(schema, defs, model_in(field.annotation) if field else None)
    factory = field.default_factory if field else None
    made = factory() if factory else field.default if field else None  # type: ignore[call-arg]
    if isinstance(made, BaseModel):  # so that the defaults inside it show when it is left out
        out["default"] = made.model_dump(mode="json", by_alias=True, exclude_unset=True)
    elif isinstance(made, timedelta):
        out["default"] = format_duration(made)
    return {k: out[k] for k in sorted(out, key=_place)}


def _flat(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> Schema:
    """The node itself: references and `X | null` resolved; the field's own words go before the model's."""
    node = dict(schema)
    inner: Mapping[str, Any] = {}
    if "$ref" in node:
        inner = defs[node["$ref"].rsplit("/", 1)[1]]
    elif options := [o for o in node.get("anyOf", []) if o != _NULL]:
        if len(options) != 1:
            raise TypeError(f"no structural schema for a union of {len(options)} types: {schema}")
        inner = options[0]
    else:
        return node
    base = _flat(inner, defs)
    both = [*base.get(_RULES, []), *node.get(_RULES, [])]
    joined = base | {k: v for k, v in node.items() if k not in {"$ref", "anyOf"}}
    return joined | ({_RULES: both} if both else {})


def _sentence(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split())


def definitions() -> list[Schema]:
    """The three CustomResourceDefinitions."""
    return [definition(d) for d in DEFINITIONS]
