"""Router-made preemption: prompts in growing prefixes, and batch that is taken back from the front."""

from collections import defaultdict
from dataclasses import replace

import pytest

from tidegate.core.flowtypes import Ask, Endpoint, Model
from tidegate.core.load import EngineReport
from tidegate.sim.fleet import Fault, Fleet
from tidegate.sim.fleet_arms.aborting import Aborting, Prompt, recalled
from tidegate.sim.fleet_arms.growing import prefix, rest
from tidegate.sim.fleet_arms.registry import arm
from tidegate.sim.headline import CLASSES, MODEL, Point
from tidegate.sim.records import State

WHOLE = Ask(7, MODEL, "batch", 1200, 256)
BEFORE, BEGUN, NEARLY = (
    Prompt(1, left_s=0.32, takes_s=0.3, step_s=0.1),
    Prompt(2, left_s=0.29, takes_s=0.3, step_s=0.1),
    Prompt(3, left_s=0.02, takes_s=0.3, step_s=0.1),
)
LATE = Prompt(4, left_s=0.16, takes_s=0.3, step_s=0.1)


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        pytest.param({}, [], id="no front"),
        pytest.param({"a": [BEGUN], "b": []}, [], id="one is free"),
        pytest.param({"a": [BEGUN], "b": [NEARLY]}, [], id="one is nearly free"),
        pytest.param({"a": [BEGUN]}, [2], id="the rest of it, but for the steps that are under way"),
        pytest.param({"a": [LATE]}, [], id="what is left is under way"),
        pytest.param({"a": [BEGUN], "b": [BEFORE]}, [1], id="of two the one that was not begun"),
        pytest.param({"a": [BEGUN], "b": [LATE]}, [2], id="where it helps"),
        pytest.param({"a": [BEGUN, BEFORE]}, [2, 1], id="all of a replica"),
        pytest.param({"a": [replace(BEGUN, aborted=3)]}, [], id="who was aborted often is left alone"),
    ],
)
def test_who_is_aborted(front, expected):
    assert recalled(front) == expected


@pytest.mark.parametrize(
    ("done", "chunk", "prompt", "output", "new"),
    [
        pytest.param(0, 512, 512, 1, 512, id="the first"),
        pytest.param(512, 512, 1024, 1, 512, id="the next begins with it"),
        pytest.param(1024, 512, 1200, 256, 176, id="the last is the request itself"),
        pytest.param(0, 1200, 1200, 256, 1200, id="in one"),
    ],
)
def test_prefixes(done, chunk, prompt, output, new):
    sent = prefix(WHOLE, done, chunk)
    assert (sent.id, sent.prompt_tokens, sent.output_tokens) == (7, prompt, output)
    assert rest(sent, done).prompt_tokens == new


@pytest.mark.parametrize("name", ["growing-100", "growing-8", "aborting-0"])
def test_numbers_that_make_no_sense_are_refused(name):
    with pytest.raises(ValueError, match=r"takes"):
        arm(name)


# ── production's queue, as these arms have it ───────────────────────────────────────────────────


def started(name):
    """A router that knows four replicas, of which chat makes one or more the front."""
    router = arm(name).router()
    endpoints = [Endpoint(address, MODEL, "batch", slots=64, chunk=2552) for address in "abcd"]
    router.set_world(CLASSES, {MODEL: Model(MODEL, tuple(CLASSES), startable=True)}, endpoints, 0.0)
    for address in "abcd":
        router.report(address, EngineReport(0.0, 0, 0, 0.0, 400_000, 0), 0, 0)
    return router


def chat(router, number, now):
    router.admit(Ask(number, MODEL, "interactive", 800, 200, streamed=True), now)
    return router.dispatch(now)


def batch(router, number, now, prompt=2600):
    router.admit(Ask(number, MODEL, "batch", prompt, 256), now)
    return router.dispatch(now)


