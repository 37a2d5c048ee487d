"""Production's own queue as arms: as it is, without each of its ideas, and without classes."""

from functools import partial
from typing import Any

from tidegate.core.flow import Flow
from tidegate.core.flowtypes import Pack, Policy
from tidegate.sim.router import Arm

IDEAS = ("front", "late", "clear", "pace", "short")
"""The ideas of `core.flowtypes.Pack` that can be turned off. Without the front there is none of them."""


def fifo() -> Arm:
    """One queue in arrival order, production's own, and an engine without priorities."""
    return Arm("fifo", lambda: Flow(Policy(qos=False)), engine_priority=False)


def ours() -> Arm:
    """Production's queue as it is, in front of engines with priority."""
    return Arm("ours", Flow)


def without(idea: str) -> Arm:
    """Production's queue with one idea turned off."""
    if idea not in IDEAS:
        raise ValueError(f"{idea!r} is no idea of the policy; there are {', '.join(IDEAS)}")
    off: dict[str, Any] = {idea: False}
    return Arm(f"ours-without-{idea}", partial(Flow, Policy(pack=Pack(**off))))
