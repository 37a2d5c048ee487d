"""The arms to compare with: what each sends and holds, one table an arm."""

import random
from dataclasses import dataclass

import pytest

from tidegate.core.flowtypes import Ask, Ended, Endpoint
from tidegate.core.load import EngineReport
from tidegate.core.steptime import LLAMA3_8B_A100 as FIT
from tidegate.sim.fleet_arms.deadlines import LeastLoaded
from tidegate.sim.fleet_arms.limits import Aimd, Cap, HoldBack, Release
from tidegate.sim.fleet_arms.packing import Alone, Packing, PackingCap, Silos, split
from tidegate.sim.fleet_arms.priority import SendAll
from tidegate.sim.fleet_arms.registry import ARMS, arm
from tidegate.sim.fleet_arms.saturation import Probabilistic, Shed, SoftReflective, saturation
from tidegate.sim.fleet_arms.tiers import Tiers, three_lanes
from tidegate.sim.headline import CLASSES, MODEL

SLOTS, KV = 8, 40_000
LETTERS = {"i": "interactive", "s": "standard", "b": "batch"}


@dataclass(frozen=True)
class Engine:
    """What an engine says of itself before anything is sent; its lane is a letter."""

    lane: str = "b"
    waiting: int = 0
    kv: float = 0.0
    ready: bool = True
    draining: bool = False


FREE = Engine()


def set_world(router, engines, now=0.0):
    endpoints = [
        Endpoint(name, MODEL, LETTERS[e.lane], SLOTS, ready=e.ready, draining=e.draining)
        for name, e in zip("abcd", engines, strict=False)
    ]
    router.set_world(CLASSES, {}, endpoints, now)


def report(router, address, engine=FREE, now=0.0):
    word = EngineReport(now, 0, engine.waiting, engine.kv, KV)
    router.report(address, word, *router.held(address))


def started(router, *engines):
    """A router that knows its endpoints a, b, … and has heard of each."""
    set_world(router, engines)
    for name, engine in zip("abcd", engines, strict=False):
        report(router, name, engine)
    return router


def ask(number, letter, prompt=1000):
    return Ask(number, MODEL, LETTERS[letter], prompt, 256)


def sends(router, letters, now=0.1, prompt=1000):
    """Who goes where, as "ba" for batch to a; in order. `letters` are the classes that ask."""
    first = len(router._where) + len(router._running) + 1000 * round(now * 10)
    for offset, letter in enumerate(letters):
        router.admit(ask(first + offset, letter, prompt), now)
    return [sent.ask.qos_class[0] + sent.address for sent in router.dispatch(now)]


