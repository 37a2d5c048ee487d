"""`spec.podOverrides`: a strategic merge patch on the pod template that cannot weaken the pod.

Kubernetes' own rules for lists: some are merged by a key, the others are replaced whole.
https://kubernetes.io/docs/tasks/manage-kubernetes-objects/update-api-object-kubectl-patch/
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Final

Object = dict[str, Any]

_MERGE_KEYS: Final = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "imagePullSecrets": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
    "topologySpreadConstraints": "topologyKey",
    "hostAliases": "ip",
}
"""List fields of a PodSpec that merge by a key (`patchMergeKey` in k8s.io/api/core/v1)."""

_OWNED_SPEC: Final = ("schedulerName", "priorityClassName", "priority", "preemptionPolicy", "nodeName")
"""What decides about the GPUs is the pool's and the class's, not the author's of one model."""


class InvalidOverrideError(ValueError):
    """A patch that is refused; the message names the field."""


def override(template: Mapping[str, Any], patch: Mapping[str, Any], gpu_resource: str) -> Object:
    """Return the pod template with `patch` merged in.

    Added containers get the engine's security context where they say nothing of their own.

    Raises:
        InvalidOverrideError: The patch is malformed, weakens the security context, mounts a host path, or
            changes what the class and the pool decide.
    """
    if unknown := set(patch) - {"metadata", "spec"}:
        raise InvalidOverrideError(
            f"spec.podOverrides.{min(unknown)} is not known; a pod template has metadata and spec"
        )
    merged = _merge(template, patch, "spec.podOverrides")
    _check_owned(template, merged, gpu_resource)
    standard = template["spec"]["containers"][0]["securityContext"]
    for container in [*merged["spec"]["containers"], *merged["spec"].get("initContainers", [])]:
        container["securityContext"] = {**standard, **(container.get("securityContext") or {})}
    for problem in _weaknesses(merged["spec"]):
        raise InvalidOverrideError(f"spec.podOverrides.spec.{problem}")
    return merged


def _merge(base: Mapping[str, Any], patch: Mapping[str, Any], path: str) -> Object:
    result = copy.deepcopy(dict(base))
    for key, value in patch.items():
        old = result.get(key)
        if value is None:
            result.pop(key, None)
        elif isinstance(old, Mapping) or (old is None and isinstance(value, Mapping)):
            if not isinstance(value, Mapping):
                raise InvalidOverrideError(f"{path}.{key} must be an object")
            result[key] = _merge(old or {}, value, f"{path}.{key}")
        elif key in _MERGE_KEYS:
            result[key] = _merge_list(old or [], value, _MERGE_KEYS[key], f"{path}.{key}")
        elif key == "tolerations" and isinstance(value, list):  # ours stay: without them nothing is placed
            result[key] = [*(old or []), *(t for t in value if t not in (old or []))]
        else:
            result[key] = copy.deepcopy(value)
    return result


def _merge_list(base: list[Any], patch: Any, merge_key: str, path: str) -> list[Any]:
    if not isinstance(patch, list):
        raise InvalidOverrideError(f"{path} must be a list")
    result = list(base)
    for index, item in enumerate(patch):
        here = f"{path}[{index}]"
        if not isinstance(item, Mapping) or merge_key not in item:
            raise InvalidOverrideError(f"{here} must be an object with {merge_key}")
        found = next((i for i, old in enumerate(result) if old.get(merge_key) == item[merge_key]), None)
        if item.get("$patch") == "delete":
            if found is not None:
                del result[found]
        elif found is None:
            result.append(_merge({}, item, here))
        else:
            result[found] = _merge(result[found], item, here)
    return result


def _check_owned(before: Mapping[str, Any], after: Mapping[str, Any], gpu_resource: str) -> None:
    for field in _OWNED_SPEC:
        if before["spec"].get(field) != after["spec"].get(field):
            raise InvalidOverrideError(
                f"spec.podOverrides.spec.{field} may not be set: the class and the pool decide it"
            )
    for kind in ("labels", "annotations"):
        old = before["metadata"].get(kind, {})
        new = after.get("metadata", {}).get(kind) or {}
        for key in {*old, *(k for k in new if "tidegate.dev/" in k)}:
            if old.get(key) != new.get(key):
                raise InvalidOverrideError(f"spec.podOverrides.metadata.{kind}[{key}] belongs to Tidegate")
    if not any(c.get("name") == "engine" for c in after["spec"].get("containers") or []):
        raise InvalidOverrideError("spec.podOverrides.spec.containers must keep the container named engine")
    wanted = before["spec"]["containers"][0]["resources"]["limits"].get(gpu_resource)
    for container in after["spec"]["containers"]:
        resources = container.get("resources") or {}
        expected = wanted if container["name"] == "engine" else None
        for side in ("limits", "requests"):
            if (resources.get(side) or {}).get(gpu_resource) != expected:
                where = f"spec.podOverrides.spec.containers[{container['name']}].resources.{side}"
                raise InvalidOverrideError(
                    f"{where}[{gpu_resource}] may not be changed: "
                    "spec.parallelism decides how many GPUs a replica has"
                )


def _weaknesses(spec: Mapping[str, Any]) -> Iterator[str]:
    """Yield what falls below the `restricted` Pod Security Standard and a read-only root.

    https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
    """
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield f"{field} may not be true"
    yield from (f"securityContext.{p}" for p in _weak_context(spec.get("securityContext") or {}, pod=True))
    for volume in spec.get("volumes") or []:
        if "hostPath" in volume:
            where = f"volumes[{volume.get('name')}].hostPath"
            yield f"{where} is not allowed: mount a claim, a config map or an emptyDir"
    for group in ("containers", "initContainers"):
        for container in spec.get(group) or []:
            where = f"{group}[{container.get('name')}]"
            context = container.get("securityContext") or {}
            yield from (f"{where}.securityContext.{p}" for p in _weak_context(context, pod=False))
            if any(port.get("hostPort") for port in container.get("ports") or []):
                yield f"{where}.ports[].hostPort may not be set"


def _weak_context(context: Mapping[str, Any], *, pod: bool) -> Iterator[str]:
    # A container that says nothing has the pod's.
    profile = (context.get("seccompProfile") or {}).get("type", None if pod else "RuntimeDefault")
    checks = {
        "runAsNonRoot must stay true": context.get("runAsNonRoot", not pod) is not True,
        "runAsUser may not be 0": context.get("runAsUser") == 0,
        "seccompProfile.type may not be Unconfined": profile not in ("RuntimeDefault", "Localhost"),
        "sysctls may not be set": bool(context.get("sysctls")),
    }
    if not pod:
        capabilities = context.get("capabilities") or {}
        checks |= {
            "privileged may not be true": bool(context.get("privileged")),
            "allowPrivilegeEscalation must stay false": context.get("allowPrivilegeEscalation") is not False,
            "readOnlyRootFilesystem must stay true": context.get("readOnlyRootFilesystem") is not True,
            "capabilities.drop must keep ALL": "ALL" not in (capabilities.get("drop") or []),
            "capabilities.add may not be set": bool(capabilities.get("add")),
            "procMount may not be Unmasked": context.get("procMount", "Default") != "Default",
        }
    yield from (message for message, weak in checks.items() if weak)
