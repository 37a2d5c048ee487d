"""Every arm there is, on small random fleets: nothing is lost, nothing is served twice, slots hold."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.core.steptime import LLAMA3_8B_A100 as FIT
from tidegate.sim.bound import bound, means
from tidegate.sim.fleet import Fault, Fleet, Replica, Setting
from tidegate.sim.fleet_arms.central import Central
from tidegate.sim.fleet_arms.registry import ARMS, arm
from tidegate.sim.headline import CLASSES, CONFIG, MODEL, Point, mean_computed, run_point
from tidegate.sim.records import State
from tidegate.sim.types import EngineConfig
from tidegate.sim.workload import Length, Stream, chat_lengths, poisson, summary_lengths

NUMBERS = {
    "aborting": "-512-400",
    "cap": "-2",
    "cooperating": "-1-2-1-4",
    "edf": "-64",
    "growing": "-16-4",
    "holdback": "-20",
    "packing": "-1",
    "packing-cap": "-1-1",
    "release": "-60",
    "silos": "-1-1-1",
    "steps": "-512-400",
    "tiers": "-1-0-1-1",
}
"""What comes after a family's name for a fleet of three."""
NAMES = sorted(family + NUMBERS.get(family, "") for family in ARMS)

LENGTHS = st.lists(st.builds(Length, st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=6)
FAULTS = st.lists(
    st.builds(
        lambda kind, which, start, lasts: Fault(kind, f"r{which}", start, start + lasts, 3.0),
        st.sampled_from(["death", "slow", "deaf"]),
        st.integers(0, 2),
        st.floats(0, 6),
        st.floats(0.5, 4),
    ),
    max_size=1,
)


@st.composite
def fleets(draw):
    """Three small replicas, a few of each class, perhaps a fault."""
    config = EngineConfig(
        max_num_seqs=draw(st.integers(1, 5)), max_num_batched_tokens=32, num_blocks=draw(st.integers(9, 30))
    )
    streams = [
        Stream(name, MODEL, name, draw(LENGTHS), times=poisson(draw(st.floats(0.5, 6))), expected_output=10)
        for name in ("interactive", "standard")
    ]
    outstanding, streamed = draw(st.integers(1, 40)), draw(st.booleans())
    streams.append(Stream("batch", MODEL, "batch", draw(LENGTHS), outstanding=outstanding, streamed=streamed))
    return Setting(
        classes=CLASSES,
        replicas=[Replica(f"r{i}", MODEL, "batch") for i in range(3)],
        streams=streams,
        seconds=10.0,
        config=config,
        faults=draw(FAULTS),
    )


class Watched:
    """Passes everything on, and keeps its own account of who is where."""

    def __init__(self, router):
        self.router = router
        self.queued, self.sent = set(), {}
        self.slots, self.busy, self.most_over = {}, Counter(), 0

    def set_world(self, classes, models, endpoints, now):
        endpoints = list(endpoints)
        self.slots |= {e.address: e.slots for e in endpoints}
        self.router.set_world(classes, models, endpoints, now)

    def admit(self, ask, now):
        assert ask.id not in self.queued
        assert ask.id not in self.sent
        assert self.router.admit(ask, now) is None, "the settings' queues are wide: nobody is refused"
        self.queued.add(ask.id)

    def dispatch(self, now):
        sent = self.router.dispatch(now)
        for each in sent:
            self.queued.remove(each.ask.id)
            self.sent[each.ask.id] = each.address
            self.busy[each.address] += 1
            self.most_over = max(self.most_over, self.busy[each.address] - self.slots[each.address])
        return sent

    def finish(self, request, now, *, whole=True):
        if request in self.sent:
            self.busy[self.sent.pop(request)] -= 1
        else:
            self.queued.remove(request)
        ended = self.router.finish(request, now, whole=whole)
        if request in getattr(self.router, "_grown", ()):
            self.queued.add(request)  # a prefix has ended, the rest waits
        return ended

    def held(self, address):
        assert self.router.held(address)[0] == self.busy[address]
        return self.router.held(address)

    def expire(self, now):
        return self.router.expire(now)

    def recall(self, now):
        return self.router.recall(now)

    def next_turn(self):
        return self.router.next_turn()

    def report(self, *args):
        self.router.report(*args)


def watched(name, setting, seed):
    """The run, and the router that was watched."""
    chosen = arm(name)
    fleet = Fleet(setting, replace(chosen, router=lambda: Watched(chosen.router())), seed)
    return fleet.run(), fleet.router


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8, deadline=None)
@given(setting=fleets(), seed=st.integers(0, 99))
def test_nothing_is_lost_nor_served_twice_and_slots_hold(name, setting, seed):
    run, router = watched(name, setting, seed)
    opened = {r.number for r in run.records if r.state is State.OPEN}
    assert opened == router.queued | set(router.sent)
    assert all(r.state is State.OPEN or r.first_s is not None for r in run.records)
    if not isinstance(router.router, Central) or router.router.bounded:
        assert router.most_over <= 0
    again = Fleet(setting, arm(name), seed).run()
    assert again.records == run.records


@pytest.mark.parametrize("name", NAMES)
def test_who_may_be_served_is(name):
    """Where no class is kept out on purpose, all answer in a calm fleet."""
    lengths = [Length(30, 5)]
    streams = [
        Stream(c, MODEL, c, lengths, times=poisson(1.0))
        if c != "batch"
        else Stream(c, MODEL, c, lengths, outstanding=3)
        for c in CLASSES
    ]
    setting = Setting(CLASSES, [Replica(f"r{i}", MODEL, "batch") for i in range(3)], streams, seconds=30.0)
    answered = Counter(r.qos_class for r in watched(name, setting, 1)[0].records if r.state is State.ANSWERED)
    assert set(answered) == set(CLASSES) - ({"batch"} if name == "alone" else set())


@pytest.mark.parametrize("name", NAMES)
def test_no_arm_is_above_the_bound(name):
    """The bound is of long runs. In a short one an engine may be the fuller at the end, by its cache."""
    point = Point(name, 1.0, seed=3, replicas=3, seconds=500.0, warm_up_s=100.0)
    chat = means(chat_lengths())
    most = bound(means(summary_lengths()), FIT, CONFIG, chat, point.load).requests_per_s
    stored = CONFIG.kv_tokens / mean_computed(summary_lengths()) / (point.seconds - point.warm_up_s)
    raw = run_point(point)
    assert raw.batch_per_s <= most + stored
    assert (raw.batch_per_s > 0) is (name != "alone")
