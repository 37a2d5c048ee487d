"""The arms that `tidegate simulate --compare` knows, by name. Further arms are added here."""

from tidegate.core.flow import Flow, Policy
from tidegate.sim.router import Arm


def arms() -> dict[str, Arm]:
    """Every arm by its name."""
    return {
        arm.name: arm
        for arm in (
            Arm("ours", Flow),
            # One queue a model in arrival order, and engines that know no classes.
            Arm("fifo", lambda: Flow(Policy(qos=False)), engine_priority=False),
        )
    }


def arm(name: str) -> Arm:
    """The arm of this name. Raises ValueError saying which there are."""
    known = arms()
    if name not in known:
        raise ValueError(f"{name!r} is no arm; there is {', '.join(known)}")
    return known[name]
