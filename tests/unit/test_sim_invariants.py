"""The watch over arms: what it says of arms that are broken on purpose, one way each."""

from dataclasses import replace

import pytest

from tidegate.core.flow import Flow
from tidegate.sim import invariants
from tidegate.sim.bulk import Bulk
from tidegate.sim.fleet import Fleet
from tidegate.sim.fleet_arms.registry import ARMS, arm
from tidegate.sim.headline import Point, summarise
from tidegate.sim.invariants import BrokenRunError, above_bound, digest, every_arm, watched
from tidegate.sim.router import Arm
from tidegate.sim.types import TokenEvent

POINT = Point("ours", 1.0, 1, replicas=2, seconds=40.0, warm_up_s=5.0)


def wrong(chosen: Arm, **changes: object) -> str:
    setting = POINT.setting()
    setting = replace(setting, config=replace(setting.config, **changes))
    try:
        return "; ".join(watched(chosen, setting, 1)[1])
    except BrokenRunError as error:
        return str(error)


class TwiceTheSlots(Flow):
    """Takes every endpoint to have twice its slots."""

    def set_world(self, classes, models, endpoints, now):
        super().set_world(classes, models, [replace(e, slots=2 * e.slots) for e in endpoints], now)


class Forgets(Flow):
    """Ends every hundredth request of its queue without a word."""

    def admit(self, ask, now):
        refused = super().admit(ask, now)
        if ask.id % 100 == 0:
            super().finish(ask.id, now)
        return refused


class SendsTwice(Flow):
    """Sends the first of each turn again."""

    def dispatch(self, now):
        sent = super().dispatch(now)
        return sent + sent[:1]


class TwoMore(Flow):
    """Says that it holds two more than it does."""

    def held(self, address):
        requests, tokens = super().held(address)
        return requests + 2, tokens


class TwiceTheKv(Bulk):
    """Has twice the KV cache that it says."""

    def __init__(self, config):
        super().__init__(replace(config, num_blocks=2 * config.num_blocks))


class TooManySlots(Bulk):
    """Runs twice as many as it says."""

    def __init__(self, config):
        super().__init__(replace(config, max_num_seqs=2 * config.max_num_seqs))


class BeginsTwice(Bulk):
    """Tells of every first token twice."""

    def complete(self, plan):
        events = super().complete(plan)
        return [again for e in events for again in ([e, e] if e.nth == 0 and not e.finished else [e])]


class EndsAtOnce(Bulk):
    """Ends who has its first token, and goes on with it."""

    def complete(self, plan):
        return [TokenEvent(e.id, e.nth, True) if e.nth == 0 else e for e in super().complete(plan)]


class Redoes(Bulk):
    """Shows more computed of a request than there is."""

    def progress(self):
        return ((number, tokens + 10_000) for number, tokens in super().progress())


BROKEN = {
    "a request is forgotten": (Arm("x", Forgets), {}, "requests were lost in the queue"),
    "a request is sent twice": (Arm("x", SendsTwice), {}, "was sent though it did not wait"),
    "the router miscounts": (Arm("x", TwoMore), {}, "holds 0 requests and not 2"),
    "the router overfills": (Arm("x", TwiceTheSlots), {"max_num_seqs": 8}, "was sent 9 requests at a time"),
    "the engine has too many slots": (
        Arm("x", TwiceTheSlots, build=TooManySlots), {"max_num_seqs": 8}, "9 requests run in an engine",
    ),
    "the engine has too much KV": (
        replace(arm("priority"), build=TwiceTheKv), {"num_blocks": 2000}, "tokens of KV",
    ),
    "a first token comes twice": (Arm("x", Flow, build=BeginsTwice), {}, "began twice"),
    "a request goes on after its end": (Arm("x", Flow, build=EndsAtOnce), {}, "the run stopped: KeyError"),
    "more is computed than there is": (Arm("x", Flow, build=Redoes), {}, "than there is"),
}  # fmt: skip


@pytest.mark.parametrize(("broken", "changes", "expected"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_found(broken: Arm, changes: dict[str, int], expected: str) -> None:
    assert expected in wrong(broken, **changes)


@pytest.mark.parametrize("name", ["ours", "qoserve", "packing-1", "probabilistic"])
def test_what_is_sound_is_left_alone_and_watching_changes_nothing(name: str) -> None:
    run, found = watched(arm(name), POINT.setting(), 1)
    assert found == []
    assert digest(run) == digest(Fleet(POINT.setting(), arm(name), 1).run())
    assert digest(run) != digest(Fleet(POINT.setting(), arm(name), 2).run())


def test_an_engine_that_is_faster_than_its_fit_is_above_the_bound() -> None:
    point = Point("packing-0", 0.0, 1, replicas=1, seconds=300.0, warm_up_s=60.0)
    setting = point.setting()
    fast = replace(setting, replicas=[replace(r, speed=1.6) for r in setting.replicas])
    sound, broken = (summarise(Fleet(each, arm(point.arm), 1).run()) for each in (setting, fast))
    assert above_bound(point, sound) is None
    assert "is above bound B" in (above_bound(point, broken) or "")


def test_there_is_one_of_every_family(monkeypatch: pytest.MonkeyPatch) -> None:
    names = every_arm()
    assert len(names) == len(ARMS)
    for name in names:
        Fleet(replace(POINT, replicas=3).setting(), arm(name), 1)
    monkeypatch.setitem(invariants.ARMS, "new", lambda count: arm("ours"))
    with pytest.raises(ValueError, match="arm new takes numbers"):
        every_arm()
