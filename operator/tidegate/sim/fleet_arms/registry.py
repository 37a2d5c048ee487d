"""The arms by name. A name carries its numbers, so that a run can be described in text: `packing-4`."""

from collections.abc import Callable
from typing import Final

from tidegate.sim.fleet_arms.packing import alone, packing, silos
from tidegate.sim.fleet_arms.plain import fifo, priority, tidegate
from tidegate.sim.router import Arm

ARMS: Final[dict[str, Callable[..., Arm]]] = {
    "alone": alone,
    "fifo": fifo,
    "packing": packing,
    "priority": priority,
    "silos": silos,
    "tidegate": tidegate,
}
"""What makes an arm, by the part of its name before the numbers."""


def factory(name: str) -> tuple[Callable[..., Arm], tuple[int, ...]]:
    """What makes the arm of this name, and the numbers to give it.

    Raises:
        ValueError: no arm has this name.
    """
    words = name.split("-")
    numbers = tuple(int(word) for word in words if word.isdigit())
    family = "-".join(word for word in words if not word.isdigit())
    if family not in ARMS:
        raise ValueError(
            f"no arm is named {name!r}; there are {', '.join(sorted(ARMS))}, and numbers after it"
        )
    return ARMS[family], numbers


def arm(name: str) -> Arm:
    """The arm of this name; `factory` says what is raised."""
    make, numbers = factory(name)
    return make(*numbers)
