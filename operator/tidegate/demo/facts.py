"""What the running system says of itself, once a second: a frame."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

Samples = list[tuple[str, dict[str, str], float]]

ACTIONS = ("borrows", "reclaims", "rebalances")


@dataclass(frozen=True, slots=True)
class Frame:
    """One second of the run, as seen from outside. `t` counts from the start of the arm's load."""

    t: float
    load: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Per class, what the load generator saw in the last seconds."""
    queue: dict[str, float] = field(default_factory=dict)
    """Per class, requests waiting in the picker."""
    gpus: dict[str, float] = field(default_factory=dict)
    """Of the pool, by state: capacity, allocated, foreign, idle."""
    class_gpus: dict[str, dict[str, float]] = field(default_factory=dict)
    """Per class: used, borrowed."""
    reserved: dict[str, float] = field(default_factory=dict)
    """Per class: GPUs reserved for it."""
    actions: dict[str, float] = field(default_factory=dict)
    """How many borrows, reclaims and rebalances so far."""
    decisions: list[dict[str, Any]] = field(default_factory=list)
    """What the operator did last, newest last."""


async def gather(
    client: httpx.AsyncClient, controller: str, picker: str, t: float, load: dict[str, Any]
) -> Frame:
    """Ask the controller and the picker. What does not answer is left empty."""
    operator, gate, decisions = await asyncio.gather(
        _metrics(client, controller), _metrics(client, picker), _decisions(client, controller)
    )
    class_gpus: dict[str, dict[str, float]] = {}
    for name, labels, value in operator:
        if name == "tidegate_pool_class_gpus":
            class_gpus.setdefault(labels["qos_class"], {})[labels["state"]] = value
    return Frame(
        t=t,
        load=load,
        queue=_total(gate, "tidegate_queue_requests", "qos_class"),
        gpus=_total(operator, "tidegate_pool_gpus", "state"),
        class_gpus=class_gpus,
        reserved=_total(
            [s for s in operator if s[1].get("state") == "reserved"],
            "tidegate_pool_reservation_gpus",
            "qos_class",
        ),
        actions={a: sum(v for n, _, v in operator if n == f"tidegate_{a}_total") for a in ACTIONS},
        decisions=decisions,
    )


async def _metrics(client: httpx.AsyncClient, url: str) -> Samples:
    try:
        text = (await client.get(f"{url}/metrics")).raise_for_status().text
    except httpx.HTTPError:
        return []
    return [(s.name, s.labels, s.value) for f in text_string_to_metric_families(text) for s in f.samples]


async def _decisions(client: httpx.AsyncClient, url: str) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = (await client.get(f"{url}/debug/decisions")).raise_for_status().json()
    except (httpx.HTTPError, ValueError):
        return []
    return found


def _total(samples: Iterable[tuple[str, dict[str, str], float]], name: str, label: str) -> dict[str, float]:
    totals: dict[str, float] = {}
    for found, labels, value in samples:
        if found == name and label in labels:
            totals[labels[label]] = totals.get(labels[label], 0.0) + value
    return totals
