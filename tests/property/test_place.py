"""Invariants of placement over random pools, and a closed loop of scheduler and extender."""

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.core.place import Grant, View, feasible, shortfalls, victims
from tidegate.core.quota import Ground, standings
from tidegate.core.types import Node, Pod, Pool, QoSClass, Reclaim, Reservation

CLASSES = {
    "gold": QoSClass("gold", 1000),
    "mid": QoSClass("mid", 500, Reclaim.ABOVE_MINIMUM),
    "bulk": QoSClass("bulk", 0, Reclaim.ALWAYS),
}
SIZES = {"gold": 2, "mid": 1, "bulk": 1}


@st.composite
def pools(draw: st.DrawFn) -> Pool:
    nodes = tuple(
        Node(f"n{i}", g)
        for i, g in enumerate(draw(st.lists(st.sampled_from([2, 4]), min_size=1, max_size=4)))
    )
    left = sum(n.gpus for n in nodes)
    reservations = []
    for name in ("gold", "mid", "bulk"):
        gpus = draw(st.integers(0, max(0, left)))
        left -= gpus
        reservations.append(
            Reservation(
                f"r-{name}",
                name,
                gpus,
                max_lend=draw(st.sampled_from([None, None, 0, 2])),
                max_borrow=draw(st.sampled_from([None, None, 2])),
            )
        )
    return Pool("p", nodes, tuple(reservations))


@st.composite
def arrivals(draw: st.DrawFn) -> list[Pod]:
    kinds = draw(st.lists(st.sampled_from(["gold", "mid", "bulk", "bulk"]), max_size=24))
    return [
        Pod(
            f"u{i:03}",
            f"pod-{i}",
            "ns",
            SIZES[k],
            created_s=float(draw(st.integers(0, 5))),
            qos_class=k,
            model=draw(st.sampled_from(["a", "b"])),
            priority=CLASSES[k].priority,
            lane_minimum=1,
        )
        for i, k in enumerate(kinds)
    ]


def _view(pool: Pool) -> View:
    return View(pool, CLASSES, {"r-gold": [2]})


def _short(view: View) -> dict[str, int]:
    return shortfalls(view.shapes, view.needs(view.unmet()))


@settings(max_examples=150, deadline=None)
@given(pools(), arrivals(), st.randoms(use_true_random=False))
def test_capacity_is_never_exceeded_and_nobody_elses_reservation_is_eaten(
    pool: Pool, pods: list[Pod], rng: random.Random
) -> None:
    view = _view(pool)
    for pod in pods:
        candidates = [n.name for n in pool.nodes if view.free(n.name) >= pod.gpus]
        before, claim = _short(view), view.after(pod).claim
        answer = feasible(pod, view, candidates, 0.0)
        refused = set(answer.failed) | set(answer.unresolvable)
        assert not refused & set(answer.nodes)
        assert answer.nodes or refused == set(candidates), "a refusal explains every node"
        if answer.nodes:
            view.place(replace(pod, node=rng.choice(answer.nodes), started_s=0.0))
            for name, short in _short(view).items():
                r = next(r for r in pool.reservations if r.name == name)
                owner = CLASSES[r.qos_class].priority
                if r.qos_class == pod.qos_class:
                    continue
                if claim is None or owner > CLASSES[pod.qos_class or ""].priority:
                    assert short <= before.get(name, 0)
        elif candidates and rng.random() < 0.3 and view.pods:
            view.drop(rng.choice(sorted(view.pods)))
    for n in pool.nodes:
        assert sum(view.pods[u].gpus for u in view.on_node[n.name]) <= n.gpus


