"""The arm that holds nothing back: the engine's own priority alone."""

from collections.abc import Iterable, Sequence
from typing import ClassVar

from tidegate.core.flowtypes import Ask
from tidegate.sim.fleet_arms.central import Central
from tidegate.sim.fleet_arms.site import Site
from tidegate.sim.router import Arm


class SendAll(Central):
    """Everything is sent at once; order is the engine's affair."""

    bounded: ClassVar[bool] = False

    def among(self, ask: Ask, sites: Sequence[Site], now: float) -> Iterable[Site]:  # noqa: ARG002
        """All replicas."""
        return sites


def priority() -> Arm:
    """The engine's `--scheduling-policy priority`, and a router that balances."""
    return Arm("priority", SendAll)
