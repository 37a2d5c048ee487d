"""What holds for every set of pods and reservations."""

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.core.quota import standings
from tidegate.core.types import Pod, QoSClass, Reclaim, Reservation

CLASSES = {
    "high": QoSClass("high", 1000),
    "mid": QoSClass("mid", 500, Reclaim.ABOVE_MINIMUM),
    "low": QoSClass("low", 0, Reclaim.ALWAYS),
}
NAMES = st.sampled_from([*CLASSES, None])
SETTINGS = settings(max_examples=200, deadline=None)


@st.composite
def pods(draw):
    made = []
    for i in range(draw(st.integers(0, 12))):
        qos = draw(NAMES)
        made.append(
            Pod(f"u{i}", f"u{i}", draw(st.sampled_from("xy")), draw(st.integers(1, 4)),
                draw(st.integers(0, 5)), qos_class=qos, model="m" if qos else None,
                terminating=draw(st.booleans()), lane_minimum=1)
        )  # fmt: skip
    return made


RESERVATIONS = st.lists(
    st.builds(
        Reservation,
        name=st.sampled_from("abcd"),
        qos_class=st.sampled_from(sorted(CLASSES)),
        gpus=st.integers(0, 8),
        namespaces=st.sampled_from([None, frozenset("x")]),
    ),
    unique_by=lambda r: r.name,
    max_size=4,
)


@SETTINGS
@given(pods(), RESERVATIONS)
def test_no_reservation_holds_more_than_it_has_nor_a_pod_that_it_does_not_cover(seen, kept):
    found = standings(seen, kept, CLASSES)
    by_name = {r.name: r for r in kept}
    used = Counter()
    assert found.keys() == {p.uid for p in seen}
    for pod in seen:
        home = found[pod.uid].reservation
        if home is not None:
            assert by_name[home].covers(pod.qos_class, pod.namespace)
            used[home] += pod.gpus
    assert all(used[r.name] <= r.gpus for r in kept)


@SETTINGS
@given(pods(), RESERVATIONS)
def test_what_borrows_can_be_taken_and_is_at_home_nowhere(seen, kept):
    for pod in seen:
        stand = standings(seen, kept, CLASSES)[pod.uid]
        if stand.borrowed:
            assert stand.reclaimable
            assert stand.reservation is None
        if stand.reclaimable:
            assert not pod.terminating
            assert CLASSES[pod.qos_class].may_borrow


@SETTINGS
@given(pods(), RESERVATIONS, st.randoms(use_true_random=False))
def test_the_order_of_pods_is_irrelevant(seen, kept, rng):
    assert standings(rng.sample(seen, len(seen)), kept, CLASSES) == standings(seen, kept, CLASSES)


@SETTINGS
@given(pods(), RESERVATIONS)
def test_a_younger_pod_changes_nothing_for_the_older(seen, kept):
    before = standings(seen, kept, CLASSES)
    newcomer = Pod("z", "z", "x", 1, 99.0, qos_class="low", model="m", lane_minimum=1)
    after = standings([*seen, newcomer], kept, CLASSES)
    assert {uid: after[uid] for uid in before} == before


@SETTINGS
@given(pods(), st.integers(0, 8))
def test_a_larger_reservation_never_makes_more_pods_borrow(seen, gpus):
    seen = [replace(p, gpus=1) for p in seen]
    borrowed = [
        sum(s.borrowed for s in standings(seen, [Reservation("r", "low", n)], CLASSES).values())
        for n in (gpus, gpus + 1)
    ]
    assert borrowed[1] <= borrowed[0]
