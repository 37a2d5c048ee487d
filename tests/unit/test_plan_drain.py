"""Replicas are emptied before they go: who goes, when, and what is taken back."""

from dataclasses import replace

import pytest

from tidegate.core.plan.drain import LIMIT_S, Drain, Replica, drain, limit_s
from tidegate.core.quota import Ground
from tidegate.core.types import Objectives

NOW, LIMIT = 1000.0, 60.0


def ready(name: str, **more: object) -> Replica:
    return replace(Replica(name, ready=True, created_s=0.0, in_flight=0), **more)  # type: ignore[arg-type]


def marked(name: str, since: float = 990.0, **more: object) -> Replica:
    return ready(name, marked_s=since, **more)


BUSY = {"in_flight": 3}
CASES = {
    "nothing to do": (2, 2, [ready("a"), ready("b")], Drain(2)),
    "raised": (3, 2, [ready("a"), ready("b")], Drain(3)),
    "one is marked, and stays until it is empty": (
        1, 2, [ready("a"), ready("b", created_s=1.0)], Drain(2, mark=("b",)),
    ),
    "marked and busy": (1, 2, [ready("a"), marked("b", **BUSY)], Drain(2)),
    "not known to be empty": (1, 2, [ready("a"), marked("b", in_flight=None)], Drain(2)),
    "0 in flight, but the picker has not heard of the mark": (
        1, 2, [ready("a"), marked("b", in_flight=0)], Drain(2),
    ),
    "empty: first it is made the cheapest": (
        1, 2, [ready("a"), marked("b", empty=True)], Drain(2, release=("b",)),
    ),
    "then the lane is lowered": (
        1, 2, [ready("a"), marked("b", empty=True, released=True)], Drain(1),
    ),
    "out of time, whatever runs there": (
        1, 2, [ready("a"), marked("b", since=940.0, **BUSY)], Drain(2, release=("b",)),
    ),
    "only as far as are empty": (
        1, 3, [ready("a"), marked("b", released=True), marked("c", **BUSY)], Drain(2),
    ),
    "what is not ready goes at once, before any other": (
        1, 3, [ready("a"), ready("b"), ready("c", ready=False)], Drain(2, mark=("a",)),
    ),
    "nobody is emptied where those that are not ready suffice": (
        2, 4, [ready("a"), ready("b"), ready("c", ready=False), ready("d", ready=False)], Drain(2),
    ),
    "pods that are not there yet need not be waited for": (1, 4, [ready("a")], Drain(1)),
    "lent before spare before reserved": (
        1, 3, [ready("a", created_s=9.0), ready("b", ground=Ground.SPARE), ready("c", ground=Ground.LENT)],
        Drain(3, mark=("c", "b")),
    ),
    "fewest in flight": (1, 2, [ready("a", in_flight=1), ready("b", in_flight=2)], Drain(2, mark=("a",))),
    "unknown is the most": (1, 2, [ready("a", in_flight=9), ready("b", in_flight=None)],
                            Drain(2, mark=("a",))),
    "the youngest": (1, 2, [ready("a", created_s=1.0), ready("b", created_s=2.0)], Drain(2, mark=("b",))),
    "ties by name": (1, 2, [ready("b"), ready("a")], Drain(2, mark=("a",))),
    "who is marked stays marked, though another would be better now": (
        1, 2, [ready("a", ground=Ground.LENT), marked("b", **BUSY)], Drain(2),
    ),
    "demand came back: marks are taken off": (
        2, 2, [ready("a"), marked("b", **BUSY)], Drain(2, unmark=("b",)),
    ),
    "in part": (
        2, 3, [ready("a"), marked("b", created_s=2.0, **BUSY), marked("c", created_s=1.0, **BUSY)],
        Drain(3, unmark=("c",)),
    ),
    "lowered, and the pod is on its way out: it stays the cheapest": (
        1, 1, [ready("a"), marked("b", released=True)], Drain(1),
    ),
    "lowered, the wrong one went: the mark is taken off": (
        1, 1, [marked("b", released=True)], Drain(1, unmark=("b",)),
    ),
    "to zero": (0, 1, [marked("a", released=True)], Drain(0)),
    "raised by hand, and new pods come": (
        1, 3, [ready("a"), ready("b", ready=False), ready("c", ready=False)], Drain(1),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("target", "current", "replicas", "expected"), CASES.values(), ids=CASES)
def test_drain(target: int, current: int, replicas: list[Replica], expected: Drain) -> None:
    assert drain(target, current, replicas, LIMIT, NOW) == expected
    assert drain(target, current, replicas[::-1], LIMIT, NOW) == expected


@pytest.mark.parametrize(
    ("objectives", "seconds"),
    [
        pytest.param(Objectives(), LIMIT_S, id="none"),
        pytest.param(Objectives(completion_s=60.0), 60.0, id="its completion"),
        pytest.param(Objectives(completion_s=86400.0), 600.0, id="at most ten minutes"),
    ],
)
def test_limit(objectives: Objectives, seconds: float) -> None:
    assert limit_s(objectives) == seconds


def test_who_stands_where_another_lanes_replica_is_to_go_is_emptied_first():
    lent = Replica("lent", ready=True, created_s=1.0, ground=Ground.LENT, in_flight=0)
    asked = Replica("asked", ready=True, created_s=0.0, ground=Ground.SPARE, in_flight=9, asked=True)
    assert drain(1, 2, [lent, asked], 60.0, 100.0).mark == ("asked",)
