"""What the picker knows of the cluster: who serves which name, for which classes, and where.

A pod is an endpoint by `status.podIP` and the engine's port, not by EndpointSlices: readiness,
labels and deletion are needed too, and they are the pod's.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tidegate.api import names
from tidegate.api.modeldeployment import ModelDeployment
from tidegate.core.flow import Endpoint, Model, ModelKey
from tidegate.core.quota import Ground
from tidegate.core.types import Objectives, QoSClass
from tidegate.facts.classes import overridden
from tidegate.facts.lanes import served
from tidegate.facts.quantities import condition

DEFAULT_SLOTS: Final = 256
"""Of a pod without the slots annotation: vLLM's own default of --max-num-seqs on most GPUs."""
DEFAULT_STEP_TOKENS: Final = 2048
"""Of a pod without that annotation: vLLM's own default of --max-num-batched-tokens on an A100."""
_ENDED: Final = ("Succeeded", "Failed")

Raw = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A ModelDeployment as requests see it. `classes` are those that exist, in the spec's order.

    `gpus` work together on a request: those of a replica, or of one of its data-parallel ranks.
    """

    key: ModelKey
    names: tuple[str, ...]
    classes: tuple[str, ...]
    protocol: str
    engine: str
    created_s: float = 0.0
    gpus: int = 1


@dataclass(frozen=True, slots=True)
class World:
    """Everything that a request is classified and placed by. `notes` says what was left out, and why."""

    classes: Mapping[str, QoSClass] = field(default_factory=dict)
    models: Mapping[ModelKey, ServedModel] = field(default_factory=dict)
    by_name: Mapping[str, ModelKey] = field(default_factory=dict)
    endpoints: tuple[Endpoint, ...] = ()
    flow_models: Mapping[ModelKey, Model] = field(default_factory=dict)
    metrics_urls: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def find(self, name: str) -> ServedModel | None:
        """The model that serves this name."""
        key = self.by_name.get(name)
        return self.models[key] if key is not None else None


def world(
    deployments: Iterable[ModelDeployment],
    pods: Iterable[Raw],
    classes: Mapping[str, QoSClass],
    default_class: str | None,
) -> World:
    """Put it together. The order of the objects does not matter.

    Args:
        deployments: Every ModelDeployment that could be read.
        pods: Raw pods; those that belong to no model are passed over.
        classes: The QoSClasses that exist, by name.
        default_class: The one that serves a model without `spec.classes`.
    """
    ordered = sorted(deployments, key=_age)
    by_namespace: dict[str, list[Raw]] = {}
    for pod in pods:
        by_namespace.setdefault(pod["metadata"].get("namespace", "default"), []).append(pod)
    models: dict[ModelKey, ServedModel] = {}
    flow_models: dict[ModelKey, Model] = {}
    endpoints: dict[str, Endpoint] = {}
    urls: dict[str, str] = {}
    by_name, notes = _names(ordered)
    for deployment in ordered:
        one = _served(deployment, classes, default_class)
        models[one.key] = one
        own = [p for p in by_namespace.get(one.key[0], ()) if _belongs(p, deployment)]
        for pod in sorted(own, key=lambda p: p["metadata"]["name"]):
            found = _endpoint(pod, deployment, one.key)
            if found is not None and found.address not in endpoints:
                endpoints[found.address] = found
                urls[found.address] = _metrics_url(pod, found.address)
        flow_models[one.key] = Model(
            one.key, one.classes, _startable(deployment, own), _objectives(deployment, classes)
        )
    return World(classes, models, by_name, tuple(endpoints.values()), flow_models, urls, tuple(notes))


def _age(deployment: ModelDeployment) -> tuple[float, str, str]:
    meta = deployment.metadata
    return (_created(deployment), meta.namespace or "default", meta.name)


def _created(deployment: ModelDeployment) -> float:
    stamp = deployment.metadata.creation_timestamp
    return stamp.timestamp() if stamp else 0.0


def _key(deployment: ModelDeployment) -> ModelKey:
    return (deployment.metadata.namespace or "default", deployment.metadata.name)


def _names(ordered: Sequence[ModelDeployment]) -> tuple[dict[str, ModelKey], list[str]]:
    """Who answers to which name: the oldest object that asks for it."""
    owners: dict[str, ModelKey] = {}
    notes = []
    for deployment in ordered:
        for name in _all_names(deployment):
            owner = owners.setdefault(name, _key(deployment))
            if owner != _key(deployment):
                own = "/".join(_key(deployment))
                notes.append(
                    f"ModelDeployment {own}: the name {name} is served by {'/'.join(owner)}, which is older"
                )
    return owners, notes


def _all_names(deployment: ModelDeployment) -> tuple[str, ...]:
    model = deployment.spec.model
    return (model.name, *model.aliases, *(a.name for a in model.adapters))


def _served(
    deployment: ModelDeployment, classes: Mapping[str, QoSClass], default_class: str | None
) -> ServedModel:
    return ServedModel(
        key=_key(deployment),
        names=_all_names(deployment),
        classes=tuple(c for c in served(deployment, default_class) if c in classes),
        protocol=deployment.spec.engine.effective_protocol,
        engine=deployment.spec.engine.type,
        created_s=_created(deployment),
        gpus=deployment.spec.parallelism.tensor * deployment.spec.parallelism.pipeline,
    )


def _objectives(deployment: ModelDeployment, classes: Mapping[str, QoSClass]) -> dict[str, Objectives]:
    """What the model promises otherwise than its classes do."""
    return {
        c.qos_class: overridden(classes[c.qos_class].objectives, c.objectives)
        for c in deployment.spec.classes
        if c.objectives is not None and c.qos_class in classes
    }


def _belongs(pod: Raw, deployment: ModelDeployment) -> bool:
    labels = pod["metadata"].get("labels") or {}
    external = deployment.spec.engine.endpoints
    if external is not None:
        return external.selector.matches(labels)
    return bool(labels.get(names.LABEL_MODEL) == names.bounded(deployment.metadata.name))


def _endpoint(pod: Raw, deployment: ModelDeployment, key: ModelKey) -> Endpoint | None:
    """The pod as an endpoint; None while it has no address, and once it has ended."""
    meta, status = pod["metadata"], pod.get("status") or {}
    address = status.get("podIP")
    external = deployment.spec.engine.endpoints
    port = external.port if external is not None else _port(pod, names.ENGINE_PORT_NAME)
    if not address or port is None or status.get("phase") in _ENDED:
        return None
    ready = condition(status.get("conditions"), "Ready")
    notes = meta.get("annotations") or {}
    return Endpoint(
        address=_join(address, port),
        model=key,
        lane=(meta.get("labels") or {}).get(names.LABEL_CLASS, ""),
        slots=_count(notes, names.ANNOTATION_SLOTS, DEFAULT_SLOTS),
        chunk=_count(notes, names.ANNOTATION_STEP_TOKENS, DEFAULT_STEP_TOKENS),
        ready=ready is not None and ready.get("status") == "True",
        draining=bool(meta.get("deletionTimestamp")) or names.ANNOTATION_DRAINING in notes,
        lent=notes.get(names.ANNOTATION_STANDING) == Ground.LENT,
    )


def _count(notes: Mapping[str, str], annotation: str, default: int) -> int:
    text = notes.get(annotation, "")
    return int(text) if text.isdecimal() and int(text) > 0 else default


def _port(pod: Raw, name: str) -> int | None:
    for container in pod["spec"].get("containers") or ():
        for port in container.get("ports") or ():
            if port.get("name") == name:
                return int(port["containerPort"])
    return None


def _metrics_url(pod: Raw, address: str) -> str:
    """Where the engine's metrics are: the port named `metrics` where there is one (Triton)."""
    port = _port(pod, "metrics")
    host = address if port is None else _join(pod["status"]["podIP"], port)
    return f"http://{host}/metrics"


def _join(ip: str, port: int) -> str:
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def _startable(deployment: ModelDeployment, pods: Iterable[Raw]) -> bool:
    """Whether waiting makes sense without a ready replica: one is coming, or may be asked for."""
    coming = any(
        not p["metadata"].get("deletionTimestamp") and (p.get("status") or {}).get("phase") not in _ENDED
        for p in pods
    )
    spec = deployment.spec
    if coming or spec.engine.external or spec.scaling.paused:
        return coming
    pinned = spec.scaling.replicas
    lanes = {c.qos_class: c.max_replicas for c in spec.classes}
    may = [pinned.get(name, 1 if most is None else most) for name, most in lanes.items()]
    return spec.max_replicas != 0 and (any(n > 0 for n in may) or not may)
