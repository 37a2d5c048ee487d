"""`plan` of a live cluster: its pools and models, as a scenario has them. Pure."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tidegate.api.gpupool import GPUPool
from tidegate.api.modeldeployment import ModelDeployment
from tidegate.facts import pools as pool_facts
from tidegate.facts.lanes import entries, pool_of
from tidegate.sim.build import shown


def plan_of(
    pools: Iterable[GPUPool],
    nodes: Sequence[Mapping[str, Any]] | None,
    models: Iterable[ModelDeployment],
    classes: Sequence[str],
    default_class: str | None,
    notes: list[str],
) -> dict[str, Any] | None:
    """Pools with nodes, and the models that run in them; None where that cannot be said, with a note why.

    Args:
        pools: Every GPUPool.
        nodes: Raw nodes; None: they could not be listed.
        models: ModelDeployments that have a replica.
        classes: Names of the QoSClasses that exist.
        default_class: The one that serves a model without `spec.classes`.
        notes: What is assumed is added here.
    """
    fixed = "replicas stay as they are when this is simulated"
    if nodes is None:
        notes.append(f"nodes could not be listed: {fixed}")
        return None
    by_name = {p.metadata.name: p for p in pools}
    found = [pool for p in sorted(by_name) if (pool := _pool(by_name[p], nodes, classes, notes))]
    homes = {m.metadata.name: pool_of(m, by_name)[0] for m in models}
    known = {p["name"] for p in found}
    lost = sorted(name for name, home in homes.items() if home not in known)
    if not found or lost:
        why = f"{', '.join(lost)} runs in no pool with nodes" if lost else "there is no GPUPool with nodes"
        notes.append(f"{why}: {fixed}")
        return None
    return {
        "pools": found,
        "models": [_model(m, homes[m.metadata.name], classes, default_class, notes) for m in models],
    }


def _pool(
    pool: GPUPool, nodes: Sequence[Mapping[str, Any]], classes: Sequence[str], notes: list[str]
) -> dict[str, Any] | None:
    fact, name = pool_facts.pool(pool, nodes, {}), pool.metadata.name
    sizes = Counter((n.gpus, n.domain) for n in fact.nodes if n.gpus)
    if not sizes:
        return None
    if pool.spec.mode == "Observe":
        notes.append(f"pool {name} only observes; it is simulated as if it were enforced")
    if pool.status.foreign:
        notes.append(f"pool {name}: {pool.status.foreign} GPUs that pods of no class use are free here")
    kept = []
    for reservation in pool.spec.reservations:
        if reservation.qos_class not in classes:
            notes.append(f"reservation {reservation.name} is left out: its class does not exist")
            continue
        raw = reservation.to_json()
        if raw.pop("namespaces", None):
            notes.append(f"reservation {reservation.name} is for all namespaces here")
        kept.append(raw)
    return {
        "name": name,
        "nodes": [
            {"count": count, "gpus": gpus} | ({"domain": domain} if domain else {})
            for (gpus, domain), count in sorted(sizes.items())
        ],
        **({"reservations": kept} if kept else {}),
        "reclaim": pool.spec.reclaim.to_json(),
    }


def _model(
    model: ModelDeployment,
    pool: str,
    classes: Sequence[str],
    default_class: str | None,
    notes: list[str],
) -> dict[str, Any]:
    name = shown((model.metadata.namespace or "default", model.metadata.name))
    scaling = model.spec.scaling.to_json()
    if model.spec.engine.external:
        notes.append(f"{name} is External, and stays as it is")
        scaling["paused"] = True
    return {
        "name": name,
        "pool": pool,
        "classes": [c.to_json() for c in entries(model, default_class) if c.qos_class in classes],
        **({"maxReplicas": model.spec.max_replicas} if model.spec.max_replicas is not None else {}),
        "scaling": scaling,
    }
