"""The class and the tenant of a request: pure, from the model, the caller and the headers."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tidegate.core.types import QoSClass, TenantFrom
from tidegate.facts.endpoints import ServedModel
from tidegate.picker.identity import Caller

CLASS_HEADERS: Final = ("x-tidegate-qos", "x-llm-d-inference-objective", "x-gateway-inference-objective")
"""The first that is there counts; the others are the ecosystem's names for the same."""
TENANT_HEADERS: Final = ("x-gateway-inference-fairness-id", "x-llm-d-inference-fairness-id")
"""The ecosystem's names for who the tenant is, where the class's own header is not there."""
_MAX_TENANT: Final = 128
"""Longer names of tenants are kept by their digest: what waits is bounded in bytes."""
_SERVICE_ACCOUNT: Final = "system:serviceaccount:"
MAX_PRIORITY: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Denied:
    """No class can be had: what to tell the client."""

    message: str


def named_class(headers: Mapping[str, str]) -> str | None:
    """The class that the request asks for by header, if any."""
    return next((value for name in CLASS_HEADERS if (value := headers.get(name, "").strip())), None)


def candidates(model: ServedModel, named: str | None) -> tuple[str, ...] | Denied:
    """Classes to try for a caller, in order: the first that it may use is the request's.

    A header picks one of them. It can only ever lower what the caller has: the right to use the
    class that it names is checked like any other.
    """
    name = "/".join(model.key)
    if not model.classes:
        return Denied(
            f"model {name} serves no class that exists; set spec.classes or mark a default QoSClass"
        )
    if named is None:
        return model.classes
    if named not in model.classes:
        return Denied(f"model {name} does not serve class {named!r}; it serves {', '.join(model.classes)}")
    return (named,)


def trusted(model: ServedModel, named: str | None, classes: Mapping[str, QoSClass]) -> str | Denied:
    """The class where a gateway's header is trusted; the least important where it says nothing."""
    found = candidates(model, named)
    if isinstance(found, Denied):
        return found
    return min(found, key=lambda c: (classes[c].priority, c))


def tenant(qos: QoSClass, caller: Caller, model: ServedModel, headers: Mapping[str, str]) -> str:
    """Who the tenant is by the class's rule; empty where it has none, or where nothing says who it is."""
    match qos.tenants.source:
        case TenantFrom.NAMESPACE:
            account = caller.user.removeprefix(_SERVICE_ACCOUNT)
            name = account.partition(":")[0] if account != caller.user else model.key[0]
        case TenantFrom.USER:
            name = caller.user
        case TenantFrom.HEADER:
            names = (qos.tenants.header, *TENANT_HEADERS)
            said = next((value for n in names if (value := headers.get(n, "").strip())), "")
            name = caller.tenant or said  # what the gateway has checked, before what anybody may write
        case TenantFrom.NONE:
            name = ""
    return name if len(name) <= _MAX_TENANT else hashlib.sha256(name.encode()).hexdigest()


def vllm_priority(qos: QoSClass) -> int:
    """VLLM's scale: lower is earlier, 0 the most important there can be."""
    return MAX_PRIORITY - qos.priority


def triton_priority(qos_class: str, model: ServedModel, classes: Mapping[str, QoSClass]) -> int:
    """Triton's scale: 1 is highest, and no more levels than the model serves classes.

    A class that went while the request waited counts as the lowest.
    """
    ordered = sorted((c for c in model.classes if c in classes), key=lambda c: (-classes[c].priority, c))
    return ordered.index(qos_class) + 1 if qos_class in ordered else len(model.classes)
