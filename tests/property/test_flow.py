"""Invariants of the queue under any sequence of events."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tidegate.core.flow import Ask, Ended, Endpoint, Flow, Model
from tidegate.core.line import Line, Waiting
from tidegate.core.load import EngineReport
from tidegate.core.pick import Place, Traffic, headroom
from tidegate.core.replicas import Replicas
from tidegate.core.types import Objectives, QoSClass, TenantFrom, Tenants

CLASSES = {
    "high": QoSClass("high", 100, objectives=Objectives(ttft_s=1.0), queue_max_wait_s=5.0),
    "mid": QoSClass("mid", 50, queue_max_wait_s=10.0),
    "low": QoSClass("low", 0, queue_max_requests=5, queue_max_wait_s=60.0),
}
BY_HEADER = Tenants(TenantFrom.HEADER, "x-team", {"a": 3})
SHARED = {
    "high": replace(CLASSES["high"], tenants=BY_HEADER),
    "mid": replace(CLASSES["mid"], objectives=Objectives(completion_s=8.0)),
    "low": replace(CLASSES["low"], tenants=BY_HEADER, minimum_share=0.3, queue_max_requests=20),
}
"""The same with tenants, deadlines and a minimum share."""
KEYS = [("ns", "m"), ("ns", "n")]
NAMES = st.sampled_from(sorted(CLASSES))
TENANTS = st.sampled_from(["", "a", "b", "c"])


class FlowMachine(RuleBasedStateMachine):
    """Requests of all kinds come and go while endpoints do too."""

    classes = CLASSES
    narrowed = False
    """Whether gateways say where requests may go."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = Flow()
        self.now = 0.0
        self.next = 0
        self.endpoints: dict[str, Endpoint] = {}
        self.waiting: dict[int, Ask] = {}
        self.running: dict[int, str] = {}
        self._world()

    def _world(self) -> None:
        models = {key: Model(key, tuple(self.classes), startable=True) for key in KEYS}
        self.flow.set_world(self.classes, models, self.endpoints.values(), self.now)

    @rule(
        number=st.integers(0, 3),
        slots=st.integers(1, 6),
        lane=NAMES,
        model=st.sampled_from(KEYS),
        lent=st.booleans(),
    )
    def endpoint_comes(self, number: int, slots: int, lane: str, model: tuple[str, str], lent: bool) -> None:
        address = f"e:{number}"
        if address not in self.endpoints and not any(a == address for a in self.running.values()):
            self.endpoints[address] = Endpoint(address, model, lane, slots, lent=lent)
            self._world()
            self.flow.report(address, EngineReport(self.now, 0, 0, 0.0, 20_000), 0, 0)

    @rule(number=st.integers(0, 3))
    def endpoint_goes(self, number: int) -> None:
        self.endpoints.pop(f"e:{number}", None)
        self._world()

    @rule(number=st.integers(0, 3), lent=st.booleans(), draining=st.booleans())
    def endpoint_changes(self, number: int, lent: bool, draining: bool) -> None:
        address = f"e:{number}"
        if address in self.endpoints:
            self.endpoints[address] = replace(self.endpoints[address], lent=lent, draining=draining)
            self._world()
            self._dispatch()

    @rule(
        qos=NAMES,
        model=st.sampled_from(KEYS),
        tokens=st.integers(1, 30_000),
        streamed=st.booleans(),
        tenant=TENANTS,
        hint=st.none() | st.lists(st.sampled_from(["e:0", "e:1", "e:2", "x:9"]), max_size=2).map(tuple),
    )
    def request_comes(
        self,
        qos: str,
        model: tuple[str, str],
        tokens: int,
        streamed: bool,
        tenant: str,
        hint: tuple[str, ...] | None,
    ) -> None:
        self.next += 1
        ask = Ask(self.next, model, qos, tokens, 10, size=tokens, streamed=streamed, tenant=tenant)
        if self.narrowed:
            ask = replace(ask, subset=hint)
        before = [a for a in self.waiting.values() if (a.model, a.qos_class) == (model, qos)]
        if self.flow.admit(ask, self.now) is None:
            self.waiting[ask.id] = ask
        elif ask.subset is None and any(e.model == model for e in self.endpoints.values()):
            most = self.classes[qos].queue_max_requests
            newcomer = all(a.tenant != tenant for a in before)
            assert len(before) >= most or not newcomer, "a tenant with nothing there found no place"
        self._dispatch()

    @rule(pick=st.integers(0, 1000), whole=st.booleans())
    def request_ends(self, pick: int, whole: bool) -> None:
        known = sorted({*self.waiting, *self.running})
        if known:
            request = known[pick % len(known)]
            expected = Ended.QUEUED if request in self.waiting else Ended.DISPATCHED
            assert self.flow.finish(request, self.now, whole=whole) is expected
            assert self.flow.finish(request, self.now) is None
            self.waiting.pop(request, None)
            self.running.pop(request, None)
            self._dispatch()

    @rule(seconds=st.floats(0, 20))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for ask, _ in self.flow.expire(self.now):
            limit = CLASSES[ask.qos_class].queue_max_wait_s
            assert limit <= self.now or not self._open(ask)
            del self.waiting[ask.id]
        for address, endpoint in self.endpoints.items():
            mine = self.flow.held(address)
            usage = min(1.0, mine[1] / 20_000)
            assert endpoint.address == address
            self.flow.report(address, EngineReport(self.now, mine[0], 0, usage, 20_000), *mine)
        self._dispatch()

    def _dispatch(self) -> None:
        for one in self.flow.dispatch(self.now):
            ask = self.waiting.pop(one.ask.id)
            to = self.endpoints[one.address]
            assert to.model == ask.model
            assert not to.draining
            assert to in self._open(ask)
            safe = [e for e in self._open(ask) if not e.lent]
            if ask.streamed:
                assert not (to.lent and safe), "a stream on GPUs that may be asked back"
            self._is_his_turn(ask, to, safe)
            self.running[ask.id] = one.address
        assert self.flow.dispatch(self.now) == []

    def _open(self, ask: Ask) -> list[Endpoint]:
        """Where it may go."""
        mine = [e for e in self.endpoints.values() if e.model == ask.model and not e.draining]
        return mine if ask.subset is None else [e for e in mine if e.address in ask.subset]

    def _is_his_turn(self, ask: Ask, to: Endpoint, safe: list[Endpoint]) -> None:
        # Who waits and could have gone there: what keeps off lent replicas is passed there only.
        rivals = [
            a for a in self.waiting.values() if a.model == ask.model and not (a.streamed and to.lent and safe)
        ]
        earlier = [a for a in rivals if a.qos_class == ask.qos_class]
        # With a deadline that passes one waits behind others.
        if self.classes[ask.qos_class].objectives == Objectives():
            assert all(a.id > ask.id for a in earlier), "overtaken inside its class"
        above = [a for a in rivals if CLASSES[a.qos_class].priority > CLASSES[ask.qos_class].priority]
        assert not above, "a lower class went while a higher one waited"

    @invariant()
    def counts_are_right_and_no_endpoint_is_overfull(self) -> None:
        assert {a.id for a in self.flow.waiting()} == self.waiting.keys()
        assert {a.id for a, _ in self.flow.in_flight()} == self.running.keys()
        assert self.flow.bytes == sum(a.size for a in self.waiting.values())
        for address, endpoint in self.endpoints.items():
            count = sum(a == address for a in self.running.values())
            assert self.flow.held(address)[0] == count <= endpoint.slots

    @invariant()
    def what_is_kept_between_rounds_is_what_would_be_found_anew(self) -> None:
        room = self.flow._room
        for model in KEYS:
            mine = [load for load in room.loads.values() if load.model == model]
            kept, fresh = room._replicas.get(model, room._none), Replicas(mine, room.ranks)
            assert list(kept.loads) == mine
            for name in ("ready", "places", "slots", "safe", "apart"):
                assert getattr(kept, name) == getattr(fresh, name), name
            assert all(kept.front(size) == fresh.front(size) for size in range(4))
        for line in self.flow._lines.values():
            for whole_only in (False, True):
                head = line.head(whole_only=whole_only)
                assert head is line._find_head(whole_only=whole_only)
                if head is not None:
                    near = line.near(head, whole_only=whole_only)
                    assert near == line._find_near(head, whole_only=whole_only)


FlowMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestFlow = FlowMachine.TestCase


class SharedMachine(FlowMachine):
    """The same, shared by tenants, with deadlines and a minimum share: nothing is lost or served twice."""

    classes = SHARED

    def _is_his_turn(self, ask: Ask, to: Endpoint, safe: list[Endpoint]) -> None:
        """Turns are other things' affair here; see test_flow_sharing.py."""

    @invariant()
    def nothing_that_waits_is_relegated_twice_nor_forgotten(self) -> None:
        known = {*self.waiting, *self.running}
        assert self.flow._room.relegated <= known
        for line in self.flow._lines.values():
            assert line.streamed == sum(one.ask.streamed for one in line)
            assert sum(t.waiting for t in line.tenants.values()) == len(line)
            held = [len(q) for t in line.tenants.values() for q in t.queues.values()]
            assert sum(held) == len(line)
            assert (line.head() is None) == (len(line) == 0)


SharedMachine.TestCase.settings = FlowMachine.TestCase.settings
TestShared = SharedMachine.TestCase


class NarrowedMachine(SharedMachine):
    """The same behind a gateway that says where requests may go, and goes on to others by itself."""

    narrowed = True

    @rule(pick=st.integers(0, 1000), number=st.integers(0, 4))
    def another_serves(self, pick: int, number: int) -> None:
        if self.running:
            request = sorted(self.running)[pick % len(self.running)]
            address, before = f"e:{number}", self.running[request]
            ask = next(a for a, _ in self.flow.in_flight() if a.id == request)
            to = self.endpoints.get(address)
            moved = self.flow.served(request, address, self.now)
            gone = to is None and any(a == address for a in self.running.values())
            assert gone or moved == (to is not None and to.model == ask.model and address != before)
            if moved:
                self.running[request] = address
            self._dispatch()

    @invariant()
    def counts_are_right_and_no_endpoint_is_overfull(self) -> None:
        assert {a.id for a in self.flow.waiting()} == self.waiting.keys()
        for address in self.endpoints:  # what others sent there may be more than it has room for
            count = sum(a == address for a in self.running.values())
            assert self.flow.held(address)[0] == count


