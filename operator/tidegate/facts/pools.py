"""GPUPool objects, the nodes they select and what is reserved on them."""

from collections.abc import Iterable, Mapping
from typing import Any

from tidegate.api import gpupool as api
from tidegate.core import reasons
from tidegate.core.types import Node, Pool, Reservation
from tidegate.facts.quantities import DEFAULT_RESOURCE, condition, devices


def resource(obj: api.GPUPool) -> str:
    """Name of the extended resource that the pool's GPUs are counted by."""
    return obj.spec.devices.resource_name or DEFAULT_RESOURCE


def node(
    raw: Mapping[str, Any], gpu_resource: str = DEFAULT_RESOURCE, topology_key: str | None = None
) -> Node:
    """A raw Node. Its `gpus` are 0 while it is cordoned, not Ready or going: nothing new lands there.

    The domain is empty where the pool has no topology key or the node lacks the label.
    """
    metadata = raw["metadata"]
    status = raw.get("status") or {}
    labels = metadata.get("labels") or {}
    ready = condition(status.get("conditions"), "Ready")
    usable = (
        ready is not None
        and ready.get("status") == "True"
        and not (raw.get("spec") or {}).get("unschedulable")
        and not metadata.get("deletionTimestamp")
    )
    return Node(
        name=metadata["name"],
        gpus=devices((status.get("allocatable") or {}).get(gpu_resource) or 0) if usable else 0,
        domain=labels.get(topology_key, "") if topology_key else "",
        labels=labels,
    )


def pool(
    obj: api.GPUPool, nodes: Iterable[Mapping[str, Any]], namespaces: Mapping[str, Mapping[str, str]]
) -> Pool:
    """A pool with its nodes, by name, and its reservations in whole GPUs.

    A share in percent is of the GPUs that can be allocated now, rounded down to whole GPUs, so that
    shares of 100 in total always fit. Reservations together above the capacity are kept as they
    are written: they are served in the order of their classes' priorities as far as GPUs go, and
    `problem` says so.

    Args:
        obj: the GPUPool.
        nodes: raw nodes of the cluster, those of other pools included.
        namespaces: labels of every namespace by its name, for reservations that select some.
    """
    name, topology = resource(obj), obj.spec.topology_key
    selector = obj.spec.node_selector
    found = [
        node(raw, name, topology) for raw in nodes if selector.matches(raw["metadata"].get("labels") or {})
    ]
    found.sort(key=lambda n: n.name)
    capacity = sum(n.gpus for n in found)
    return Pool(
        name=obj.metadata.name,
        nodes=tuple(found),
        reservations=tuple(_reservation(r, capacity, namespaces) for r in obj.spec.reservations),
        enforce=obj.spec.mode == "Enforce",
        drain_timeout_s=obj.spec.reclaim.drain_timeout.total_seconds(),
    )


def _reservation(
    spec: api.Reservation, capacity: int, namespaces: Mapping[str, Mapping[str, str]]
) -> Reservation:
    selector = spec.namespaces
    chosen = (
        None
        if selector is None or selector.empty
        else frozenset(n for n, labels in namespaces.items() if selector.matches(dict(labels)))
    )
    return Reservation(
        name=spec.name,
        qos_class=spec.qos_class,
        gpus=spec.gpus_of(capacity),
        namespaces=chosen,
        max_lend=spec.max_lend,
        max_borrow=spec.max_borrow,
    )


def problem(found: Pool) -> tuple[str, str] | None:
    """Reason and message when the reservations are more than the pool has, else None."""
    reserved = sum(r.gpus for r in found.reservations)
    if reserved <= found.capacity:
        return None
    parts = ", ".join(f"{r.name} {r.gpus}" for r in found.reservations)
    return (
        reasons.RESERVATIONS_EXCEED_POOL,
        (
            f"spec.reservations ask for {reserved} GPUs together ({parts}); the pool's"
            f" {sum(n.gpus > 0 for n in found.nodes)} schedulable nodes have {found.capacity}."
            f" Lower them by {reserved - found.capacity} or add nodes"
        ),
    )
