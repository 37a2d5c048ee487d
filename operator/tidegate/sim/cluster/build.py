"""From a scenario with `plan` to the cluster that it runs on: names checked against each other."""

from collections.abc import Iterable, Sequence

from tidegate.api.modeldeployment import ClassLane
from tidegate.core.flowtypes import ModelKey
from tidegate.core.plan.types import Lane, LaneKey, Model
from tidegate.core.types import Node, Pool, Reservation
from tidegate.facts.classes import objectives
from tidegate.facts.pools import problem
from tidegate.sim.build import group_model, highest, key, shown, unknown
from tidegate.sim.cluster.fields import ModelSpec, PlanSpec, PoolSpec
from tidegate.sim.cluster.spec import ClusterSpec
from tidegate.sim.fleet import Setting
from tidegate.sim.scenario import Group, Scenario, ScenarioError


def cluster(scenario: Scenario, setting: Setting) -> ClusterSpec | None:
    """The cluster of a scenario; None where its replicas are fixed.

    Raises:
        ScenarioError: A pool, model or class that is not there; the message names the field.
    """
    if scenario.plan is None:
        return None
    groups = _groups(scenario)
    pools = [_pool(scenario, pool) for pool in scenario.plan.pools]
    specs = {key(m.name): (f"plan.models[{i}]", m) for i, m in enumerate(scenario.plan.models)}
    models = [
        _model(scenario, scenario.plan, model, groups[model], specs.get(model), setting) for model in groups
    ]
    for model, (field, _) in specs.items():
        if model not in groups:
            raise ScenarioError(
                f"{field}.name: replicas has no entry of {shown(model)}; give it one that says its gpus and"
                " engine, be it with count 0"
            )
    first = {model: mine[0] for model, mine in groups.items()}
    try:
        return ClusterSpec(
            pools=pools,
            models=models,
            delays=scenario.plan.delays(),
            engines={model: g.engine.config() for model, g in first.items() if g.engine},
            speeds={model: g.speed for model, g in first.items()},
        )
    except ValueError as error:
        raise ScenarioError(f"plan: {error}") from error


def problems(scenario: Scenario) -> list[str]:
    """What the controller would say is wrong with the pools: more is reserved than there is."""
    pools = [_pool(scenario, spec) for spec in scenario.plan.pools] if scenario.plan else []
    return [f"pool {pool.name}: {found[1]}" for pool in pools if (found := problem(pool))]


def _groups(scenario: Scenario) -> dict[ModelKey, list[Group]]:
    """Entries of replicas by model; those of one model are alike but for lane and count."""
    found: dict[ModelKey, list[Group]] = {}
    for index, group in enumerate(scenario.replicas):
        mine = found.setdefault(group_model(scenario, index), [])
        mine.append(group)
        if (group.gpus, group.speed, group.engine) != (mine[0].gpus, mine[0].speed, mine[0].engine):
            raise ScenarioError(
                f"replicas[{index}]: with plan all replicas of a model have the same gpus, speed and engine"
            )
    return found


def _pool(scenario: Scenario, spec: PoolSpec) -> Pool:
    nodes = [
        Node(f"{spec.name}-{index}-{number}", group.gpus, group.domain)
        for index, group in enumerate(spec.nodes)
        for number in range(group.count)
    ]
    for r in spec.reservations:
        if r.qos_class not in scenario.classes:
            raise unknown(
                f"plan.pools: reservation {r.name}: qosClass", r.qos_class, scenario.classes, "classes"
            )
    kept = [
        Reservation(r.name, r.qos_class, r.gpus_of(spec.capacity), None, r.max_lend, r.max_borrow)
        for r in spec.reservations
    ]
    return Pool(
        spec.name, tuple(nodes), tuple(kept), drain_timeout_s=spec.reclaim.drain_timeout.total_seconds()
    )


def _model(
    scenario: Scenario,
    plan: PlanSpec,
    model: ModelKey,
    groups: Sequence[Group],
    entry: tuple[str, ModelSpec] | None,
    setting: Setting,
) -> Model:
    field, spec = entry or ("plan.models", ModelSpec(name=shown(model)))
    pools = [p.name for p in plan.pools]
    if spec.pool is None and len(pools) > 1:
        raise ScenarioError(f"{field}: pool of {shown(model)} is required: there are {', '.join(pools)}")
    if spec.pool is not None and spec.pool not in pools:
        raise unknown(f"{field}.pool", spec.pool, pools, "plan.pools")
    counts: dict[str, int] = {}
    for group in groups:
        name = group.lane or highest(scenario)
        counts[name] = counts.get(name, 0) + group.count
    lanes = spec.classes or [ClassLane(qos_class=name) for name in _used(scenario, model, counts, setting)]
    names = [lane.qos_class for lane in lanes]
    for name in (*names, *spec.scaling.replicas):
        if name not in scenario.classes:
            raise unknown(f"{field}: class", name, scenario.classes, "classes")
    for name in (*counts, *spec.scaling.replicas):
        if name not in names:
            raise unknown(f"{field}: lane", name, names, f"the classes of {shown(model)}")
    scaling = spec.scaling
    to_zero = scaling.scale_to_zero_after
    return Model(
        *model,
        pool=spec.pool or pools[0],
        lanes=tuple(_lane(scenario, model, lane, groups[0].gpus, counts, scaling.replicas) for lane in lanes),
        max_replicas=spec.max_replicas,
        paused=scaling.paused,
        scale_down_delay_s=scaling.scale_down_delay.total_seconds(),
        scale_to_zero_after_s=to_zero.total_seconds() if to_zero else None,
    )


def _lane(
    scenario: Scenario,
    model: ModelKey,
    entry: ClassLane,
    gpus: int,
    counts: dict[str, int],
    pinned: dict[str, int],
) -> Lane:
    name = entry.qos_class
    base = scenario.classes[name].objectives
    return Lane(
        key=LaneKey(*model, name),
        gpus=gpus,
        min_replicas=entry.min_replicas,
        max_replicas=entry.max_replicas,
        pinned=pinned.get(name),
        replicas=counts.get(name, 0),
        objectives=objectives(base.overridden(entry.objectives)) if entry.objectives else None,
    )


def _used(scenario: Scenario, model: ModelKey, counts: Iterable[str], setting: Setting) -> list[str]:
    """Classes that replicas or streams of a model name, the highest first."""
    names = {*counts, *(s.qos_class for s in setting.streams if s.model == model)}
    return sorted(names, key=lambda name: (-scenario.classes[name].priority, name))
