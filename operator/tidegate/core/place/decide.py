"""What both decisions share: their answers, and what a placement would cost the others."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from tidegate.core import reasons
from tidegate.core.place.cover import Shape, shortfalls
from tidegate.core.place.view import After, View
from tidegate.core.types import Pod


@dataclass(frozen=True, slots=True)
class Why:
    """A reason from the catalogue, and a message with its figures."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Feasible:
    """Nodes that a pod may be placed on, best first, and why not on the others.

    `unresolvable` are those where giving pods up would not help either. `restricted` is False when
    the pool only observes: then every node passes and the order means nothing.
    """

    nodes: tuple[str, ...]
    failed: Mapping[str, Why] = field(default_factory=dict)
    unresolvable: Mapping[str, Why] = field(default_factory=dict)
    restricted: bool = True


@dataclass(frozen=True, slots=True)
class Preemption:
    """The node to preempt on with the pods to give up (at most one where the pool enforces).

    `retry_s` is when asking again may have another answer, where time alone decides that.
    """

    nodes: Mapping[str, tuple[str, ...]]
    why: Why
    retry_s: float | None = None
    restricted: bool = True


class Cost(IntEnum):
    """What a placement would do to the reservations of others."""

    NOTHING = 0
    BELOW = 1
    """Only what its own reservation comes before: lower classes, or GPUs that are kept from lending."""
    FORBIDDEN = 2


class Costs:
    """The cost of placing one pod, by the shape of the node. Computed once a shape."""

    def __init__(self, pod: Pod, view: View, after: After) -> None:
        self._pod, self._view, self._after = pod, view, after
        qos = view.classes.get(pod.qos_class or "")
        self._priority = qos.priority if qos else 0
        before = view.unmet()
        self._before = shortfalls(view.shapes, view.needs(before))
        self._kept_before = shortfalls(view.shapes, view.needs(before, kept=True), reclaim=False)
        self._needs = view.needs(after.unmet)
        self._kept = view.needs(after.unmet, kept=True)
        self._others = {
            r.name: view.classes[r.qos_class].priority
            for r in view.pool.reservations
            if r.qos_class in view.classes and not r.covers(pod.qos_class or "", pod.namespace)
        }
        self._known: dict[tuple[Shape, tuple[tuple[int, int], ...], bool], tuple[Cost, Why]] = {}

    def on(self, node: str, given_up: Mapping[int, int] | None = None) -> tuple[Cost, Why]:
        """Cost on a node, after GPUs (by priority of their class) were given up there for it."""
        lost = tuple(sorted((given_up or {}).items()))
        flipped = any(name == node for name, _, _ in self._after.flips)
        key = (self._view.shape(node), lost, flipped)
        if flipped or key not in self._known:
            self._known[key] = self._judge(node, dict(lost))
        return self._known[key]

    def _judge(self, node: str, lost: Mapping[int, int]) -> tuple[Cost, Why]:
        fits = Why(reasons.RESERVATIONS_FIT, "no reservation loses anything by it")
        if not self._needs:
            return Cost.NOTHING, fits
        shapes = self._shapes_with(node, lost)
        short = shortfalls(shapes, self._needs)
        worst = (Cost.NOTHING, fits)
        for name, priority in self._others.items():
            grown = short.get(name, 0) - self._before.get(name, 0)
            if grown > 0:
                below = self._after.claim is not None and priority < self._priority
                worst = max(
                    worst,
                    (Cost.BELOW if below else Cost.FORBIDDEN, self._lacks(name, grown)),
                    key=lambda w: w[0],
                )
        if worst[0] is Cost.NOTHING and self._kept:
            open_only = shortfalls(shapes, self._kept, reclaim=False)
            for name in self._others:
                grown = open_only.get(name, 0) - self._kept_before.get(name, 0)
                if grown > 0:
                    own = self._after.claim is not None
                    return Cost.BELOW if own else Cost.FORBIDDEN, self._keeps(name)
        return worst

    def _shapes_with(self, node: str, lost: Mapping[int, int]) -> dict[Shape, int]:
        shapes = dict(self._view.shapes)
        changed: dict[str, tuple[int, dict[int, int]]] = {}

        def lift(name: str) -> tuple[int, dict[int, int]]:
            if name not in changed:
                shape = self._view.shape(name)
                shapes[shape] -= 1
                if not shapes[shape]:
                    del shapes[shape]
                changed[name] = (shape[0], dict(shape[1]))
            return changed[name]

        for name, priority, gpus in self._after.flips:
            if name in self._view.nodes:
                tiers = lift(name)[1]
                tiers[priority] = tiers.get(priority, 0) + gpus
        free, tiers = lift(node)
        for priority, gpus in lost.items():
            tiers[priority] = tiers.get(priority, 0) - gpus
            free += gpus
        if self._after.standing.borrowed:
            tiers[self._priority] = tiers.get(self._priority, 0) + self._pod.gpus
        changed[node] = (max(0, free - self._pod.gpus), tiers)
        for free, tiers in changed.values():
            shape = (free, tuple(sorted((p, g) for p, g in tiers.items() if g > 0)))
            shapes[shape] = shapes.get(shape, 0) + 1
        return shapes

    def _lacks(self, name: str, grown: int) -> Why:
        r = next(r for r in self._view.pool.reservations if r.name == name)
        return Why(
            reasons.RESERVED_FOR_OTHERS,
            f"{_asks(self._pod)}, but class {r.qos_class} has {r.gpus} GPUs reserved ({name}),"
            f" {self._after.unmet[name]} of them not in use yet, and {grown} could not be given back to it",
        )

    def _keeps(self, name: str) -> Why:
        r = next(r for r in self._view.pool.reservations if r.name == name)
        return Why(
            reasons.RESERVED_FOR_OTHERS,
            f"{_asks(self._pod)}, but class {r.qos_class} has {r.gpus} GPUs reserved ({name}) and lends"
            f" at most {r.max_lend} of them (maxLend)",
        )


def _asks(pod: Pod) -> str:
    return f"class {pod.qos_class} asks for {pod.gpus} GPU{'s' if pod.gpus != 1 else ''}"