NarrowedMachine.TestCase.settings = FlowMachine.TestCase.settings
TestNarrowed = NarrowedMachine.TestCase


CAME = st.tuples(
    st.sampled_from(["a", "b", "c", "d"]), st.integers(1, 500), st.integers(1, 500), st.integers(1, 9)
)


@given(came=st.lists(CAME, min_size=1, max_size=60), leave=st.lists(st.integers(0, 99), max_size=60))
def test_who_was_served_least_goes_and_of_it_what_is_due_first(
    came: list[tuple[str, int, int, int]], leave: list[int]
) -> None:
    """The line beside a plain list that is searched whole."""
    line, there = Line(), []
    numbers, leaving = iter(range(1000)), iter(leave)
    for tenant, prompt, output, due in came:
        there.append(line.add(Ask(next(numbers), KEYS[0], "low", prompt, output), 0.0, tenant, 1, float(due)))
        gone = next(leaving, 0)
        if gone % 3 == 0:
            head = line.head()
            assert head is not None
            waits = {one.tenant for one in there}
            assert line.tenants[head.tenant].served == min(line.tenants[t].served for t in waits)
            assert head is min(_of(there, head.tenant), key=lambda one: (one.due, one.number))
            there.remove(line.pop(head.ask.id))
            line.charge(head.tenant, prompt + output)
        elif gone % 3 == 1 and there:
            there.remove(line.pop(there[gone % len(there)].ask.id))
    assert list(line) == there
    assert line.least() <= min((t.served for t in line.tenants.values() if t.waiting), default=line.least())


