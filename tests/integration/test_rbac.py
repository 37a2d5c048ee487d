"""What the accounts of the parts, and people, may do on a real API server."""

import asyncio
from typing import Any

import pytest

from tidegate.adapters.kube import Kube, kinds

OURS = "tidegate.dev"

# Each: part, verb, group, resource, subresource, and whether it may.
PARTS = {
    "controller watches models": ("controller", "watch", OURS, "modeldeployments", "", True),
    "controller writes a status": ("controller", "patch", OURS, "modeldeployments", "status", True),
    "controller writes no user's spec": ("controller", "patch", OURS, "modeldeployments", "", False),
    "controller deletes no class": ("controller", "delete", OURS, "qosclasses", "", False),
    "controller holds a class": ("controller", "patch", OURS, "qosclasses", "", True),
    "controller holds a pool": ("controller", "patch", OURS, "gpupools", "", True),
    "controller taints nodes": ("controller", "patch", "", "nodes", "", True),
    "controller deletes no nodes": ("controller", "delete", "", "nodes", "", False),
    "controller owns lanes": ("controller", "create", "apps", "deployments", "", True),
    "controller owns priority classes": (
        "controller",
        "delete",
        "scheduling.k8s.io",
        "priorityclasses",
        "",
        True,
    ),
    "controller tells": ("controller", "create", "events.k8s.io", "events", "", True),
    "controller evicts nobody": ("controller", "create", "", "pods", "eviction", False),
    "controller notes things on pods": ("controller", "patch", "", "pods", "", True),
    "controller deletes no pods": ("controller", "delete", "", "pods", "", False),
    "controller reads no secrets": ("controller", "get", "", "secrets", "", False),
    "controller runs nothing in pods": ("controller", "create", "", "pods", "exec", False),
    "controller grants nothing": (
        "controller",
        "create",
        "rbac.authorization.k8s.io",
        "clusterroles",
        "",
        False,
    ),
    "extender watches nodes": ("extender", "watch", "", "nodes", "", True),
    "extender touches waiting pods": ("extender", "patch", "", "pods", "", True),
    "extender binds no pods": ("extender", "create", "", "pods", "binding", False),
    "extender deletes no pods": ("extender", "delete", "", "pods", "", False),
    "extender writes no pools": ("extender", "patch", OURS, "gpupools", "", False),
    "picker watches pods": ("picker", "watch", "", "pods", "", True),
    "picker asks who calls": ("picker", "create", "authentication.k8s.io", "tokenreviews", "", True),
    "picker asks what a caller may": (
        "picker",
        "create",
        "authorization.k8s.io",
        "subjectaccessreviews",
        "",
        True,
    ),
    "picker writes nothing": ("picker", "patch", "", "pods", "", False),
    "picker uses no class itself": ("picker", "use", OURS, "qosclasses", "", False),
}


async def may(kube: Kube, user: str, groups: list[str], **attributes: str) -> bool:
    spec: dict[str, Any] = {"user": user, "groups": groups, "resourceAttributes": attributes}
    review = await kube.create(kinds.ACCESS_REVIEW, {"spec": spec})
    return bool(review["status"]["allowed"])


@pytest.mark.parametrize("case", PARTS.values(), ids=PARTS)
async def test_parts(kube: Kube, case: tuple[str, str, str, str, str, bool]) -> None:
    part, verb, group, resource, subresource, expected = case
    user = f"system:serviceaccount:tidegate-system:tidegate-{part}"
    groups = ["system:serviceaccounts", "system:authenticated"]
    found = await may(
        kube,
        user,
        groups,
        verb=verb,
        group=group,
        resource=resource,
        subresource=subresource,
        namespace="default",
    )
    assert found is expected


PEOPLE = {
    "view reads models": ("view", "get", "modeldeployments", True),
    "view writes none": ("view", "create", "modeldeployments", False),
    "edit writes models": ("edit", "create", "modeldeployments", True),
    "edit writes no class": ("edit", "create", "qosclasses", False),
    "admin writes models": ("admin", "deletecollection", "modeldeployments", True),
    "admin writes no pool": ("admin", "patch", "gpupools", False),
    "admin uses no class by that": ("admin", "use", "qosclasses", False),
    "platform writes classes": ("tidegate-platform", "create", "qosclasses", True),
    "platform uses classes": ("tidegate-platform", "use", "qosclasses", True),
}


@pytest.mark.parametrize("case", PEOPLE.values(), ids=PEOPLE)
async def test_people_by_the_usual_roles(
    kube: Kube, namespace: str, case: tuple[str, str, str, bool]
) -> None:
    role, verb, resource, expected = case
    user = f"somebody-{namespace}"
    binding = {
        "metadata": {"name": f"test-{namespace}"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
    }
    await kube.create(kinds.CLUSTER_ROLE_BINDING, binding)
    try:
        # The binding is seen a moment later; `get modeldeployments` is what every one of them may.
        async with asyncio.timeout(20):
            while True:
                if await may(kube, user, [], verb="get", group=OURS, resource="modeldeployments"):
                    break
                await asyncio.sleep(0.05)
        found = await may(kube, user, [], verb=verb, group=OURS, resource=resource, namespace=namespace)
    finally:
        await kube.delete(kinds.CLUSTER_ROLE_BINDING, f"test-{namespace}")
    assert found is expected
