"""The checks, a module for each group of rules."""

import importlib
from typing import Final

GROUPS: Final = ("destination", "subset", "body", "stream", "response", "refusal", "health")
"""In the order in which they are checked."""


def load() -> None:
    """Import every group: its rules register themselves."""
    for group in GROUPS:
        importlib.import_module(f"{__name__}.{group}")