@settings(max_examples=150, deadline=None)
@given(pools(), arrivals(), st.randoms(use_true_random=False))
def test_the_view_follows_events_to_what_it_would_be_if_built_anew(
    pool: Pool, pods: list[Pod], rng: random.Random
) -> None:
    view, placed = _view(pool), {}
    for pod in pods:
        step = rng.random()
        if placed and step < 0.2:
            uid = rng.choice(sorted(placed))
            del placed[uid]
            view.drop(uid)
        elif placed and step < 0.3:
            uid = rng.choice(sorted(placed))
            placed[uid] = replace(placed[uid], terminating=True)
            view.place(placed[uid])
        where = replace(pod, node=rng.choice(pool.nodes).name, started_s=0.0)
        placed[pod.uid] = where
        view.place(where)
    again = View.build(pool, CLASSES, sorted(placed.values(), key=lambda p: p.name), {"r-gold": [2]})
    assert view.unmet() == again.unmet()
    assert dict(view.shapes) == dict(again.shapes)
    staying = [p for p in placed.values() if not p.terminating]
    expected = standings(staying, pool.reservations, CLASSES, pool.capacity)
    assert {p.uid: view.standing(p.uid) for p in staying} == expected


@settings(max_examples=100, deadline=None)
@given(pools(), arrivals(), st.randoms(use_true_random=False))
def test_order_of_candidates_does_not_matter_and_asking_changes_nothing(
    pool: Pool, pods: list[Pod], rng: random.Random
) -> None:
    view = _view(pool)
    for pod in pods:
        names = [n.name for n in pool.nodes if view.free(n.name) >= pod.gpus]
        shapes, unmet = dict(view.shapes), view.unmet()
        first = feasible(pod, view, names, 0.0)
        shuffled = rng.sample(names, len(names))
        assert feasible(pod, view, shuffled, 0.0) == first
        assert (dict(view.shapes), view.unmet()) == (shapes, unmet)
        if first.nodes:
            view.assume(pod, first.nodes[0], 60.0)
            within = feasible(pod, view, names, 1.0)
            assert within.nodes[:1] == first.nodes[:1]


