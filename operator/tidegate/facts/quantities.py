"""Counts and times as Kubernetes writes them, read cheaply: these are on hot paths."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final

DEFAULT_RESOURCE: Final = "nvidia.com/gpu"


def devices(value: object) -> int:
    """A whole number of devices: `4`, `"4"`, `"4.0"`, `"4e0"` or `"2k"`.

    The API server admits whole numbers only for extended resources, and writes them bare; the
    other forms are what a manifest or another writer may hold.
    """
    try:
        return int(value)  # type: ignore[call-overload, no-any-return]
    except (TypeError, ValueError):
        text = str(value)
        scale = {"k": 1_000, "M": 1_000_000}.get(text[-1:], 1)
        return int(float(text[:-1] if scale > 1 else text) * scale)


def seconds(timestamp: str | None) -> float | None:
    """Unix seconds of an RFC 3339 time, None for none."""
    return datetime.fromisoformat(timestamp).timestamp() if timestamp else None


def condition(conditions: Iterable[Mapping[str, Any]] | None, name: str) -> Mapping[str, Any] | None:
    """The condition of this type, if there is one."""
    for entry in conditions or ():
        if entry.get("type") == name:
            return entry
    return None
