"""Who stands where: named cases."""

import pytest

from tidegate.core.quota import Ground, reclaimable_pods, standing, standings
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


HOME = standing("high", reclaimable=False)
CASES = {
    "the oldest fill the reservation": (
        [pod("p2", "low"), pod("p1", "low")],
        [kept("low", 1)],
        {"p1": standing("low", True), "p2": standing(None, True)},
    ),
    "one that may not be taken never borrows": (
        [pod("p1", "high"), pod("p2", "high")],
        [kept("high", 1)],
        {"p1": HOME, "p2": standing(None, False)},
    ),
    "a pod that does not fit leaves the room to a smaller one": (
        [pod("p1", "high", 4), pod("p2", "high", 1)],
        [kept("high", 2)],
        {"p1": standing(None, False), "p2": HOME},
    ),
    "above the lane's minimum": (
        [pod("p1", "mid", lane_minimum=1), pod("p2", "mid", lane_minimum=1)],
        [],
        {"p1": standing(None, False), "p2": standing(None, True)},
    ),
    "ages that are equal are told apart by UID": (
        [pod("p2", "low", age=0.0), pod("p1", "low", age=0.0)],
        [kept("low", 1)],
        {"p1": standing("low", True), "p2": standing(None, True)},
    ),
    "the first in the list with room": (
        [pod("p1", "low", namespace="a"), pod("p2", "low", namespace="a"), pod("p3", "low", namespace="b")],
        [kept("low", 1, name="a", namespaces=frozenset({"a"})), kept("low", 1, name="all")],
        {
            "p1": standing("a", True),
            "p2": standing("all", True),
            "p3": standing(None, True),
        },
    ),
    "foreign pods stand nowhere": (
        [pod("p1", None), pod("p2", "gone")],
        [kept("gone", 8)],
        {"p1": standing(None, False), "p2": standing(None, False)},
    ),
    "one that goes cannot be taken again": (
        [pod("p1", "low", terminating=True)], [], {"p1": standing(None, False)},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("pods", "reservations", "expected"), CASES.values(), ids=CASES)
def test_standings(pods, reservations, expected):
    assert standings(pods, reservations, CLASSES) == expected


def test_a_pod_that_goes_does_not_count_towards_the_minimum():
    pods = [pod("p1", "mid", lane_minimum=1, terminating=True), pod("p2", "mid", lane_minimum=1)]
    assert reclaimable_pods(pods, CLASSES) == frozenset()


SPARE, LENT, RESERVED = Ground.SPARE, Ground.LENT, Ground.RESERVED
GROUNDS = {
    "the oldest fill the spare GPUs": (
        3, [pod("p3", "low"), pod("p1", "low"), pod("p2", "low")], [kept("high", 1)],
        {"p1": SPARE, "p2": SPARE, "p3": LENT},
    ),
    "whole pods only, and no younger one before an older": (
        5, [pod("p1", "low", 2), pod("p2", "low", 2), pod("p3", "low", 1)], [kept("high", 2)],
        {"p1": SPARE, "p2": LENT, "p3": LENT},
    ),
    "foreign pods use spare GPUs up": (
        4, [pod("p1", "low"), pod("p2", None, 2), pod("p3", "low")], [kept("high", 1)],
        {"p1": SPARE, "p2": SPARE, "p3": LENT},
    ),
    "so do those that may not be taken, beyond their reservation": (
        4, [pod("p1", "low"), pod("p2", "high", 2), pod("p3", "high", 2)], [kept("high", 2)],
        {"p1": LENT, "p2": RESERVED, "p3": SPARE},
    ),
    "what is going uses nothing up": (
        2, [pod("p1", None, terminating=True), pod("p2", "low", terminating=True), pod("p3", "low")],
        [kept("high", 1)], {"p1": SPARE, "p2": SPARE, "p3": SPARE},
    ),
    "a higher class first: only what is lower can be taken for another": (
        3, [pod("p1", "low"), pod("p2", "mid")], [kept("high", 2)],
        {"p1": LENT, "p2": SPARE},
    ),
    "more reserved than there is": (
        2, [pod("p1", "low")], [kept("high", 4)], {"p1": LENT},
    ),
    "everything reserved is in use by its own": (
        2, [pod("p1", "low"), pod("p2", "high")], [kept("high", 1)], {"p1": SPARE, "p2": RESERVED},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("capacity", "pods", "reservations", "expected"), GROUNDS.values(), ids=GROUNDS)
def test_on_whose_gpus(capacity, pods, reservations, expected):
    found = standings(pods, reservations, CLASSES, capacity)
    assert {uid: stand.ground for uid, stand in found.items()} == expected
