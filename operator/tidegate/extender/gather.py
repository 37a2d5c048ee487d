"""From watched objects to one `core.place.View` for every pool, kept up to date by events."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from tidegate.adapters.kube import Kind, Kube, Reflector, kinds
from tidegate.api.common import InvalidObject
from tidegate.api.gpupool import GPUPool
from tidegate.api.modeldeployment import ModelDeployment
from tidegate.api.names import LABEL_CLASS, LABEL_POOL
from tidegate.api.qosclass import QoSClass
from tidegate.core.place import View
from tidegate.core.types import Pod
from tidegate.core.types import QoSClass as Class
from tidegate.facts import classes as class_facts
from tidegate.facts import lanes as lane_facts
from tidegate.facts import pods as pod_facts
from tidegate.facts import pools as pool_facts

log = logging.getLogger(__name__)

Raw = dict[str, Any]
T = TypeVar("T")
WATCHED = (
    kinds.QOS_CLASS,
    kinds.GPU_POOL,
    kinds.MODEL_DEPLOYMENT,
    kinds.NAMESPACE,
    kinds.NODE,
    kinds.POD,
)


class Cluster:
    """Copies of what decisions need, and the views made from them.

    `on_settings` is called when classes, pools, models, namespaces or nodes changed in what they
    mean; `on_pod` when a pod was bound or went (its UID, and whether GPUs may have come free).
    """

    def __init__(self) -> None:
        self.on_settings: Callable[[], None] = lambda: None
        self.on_pod: Callable[[str, bool], None] = lambda _uid, _freed: None
        self.pods: dict[str, Raw] = {}
        self.classes: dict[str, Class] = {}
        self.pools: dict[str, GPUPool] = {}
        self._class_objects: dict[str, QoSClass] = {}
        self._models: dict[str, ModelDeployment] = {}
        self._namespaces: dict[str, dict[str, str]] = {}
        self._nodes: dict[str, Raw] = {}
        self._views: dict[str, View] = {}
        self._minimums: dict[tuple[str, str, str], int] = {}
        self._default: str | None = None
        self._dirty = True

    def reflectors(self, kube: Kube) -> list[Reflector]:
        """One reflector for every watched kind; running them keeps the cluster current."""
        return [Reflector(kube, kind, on_change=self._listener(kind)) for kind in WATCHED]

    def _listener(self, kind: Kind) -> Callable[[str, Raw], None]:
        return lambda event, obj: self.see(kind, event, obj)

    def see(self, kind: Kind, event: str, obj: Raw) -> None:
        """Take in one event (`ADDED`, `MODIFIED` or `DELETED`). An invalid object keeps its last form."""
        gone = event == "DELETED"
        if kind is kinds.POD:
            self._see_pod(obj, gone=gone)
            return
        try:
            changed = self._see_setting(kind, obj, gone=gone)
        except InvalidObject as error:
            log.warning("%s %s is ignored: %s", kind.name, obj["metadata"]["name"], error)
            return
        if changed:
            self._dirty = True
            self.on_settings()

    def _see_setting(self, kind: Kind, obj: Raw, *, gone: bool) -> bool:
        meta = obj["metadata"]
        name = meta["name"]
        if kind is kinds.NODE:
            return _swap(self._nodes, name, None if gone else obj, key=_node_facts)
        if kind is kinds.NAMESPACE:
            return _swap(self._namespaces, name, None if gone else (meta.get("labels") or {}))
        if kind is kinds.QOS_CLASS:
            found = None if gone else QoSClass.from_object(obj)
            return _swap(self._class_objects, name, found, key=_class_facts)
        if kind is kinds.GPU_POOL:
            return _swap(self.pools, name, None if gone else GPUPool.from_object(obj), key=lambda p: p.spec)
        full = f"{meta.get('namespace', '')}/{name}"
        model = None if gone else ModelDeployment.from_object(obj)
        return _swap(self._models, full, model, key=lambda m: m.spec)

    def _see_pod(self, raw: Raw, *, gone: bool) -> None:
        uid = raw["metadata"]["uid"]
        if gone:
            self.pods.pop(uid, None)
        else:
            self.pods[uid] = raw
        bound = bool(raw["spec"].get("nodeName"))
        leaving = gone or "deletionTimestamp" in raw["metadata"]
        if not self._dirty:
            for name, view in self._views.items():
                self._update(view, name, raw, gone=gone)
        if bound or leaving:
            self.on_pod(uid, leaving or raw.get("status", {}).get("phase") in {"Succeeded", "Failed"})

    def _update(self, view: View, pool: str, raw: Raw, *, gone: bool) -> None:
        uid = raw["metadata"]["uid"]
        pod = None if gone else self.fact(raw, pool)
        if pod is None or (pod.node is None and pod.terminating):
            view.drop(uid)
        elif pod.node is not None and (pod.node in view.nodes or uid in view.pods):
            old = view.pods.get(uid)
            if old != pod or uid in view.assumed or uid in view.grants:
                view.place(pod)
        # A pod that waits changes nothing: what was promised to it stands.

    def fact(self, raw: Mapping[str, Any], pool: str) -> Pod | None:
        """A raw pod as a plain value, with its GPUs counted as that pool counts them."""
        resource = pool_facts.resource(self.pools[pool])
        return pod_facts.pod(raw, self.classes, self._minimums, resource)

    def pool_of(self, raw: Mapping[str, Any]) -> str | None:
        """The pool that a pod is for: its label's, else the only one there is, else none."""
        labels = raw["metadata"].get("labels") or {}
        named = labels.get(LABEL_POOL)
        if named is not None:
            return named if named in self.pools else None
        if LABEL_CLASS in labels and len(self.pools) == 1:
            return next(iter(self.pools))
        return None

    def view(self, pool: str) -> View:
        """The view of a pool, made anew if settings changed; what was promised is kept."""
        if self._dirty:
            self._rebuild()
        return self._views[pool]

    def views(self) -> Mapping[str, View]:
        """All views, by pool."""
        if self._dirty:
            self._rebuild()
        return self._views

    def _rebuild(self) -> None:
        self._dirty = False
        self.classes = {name: class_facts.qos_class(c) for name, c in self._class_objects.items()}
        self._default = class_facts.default_class(self._class_objects.values())
        self._minimums = {
            (m.metadata.namespace or "default", m.metadata.name, c.qos_class): c.min_replicas
            for m in self._models.values()
            for c in lane_facts.entries(m, self._default)
        }
        old, self._views = self._views, {}
        for name, pool in self.pools.items():
            fact = pool_facts.pool(pool, self._nodes.values(), self._namespaces)
            pods = [p for raw in self.pods.values() if (p := self.fact(raw, name)) is not None]
            view = View.build(fact, self.classes, pods, self._block_sizes(name, pods))
            if name in old:
                _keep_promises(old[name], view, self.pods)
            self._views[name] = view

    def _block_sizes(self, pool: str, pods: Iterable[Pod]) -> dict[str, set[int]]:
        """GPUs of the replicas that each reservation is for: of its class's lanes and pods."""
        asks = {(p.qos_class, p.namespace, p.gpus) for p in pods if p.qos_class}
        asks |= {
            (c.qos_class, m.metadata.namespace or "default", m.gpus_per_replica)
            for m in self._models.values()
            for c in lane_facts.entries(m, self._default)
            if lane_facts.pool_of(m, self.pools)[0] == pool
        }
        fact = pool_facts.pool(self.pools[pool], (), self._namespaces)
        found: defaultdict[str, set[int]] = defaultdict(set)
        for r in fact.reservations:
            for qos, namespace, gpus in asks:
                if r.covers(qos or "", namespace):
                    found[r.name].add(gpus)
        return dict(found)


