"""The environment and command line of a container, as Kubernetes defines them (pure)."""

import re
from collections.abc import Mapping
from typing import Any

from tidegate.local.kubelet.model import Container, Pod

Source = Mapping[tuple[str, str], Mapping[str, str] | None]
"""("ConfigMap"｜"Secret", name) → its data decoded, or None when there is no such object."""

_REFERENCE = re.compile(r"\$(?:\$|\(([^()]*)\))")
_SUBSCRIPT = re.compile(r"^metadata\.(labels|annotations)\['([^']+)'\]$")


class EnvError(Exception):
    """The environment cannot be made; the message names the variable and what is missing."""


def expand(text: str, env: Mapping[str, str]) -> str:
    """Replace `$(NAME)`; `$$` is a dollar sign, and an unknown name stays as it is written."""

    def put(match: re.Match[str]) -> str:
        name = match.group(1)
        if name is None:
            return "$"
        return env.get(name, match.group(0))

    return _REFERENCE.sub(put, text)


def sources(container: Container) -> set[tuple[str, str]]:
    """ConfigMaps and Secrets that a container's environment is made from."""
    needed: set[tuple[str, str]] = set()
    for item in container.env_from:
        for key, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
            if item.get(key):
                needed.add((kind, item[key]["name"]))
    for item in container.env:
        value_from = item.get("valueFrom") or {}
        for key, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
            if value_from.get(key):
                needed.add((kind, value_from[key]["name"]))
    return needed


def environment(
    pod: Pod, container: Container, *, pod_ip: str, host_ip: str, base: Mapping[str, str], data: Source
) -> dict[str, str]:
    """The whole environment: `base`, then envFrom, then env in order. Raises EnvError."""
    env = dict(base)
    for item in container.env_from:
        for key, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
            if ref := item.get(key):
                values = _object(data, kind, ref)
                env |= {f"{item.get('prefix') or ''}{k}": v for k, v in values.items()}
    for item in container.env:
        name = item["name"]
        if value_from := item.get("valueFrom"):
            value = _value_from(pod, name, value_from, pod_ip, host_ip, data)
            if value is not None:
                env[name] = value
        else:
            env[name] = expand(item.get("value") or "", env)
    return env


def _object(data: Source, kind: str, ref: Mapping[str, Any]) -> Mapping[str, str]:
    found = data.get((kind, ref["name"]))
    if found is None and not ref.get("optional"):
        raise EnvError(f'{kind.lower()} "{ref["name"]}" not found')
    return found or {}


def _value_from(
    pod: Pod, name: str, value_from: Mapping[str, Any], pod_ip: str, host_ip: str, data: Source
) -> str | None:
    if ref := value_from.get("fieldRef"):
        return _field(pod, name, ref["fieldPath"], pod_ip, host_ip)
    for key, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
        if ref := value_from.get(key):
            values = _object(data, kind, ref)
            if ref["key"] not in values and not ref.get("optional"):
                raise EnvError(
                    f"env {name}: couldn't find key {ref['key']} in {kind} {pod.namespace}/{ref['name']}"
                )
            return values.get(ref["key"])
    raise EnvError(f"env {name}: valueFrom.{next(iter(value_from))} is not supported on a process node")


def _field(pod: Pod, name: str, path: str, pod_ip: str, host_ip: str) -> str:
    if match := _SUBSCRIPT.match(path):
        values = pod.labels if match.group(1) == "labels" else pod.annotations
        return values.get(match.group(2), "")
    fields = {
        "metadata.name": pod.name,
        "metadata.namespace": pod.namespace,
        "metadata.uid": pod.uid,
        "spec.nodeName": pod.node,
        "spec.serviceAccountName": pod.service_account,
        "status.podIP": pod_ip,
        "status.podIPs": pod_ip,
        "status.hostIP": host_ip,
        "status.hostIPs": host_ip,
    }
    if path not in fields:
        raise EnvError(f"env {name}: fieldPath {path!r} is not supported on a process node")
    return fields[path]
