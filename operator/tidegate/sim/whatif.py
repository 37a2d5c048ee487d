"""What if there were more GPUs, or fewer: the same scenario with other numbers of replicas.

The plan is not simulated yet, so a rule stands for it, the one that reservations amount to: the
lanes of the lowest class gain and give up first.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from pydantic import TypeAdapter, ValidationError

from tidegate.core.flowtypes import ModelKey
from tidegate.sim.build import group_model, highest
from tidegate.sim.scenario import Group, Scenario, ScenarioError, Seconds

_NUMBER: Final = re.compile(r"[0-9]+(\.[0-9]*)?")


def with_seconds(scenario: Scenario, text: str) -> Scenario:
    """The scenario with another length: a number of seconds, or a duration such as 10m.

    Raises:
        ScenarioError: It is neither.
    """
    try:
        value = TypeAdapter(Seconds).validate_python(float(text) if _NUMBER.fullmatch(text) else text)
    except ValidationError as error:
        raise ScenarioError(f"--seconds must be above 0, such as 600 or 10m, not {text!r}") from error
    return scenario.model_copy(update={"seconds": value})


def with_gpus(scenario: Scenario, change: int) -> Scenario:
    """The scenario with so many GPUs more, or fewer (negative).

    Fewer: replicas go until at least so many GPUs are free. More: they come as long as they fit.

    Raises:
        ScenarioError: There are not so many GPUs to do without.
    """
    have = gpus(scenario)

    def enough(counts: Sequence[int], group: Group, now: int) -> bool:  # noqa: ARG001  (as _resize asks)
        return now <= have + change if change < 0 else now + group.gpus > have + change

    return _resize(scenario, enough, up=change > 0, asked=f"--gpus {change:+d}")


def with_replicas(scenario: Scenario, total: int) -> Scenario:
    """The scenario with so many replicas in all. Raises ScenarioError when that is too few."""
    up = total > sum(g.count for g in scenario.replicas)

    def enough(counts: Sequence[int], _group: Group, _now: int) -> bool:
        return sum(counts) == total

    return _resize(scenario, enough, up=up, asked=f"--replicas {total}")


def gpus(scenario: Scenario) -> int:
    """GPUs of all replicas."""
    return sum(g.count * g.gpus for g in scenario.replicas)


def difference(before: Scenario, after: Scenario) -> list[str]:
    """What became of which lane: `batch of chat-8b: 12 → 2`."""
    was, now = _by_lane(before), _by_lane(after)
    return [f"{lane}: {was[lane]} → {now.get(lane, 0)}" for lane in was if was[lane] != now.get(lane, 0)]


def _by_lane(scenario: Scenario) -> dict[str, int]:
    counts: dict[str, int] = {}
    for index, group in enumerate(scenario.replicas):
        lane = f"{group.lane or highest(scenario)} of {'/'.join(group_model(scenario, index))}"
        counts[lane] = counts.get(lane, 0) + group.count
    return counts


def _resize(
    scenario: Scenario, enough: Callable[[Sequence[int], Group, int], bool], *, up: bool, asked: str
) -> Scenario:
    """Add or take replicas one by one, those of the lowest class first."""
    groups = scenario.replicas
    models = [group_model(scenario, index) for index in range(len(groups))]
    ranks = [_priority(scenario, group) for group in groups]
    counts = [group.count for group in groups]

    def order(index: int) -> tuple[int, int, int]:
        # Among lanes of one class the largest gives first, and the smallest gets first.
        held = counts[index] * groups[index].gpus
        return (ranks[index], held if up else -held, index)

    while True:
        free = range(len(groups)) if up else [i for i in range(len(groups)) if _may_go(i, counts, models)]
        now = sum(c * g.gpus for c, g in zip(counts, groups, strict=True))
        chosen = min(free, key=order, default=None)
        if chosen is None:
            if enough(counts, groups[0], now):
                break
            left = " and ".join(sorted({"/".join(m) for m in models}))
            raise ScenarioError(
                f"{asked}: of {sum(g.count for g in groups)} replicas on {gpus(scenario)} GPUs one has to"
                f" stay for {left}"
            )
        if enough(counts, groups[chosen], now):
            break
        counts[chosen] += 1 if up else -1
    kept = [g.model_copy(update={"count": c}) for g, c in zip(groups, counts, strict=True) if c]
    return scenario.model_copy(update={"replicas": kept})


def _priority(scenario: Scenario, group: Group) -> int:
    known = scenario.classes.get(group.lane or highest(scenario))
    return known.priority if known else 0


def _may_go(index: int, counts: Sequence[int], models: Sequence[ModelKey]) -> bool:
    """Whether a replica can be taken here: each model keeps its last one."""
    by_model: Mapping[ModelKey, int] = {
        m: sum(c for c, of in zip(counts, models, strict=True) if of == m) for m in set(models)
    }
    return counts[index] > 0 and by_model[models[index]] > 1
