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
from tidegate.facts.quantities import condition, seconds

DEFAULT_SLOTS: Final = 256
"""Of a pod without the slots annotation: vLLM's own default of --max-num-seqs on most GPUs."""
DEFAULT_STEP_TOKENS: Final = 2048
"""Of a pod without that annotation: vLLM's own default of --max-num-batched-tokens on an A100."""
_ENDED: Final = ("Succeeded", "Failed")

Raw = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A ModelDeployment as requests see it. `classes` are those that exist, in the spec's order.

    `engine_names` are the engine's own of those names that it does not know as clients have them;
    `adapters` are the names that stand for a LoRA adapter. `gpus` work together on a request: those of
    a replica, or of one of its data-parallel ranks.
    """

    key: ModelKey
    names: tuple[str, ...]
    classes: tuple[str, ...]
    protocol: str
    engine: str
    created_s: float = 0.0
    engine_names: Mapping[str, str] = field(default_factory=dict)
    adapters: frozenset[str] = frozenset()
    gpus: int = 1

    def engine_name(self, name: str) -> str:
        """What the engine calls what clients ask for by this name."""
        return self.engine_names.get(name, name)

    def adapter(self, name: str) -> str:
        """The engine's name of the adapter that this name stands for; empty where it is the model's own."""
        return self.engine_name(name) if name in self.adapters else ""


@dataclass(frozen=True, slots=True)
class World:
    """Everything that a request is classified and placed by. `notes` says what was left out, and why."""

    classes: Mapping[str, QoSClass] = field(default_factory=dict)
    models: Mapping[ModelKey, ServedModel] = field(default_factory=dict)
    by_name: Mapping[str, ModelKey] = field(default_factory=dict)
    endpoints: tuple[Endpoint, ...] = ()
    flow_models: Mapping[ModelKey, Model] = field(default_factory=dict)
    metrics_urls: Mapping[str, str] = field(default_factory=dict)
    grpc_addresses: Mapping[str, str] = field(default_factory=dict)
    """By an endpoint's address, where it speaks KServe v2 over gRPC."""
    notes: tuple[str, ...] = ()

    def find(self, name: str) -> ServedModel | None:
        """The model that serves this name."""
        key = self.by_name.get(name)
        return self.models[key] if key is not None else None

    def ready(self, key: ModelKey | None = None, *, grpc: bool = False) -> list[str]:
        """Addresses that answer for a model, or for any: ready, not going, and speaking gRPC where asked."""
        return [
            e.address
            for e in self.endpoints
            if e.ready
            and not e.draining
            and (key is None or e.model == key)
            and (not grpc or e.address in self.grpc_addresses)
        ]


def world(
    deployments: Iterable[ModelDeployment],
    pods: Iterable[Raw],
    classes: Mapping[str, QoSClass],
    default_class: str | None,
    starts: Mapping[ModelKey, float] | None = None,
    now_s: float = 0.0,
) -> World:
    """Put it together. The order of the objects does not matter.

    Args:
        deployments: Every ModelDeployment that could be read.
        pods: Raw pods; those that belong to no model are passed over.
        classes: The QoSClasses that exist, by name.
        default_class: The one that serves a model without `spec.classes`.
        starts: How long a replica takes to start, by model; see `start_times`.
        now_s: Unix seconds, for how long those that are starting have been.
    """
    starts = starts or {}
    ordered = sorted(deployments, key=_age)
    by_namespace: dict[str, list[Raw]] = {}
    for pod in pods:
        by_namespace.setdefault(pod["metadata"].get("namespace", "default"), []).append(pod)
    models: dict[ModelKey, ServedModel] = {}
    flow_models: dict[ModelKey, Model] = {}
    endpoints: dict[str, Endpoint] = {}
    urls: dict[str, str] = {}
    grpc: dict[str, str] = {}
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
                if spoken := _grpc_address(pod, deployment):
                    grpc[found.address] = spoken
        flow_models[one.key] = Model(
            one.key,
            one.classes,
            _startable(deployment, own),
            _objectives(deployment, classes),
            starts.get(one.key),
            _starting_s(own, now_s),
        )
    return World(classes, models, by_name, tuple(endpoints.values()), flow_models, urls, grpc, tuple(notes))


