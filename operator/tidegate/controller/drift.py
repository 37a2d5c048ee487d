"""Has a child drifted, and does somebody else own what we would write? Pure functions."""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import orjson

from tidegate.api import names

Object = dict[str, Any]
Path = tuple[str | int, ...]


class Claim(NamedTuple):
    """A field that another manager applies with another value than ours."""

    path: Path
    manager: str

    def __str__(self) -> str:
        steps = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in self.path)
        return f"{steps.lstrip('.')} (applied by {self.manager})"


def digest(value: Any) -> str:
    """A short stable hash of JSON."""
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def fingerprint(live: Mapping[str, Any]) -> str:
    """Hash of what a user can edit by hand: everything but status and the server's bookkeeping.

    A child is written again when this changes, so quantities and defaults that the API server
    rewrites need not be understood here.
    """
    meta = live["metadata"]
    annotations = {
        k: v
        for k, v in (meta.get("annotations") or {}).items()
        if not k.startswith("deployment.kubernetes.io/")
    }
    kept = {
        "labels": meta.get("labels"),
        "annotations": annotations,
        "owners": meta.get("ownerReferences"),
        "deleting": meta.get("deletionTimestamp"),
        "uid": meta.get("uid"),
    }
    body = {k: v for k, v in live.items() if k not in ("metadata", "status", "apiVersion", "kind")}
    return digest([kept, body])


def claims(live: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[Claim]:
    """Fields of `wanted` that another manager owns by *Apply* with another value.

    Ownership by Update (kubectl edit, a patch) is drift and no claim.
    """
    found: dict[Path, str] = {}
    for entry in live["metadata"].get("managedFields") or []:
        other = entry.get("manager") != names.FIELD_MANAGER and entry.get("operation") == "Apply"
        if other and not entry.get("subresource"):
            for path in _contested(entry.get("fieldsV1") or {}, live, wanted, ()):
                found.setdefault(path, entry["manager"])
    return [Claim(path, manager) for path, manager in sorted(found.items(), key=str)]


def without(wanted: Mapping[str, Any], taken: list[Claim]) -> Object:
    """`wanted` less the fields that others claim: left out of an apply, they stay theirs."""
    result = copy.deepcopy(dict(wanted))
    for claim in taken:
        parent: Any = result
        for step in claim.path[:-1]:
            parent = parent[step]
        if isinstance(parent, dict):
            parent.pop(claim.path[-1], None)
    return result


def _contested(fields: Mapping[str, Any], live: Any, wanted: Any, path: Path) -> Iterator[Path]:
    """Walk a fieldsV1 tree (`f:name`, `k:{"key":…}`, `.`) beside both objects."""
    for key, below in fields.items():
        for step, live_value, wanted_value in _descend(key, live, wanted):
            here = (*path, step)
            if set(below) - {"."}:
                yield from _contested(below, live_value, wanted_value, here)
            elif live_value != wanted_value and not isinstance(step, int):
                yield here


def _descend(key: str, live: Any, wanted: Any) -> Iterator[tuple[str | int, Any, Any]]:
    kind, _, name = key.partition(":")
    if kind == "f" and isinstance(wanted, dict) and name in wanted:
        yield name, live.get(name) if isinstance(live, dict) else None, wanted[name]
    elif kind == "k" and isinstance(wanted, list):
        match = json.loads(name)
        theirs = next((i for i in live or [] if _matches(i, match)), None) if isinstance(live, list) else None
        for index, item in enumerate(wanted):
            if _matches(item, match):
                yield index, theirs, item


def _matches(item: Any, match: Mapping[str, Any]) -> bool:
    # A port's protocol is part of its key and defaults to TCP, which we do not write.
    return isinstance(item, dict) and all(item.get(k, "TCP") == v for k, v in match.items())