class Fixed(random.Random):
    """Draws the same again and again."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def random(self):
        return self.value


LANES = [Engine("i"), Engine("b")]
SILOS = [Engine("i"), Engine("s"), Engine("b")]
BUSY, FULL = Engine(waiting=5), Engine(kv=0.8)


@pytest.mark.parametrize(
    ("router", "engines", "letters", "expected"),
    [
        pytest.param(Alone(), [FREE], "bib", ["ia"], id="alone: batch waits for ever"),
        pytest.param(Packing(), LANES, "bsi", ["ia", "sa", "bb"], id="packing: batch apart from all others"),
        pytest.param(Packing(), LANES, "i" * 9, ["ia"] * 8, id="packing: people do not overflow either"),
        pytest.param(Packing(), [Engine("i")] * 2, "bb", [], id="packing: no replica for batch"),
        pytest.param(
            PackingCap(1), LANES, "b" * 9 + "i", ["ia"] + ["bb"] * 8 + ["ba"], id="packing, cap: last"
        ),
        pytest.param(PackingCap(2), [Engine("i")] * 2, "bbb", ["ba", "bb", "ba"], id="packing, cap: in turn"),
        pytest.param(
            Tiers(0, 2, cooperates=True), SILOS, "bbb", ["bc"] * 3, id="tiers: batch on its own first"
        ),
        pytest.param(
            Tiers(1, 2, cooperates=True),
            SILOS[:2],
            "b" * 9,
            ["ba", "bb", "bb"],
            id="tiers: then so many beside people",
        ),
        pytest.param(
            Tiers(0, 2, cooperates=True), SILOS, "iii", ["ib", "ib", "ia"], id="tiers: shared while soon"
        ),
        pytest.param(
            LeastLoaded(), [FREE] * 2, "bib", ["ia", "bb", "ba"], id="by deadline: the least loaded"
        ),
        pytest.param(Silos(), SILOS, "bsi", ["ia", "sb", "bc"], id="silos: each its own"),
        pytest.param(
            SendAll(), [FREE] * 2, "b" * 20, ["ba", "bb"] * 10, id="priority: beyond the slots, in turn"
        ),
        pytest.param(Shed(), [BUSY, FULL], "bi", ["ia"], id="shed: five wait, or the KV is full"),
        pytest.param(
            Shed(),
            [Engine(waiting=3, kv=0.1)],
            "bbbi",
            ["ia", "ba"],
            id="shed: what it sent counts until the next report",
        ),
        pytest.param(Shed(), [Engine(kv=0.74)], "bbb", ["ba", "ba"], id="shed: so does the KV"),
        pytest.param(Probabilistic(Fixed(0.99)), [FREE], "bb", ["ba", "ba"], id="probabilistic: idle"),
        pytest.param(
            Probabilistic(Fixed(0.99)),
            [Engine(kv=0.27)],
            "bi",
            ["ia"],
            id="probabilistic: all refused at 0.34",
        ),
        pytest.param(
            Probabilistic(Fixed(0.022)), [Engine(kv=0.12)], "b", [], id="probabilistic: 2.3% refused at 0.15"
        ),
        pytest.param(
            Probabilistic(Fixed(0.024)), [Engine(kv=0.12)], "b", ["ba"], id="probabilistic: the others not"
        ),
        pytest.param(SoftReflective(), [Engine(kv=0.3)], "ib", ["ia", "ba"], id="soft: open below a half"),
        pytest.param(SoftReflective(), [BUSY], "ib", [], id="soft: saturated, nobody goes"),
        pytest.param(SoftReflective(), [BUSY, FREE, FREE], "i", ["ia"], id="soft: the mean counts"),
        pytest.param(HoldBack(0.5), [FREE], "b" * 5, ["ba"] * 4, id="hold-back: half of the slots"),
        pytest.param(HoldBack(0.1), [FREE], "b" * 5, ["ba"], id="hold-back: a tenth"),
        pytest.param(HoldBack(0.1), [FREE], "ib", ["ia"], id="hold-back: people use batch's part too"),
        pytest.param(Release(0.5), [FREE] * 2, "b" * 20, ["ba", "bb"] * 4, id="release: half of the slots"),
        pytest.param(
            Release(0.6),
            [Engine(kv=0.7), Engine(kv=0.4)],
            "b" * 9,
            ["ba", "bb"] * 2,
            id="release: or of the KV",
        ),
        pytest.param(Release(0.6), [Engine(kv=0.6)], "bi", ["ia"], id="release: closed"),
        pytest.param(Cap(2), [FREE] * 2, "b" * 9, ["ba", "bb"] * 2, id="cap: two on each"),
        pytest.param(Cap(2), [FREE], "bbbiii", ["ia"] * 3 + ["ba"] * 2, id="cap: of batch alone"),
        pytest.param(Aimd(0.02), [FREE] * 2, "bbbi", ["ia", "bb"], id="adaptive: one to begin with"),
    ],
)
def test_what_is_sent(router, engines, letters, expected):
    assert sends(started(router, *engines), letters) == expected


def test_full_width_is_what_the_cache_holds():
    assert sends(started(Packing(), *LANES), "bbbb", prompt=12_000) == ["bb"] * 3


def test_the_kept_tier_is_for_who_cannot_wait():
    """Who would wait more than 0.3 s on the shared ones; an engine that cooperates stops batch's prompts."""
    for cooperates, there in ((True, "ib"), (False, "ia")):
        router = started(Tiers(0, 9, cooperates=cooperates), *SILOS[:2])
        assert sends(router, "b") == ["bb"]
        assert sends(router, "i", now=0.12, prompt=2500) == [there]
    # Too long for either: where it comes soonest, and that is where nothing decodes.
    router = started(Tiers(0, 9, cooperates=True), *SILOS[:2])
    assert sends(router, "b") == ["bb"]
    assert sends(router, "i", now=5.0, prompt=4000) == ["ia"]


# ── what all share ──────────────────────────────────────────────────────────────────────────────


def test_a_prompt_goes_where_less_is_predicted_before_it():
    router = started(SendAll(), FREE, FREE)
    assert sends(router, "i", prompt=4000) == ["ia"]
    assert sends(router, "ii", prompt=500) == ["ib", "ib"]
    # Long after, both have computed all that was sent: by what is in flight.
    assert sends(router, "iii", now=5.0, prompt=4000) == ["ib", "ia", "ib"]


def test_people_wait_for_their_like_and_for_one_prompt_of_batch():
    router = started(SendAll(), FREE)
    sends(router, "bbb", now=0.0)
    one_s = FIT.seconds(1000, 0)
    wait_s = router.sites["a"].wait_s(0, 0.0)
    assert one_s < wait_s < 1.2 * one_s
    assert router.sites["a"].wait_s(2, 0.0) > 3 * one_s
    assert router.sites["a"].wait_s(2, 1.0) == 0.0


def test_batch_waits_for_a_first_report_people_do_not():
    router = Cap(9)
    set_world(router, [FREE])
    assert sends(router, "bi") == ["ia"]
    assert router.dispatch(1.9) == []
    assert [sent.ask.qos_class for sent in router.dispatch(2.0)] == ["batch"]