def start_times(
    deployments: Iterable[ModelDeployment], pods: Iterable[Raw], known: Mapping[ModelKey, float]
) -> dict[ModelKey, float]:
    """How long a replica of each model takes from its start to ready, in seconds.

    The shortest of those that are ready now: one that was unready for a while looks like a long start.
    What was `known` stays while a model has none that is ready.
    """
    by_namespace: dict[str, list[Raw]] = {}
    for pod in pods:
        by_namespace.setdefault(pod["metadata"].get("namespace", "default"), []).append(pod)
    found = {}
    for deployment in deployments:
        key = _key(deployment)
        own = (p for p in by_namespace.get(key[0], ()) if _belongs(p, deployment))
        took = min((s for p in own if (s := _took_s(p)) is not None), default=known.get(key))
        if took is not None:
            found[key] = took
    return found


def _took_s(pod: Raw) -> float | None:
    status = pod.get("status") or {}
    ready = condition(status.get("conditions"), "Ready")
    if ready is None or ready.get("status") != "True":
        return None
    since, started = seconds(ready.get("lastTransitionTime")), seconds(status.get("startTime"))
    return max(0.0, since - started) if since is not None and started is not None else None


def _starting_s(pods: Iterable[Raw], now_s: float) -> float | None:
    """For how long the foremost of the pods that are not ready yet has been starting."""
    found = []
    for pod in pods:
        status = pod.get("status") or {}
        ready = condition(status.get("conditions"), "Ready")
        waits = (ready is None or ready.get("status") != "True") and status.get("phase") not in _ENDED
        started = seconds(status.get("startTime"))
        if waits and started is not None and not pod["metadata"].get("deletionTimestamp"):
            found.append(max(0.0, now_s - started))
    return max(found, default=None)


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
        for name in deployment.spec.model.served_names:
            owner = owners.setdefault(name, _key(deployment))
            if owner != _key(deployment):
                own = "/".join(_key(deployment))
                notes.append(
                    f"ModelDeployment {own}: the name {name} is served by {'/'.join(owner)}, which is older"
                )
    return owners, notes


def names_taken(deployments: Iterable[ModelDeployment]) -> dict[ModelKey, dict[str, ModelKey]]:
    """For each model the names that it asks for and does not get, and who has them: an older one."""
    ordered = sorted(deployments, key=_age)
    owners, _ = _names(ordered)
    lost = {
        _key(d): {n: owners[n] for n in d.spec.model.served_names if owners[n] != _key(d)} for d in ordered
    }
    return {key: found for key, found in lost.items() if found}


def _engine_names(deployment: ModelDeployment) -> dict[str, str]:
    """What the engine calls what clients ask for, where it is something else."""
    model, engine = deployment.spec.model, deployment.spec.engine
    known = {a.name: a.effective_engine_name for a in model.adapters}
    # vLLM that Tidegate runs is told the aliases, too.
    if engine.type != "vLLM" or model.engine_name:
        known |= dict.fromkeys((model.name, *model.aliases), model.effective_engine_name)
    return {name: called for name, called in known.items() if name != called}


def _served(
    deployment: ModelDeployment, classes: Mapping[str, QoSClass], default_class: str | None
) -> ServedModel:
    return ServedModel(
        key=_key(deployment),
        names=deployment.spec.model.served_names,
        classes=tuple(c for c in served(deployment, default_class) if c in classes),
        protocol=deployment.spec.engine.effective_protocol,
        engine=deployment.spec.engine.type,
        created_s=_created(deployment),
        engine_names=_engine_names(deployment),
        adapters=frozenset(a.name for a in deployment.spec.model.adapters),
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
        address=joined(address, port),
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


def _grpc_address(pod: Raw, deployment: ModelDeployment) -> str | None:
    """Where it speaks KServe v2 over gRPC, if it does."""
    if deployment.spec.engine.effective_protocol != "KServeV2":
        return None
    external = deployment.spec.engine.endpoints
    port = (external.grpc_port if external else None) or _port(pod, names.GRPC_PORT_NAME)
    return joined(pod["status"]["podIP"], port) if port is not None else None


def _metrics_url(pod: Raw, address: str) -> str:
    """Where the engine's metrics are: the port named `metrics` where there is one (Triton)."""
    port = _port(pod, "metrics")
    host = address if port is None else joined(pod["status"]["podIP"], port)
    return f"http://{host}/metrics"


def joined(ip: str, port: int) -> str:
    """An address as URLs and gRPC have it; IPv6 in brackets."""
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
