"""A lane in a loop with a ReplicaSet: whatever is wanted when, nothing that runs is cut off."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.core.plan.drain import Replica, drain
from tidegate.core.quota import Ground

STEPS = st.lists(
    st.tuples(
        st.integers(0, 6),  # replicas that are wanted
        st.lists(st.integers(0, 5), max_size=3),  # who gets a request
        st.lists(st.integers(0, 5), max_size=3),  # whose request ends
        st.lists(st.integers(0, 5), max_size=2),  # who becomes ready
    ),
    max_size=40,
)


class Lane:
    """Pods as a ReplicaSet keeps them: what is not ready goes first, then the cheapest."""

    def __init__(self) -> None:
        self.pods: dict[str, Replica] = {}
        self.asked = self.made = 0
        self.now = 0.0

    def reconcile(self) -> None:
        while len(self.pods) < self.asked:
            self.made += 1
            name = f"p{self.made:03}"
            ground = list(Ground)[self.made % 3]
            self.pods[name] = Replica(name, False, self.now, ground, in_flight=0)

        def cost(r: Replica) -> tuple[bool, int, float, str]:
            return (r.ready, -2 * r.released - (r.marked_s is not None), -r.created_s, r.name)

        for r in sorted(self.pods.values(), key=cost)[: max(0, len(self.pods) - self.asked)]:
            assert not r.in_flight, "a replica went with requests on it"
            del self.pods[r.name]

    def change(self, name: str, **fields: object) -> None:
        self.pods[name] = replace(self.pods[name], **fields)  # type: ignore[arg-type]

    def controller(self, target: int) -> None:
        found = drain(target, self.asked, self.pods.values(), float("inf"), self.now)
        assert target >= self.asked or target <= found.replicas <= self.asked
        for name in found.mark:
            self.change(name, marked_s=self.now)
        for name in found.release:
            self.change(name, released=True)
        for name in found.unmark:
            self.change(name, marked_s=None, released=False, empty=False)
        self.asked = found.replicas
        self.reconcile()

    def picker(self, wanted: list[int]) -> None:
        for at in wanted:
            usable = [r for r in self.pods.values() if r.ready and r.marked_s is None]
            if usable:
                r = usable[at % len(usable)]
                self.change(r.name, in_flight=(r.in_flight or 0) + 1)
        for r in list(self.pods.values()):
            self.change(r.name, empty=r.marked_s is not None and not r.in_flight)

    def end(self, of: list[int]) -> None:
        for at in of:
            busy = [r for r in self.pods.values() if r.in_flight]
            if busy:
                r = busy[at % len(busy)]
                self.change(r.name, in_flight=(r.in_flight or 0) - 1)

    def start(self, who: list[int]) -> None:
        for at in who:
            young = [r for r in self.pods.values() if not r.ready]
            if young:
                self.change(young[at % len(young)].name, ready=True)


@settings(max_examples=200, deadline=None)
@given(STEPS, st.integers(0, 6))
def test_nothing_that_runs_is_cut_off_and_every_target_is_reached(
    steps: list[tuple[int, list[int], list[int], list[int]]], last: int
) -> None:
    lane = Lane()
    for target, requests, ends, starts in steps:
        lane.now += 1.0
        lane.controller(target)
        lane.start(starts)
        lane.picker(requests)
        lane.end(ends)
    for _ in range(60):
        lane.now += 1.0
        lane.end([0] * 10)
        lane.picker([])
        lane.controller(last)
    assert lane.asked == len(lane.pods) == last
    assert all(r.marked_s is None for r in lane.pods.values())