def test_endpoints_that_take_nothing_more():
    router = started(SendAll(), Engine(ready=False), Engine(draining=True), FREE)
    assert sends(router, "ii") == ["ic", "ic"]
    set_world(router, [FREE, FREE])  # c is gone, and keeps what it has until it ends
    assert router.held("c") == (2, 2512)
    assert sends(router, "i", 0.2) == ["ia"]
    for number in [n for n, running in router._running.items() if running.site.facts.address == "c"]:
        assert router.finish(number, 0.3) is Ended.DISPATCHED
    assert "c" not in router.sites
    router.report("c", EngineReport(0.3, 0, 0), 0, 0)
    assert router.held("c") == (0, 0)


def test_an_end_is_counted_once():
    router = started(Cap(1), FREE)
    for number in (1, 2, 3):
        router.admit(ask(number, "b"), 0.0)
    assert [sent.ask.id for sent in router.dispatch(0.0)] == [1]
    assert router.finish(2, 0.1) is Ended.QUEUED
    assert router.finish(1, 0.1) is Ended.DISPATCHED
    assert router.finish(1, 0.1) is None
    assert router.held("a") == (0, 0)
    (sent,) = router.dispatch(0.5)
    assert (sent.ask.id, sent.waited_s) == (3, 0.5)
    assert list(router.waiting()) == []


# ── what changes with time ──────────────────────────────────────────────────────────────────────


def test_the_soft_ceiling_lets_one_through_in_so_many_cycles():
    # At 0.78 one cycle in round(0.78 / 0.22) is open; a cycle is a millisecond.
    router = started(SoftReflective(), Engine(kv=0.59))
    sends(router, "i", now=0.0)
    router.admit(ask(900, "b"), 0.0)
    went = []
    for cycle in range(1, 10):
        now = cycle * 0.001
        if router.dispatch(now):
            went.append(cycle)
            router.finish(900 + len(went) - 1, now)
            router.admit(ask(900 + len(went), "b"), now)
    assert saturation(list(router.sites.values())) == pytest.approx(0.777, abs=0.001)
    assert went == [3, 6, 9]


def test_the_adaptive_limit_climbs_and_falls():
    router = started(Aimd(0.02), FREE, FREE)
    sends(router, "b" * 30, now=0.1)
    limits = []
    for second in range(1, 6):
        report(router, "a", now=float(second))
        router.dispatch(second + 0.1)
        limits.append(router.limit)
    assert limits == [3.0, 5.0, 7.0, 9.0, 11.0]
    sends(router, "iiii", now=5.5, prompt=4000)  # the third meets one before it
    report(router, "a", now=6.1)
    router.dispatch(6.2)
    assert router.limit == pytest.approx(11 * 0.7)


def test_the_adaptive_limit_falls_when_an_engine_tells_of_waiting_people():
    router = started(Aimd(0.02), FREE)
    sends(router, "bbi", now=0.1)
    report(router, "a", Engine(waiting=5), now=1.1)
    router.dispatch(1.2)
    assert router.limit == 1.0, "never below one"


# ── names ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("replicas", "needs", "expected"),
    [
        pytest.param(10, [1, 0, 1], [5, 0, 5], id="even"),
        pytest.param(10, [0.4, 0, 0.6], [4, 0, 6], id="as needed"),
        pytest.param(10, [2, 1, 1], [5, 3, 2], id="a remainder: the first of equals"),
        pytest.param(10, [1, 99, 0], [1, 9, 0], id="one at least"),
        pytest.param(3, [1, 1000, 1000], [1, 1, 1], id="no more than one"),
    ],
)
def test_split(replicas, needs, expected):
    assert split(replicas, needs) == expected


def test_lanes_are_named_after_classes():
    assert arm("packing-1").lanes(3) == ["interactive", "batch", "batch"]
    assert arm("silos-1-1-2").lanes(4) == ["interactive", "standard", "batch", "batch"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(
            lambda: arm("packings-1"), "no arm is named 'packings-1'; there are aborting, ", id="unknown"
        ),
        pytest.param(lambda: arm("packing"), "after packing comes first", id="too few numbers"),
        pytest.param(lambda: arm("alone-1"), "after alone comes nothing", id="too many"),
        pytest.param(
            lambda: arm("packing-4").lanes(3),
            "people on the first 4: there are only 3",
            id="too small a fleet",
        ),
        pytest.param(lambda: arm("silos-1-1-1").lanes(4), "must be the 4 replicas", id="another fleet"),
        pytest.param(
            lambda: three_lanes(2, 2, 3), "people on 2 and 2: there are only 3", id="too many tiers"
        ),
        pytest.param(lambda: split(1, [1, 1]), "cannot be split", id="too few replicas"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_arm_bears_its_name():
    names = {"cap": "cap-4", "holdback": "holdback-10", "release": "release-50", "packing": "packing-4"}
    names |= {"packing-cap": "packing-4-cap-1", "edf": "edf-256"}
    names |= {"tiers": "tiers-2-0-1-1", "cooperating": "cooperating-2-16-2-16"}
    names |= {"growing": "growing-512-11", "aborting": "aborting-2552-120", "steps": "steps-2552-120"}
    for family in ARMS:
        name = names.get(family, "silos-4-0-6" if family == "silos" else family)
        assert arm(name).name == name
