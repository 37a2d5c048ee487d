"""kube-scheduler's extender protocol (k8s.io/kube-scheduler/extender/v1) with node names only.

Its JSON keys are Go field names. Node objects are never sent, since the scheduler's configuration
says `nodeCacheCapable: true`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson


class BadRequest(ValueError):  # noqa: N818 - reads as what it says
    """The body is not what kube-scheduler sends; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class FilterArgs:
    """ExtenderArgs: a raw pod, and the nodes that passed kube-scheduler's own filters."""

    pod: Mapping[str, Any]
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PreemptArgs:
    """ExtenderPreemptionArgs: a raw pod, proposed victims' UIDs and PDB violations by node."""

    pod: Mapping[str, Any]
    victims: Mapping[str, tuple[str, ...]]
    violations: Mapping[str, int]


def filter_args(body: bytes) -> FilterArgs:
    """Decode a filter call. Raises BadRequest."""
    raw = _object(body)
    names = raw.get("NodeNames")
    if not isinstance(names, list) or not set(map(type, names)) <= {str}:
        raise BadRequest(
            "NodeNames must be a list of strings; set nodeCacheCapable: true for this extender in the"
            " scheduler's configuration"
        )
    return FilterArgs(_pod(raw), tuple(names))


def preempt_args(body: bytes) -> PreemptArgs:
    """Decode a preempt call. Raises BadRequest."""
    raw = _object(body)
    proposed = raw.get("NodeNameToMetaVictims")
    if not isinstance(proposed, dict):
        raise BadRequest(
            "NodeNameToMetaVictims must be an object; set nodeCacheCapable: true for this extender in the"
            " scheduler's configuration"
        )
    try:
        victims = {n: tuple(str(p["UID"]) for p in (v["Pods"] or ())) for n, v in proposed.items()}
        violations = {n: int(v.get("NumPDBViolations") or 0) for n, v in proposed.items()}
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise BadRequest(f"NodeNameToMetaVictims: each node needs Pods: [{{UID}}] ({error!r})") from error
    return PreemptArgs(_pod(raw), victims, violations)


def filter_result(
    nodes: tuple[str, ...], failed: Mapping[str, str], unresolvable: Mapping[str, str]
) -> bytes:
    """Encode an ExtenderFilterResult."""
    return orjson.dumps(
        {
            "NodeNames": nodes,
            "FailedNodes": failed,
            "FailedAndUnresolvableNodes": unresolvable,
            "Error": "",
        }
    )


def preempt_result(nodes: Mapping[str, tuple[str, ...]], violations: Mapping[str, int]) -> bytes:
    """Encode an ExtenderPreemptionResult."""
    return orjson.dumps(
        {
            "NodeNameToMetaVictims": {
                n: {"Pods": [{"UID": u} for u in uids], "NumPDBViolations": violations.get(n, 0)}
                for n, uids in nodes.items()
            }
        }
    )


def _object(body: bytes) -> dict[str, Any]:
    try:
        raw = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise BadRequest(f"the body must be a JSON object, not {type(raw).__name__}")
    return raw


def _pod(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    pod = raw.get("Pod")
    if not isinstance(pod, dict):
        raise BadRequest("Pod must be an object")
    meta, spec = pod.get("metadata"), pod.get("spec")
    if not isinstance(meta, dict) or not isinstance(spec, dict):
        raise BadRequest("Pod needs metadata and spec")
    for key in ("uid", "name"):
        if not isinstance(meta.get(key), str):
            raise BadRequest(f"Pod.metadata.{key} must be a string")
    return pod
