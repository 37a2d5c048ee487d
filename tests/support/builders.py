"""Smallest valid objects of the three kinds, for tables of what is added to or taken from them."""

from typing import Any

from support.wait import eventually
from tidegate.adapters.kube import Kube
from tidegate.local.install import policies_judge


def qos(**spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "c"}, "spec": {"priority": 5, **spec}}


def pool(**spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "p"}, "spec": {"nodeSelector": {"matchLabels": {"gpu": "yes"}}, **spec}}


def mdep(**spec: Any) -> dict[str, Any]:
    base = {"model": {"name": "m", "uri": "hf://org/m"}, "engine": {"type": "vLLM"}}
    return {"metadata": {"name": "m", "namespace": "default"}, "spec": {**base, **spec}}


def engine(**more: Any) -> dict[str, Any]:
    return mdep(engine={"type": "vLLM", **more})


def external(**more: Any) -> dict[str, Any]:
    endpoints = {"selector": {"matchLabels": {"app": "x"}}, "port": 8000}
    return mdep(engine={"type": "External", "endpoints": endpoints, **more})


def reserve(**more: Any) -> dict[str, Any]:
    first = {"name": "first", "qosClass": "a", "gpus": 0}
    return pool(reservations=[first, {"name": "r", "qosClass": "b", **more}])


def named(name: str, obj: dict[str, Any]) -> dict[str, Any]:
    return {**obj, "metadata": {**obj["metadata"], "name": name}}


async def dry_run(kube: Kube, kind: Any, obj: dict[str, Any]) -> dict[str, Any]:
    """Create as kubectl does, without keeping it: unknown fields are errors."""
    body = {"apiVersion": kind.api_version, "kind": kind.name, **obj}
    query = {"dryRun": "All", "fieldValidation": "Strict"}
    return await kube.request("POST", kind.path(obj["metadata"].get("namespace")), query=query, body=body)


async def admission_settled(kube: Kube, *, within_s: float = 90) -> None:
    """Wait until Tidegate's policies judge: a test that restarted the API server leaves that to the next."""
    await eventually(lambda: policies_judge(kube), within_s=within_s)
