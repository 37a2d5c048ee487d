"""Durations survive being written and read."""

from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from tidegate.api.common import DURATION_MAX_LENGTH, format_duration, parse_duration

DURATIONS = st.timedeltas(timedelta(0), timedelta(hours=999_999)).flatmap(
    lambda t: st.sampled_from(
        [
            t // timedelta(hours=1) * timedelta(hours=1),
            timedelta(seconds=t.seconds),
            timedelta(milliseconds=t.seconds),
        ]
    )
)


@given(DURATIONS)
def test_written_and_read_is_the_same(value):
    text = format_duration(value)
    assert len(text) <= DURATION_MAX_LENGTH
    assert parse_duration(text) == value


@given(
    st.lists(
        st.tuples(st.integers(0, 999_999), st.sampled_from(["h", "m", "s", "ms"])), min_size=1, max_size=2
    )
)
def test_a_sum_is_the_sum_of_its_parts(parts):
    text = "".join(f"{n}{unit}" for n, unit in parts)
    assert parse_duration(text) == sum((parse_duration(f"{n}{u}") for n, u in parts), timedelta(0))
