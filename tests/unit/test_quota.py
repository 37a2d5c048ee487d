"""Who stands where: named cases."""

import pytest

from tidegate.core.quota import Standing, reclaimable_pods, standings
from tidegate.core.types import Pod, QoSClass, Reclaim, Reservation

CLASSES = {
    "high": QoSClass("high", 1000),
    "mid": QoSClass("mid", 500, Reclaim.ABOVE_MINIMUM),
    "low": QoSClass("low", 0, Reclaim.ALWAYS),
}


def pod(uid, qos, gpus=1, age=None, **more):
    created = float(uid[1:]) if age is None else age
    return Pod(uid, uid, more.pop("namespace", "ns"), gpus, created, qos_class=qos, model="m", **more)


def kept(qos, gpus, **more):
    return Reservation(more.pop("name", qos), qos, gpus, **more)


HOME = Standing("high", reclaimable=False, borrowed=False)
CASES = {
    "the oldest fill the reservation": (
        [pod("p2", "low"), pod("p1", "low")],
        [kept("low", 1)],
        {"p1": Standing("low", True, False), "p2": Standing(None, True, True)},
    ),
    "one that may not be taken never borrows": (
        [pod("p1", "high"), pod("p2", "high")],
        [kept("high", 1)],
        {"p1": HOME, "p2": Standing(None, False, False)},
    ),
    "a pod that does not fit leaves the room to a smaller one": (
        [pod("p1", "high", 4), pod("p2", "high", 1)],
        [kept("high", 2)],
        {"p1": Standing(None, False, False), "p2": HOME},
    ),
    "above the lane's minimum": (
        [pod("p1", "mid", lane_minimum=1), pod("p2", "mid", lane_minimum=1)],
        [],
        {"p1": Standing(None, False, False), "p2": Standing(None, True, True)},
    ),
    "ages that are equal are told apart by UID": (
        [pod("p2", "low", age=0.0), pod("p1", "low", age=0.0)],
        [kept("low", 1)],
        {"p1": Standing("low", True, False), "p2": Standing(None, True, True)},
    ),
    "the first in the list with room": (
        [pod("p1", "low", namespace="a"), pod("p2", "low", namespace="a"), pod("p3", "low", namespace="b")],
        [kept("low", 1, name="a", namespaces=frozenset({"a"})), kept("low", 1, name="all")],
        {
            "p1": Standing("a", True, False),
            "p2": Standing("all", True, False),
            "p3": Standing(None, True, True),
        },
    ),
    "foreign pods stand nowhere": (
        [pod("p1", None), pod("p2", "gone")],
        [kept("gone", 8)],
        {"p1": Standing(None, False, False), "p2": Standing(None, False, False)},
    ),
    "one that goes cannot be taken again": (
        [pod("p1", "low", terminating=True)], [], {"p1": Standing(None, False, False)},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("pods", "reservations", "expected"), CASES.values(), ids=CASES)
def test_standings(pods, reservations, expected):
    assert standings(pods, reservations, CLASSES) == expected


def test_a_pod_that_goes_does_not_count_towards_the_minimum():
    pods = [pod("p1", "mid", lane_minimum=1, terminating=True), pod("p2", "mid", lane_minimum=1)]
    assert reclaimable_pods(pods, CLASSES) == frozenset()
