"""What holds for every plan, whatever the pool, the lanes and their demand."""

import random
from collections import Counter
from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.plan_world import CLASSES, POLICY, World, lane, load, model
from tidegate.core import reasons
from tidegate.core.plan import plan
from tidegate.core.plan.types import Memory, Snapshot
from tidegate.core.quota import standings
from tidegate.core.types import Node, Pool, Reservation

SETTLES = 140
"""Steps until nothing moves: a replica that changes hands is calm for ten, drains, and starts elsewhere."""
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SIZES = st.sampled_from([1, 2, 4])
LOADS = st.builds(
    lambda replicas, queued: load(replicas, queued, queued * 1000.0),
    st.sampled_from([0.0, 0.4, 1.0, 2.5, 6.0]),
    st.sampled_from([0, 0, 1, 500]),
)


@st.composite
def worlds(draw):
    nodes = tuple(
        Node(f"n{i}", g) for i, g in enumerate(draw(st.lists(st.integers(1, 8), min_size=1, max_size=5)))
    )
    left = sum(n.gpus for n in nodes)
    kept = []
    for name in draw(st.permutations(sorted(CLASSES))):
        gpus = draw(st.integers(0, left))
        left -= gpus
        lend = draw(st.sampled_from([None, None, 0, 2]))
        kept.append(Reservation(name, name, gpus, max_lend=lend))
    models, demand = [], {}
    for name in draw(st.sampled_from(["a", "ab", "abc"])):
        size = draw(SIZES)
        lanes = []
        for qos in draw(st.lists(st.sampled_from(sorted(CLASSES)), min_size=1, unique=True)):
            low = draw(st.integers(0, 2))
            high = draw(st.one_of(st.none(), st.integers(low, 6)))
            pin = draw(st.sampled_from([None, None, None, 0, 1, 4]))
            lanes.append(lane(name, qos, size, min_replicas=low, max_replicas=high, pinned=pin))
            demand[lanes[-1].key] = draw(LOADS)
        models.append(model(name, *lanes))
    return World(Pool("p", nodes, tuple(kept)), tuple(models), demand)


def packs(nodes, replicas):
    """Whether these blocks fit; exact, since each size divides the next and the largest goes first."""
    free = [n.gpus for n in nodes]
    for size in sorted(replicas, reverse=True):
        at = next((i for i, f in enumerate(free) if f >= size), None)
        if at is None:
            return False
        free[at] -= size
    return True


@SETTINGS
@given(worlds())
def test_what_an_empty_pool_is_planned_for_fits_in_whole_blocks(world):
    made = plan(world.snapshot(), POLICY, Memory(), 0.0)
    sizes = [x.gpus for m in world.models for x in m.lanes for _ in range(made.lanes[x.key].replicas)]
    assert packs(world.pool.nodes, sizes)


@SETTINGS
@given(worlds())
def test_what_cannot_be_taken_back_leaves_others_reservations_alone(world):
    made = plan(world.snapshot(), POLICY, Memory(), 0.0)
    solid = Counter()
    for m in world.models:
        for x in m.lanes:
            qos = CLASSES[x.key.qos_class]
            count = made.lanes[x.key].replicas
            firm = {"Never": count, "AboveMinimum": min(count, x.min_replicas), "Always": 0}[qos.reclaim]
            solid[qos.name] += firm * x.gpus
    room = {r.qos_class: r.gpus for r in world.pool.reservations}
    unreserved = world.pool.capacity - sum(room.values())
    assert sum(max(used - room[q], 0) for q, used in solid.items()) <= unreserved


@SETTINGS
@given(worlds(), worlds(), st.booleans())
def test_it_converges_and_then_nothing_moves(world, other, forget):
    world.run(12)
    for key, demand in zip(sorted(world.demand), other.demand.values(), strict=False):
        world.demand[key] = demand
    world.forget = forget
    world.run(SETTLES)
    told, preempted = len(world.decisions), world.preempted
    world.run(10)
    assert len({tuple(sorted(step.items())) for step in world.history[-10:]}) == 1
    assert world.preempted == preempted
    assert world.pending() == []
    if not forget:
        assert len(world.decisions) == told
    used = Counter()
    for pod in world.pods:
        used[pod.node] += pod.gpus
    assert all(used[n.name] <= n.gpus for n in world.pool.nodes)