LATE = st.tuples(st.sampled_from(["a", "b"]), st.integers(1, 20), st.booleans(), st.integers(1, 500))


@given(came=st.lists(LATE, min_size=1, max_size=60), now=st.integers(0, 21))
def test_who_is_late_steps_back_together_as_one_by_one(
    came: list[tuple[str, int, bool, int]], now: int
) -> None:
    together, alone = Line(), Line()
    for number, (tenant, due, streamed, tokens) in enumerate(came):
        for line in (together, alone):
            one = Ask(number, KEYS[0], "low", tokens, 0, streamed=streamed)
            line.add(one, 0.0, tenant, 1, float(due))
            line.charge(tenant, tokens)
    while (head := alone.head()) is not None and head.due < now:
        alone.relegate(head)
    while (head := together.head()) is not None and head.due < now:
        assert head in together.relegate_late(head, now)
    assert together.relegated == alone.relegated
    while (head := alone.head()) is not None:
        other = together.head()
        assert other == head
        assert alone.near(head) == together.near(head)
        for line in (together, alone):
            line.pop(head.ask.id)
    assert not together


def _of(there: list[Waiting], tenant: str) -> list[Waiting]:
    return [one for one in there if one.tenant == tenant]


@given(
    rates=st.lists(st.integers(1, 20), min_size=2, max_size=5),
    sizes=st.lists(st.integers(1, 400), min_size=5, max_size=5),
)
def test_tenants_with_something_waiting_stay_within_a_request_of_each_other(
    rates: list[int], sizes: list[int]
) -> None:
    """VTC's bound: between two that wait all the while the difference is at most a request's tokens."""
    line, numbers = Line(), iter(range(10_000))
    for index, rate in enumerate(rates):
        for _ in range(40 * rate):
            line.add(Ask(next(numbers), KEYS[0], "low", sizes[index], 0), 0.0, f"t{index}")
    had = dict.fromkeys(range(len(rates)), 0)
    for _ in range(40):
        head = line.head()
        assert head is not None
        line.pop(head.ask.id)
        line.charge(head.tenant, head.ask.prompt_tokens)
        had[int(head.tenant[1:])] += head.ask.prompt_tokens
    if all(line.tenants[f"t{index}"].waiting for index in range(len(rates))):
        assert max(had.values()) - min(had.values()) <= max(sizes)


PLACES = st.lists(
    st.builds(Place, address=st.uuids().map(str), lane=NAMES, slots=st.integers(1, 32)),
    max_size=6,
    unique_by=lambda p: p.address,
)
TRAFFIC = st.tuples(st.floats(0, 50), st.floats(0, 50), st.floats(0, 50), st.booleans(), st.booleans()).map(
    lambda t: [
        Traffic("high", 0, t[0], 500.0, t[3]),
        Traffic("mid", 1, t[1], 500.0, t[4]),
        Traffic("low", 2, t[2], 500.0, True),
    ]
)


@given(places=PLACES, traffic=TRAFFIC, service=st.floats(0.1, 60))
def test_headroom_never_takes_a_whole_endpoint_and_grows_downwards(
    places: list[Place], traffic: list[Traffic], service: float
) -> None:
    seconds = dict.fromkeys((0, 1, 2), service)
    kept = headroom(traffic, places, seconds, {0: 1, 2: 3})
    assert kept == headroom(traffic[::-1], places[::-1], seconds, {0: 1, 2: 3})
    for place in places:
        slots = [kept[rank][place.address][0] for rank in (0, 1, 2)]
        assert slots == sorted(slots)
        assert slots[0] == 0
        assert slots[2] <= max(0, place.slots - 1)
