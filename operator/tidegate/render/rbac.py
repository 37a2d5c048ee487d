"""Who may do what: the accounts that Tidegate's parts run under, and roles for people.

Each part gets what it is seen to need and nothing by wildcard. Server-side apply needs `create`
and `patch`.
"""

from collections.abc import Iterable
from typing import Any, Final

from tidegate.api.names import GROUP

Rule = dict[str, list[str]]

KINDS: Final = ("qosclasses", "gpupools", "modeldeployments")
_READ: Final = ("get", "list", "watch")
_OWN: Final = ("get", "list", "watch", "create", "patch", "delete")
_WRITE: Final = ("create", "update", "patch", "delete", "deletecollection")
_RBAC: Final = "rbac.authorization.k8s.io"


def _rule(group: str, resources: Iterable[str], verbs: Iterable[str]) -> Rule:
    return {"apiGroups": [group], "resources": list(resources), "verbs": list(verbs)}


def controller_rules() -> list[Rule]:
    """The controller reads the cluster, owns the children of the kinds, and taints the pools' nodes."""
    return [
        _rule(GROUP, KINDS, _READ),
        _rule(GROUP, ("qosclasses", "gpupools"), ("patch",)),  # the finalizer of what is in use
        _rule(GROUP, (f"{k}/status" for k in KINDS), ("patch",)),
        _rule("", ("namespaces",), _READ),
        _rule("", ("pods",), (*_READ, "patch")),  # patch: whose GPUs it stands on, that it is emptied
        _rule("", ("nodes",), (*_READ, "patch")),  # patch: the pool's taint
        _rule("", ("services",), _OWN),
        _rule("apps", ("deployments",), _OWN),
        _rule("scheduling.k8s.io", ("priorityclasses",), _OWN),
        _rule("inference.networking.k8s.io", ("inferencepools",), _OWN),  # of models with spec.exposure
        _rule("gateway.networking.k8s.io", ("httproutes",), _OWN),
        _rule("events.k8s.io", ("events",), ("create", "patch")),
    ]


def extender_rules() -> list[Rule]:
    """The extender reads what placement is decided from, and touches pods that wait."""
    return [
        _rule(GROUP, KINDS, _READ),
        _rule("", ("nodes", "namespaces"), _READ),
        _rule("", ("pods",), (*_READ, "patch")),  # patch: a change of a pool wakes no waiting pod by itself
    ]


def picker_rules() -> list[Rule]:
    """The picker reads models, classes and endpoints, and asks who a caller is and what it may use."""
    return [
        _rule(GROUP, ("qosclasses", "modeldeployments"), _READ),
        _rule("", ("pods",), _READ),
        _rule("authentication.k8s.io", ("tokenreviews",), ("create",)),
        _rule("authorization.k8s.io", ("subjectaccessreviews",), ("create",)),
    ]


PARTS: Final = {"controller": controller_rules, "extender": extender_rules, "picker": picker_rules}


def view_rules() -> list[Rule]:
    """For people who look."""
    return [_rule(GROUP, KINDS, _READ)]


def edit_rules() -> list[Rule]:
    """For people who run models in their namespace. Which classes they may use, admission says."""
    return [_rule(GROUP, ("modeldeployments",), _WRITE)]


def platform_rules() -> list[Rule]:
    """For platform engineers: the cluster's classes and pools, and every class for their own requests."""
    return [
        _rule(GROUP, KINDS, (*_READ, *_WRITE)),
        _rule(GROUP, ("qosclasses",), ("use",)),
    ]


def _object(api_version: str, kind: str, name: str, **more: Any) -> dict[str, Any]:
    meta: dict[str, Any] = {"name": name, "labels": {"app.kubernetes.io/part-of": "tidegate"}}
    return {"apiVersion": api_version, "kind": kind, "metadata": meta, **more}


def _role(name: str, rules: list[Rule], aggregate_to: str = "") -> dict[str, Any]:
    role = _object(f"{_RBAC}/v1", "ClusterRole", name, rules=rules)
    if aggregate_to:
        role["metadata"]["labels"][f"{_RBAC}/aggregate-to-{aggregate_to}"] = "true"
    return role


def _part(part: str, rules: list[Rule], namespace: str) -> list[dict[str, Any]]:
    name = f"tidegate-{part}"
    account = _object("v1", "ServiceAccount", name)
    account["metadata"]["namespace"] = namespace
    binding = _object(
        f"{_RBAC}/v1",
        "ClusterRoleBinding",
        name,
        roleRef={"apiGroup": _RBAC, "kind": "ClusterRole", "name": name},
        subjects=[{"kind": "ServiceAccount", "name": name, "namespace": namespace}],
    )
    return [account, _role(name, rules), binding]


def rbac(namespace: str) -> list[dict[str, Any]]:
    """Accounts, roles and bindings of the parts, and the roles for people."""
    parts = [o for part, rules in PARTS.items() for o in _part(part, rules(), namespace)]
    # Kubernetes' own `admin` takes up what is aggregated to `edit`; the third role says so itself,
    # for clusters whose `edit` and `admin` were rewritten.
    people = [
        _role("tidegate-view", view_rules(), "view"),
        _role("tidegate-edit", edit_rules(), "edit"),
        _role("tidegate-admin", [*view_rules(), *edit_rules()], "admin"),
        _role("tidegate-platform", platform_rules()),
    ]
    return [*parts, *people]


def system_namespace(namespace: str) -> dict[str, Any]:
    """The namespace that the parts run in."""
    return _object("v1", "Namespace", namespace)