@SETTINGS
@given(worlds(), worlds(), st.integers(1, 6), st.booleans())
def test_from_any_state_nobody_waits_in_vain(world, other, steps, forget):
    """Also from the middle of a change: pins and demand move while pods are on their way."""
    world.run(steps)
    pins = [x.pinned for m in other.models for x in m.lanes]
    world.models = tuple(
        replace(m, lanes=tuple(replace(x, pinned=pins[i % len(pins)]) for i, x in enumerate(m.lanes)))
        for m in world.models
    )
    for key, demand in zip(sorted(world.demand), other.demand.values(), strict=False):
        world.demand[key] = demand
    world.run(2)
    world.forget = forget
    world.run(SETTLES)
    for _ in range(6):
        before = world.replicas_by_lane()
        world.step()
        assert (world.pending(), world.replicas_by_lane()) == ([], before)


@SETTINGS
@given(worlds())
def test_unmet_demand_of_a_higher_class_leaves_nothing_reclaimable_below_it(world):
    made = world.run(30)
    stands = standings(world.pods, world.pool.reservations, CLASSES)
    floors = {x.key: x.min_replicas for m in world.models for x in m.lanes}
    for short in made.unmet:
        if short.reason != reasons.NO_FREE_BLOCK:
            continue
        qos = CLASSES[short.lane.qos_class]
        # A floor yields to reservations only, not to demand beyond them.
        age = Counter()
        may_go = set()
        for pod in sorted(world.pods, key=lambda p: p.age_key):
            age[pod.lane] += 1
            if stands[pod.uid].borrowed and pod.priority < qos.priority and age[pod.lane] > floors[pod.lane]:
                may_go.add(pod.uid)
        for node in world.pool.nodes:
            stays = [p for p in world.pods if p.node == node.name and p.uid not in may_go]
            assert node.gpus - sum(p.gpus for p in stays) < short.gpus // short.replicas


@SETTINGS
@given(worlds(), st.integers(0, 5))
def test_applying_twice_changes_nothing(world, steps):
    for _ in range(steps):
        world.step()
    first = plan(world.snapshot(), POLICY, world.memory, world.now)
    world.apply(first.lanes)
    again = plan(world.snapshot(), POLICY, first.memory, world.now)
    assert {k: p.replicas for k, p in again.lanes.items()} == {k: p.replicas for k, p in first.lanes.items()}
    assert again.weights == first.weights
    assert again.decisions == ()


@SETTINGS
@given(worlds(), st.integers(0, 6), st.randoms(use_true_random=False))
def test_the_order_of_input_is_irrelevant(world, steps, rng: random.Random):
    for _ in range(steps):
        world.step()
    seen = world.snapshot()
    pods, models, keys = list(seen.pods), list(seen.models), list(seen.demand)
    for things in (pods, models, keys):
        rng.shuffle(things)
    nodes = list(seen.pools["p"].nodes)
    rng.shuffle(nodes)
    mixed = Snapshot(
        dict(reversed(seen.classes.items())),
        {"p": replace(seen.pools["p"], nodes=tuple(nodes))},
        tuple(replace(m, lanes=tuple(rng.sample(m.lanes, len(m.lanes)))) for m in models),
        tuple(pods),
        {k: seen.demand[k] for k in keys},
    )
    assert plan(mixed, POLICY, world.memory, world.now) == plan(seen, POLICY, world.memory, world.now)


@SETTINGS
@given(worlds(), st.integers(0, 10))
def test_weights_sum_to_a_hundred_over_lanes_that_are_ready(world, steps):
    for _ in range(steps):
        made = world.step()
        seen = world.snapshot()
        made = plan(seen, POLICY, world.memory, world.now)
        ready = {x.key for m in seen.models for x in m.lanes if x.ready}
        for key, shares in made.weights.items():
            assert sum(w.weight for w in shares) in {0, 100}
            assert all(w.weight > 0 for w in shares)
            assert {key._replace(qos_class=w.lane) for w in shares} <= ready
            assert bool(shares) or key not in ready


@SETTINGS
@given(worlds(), st.integers(0, 8))
def test_missing_figures_take_nothing_away(world, steps):
    for _ in range(steps):
        world.step()
    seen = replace(world.snapshot(), demand={})
    made = plan(seen, POLICY, world.memory, world.now)
    running = Counter(p.lane for p in world.pods if p.node and not p.terminating)
    for m in seen.models:
        for x in m.lanes:
            assert made.lanes[x.key].replicas >= min(x.replicas, running[x.key])
