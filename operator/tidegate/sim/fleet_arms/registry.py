"""The arms by name. A name carries its numbers, so that a run can be described in text: `packing-4`."""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Final

from tidegate.sim.fleet_arms.aborting import aborting, steps
from tidegate.sim.fleet_arms.deadlines import edf, edf_clairvoyant, edf_dynamic, qoserve
from tidegate.sim.fleet_arms.growing import growing
from tidegate.sim.fleet_arms.limits import aimd, cap, holdback, release
from tidegate.sim.fleet_arms.packing import alone, packing, packing_cap, silos
from tidegate.sim.fleet_arms.priority import priority
from tidegate.sim.fleet_arms.production import IDEAS, fifo, ours, without
from tidegate.sim.fleet_arms.saturation import probabilistic, shed, soft_reflective
from tidegate.sim.fleet_arms.tiers import cooperating, ours_cooperating, tiers
from tidegate.sim.router import Arm

ARMS: Final[dict[str, Callable[..., Arm]]] = {
    "aborting": aborting,
    "aimd": aimd,
    "alone": alone,
    "cap": cap,
    "cooperating": cooperating,
    "edf": edf,
    "edf-clairvoyant": edf_clairvoyant,
    "edf-dynamic": edf_dynamic,
    "fifo": fifo,
    "growing": growing,
    "holdback": holdback,
    "packing": packing,
    "packing-cap": packing_cap,
    "priority": priority,
    "probabilistic": probabilistic,
    "release": release,
    "shed": shed,
    "qoserve": qoserve,
    "silos": silos,
    "soft-reflective": soft_reflective,
    "steps": steps,
    "tiers": tiers,
    "ours": ours,
    "ours-cooperating": ours_cooperating,
    **{f"ours-without-{idea}": partial(without, idea) for idea in IDEAS},
}
"""What makes an arm, by the part of its name before the numbers."""


def factory(name: str) -> tuple[Callable[..., Arm], tuple[int, ...]]:
    """What makes the arm of this name, and the numbers to give it.

    Raises:
        ValueError: there is no such arm, or it takes other numbers.
    """
    words = name.split("-")
    numbers = tuple(int(word) for word in words if word.isdigit())
    family = "-".join(word for word in words if not word.isdigit())
    make = ARMS.get(family)
    if make is None:
        raise ValueError(f"no arm is named {name!r}; there are {', '.join(sorted(ARMS))}, and numbers after")
    try:
        signature(make).bind(*numbers)
    except TypeError as error:
        wanted = ", ".join(signature(make).parameters) or "nothing"
        raise ValueError(f"arm {name!r}: after {family} comes {wanted}") from error
    return make, numbers


def arm(name: str) -> Arm:
    """The arm of this name; raises what `factory` does."""
    make, numbers = factory(name)
    return make(*numbers)
