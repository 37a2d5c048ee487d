"""What is noted on pods, and what is read back from them."""

from typing import Any

import pytest

from tidegate.adapters.metrics import Sample
from tidegate.controller.demand import Occupied, occupancy
from tidegate.controller.podnotes import changes, notes_of, replica
from tidegate.core.plan.drain import Drain, Replica
from tidegate.core.quota import Ground

DRAINING, COST = "tidegate.dev/draining", "controller.kubernetes.io/pod-deletion-cost"
SINCE = "2026-01-01T00:00:10Z"


def pod(**notes: str) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "p",
            "uid": "u",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "annotations": {"tidegate.dev/slots": "16"} | notes,
        },
        "status": {"podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": "True"}]},
    }


BASE = 1767225600.0
READ = {
    "nothing said": (pod(), {}, Replica("p", True, BASE)),
    "what runs there": (
        pod(), {"10.0.0.1": Occupied(3, drained=False)}, Replica("p", True, BASE, in_flight=3),
    ),
    "marked": (pod(**{DRAINING: SINCE}), {}, Replica("p", True, BASE, marked_s=BASE + 10)),
    "empty": (
        pod(**{DRAINING: SINCE, COST: "-1000"}), {"10.0.0.1": Occupied(0, drained=True)},
        Replica("p", True, BASE, in_flight=0, marked_s=BASE + 10, empty=True),
    ),
    "released": (
        pod(**{DRAINING: SINCE, COST: "-2000"}), {},
        Replica("p", True, BASE, marked_s=BASE + 10, released=True),
    ),
    "a cost that somebody else gave it": (pod(**{COST: "-2000"}), {}, Replica("p", True, BASE)),
    "a time that cannot be read is long ago": (
        pod(**{DRAINING: "yesterday"}), {}, Replica("p", True, BASE, marked_s=0.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "occupied", "expected"), READ.values(), ids=READ)
def test_a_replica_is_read_from_its_pod(
    raw: dict[str, Any], occupied: dict[str, Occupied], expected: Replica
) -> None:
    assert replica(raw, None, occupied) == expected


def test_ground_is_passed_on() -> None:
    assert replica(pod(), Ground.LENT, {}).ground is Ground.LENT


def test_what_is_written_can_be_read_again() -> None:
    notes = notes_of(Drain(1, mark=("p",)), BASE + 10)["p"]
    assert replica(pod(**{k: v for k, v in notes.items() if v}), None, {}).marked_s == BASE + 10
    more = notes | notes_of(Drain(1, release=("p",)), BASE + 20)["p"]
    found = replica(pod(**{k: v for k, v in more.items() if v}), None, {})
    assert (found.marked_s, found.released) == (BASE + 10, True)
    assert notes_of(Drain(1, unmark=("p",)), 0.0)["p"] == {DRAINING: None, COST: None}


@pytest.mark.parametrize(
    ("have", "wanted", "expected"),
    [
        pytest.param({"a": "1"}, {"a": "1"}, {}, id="the same"),
        pytest.param({"a": "1"}, {"a": "2"}, {"a": "2"}, id="another"),
        pytest.param({}, {"a": "1"}, {"a": "1"}, id="new"),
        pytest.param({"a": "1"}, {"a": None}, {"a": None}, id="taken off"),
        pytest.param({}, {"a": None}, {}, id="not there anyway"),
    ],
)
def test_only_changes_are_written(
    have: dict[str, str], wanted: dict[str, str | None], expected: dict[str, str | None]
) -> None:
    assert changes({"metadata": {"annotations": have}}, wanted) == expected


def says(value: float, draining: str, address: str = "10.0.0.1:8000") -> Sample:
    labels = {"namespace": "ns", "model": "m", "address": address, "draining": draining}
    return Sample("tidegate_endpoint_inflight_requests", labels, value)


OCCUPANCY = {
    "nothing in flight, and told": ([says(0, "true")], True, Occupied(0, drained=True)),
    "something in flight": ([says(2, "true")], True, Occupied(2, drained=False)),
    "not told yet": ([says(0, "false")], True, Occupied(0, drained=False)),
    "one of two pickers is not told yet": ([says(0, "true"), says(0, "false")], True, Occupied(0, False)),
    "in the other order": ([says(0, "false"), says(0, "true")], True, Occupied(0, False)),
    "one of two has something": ([says(0, "true"), says(1, "true")], True, Occupied(1, False)),
    "or the other": ([says(1, "true"), says(0, "true")], True, Occupied(1, False)),
    "a picker is silent": ([says(0, "true")], False, Occupied(0, drained=False)),
}


@pytest.mark.parametrize(("samples", "whole", "expected"), OCCUPANCY.values(), ids=OCCUPANCY)
def test_occupancy(samples: list[Sample], whole: bool, expected: Occupied) -> None:
    assert occupancy(samples, whole=whole) == {"10.0.0.1": expected}


def test_occupancy_knows_ipv6() -> None:
    assert list(occupancy([says(0, "true", "[fd00::1]:8000")], whole=True)) == ["fd00::1"]
