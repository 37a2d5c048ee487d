"""What if there were more GPUs, or fewer, or a reservation: the same scenario with other numbers.

Where replicas are planned, nodes and reservations change, and the plan does the rest. Where they are
fixed, a rule stands for it, the one that reservations amount to: the lanes of the lowest class gain
and give up first.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from pydantic import TypeAdapter, ValidationError

from tidegate.api.gpupool import Reservation
from tidegate.api.problems import describe
from tidegate.core.flowtypes import ModelKey
from tidegate.sim.build import group_model, highest
from tidegate.sim.cluster.fields import NodeGroup, PlanSpec, PoolSpec
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

    Where replicas are planned, whole nodes go or come, of the last kind of the largest pool, and one
    with fewer GPUs for what is left.

    Raises:
        ScenarioError: There are not so many GPUs to do without.
    """
    if scenario.plan is not None:
        return _with_plan(scenario, _with_nodes(scenario.plan, change))
    have = gpus(scenario)

    def enough(counts: Sequence[int], group: Group, now: int) -> bool:  # noqa: ARG001  (as _resize asks)
        return now <= have + change if change < 0 else now + group.gpus > have + change

    return _resize(scenario, enough, up=change > 0, asked=f"--gpus {change:+d}")


def with_replicas(scenario: Scenario, total: int) -> Scenario:
    """The scenario with so many replicas in all. Raises ScenarioError when that is too few, or planned."""
    if scenario.plan is not None:
        raise ScenarioError("--replicas: here the plan says how many there are; --gpus changes what it has")
    up = total > sum(g.count for g in scenario.replicas)

    def enough(counts: Sequence[int], _group: Group, _now: int) -> bool:
        return sum(counts) == total

    return _resize(scenario, enough, up=up, asked=f"--replicas {total}")


def with_reservation(scenario: Scenario, text: str) -> Scenario:
    """The scenario with a class's reservation set to so many GPUs: `interactive=8`; 0 takes it away.

    It is the class's first one in the only pool that has one for it, or else in the only pool.

    Raises:
        ScenarioError: Replicas are not planned, the class or the pool cannot be said, or it is too much.
    """
    if scenario.plan is None:
        raise ScenarioError("--reserve needs a scenario with plan: without it replicas are fixed")
    name, _, number = text.partition("=")
    if name not in scenario.classes or not number.isdecimal():
        raise ScenarioError(
            f"--reserve takes CLASS=GPUS with one of {', '.join(scenario.classes)}, not {text!r}"
        )
    pools = scenario.plan.pools
    having = [p for p in pools if any(r.qos_class == name for r in p.reservations)] or pools
    if len(having) > 1:
        raise ScenarioError(f"--reserve {text}: there are several pools: {', '.join(p.name for p in having)}")
    pool, wanted = having[0], int(number)
    mine = next((r for r in pool.reservations if r.qos_class == name), None)
    others = [r for r in pool.reservations if r is not mine]
    kept = Reservation(name=name, qos_class=name, gpus=wanted)
    if mine is not None:
        kept = mine.model_copy(update={"gpus": wanted, "share_percent": None})
    return _with_plan(
        scenario, _with_pool(scenario.plan, pool, reservations=[*others, *[kept][: wanted > 0]])
    )


def gpus(scenario: Scenario) -> int:
    """GPUs of all pools where replicas are planned, else of all replicas."""
    if scenario.plan is not None:
        return scenario.plan.capacity
    return sum(g.count * g.gpus for g in scenario.replicas)


def difference(before: Scenario, after: Scenario) -> list[str]:
    """What became of which lane, or pool: `batch of chat-8b: 12 → 2`."""
    if before.plan is not None and after.plan is not None:
        pairs = zip(before.plan.pools, after.plan.pools, strict=True)
        return [f"{a.name}: {_told(a)} → {_told(b)}" for a, b in pairs if a != b]
    was, now = _by_lane(before), _by_lane(after)
    return [f"{lane}: {was[lane]} → {now.get(lane, 0)}" for lane in was if was[lane] != now.get(lane, 0)]


def _by_lane(scenario: Scenario) -> dict[str, int]:
    counts: dict[str, int] = {}
    for index, group in enumerate(scenario.replicas):
        lane = f"{group.lane or highest(scenario)} of {'/'.join(group_model(scenario, index))}"
        counts[lane] = counts.get(lane, 0) + group.count
    return counts


def _told(pool: PoolSpec) -> str:
    """A pool's GPUs, and what is reserved of them."""
    kept = ", ".join(f"{r.qos_class} {r.gpus_of(pool.capacity)}" for r in pool.reservations)
    return f"{pool.capacity} GPUs" + (f" ({kept} reserved)" if kept else "")


def _with_nodes(plan: PlanSpec, change: int) -> PlanSpec:
    pool = max(plan.pools, key=lambda p: p.capacity)
    nodes, size = list(pool.nodes), pool.nodes[-1].gpus
    if -change >= pool.capacity:
        raise ScenarioError(f"--gpus {change:+d}: pool {pool.name} has {pool.capacity} GPUs")
    whole, rest = divmod(max(change, 0), size)
    nodes += [
        NodeGroup(count=count, gpus=gpus) for count, gpus in ((whole, size), (1, rest)) if count and gpus
    ]
    left = max(-change, 0)
    while left > 0:
        last = nodes.pop()
        if last.count > 1:
            nodes.append(last.model_copy(update={"count": last.count - 1}))
        if last.gpus > left:
            nodes.append(last.model_copy(update={"count": 1, "gpus": last.gpus - left}))
        left -= last.gpus
    return _with_pool(plan, pool, nodes=nodes)


def _with_pool(plan: PlanSpec, pool: PoolSpec, **changed: object) -> PlanSpec:
    """The plan with another form of a pool, which is checked as if it were read."""
    try:
        new = PoolSpec.model_validate(pool.model_copy(update=changed).to_json())
    except ValidationError as error:
        raise ScenarioError(f"pool {pool.name}: {'; '.join(describe(PoolSpec, error))}") from error
    return plan.model_copy(update={"pools": [new if p is pool else p for p in plan.pools]})


def _with_plan(scenario: Scenario, plan: PlanSpec) -> Scenario:
    return scenario.model_copy(update={"plan": plan})


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