def test_a_prompt_on_the_front_goes_on_when_the_chat_has_been_served():
    router = started("growing-512")
    for number in range(20):  # chat makes a front
        (sent,) = chat(router, number, 0.1 * number)
        router.finish(number, 0.1 * number + 0.09)
    sent = [d for number in range(100, 110) for d in batch(router, number, 2.0)]
    front = [d for d in sent if d.ask.prompt_tokens == 512]
    assert front, "the front takes prefixes"
    assert all(d.ask.prompt_tokens in (512, 2600) for d in sent)
    one = front[0]
    (person,) = [d for n in range(20, 40) for d in chat(router, n, 2.01) if d.address == one.address][:1]
    router.finish(one.ask.id, 2.06)
    assert [d for d in router.dispatch(2.06) if d.ask.id == one.ask.id] == [], "a chat's prompt is computed"
    for number in range(20, 40):
        router.finish(number, 2.9)
    (again,) = [d for d in router.dispatch(3.0) if d.ask.id == one.ask.id]
    assert (again.address, again.ask.prompt_tokens, again.ask.output_tokens) == (one.address, 1024, 1)
    assert person.address == one.address
    assert router.finish(one.ask.id, 3.0, whole=False) is not None
    assert router.finish(one.ask.id, 3.0) is None, "it is over"


# ── in a fleet ──────────────────────────────────────────────────────────────────────────────────

SHORT = Point("ours", 1.0, 1, replicas=4, seconds=60.0, warm_up_s=20.0)


class Spy:
    """Notes what a router sends and is told."""

    def __init__(self, router, log):
        self._router, self._log = router, log

    def __getattr__(self, name):
        return getattr(self._router, name)

    def dispatch(self, now):
        sent = self._router.dispatch(now)
        self._log.extend(("sent", d.ask.id, d.ask.prompt_tokens, d.address) for d in sent)
        return sent

    def recall(self, now):
        return self._router.recall(now) if isinstance(self._router, Aborting) else []

    def finish(self, request, now, *, whole=True):
        self._log.append(("ended", request, whole, ""))
        return self._router.finish(request, now, whole=whole)


def run(name, **changed):
    """A short run, and what its router sent."""
    log = []
    made = arm(name)
    spied = replace(made, router=lambda: Spy(made.router(), log))
    fleet = Fleet(replace(SHORT.setting(), **changed), spied, 1)
    return fleet.run(), log


@pytest.mark.parametrize("faults", [(), (Fault("death", "10.0.0.1:8000", 30.0, 35.0),)], ids=["", "a death"])
def test_prefixes_grow_where_they_began_until_the_whole_is_sent(faults):
    found, log = run("growing-512", faults=faults)
    parts = defaultdict(list)
    for what, number, tokens, address in log:
        if what == "sent":
            if parts[number] and parts[number][-1][0] != address:
                assert faults, "only a death moves it"
                parts[number].clear()
            parts[number].append((address, tokens))
        elif not tokens:
            parts[number].clear()
    prompts = {r.number: r.prompt for r in found.records}
    grown = {n: [t for _, t in sent] for n, sent in parts.items() if len(sent) > 1}
    assert len(grown) > 10
    for number, tokens in grown.items():
        assert tokens == sorted(set(tokens))
        assert all(t % 16 == 0 for t in tokens[:-1])
        assert tokens[-1] == prompts[number] or tokens[-1] % 16 == 0, "the last, or it goes on at the end"
    done = [r for r in found.records if r.qos_class == "batch" and r.state is State.ANSWERED]
    assert len(done) > 50
    assert all(parts[r.number][-1][1] == r.prompt for r in done)
    if not faults:
        assert found.recomputed_tokens == 0, "every prefix was found in the cache"


def test_who_is_aborted_is_served_in_the_end():
    found, _ = run("aborting-512-400")
    aborted = [r for r in found.records if r.recalls]
    assert aborted
    assert all(r.qos_class == "batch" and r.recalls <= 5 for r in aborted)
    assert {r.state for r in aborted} <= {State.OPEN, State.ANSWERED}
    assert found.recomputed_tokens > 0
