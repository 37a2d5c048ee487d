"""One pool as placement decisions see it: filter and preempt both decide on this.

The view follows events at little cost: adding or removing a pod touches its node and the younger
pods of its class. `tidegate.core.quota` defines who borrows; the view keeps that answer up to date.
"""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Final

from tidegate.core.place.cover import Need, Shape, blocks
from tidegate.core.quota import Ground, Standing, spare_pods, standing
from tidegate.core.types import Node, Pod, Pool, QoSClass, Reclaim, Reservation

AgeKey = tuple[float, str]

ASSUME_S: Final = 30.0
"""How long an answered placement counts unseen. Binding takes milliseconds; kube-scheduler's own
assumption ends with the binding, whose API calls time out after this long."""
GRANT_SLACK_S: Final = 30.0
"""Beyond the pool's drain timeout: deleting, killing and a last try of the pod's back-off (10 s)."""


@dataclass(frozen=True, slots=True)
class Grant:
    """A node that was promised to a pod, with the pods that are given up for it."""

    pod: Pod
    node: str
    victims: tuple[str, ...]
    until_s: float


@dataclass(frozen=True, slots=True)
class Assumed:
    """A placement that was answered and not seen yet. After `until_s` it is taken as not happened."""

    node: str
    until_s: float


@dataclass(frozen=True, slots=True)
class After:
    """What would change if a pod stood in the pool.

    `claim` is a reservation that covers it and has room for it now; a pod that is older than others
    of its class may take their place in a full one (that is its `standing`), but that asks nothing
    back from anybody. `unmet` is GPUs by reservation; `flips` are changes of what nodes could
    give back, as (node, priority, GPUs), since those whose place it takes may borrow from then on.
    """

    standing: Standing
    unmet: Mapping[str, int]
    claim: str | None = None
    flips: tuple[tuple[str, int, int], ...] = ()

    def borrows(self, gpus: int) -> int:
        """GPUs by which the borrowing of the pod's class grows, when it asks for `gpus`."""
        return (gpus if self.standing.borrowed else 0) + sum(change for _, _, change in self.flips)


@dataclass(slots=True)
class _Book:
    """The pods of one class, oldest first, with the room left in its reservations."""

    qos: QoSClass
    reservations: tuple[Reservation, ...]
    keys: list[AgeKey] = field(default_factory=list)
    pods: list[Pod] = field(default_factory=list)
    standing: dict[str, Standing] = field(default_factory=dict)
    room: dict[str, int] = field(default_factory=dict)
    lanes: Counter[tuple[str, str | None, str | None]] = field(default_factory=Counter)

    def replay(self, start: int, tail: Iterable[Pod]) -> tuple[dict[str, Standing], dict[str, int]]:
        """Standings of `tail` if it stood from index `start` on, and the room then left."""
        room, lanes = dict(self.room), Counter[tuple[str, str | None, str | None]]()
        for pod in self.pods[start:]:
            home = self.standing[pod.uid].reservation
            lanes[pod.lane] -= 1
            if home is not None:
                room[home] += pod.gpus
        found: dict[str, Standing] = {}
        for pod in tail:
            home = next(
                (
                    r.name
                    for r in self.reservations
                    if r.covers(self.qos.name, pod.namespace) and room[r.name] >= pod.gpus
                ),
                None,
            )
            if home is not None:
                room[home] -= pod.gpus
            lanes[pod.lane] += 1
            above = self.lanes[pod.lane] + lanes[pod.lane] > pod.lane_minimum
            can_go = self.qos.reclaim is Reclaim.ALWAYS or (
                self.qos.reclaim is Reclaim.ABOVE_MINIMUM and above
            )
            found[pod.uid] = standing(home, can_go)
        return found, room