def _swap(store: dict[str, T], name: str, new: T | None, key: Callable[[T], Any] = lambda x: x) -> bool:
    """Store or remove an object; whether what matters of it changed."""
    old = store.pop(name, None)
    if new is not None:
        store[name] = new
    return (old is None) != (new is None) or (old is not None and new is not None and key(old) != key(new))


def _class_facts(obj: QoSClass) -> object:
    """What decisions read of a class."""
    return (obj.spec, obj.claims_default, obj.metadata.deletion_timestamp is None)


def _node_facts(raw: Raw) -> object:
    """What decisions read of a node; its heartbeats are none of it."""
    ready = [c.get("status") for c in raw["status"].get("conditions") or () if c.get("type") == "Ready"]
    return (
        raw["metadata"].get("labels"),
        "deletionTimestamp" in raw["metadata"],
        raw["spec"].get("unschedulable"),
        (raw["status"].get("allocatable") or {}),
        ready,
    )


def _keep_promises(old: View, new: View, pods: Mapping[str, Raw]) -> None:
    """Carry what was assumed or granted over to a new view, where it still makes sense."""
    for uid, assumed in old.assumed.items():
        if uid in pods and uid not in new.pods and assumed.node in new.nodes:
            new.assume(old.pods[uid], assumed.node, assumed.until_s)
    for uid, grant in old.grants.items():
        if uid in pods and uid not in new.pods and grant.node in new.nodes:
            new.grant(grant)
