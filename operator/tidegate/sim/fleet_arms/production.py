"""Production's own queue as an arm: as it is, and as it is without classes."""

from tidegate.core.flow import Flow
from tidegate.core.flowtypes import Policy
from tidegate.sim.router import Arm


def fifo() -> Arm:
    """One queue in arrival order, production's own, and an engine without priorities."""
    return Arm("fifo", lambda: Flow(Policy(qos=False)), engine_priority=False)


def tidegate() -> Arm:
    """Production's queue as it is, in front of engines with priority."""
    return Arm("tidegate", Flow)