class View:
    """What stands in a pool, what was promised in it, and what its reservations still wait for.

    A pod that is going (or was given up) counts for no reservation, and its GPUs count as open for
    coverage, since they come free by themselves; they are not free to be placed on until it is gone.
    `place`, `drop`, `assume`, `grant` and `expire` are the only ways to change a view.
    """

    def __init__(
        self,
        pool: Pool,
        classes: Mapping[str, QoSClass],
        block_sizes: Mapping[str, Iterable[int]] | None = None,
    ) -> None:
        """An empty pool. `block_sizes` are the GPUs a replica by reservation; without, one each."""
        self.pool, self.classes = pool, classes
        self.nodes: dict[str, Node] = {n.name: n for n in pool.nodes}
        self.pods: dict[str, Pod] = {}
        self.on_node: defaultdict[str, set[str]] = defaultdict(set)
        self.grants: dict[str, Grant] = {}
        self.assumed: dict[str, Assumed] = {}
        self._sizes = {name: tuple(sizes) for name, sizes in (block_sizes or {}).items()}
        self._held: Counter[str] = Counter()
        self._going: Counter[str] = Counter()
        self._tiers: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self._borrowed: Counter[tuple[str, str]] = Counter()
        self._doomed: Counter[str] = Counter()
        self._shapes: Counter[Shape] = Counter()
        self._shape: dict[str, Shape] = {}
        self._lanes: defaultdict[tuple[str, str | None, str | None], Counter[str]] = defaultdict(Counter)
        self.empties: set[str] = {n.name for n in pool.nodes}
        """Nodes of which no GPU is held."""
        self._books: dict[str, _Book] = {}
        self._unreserved = pool.capacity - sum(r.gpus for r in pool.reservations)
        self._spare: frozenset[str] | None = None
        for node in pool.nodes:
            self._reshape(node.name)

    @classmethod
    def build(
        cls,
        pool: Pool,
        classes: Mapping[str, QoSClass],
        pods: Iterable[Pod],
        block_sizes: Mapping[str, Iterable[int]] | None = None,
    ) -> "View":
        """A view with these pods; those that are bound to no node of the pool are left out."""
        view = cls(pool, classes, block_sizes)
        for pod in pods:
            view.place(pod)
        return view

    # -- changes

    def place(self, pod: Pod) -> None:
        """A pod was seen bound (or changed). It ends what was assumed for it."""
        self.drop(pod.uid)
        if pod.node in self.nodes:
            self._enter(pod)

    def drop(self, uid: str) -> None:
        """A pod is gone, with all that was assumed for it or granted to it."""
        self.assumed.pop(uid, None)
        self._leave(uid)
        grant = self.grants.pop(uid, None)
        for victim in grant.victims if grant else ():
            self._doom(victim, -1)

    def assume(self, pod: Pod, node: str, until_s: float) -> None:
        """A placement was answered: it counts until it is seen, or until `until_s`."""
        self.drop(pod.uid)
        self.assumed[pod.uid] = Assumed(node, until_s)
        self._enter(replace(pod, node=node, started_s=None))

    def grant(self, grant: Grant) -> None:
        """A node was promised: its GPUs are held, and its victims count as going from now on."""
        self.drop(grant.pod.uid)
        self.grants[grant.pod.uid] = grant
        for victim in grant.victims:
            self._doom(victim, 1)
        self._enter(replace(grant.pod, node=grant.node, started_s=None))

    def expire(self, now: float) -> list[str]:
        """Forget what was assumed or granted and did not come; returns the UIDs, sorted."""
        late = [uid for uid, a in self.assumed.items() if a.until_s <= now]
        late += [uid for uid, g in self.grants.items() if g.until_s <= now]
        for uid in late:
            self.drop(uid)
        return sorted(late)

    @contextmanager
    def without(self, uid: str) -> Iterator[None]:
        """The view as if one pod had been promised nothing; put back at the end."""
        assumed, grant, pod = self.assumed.get(uid), self.grants.get(uid), self.pods.get(uid)
        if assumed is None and grant is None:
            yield
            return
        self.drop(uid)
        try:
            yield
        finally:
            if grant is not None:
                self.grant(grant)
            elif assumed is not None and pod is not None:
                self.assume(pod, assumed.node, assumed.until_s)

    # -- questions

    def open(self, node: str) -> int:
        """GPUs of a node that nobody holds; those of pods that are going included."""
        return max(0, self.nodes[node].gpus - self._held[node])

    def free(self, node: str) -> int:
        """GPUs of a node that are free at this moment."""
        return max(0, self.nodes[node].gpus - self._held[node] - self._going[node])

    def shape(self, node: str) -> Shape:
        """What matters about a node to coverage."""
        return self._shape[node]

    def by_shape(self, nodes: Iterable[str]) -> tuple[dict[Shape, list[str]], list[str]]:
        """Nodes by their shape, and those that are not in the pool."""
        found: dict[Shape, list[str]] = {}
        unknown = []
        for node in nodes:
            shape = self._shape.get(node)
            if shape is None:
                unknown.append(node)
            else:
                found.setdefault(shape, []).append(node)
        return found, unknown

    def lane_nodes(self, pod: Pod) -> Collection[str]:
        """Nodes with a replica of the pod's lane, of its model that is."""
        return self._lanes[pod.lane].keys() if pod.model and pod.lane in self._lanes else ()

    @property
    def shapes(self) -> Mapping[Shape, int]:
        """How many nodes there are of each shape."""
        return self._shapes

    def going(self, uid: str) -> bool:
        """Whether a pod is on its way out, or was given up for somebody."""
        return self.pods[uid].terminating or bool(self._doomed[uid])

    def standing(self, uid: str) -> Standing:
        """Where a pod stands. What is going, or foreign, stands nowhere and is not reclaimable."""
        book = self._books.get(self.pods[uid].qos_class or "")
        found = book.standing.get(uid) if book else None
        if found is None:
            return standing(None, reclaimable=False)
        return replace(found, ground=Ground.SPARE) if uid in self._on_spare() else found

    def borrowed(self, qos_class: str, namespace: str) -> int:
        """GPUs that a class borrows for a namespace."""
        return self._borrowed[qos_class, namespace]

    def borrow_limit(self, pod: Pod) -> tuple[int, int] | None:
        """(GPUs borrowed under the reservations that cover a pod, what they may borrow), or None."""
        covering = [r for r in self.pool.reservations if r.covers(pod.qos_class or "", pod.namespace)]
        limits = [r.max_borrow for r in covering if r.max_borrow is not None]
        if not covering or len(limits) < len(covering):
            return None
        used = sum(
            gpus
            for (qos, namespace), gpus in self._borrowed.items()
            if any(r.covers(qos, namespace) for r in covering)
        )
        return used, sum(limits)

    def unmet(self) -> dict[str, int]:
        """GPUs by reservation that its class does not stand on yet."""
        found = {r.name: r.gpus for r in self.pool.reservations}
        for book in self._books.values():
            found.update(book.room)
        return found

    def needs(self, unmet: Mapping[str, int], *, kept: bool = False) -> list[Need]:
        """What reservations wait for, in blocks; with `kept`, what `maxLend` forbids to lend of it."""
        found = []
        for r in self.pool.reservations:
            gpus, qos = unmet[r.name], self.classes.get(r.qos_class)
            if kept:
                gpus = max(0, gpus - r.max_lend) if r.max_lend is not None else 0
            if gpus > 0 and qos is not None:
                found.append(Need(r.name, qos.priority, blocks(gpus, self._sizes.get(r.name, (1,)))))
        return found

    def after(self, pod: Pod) -> After:
        """What would change if this pod stood in the pool, whichever its node."""
        book = self._book(pod.qos_class)
        unmet = self.unmet()
        if book is None:
            return After(standing(None, reclaimable=False), unmet)
        at = bisect_left(book.keys, pod.age_key)
        tail = book.pods[at:]
        found, room = book.replay(at, [pod, *tail])
        flips = tuple(
            (p.node, book.qos.priority, p.gpus * (found[p.uid].borrowed - book.standing[p.uid].borrowed))
            for p in tail
            if p.node is not None and found[p.uid].borrowed != book.standing[p.uid].borrowed
        )
        claim = next(
            (
                r.name
                for r in book.reservations
                if r.covers(book.qos.name, pod.namespace) and book.room[r.name] >= pod.gpus
            ),
            None,
        )
        return After(found[pod.uid], unmet | room, claim, flips)

    # -- bookkeeping

    def _on_spare(self) -> frozenset[str]:
        """Borrowed pods on spare GPUs. Asked for by preemption only, and kept until a pod changes."""
        if self._spare is None:
            books = sorted(self._books.values(), key=lambda b: (-b.qos.priority, b.qos.name))
            borrowed = (p for b in books for p in b.pods if b.standing[p.uid].borrowed)
            self._spare = spare_pods(borrowed, self._unreserved)
        return self._spare

    def _book(self, qos_class: str | None) -> _Book | None:
        qos = self.classes.get(qos_class or "")
        if qos is None:
            return None
        if qos.name not in self._books:
            own = tuple(r for r in self.pool.reservations if r.qos_class == qos.name)
            self._books[qos.name] = _Book(qos, own, room={r.name: r.gpus for r in own})
        return self._books[qos.name]

    def _enter(self, pod: Pod) -> None:
        self.pods[pod.uid] = pod
        self.on_node[pod.node or ""].add(pod.uid)
        self._lanes[pod.lane][pod.node or ""] += 1
        self._count(pod, 1)

    def _leave(self, uid: str) -> None:
        pod = self.pods.get(uid)
        if pod is not None:
            self._count(pod, -1)
            del self.pods[uid]
            self.on_node[pod.node or ""].discard(uid)
            lane = self._lanes[pod.lane]
            lane[pod.node or ""] -= 1
            if not lane[pod.node or ""]:
                del lane[pod.node or ""]

    def _doom(self, uid: str, step: int) -> None:
        """Count a pod as going (or no longer), whether it is there or not."""
        pod = self.pods.get(uid)
        if pod is not None:
            self._count(pod, -1)
        self._doomed[uid] += step
        if not self._doomed[uid]:
            del self._doomed[uid]
        if pod is not None:
            self._count(pod, 1)

    def _count(self, pod: Pod, sign: int) -> None:
        node = pod.node or ""
        if pod.terminating or self._doomed[pod.uid]:
            self._going[node] += sign * pod.gpus
            return
        self._held[node] += sign * pod.gpus
        if self._held[node]:
            self.empties.discard(node)
        elif node in self.nodes:
            self.empties.add(node)
        self._spare = None
        book = self._book(pod.qos_class)
        if book is None:
            self._unreserved -= sign * pod.gpus
        touched = {node}
        if book is not None:
            touched |= self._rebook(book, pod, entering=sign > 0)
        for name in touched:
            self._reshape(name)

    def _rebook(self, book: _Book, pod: Pod, *, entering: bool) -> set[str]:
        """Enter a pod into its class's book or strike it out; returns nodes whose standing changed."""
        at = bisect_left(book.keys, pod.age_key)
        tail = book.pods[at:] if entering else book.pods[at + 1 :]
        found, room = book.replay(at, [pod, *tail] if entering else tail)
        touched = set()
        for other in tail:
            touched |= self._restand(book, other, found[other.uid])
        if entering:
            book.keys.insert(at, pod.age_key)
            book.pods.insert(at, pod)
            touched |= self._restand(book, pod, found[pod.uid])
        else:
            touched |= self._restand(book, pod, None)
            del book.keys[at], book.pods[at]
        book.lanes[pod.lane] += 1 if entering else -1
        book.room = room
        return touched

    def _restand(self, book: _Book, pod: Pod, new: Standing | None) -> set[str]:
        old = book.standing.pop(pod.uid, None)
        if new is not None:
            book.standing[pod.uid] = new
        self._unreserved -= pod.gpus * (_unreserved(new) - _unreserved(old))
        change = int(bool(new and new.borrowed)) - int(bool(old and old.borrowed))
        if not change or pod.node is None:
            return set()
        self._tiers[pod.node][book.qos.priority] += change * pod.gpus
        self._borrowed[book.qos.name, pod.namespace] += change * pod.gpus
        return {pod.node}

    def _reshape(self, name: str) -> None:
        old = self._shape.get(name)
        tiers = tuple(sorted((p, g) for p, g in self._tiers[name].items() if g))
        new = (self.open(name), tiers)
        if new == old:
            return
        if old is not None:
            self._shapes[old] -= 1
            if not self._shapes[old]:
                del self._shapes[old]
        self._shape[name] = new
        self._shapes[new] += 1


def _unreserved(stand: Standing | None) -> bool:
    """Whether a pod uses up unreserved GPUs: it stands beyond its reservation and may not be taken."""
    return stand is not None and stand.reservation is None and not stand.borrowed
