"""Whatever happens to a queue, its log says all of it: read back it is the same, replayed too."""

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.adapters.decisions import Call, decode, decode_header, encode, encode_header
from tidegate.core.flow import Ask, Endpoint, Model, Policy
from tidegate.core.load import EngineReport
from tidegate.core.steptime import LLAMA2_70B_H100_TP8, LLAMA3_8B_A100, StepFit
from tidegate.core.types import Objectives, QoSClass, TenantFrom, Tenants
from tidegate.picker.decisionlog import DecisionLog, RecordedFlow
from tidegate.sim.replay import replay

# ── what a line holds ───────────────────────────────────────────────────────────────────────────

PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(-(1 << 63), (1 << 63) - 1),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(st.characters(exclude_categories=("Cs",)), max_size=8),
    type(None): st.none(),
    # Not every fit is one: its coefficients must make it monotone.
    StepFit: st.sampled_from([LLAMA3_8B_A100, LLAMA2_70B_H100_TP8]),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of a type, made from its annotations: a field that core gets is covered at once."""
    of, inner = get_origin(hint), get_args(hint)
    if hint in PLAIN:
        return PLAIN[hint]
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return st.builds(hint, **{f.name: values(hints[f.name]) for f in fields(hint)})
    if of in {tuple, frozenset, Mapping}:
        return collections(of, inner)
    if of in {Union, types.UnionType}:
        return st.one_of(*map(values, inner))
    return st.sampled_from(inner if of is Literal else hint)


def collections(of: Any, inner: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    if of is frozenset:
        return st.frozensets(values(inner[0]), max_size=3)
    if of is Mapping:
        return st.dictionaries(values(inner[0]), values(inner[1]), max_size=3)
    if inner[1:] == (...,):
        return st.lists(values(inner[0]), max_size=3).map(tuple)
    return st.tuples(*map(values, inner))


@pytest.mark.parametrize("kind", get_args(Call), ids=lambda kind: kind.__name__)
def test_every_call_is_read_back_as_it_was(kind: Any) -> None:
    @settings(max_examples=60, deadline=None)
    @given(values(kind))
    def check(call: Call) -> None:
        line = encode(call)
        assert line.count(b"\n") == 1
        assert line.endswith(b"\n")
        assert decode(line) == call

    check()


@given(values(Policy))
def test_the_policy_is_read_back_as_it_was(policy: Policy) -> None:
    assert decode_header(encode_header(policy)) == policy


# ── a queue's life ──────────────────────────────────────────────────────────────────────────────

SHARED = Tenants(TenantFrom.USER, weights={"a": 2})
CLASSES = {
    "high": QoSClass("high", 100, objectives=Objectives(ttft_s=1.0), queue_max_wait_s=5.0, tenants=SHARED),
    "mid": QoSClass("mid", 50, objectives=Objectives(completion_s=6.0), queue_max_wait_s=10.0),
    "low": QoSClass("low", 0, queue_max_requests=3, queue_max_wait_s=60.0, tenants=SHARED, minimum_share=0.3),
}
KEYS = (("ns", "m"), ("ns", "n"))
NAMES = st.sampled_from([*CLASSES, "gone"])
PLACES = st.builds(
    Endpoint,
    address=st.integers(0, 4).map("e:{}".format),
    model=st.sampled_from(KEYS),
    lane=NAMES,
    slots=st.integers(1, 4),
    ready=st.sampled_from([True, True, False]),
    draining=st.sampled_from([False, False, True]),
    lent=st.booleans(),
)
# Weights matter: arrivals and endings by far the most, and worlds in which little can be served seldom.
EVENT = st.one_of(
    st.tuples(
        st.just("world"),
        st.sampled_from([tuple(CLASSES), ("high", "low")]),
        st.booleans(),
        st.lists(PLACES, min_size=1, max_size=5, unique_by=lambda e: e.address),
    ),
    st.tuples(
        st.just("report"),
        st.integers(0, 5).map("e:{}".format),
        st.integers(0, 5),
        st.none() | st.floats(0, 1),
        st.none() | st.integers(1, 40_000),
    ),
    *[
        st.tuples(
            st.just("arrive"),
            NAMES,
            st.sampled_from(KEYS),
            st.integers(1, 9000),
            st.booleans(),
            st.sampled_from(["", "a", "b"]),
        )
    ]
    * 4,
    *[st.tuples(st.just("end"), st.integers(0, 999), st.booleans())] * 3,
    *[st.tuples(st.just("tick"), st.floats(0, 4))] * 2,
    st.tuples(st.just("measured"), st.integers(0, 999), st.integers(0, 9000), st.integers(0, 9000)),
    st.tuples(st.just("served"), st.integers(0, 999), st.integers(0, 4)),
)


class Driver:
    """What a picker does with a queue, in any order, sensible or not."""

    def __init__(self, policy: Policy) -> None:
        self.decisions = DecisionLog(Path("/nowhere"), policy)
        self.flow = RecordedFlow(policy, self.decisions)
        self.now, self.number, self.answers = 0.0, 0, 0

    def world(self, classes: tuple[str, ...], startable: bool, places: list[Endpoint]) -> None:
        known = {name: CLASSES[name] for name in classes}
        models = {key: Model(key, classes, startable) for key in KEYS}
        self.flow.set_world(known, models, iter(places), self.now)

    def report(self, address: str, running: int, usage: float | None, tokens: int | None) -> None:
        report = EngineReport(self.now, running, 0, usage, tokens)
        self.flow.report(address, report, *self.flow.held(address))

    def arrive(self, qos_class: str, key: tuple[str, str], tokens: int, streamed: bool, tenant: str) -> None:
        self.number += 1
        hint = (None, None, ("e:0", "e:1"), ("e:2",))[self.number % 4]
        ask = Ask(
            self.number, key, qos_class, tokens, 16,
            size=tokens, streamed=streamed, tenant=tenant, subset=hint,
        )  # fmt: skip
        self.flow.admit(ask, self.now)
        self.answers += 1
        self.pump()

    def end(self, pick: int, whole: bool) -> None:
        """Any that ever came, so that some end twice."""
        ended = self.flow.finish(1 + pick % (self.number + 1), self.now, whole=whole)
        self.answers += ended is not None
        self.pump()

    def measured(self, pick: int, prompt: int, output: int) -> None:
        """Of any that ever came, whether it runs, has ended or waits."""
        self.flow.measured(1 + pick % (self.number + 1), prompt, output)
        self.pump()

    def served(self, pick: int, place: int) -> None:
        self.flow.served(1 + pick % (self.number + 1), f"e:{place}", self.now)
        self.pump()

    def pump(self) -> None:
        self.answers += len(self.flow.expire(self.now)) + len(self.flow.dispatch(self.now))

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.pump()


@settings(max_examples=100, deadline=None)
@given(
    qos=st.booleans(),
    most=st.sampled_from([1 << 20, 1 << 20, 30_000]),
    events=st.lists(EVENT, min_size=30, max_size=80),
)
def test_a_replay_answers_as_the_live_queue_did(qos: bool, most: int, events: list[tuple[Any, ...]]) -> None:
    driver = Driver(Policy(qos=qos, max_bytes=most, fallbacks=2))
    driver.world(tuple(CLASSES), True, [Endpoint(f"e:{i}", KEYS[i % 2], "low", 2) for i in range(4)])
    driver.tick(3)  # so long that engines count though they have not reported
    for name, *arguments in events:
        getattr(driver, name)(*arguments)
    lines = driver.decisions.take().splitlines(keepends=True)
    result = replay(lines)
    assert result.first is None
    assert result.calls == len(lines) - 1
    assert result.compared == driver.answers