class Loop:
    """kube-scheduler and the API server in miniature, with a watch that lags behind.

    The extender's view hears of binds and deletions only `lag` steps late, which is how the seen
    hazard came about: preempt granted what filter then refused.
    """

    def __init__(self, pool: Pool, lag: int, rng: random.Random) -> None:
        self.pool, self.lag, self.rng = pool, lag, rng
        self.view = _view(pool)
        self.bound: dict[str, Pod] = {}
        self.events: list[tuple[int, str, Pod]] = []
        self.step = self.evictions = self.attempts = 0

    def used(self, node: str) -> int:
        return sum(p.gpus for p in self.bound.values() if p.node == node)

    def nominated(self, node: str, pod: Pod) -> int:
        """GPUs that kube-scheduler keeps for pods at least as important that preempted there."""
        grants = [g for u, g in self.view.grants.items() if u not in self.bound and u != pod.uid]
        return sum(g.pod.gpus for g in grants if g.node == node and g.pod.priority >= pod.priority)

    def hear(self) -> None:
        while self.events and self.events[0][0] + self.lag <= self.step:
            _, kind, pod = self.events.pop(0)
            if kind == "gone":
                self.view.drop(pod.uid)
            else:
                self.view.place(pod)

    def bind(self, pod: Pod, node: str) -> None:
        assert self.used(node) + pod.gpus <= next(n.gpus for n in self.pool.nodes if n.name == node)
        self.bound[pod.uid] = replace(pod, node=node, started_s=0.0)
        self.events.append((self.step, "bound", self.bound[pod.uid]))

    def attempt(self, pod: Pod) -> bool:
        """One scheduling cycle; whether the pod was bound."""
        self.attempts += 1
        held = {n.name: self.used(n.name) + self.nominated(n.name, pod) for n in self.pool.nodes}
        fits = [n.name for n in self.pool.nodes if held[n.name] + pod.gpus <= n.gpus]
        answer = feasible(pod, self.view, fits, float(self.step), limit=1)
        if answer.nodes:
            if pod.uid not in self.view.grants or self.view.grants[pod.uid].node != answer.nodes[0]:
                self.view.assume(pod, answer.nodes[0], self.step + 1000.0)
            self.bind(pod, answer.nodes[0])
            return True
        proposed = {}
        for n in self.pool.nodes:
            lower = [p for p in self.bound.values() if p.node == n.name and p.priority < pod.priority]
            self.rng.shuffle(lower)
            free, chosen = n.gpus - held[n.name], []
            for p in lower:
                if free >= pod.gpus:
                    break
                free, chosen = free + p.gpus, [*chosen, p.uid]
            if chosen and free >= pod.gpus:
                proposed[n.name] = chosen
        result = victims(pod, self.view, proposed, float(self.step))
        for node, uids in result.nodes.items():
            if pod.uid not in self.view.grants:
                self.view.grant(Grant(pod, node, uids, self.step + 1000.0))
            for uid in uids:
                gone = self.bound.pop(uid, None)
                if gone is not None:
                    self.evictions += 1
                    self.events.append((self.step, "gone", gone))
        return False


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 12), st.integers(0, 2**32))
def test_a_wave_of_claims_evicts_once_for_each_and_binds_all(
    nodes: int, reserved_nodes: int, lag: int, seed: int
) -> None:
    rng = random.Random(seed)
    reserved = 4 * min(reserved_nodes, nodes)
    pool = Pool(
        "p", tuple(Node(f"n{i}", 4) for i in range(nodes)), (Reservation("r-gold", "gold", reserved),)
    )
    loop = Loop(pool, lag, rng)
    backlog = [
        Pod(f"b{i:03}", f"b{i}", "ns", 1, float(i), "bulk", "a", priority=0) for i in range(nodes * 4 + 8)
    ]
    waiting = [p for p in backlog if not loop.attempt(p)]
    golds = [
        Pod(f"g{i:03}", f"g{i}", "ns", 2, 100.0 + i, "gold", "a", priority=1000)
        for i in range(reserved // 2 + 3)
    ]
    queue = golds + waiting
    for loop.step in range(1, 120):
        loop.hear()
        rng.shuffle(queue)
        queue.sort(key=lambda p: -p.priority)
        queue = [p for p in queue if not loop.attempt(p)]
    bound_gold = [p for p in loop.bound.values() if p.qos_class == "gold"]
    assert len(bound_gold) == reserved // 2, "the reservation is filled, and nothing beyond it preempts"
    assert loop.evictions <= reserved, "a claim of two GPUs costs two pods, once"


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 2]),
    st.lists(st.sampled_from([2, 4]), min_size=1, max_size=4),
    st.data(),
    st.randoms(use_true_random=False),
)
def test_who_stands_on_spare_gpus_stays_when_every_reservation_is_asked_back(
    block: int, sizes: list[int], data: st.DataObject, rng: random.Random
) -> None:
    nodes = tuple(Node(f"n{i}", g) for i, g in enumerate(sizes))
    whole = sum(sizes) // block
    gold = data.draw(st.integers(0, whole), "blocks reserved for gold")
    mid = data.draw(st.integers(0, whole - gold), "blocks reserved for mid")
    reservations = (Reservation("r-gold", "gold", gold * block), Reservation("r-mid", "mid", mid * block))
    loop = Loop(Pool("p", nodes, reservations), 0, rng)
    loop.view = View(loop.pool, CLASSES, {"r-gold": [block], "r-mid": [block]})

    def arrive(kind: str, at: int) -> Pod:
        name = f"{kind}-{at}"
        return Pod(name, name, "ns", block, float(at), kind, "a", priority=CLASSES[kind].priority)

    early = data.draw(st.lists(st.sampled_from(["gold", "mid", "bulk", "bulk"]), max_size=20), "who is there")
    waiting = [arrive(kind, at) for at, kind in enumerate([*early, *["bulk"] * whole])]
    for _ in range(3):  # who preempted is bound when it is tried again
        waiting = [p for p in waiting if not loop.attempt(p)]
        loop.hear()
    claims = [arrive("gold", 100 + i) for i in range(gold)] + [arrive("mid", 200 + i) for i in range(mid)]
    rng.shuffle(claims)
    safe = {u for u in loop.bound if loop.view.standing(u).ground is Ground.SPARE}
    for loop.step in range(1, 30):
        claims = [p for p in claims if not loop.attempt(p)]
        loop.hear()
        assert safe <= loop.bound.keys()
    assert loop.view.unmet() == {"r-gold": 0, "r-mid": 0}
