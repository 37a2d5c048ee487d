"""What holds for a forecast whatever is sent, ends, is refused and reported, in whatever order."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.core.forecast import Forecast
from tidegate.core.steptime import LLAMA3_8B_A100

DOINGS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(1, 9000), st.sampled_from([None, 0.02, 0.05])),
        st.tuples(st.just("end"), st.integers(0, 30), st.booleans()),
        st.tuples(st.just("wait"), st.floats(0, 3), st.none()),
        st.tuples(st.just("report"), st.integers(0, 5000), st.booleans()),
    ),
    max_size=120,
)


@settings(max_examples=200, deadline=None)
@given(DOINGS)
def test_ends_never_add_prefill_and_nothing_is_kept_of_who_has_gone(doings):
    forecast = Forecast(LLAMA3_8B_A100, 2048, 0.0)
    now, made, running = 0.0, 0, []
    for number, (doing, value, flag) in enumerate(doings):
        forecast.advance(now)
        before_s = forecast.backlog_s
        if doing == "take":
            forecast.take(number, value, flag, priority=number % 3)
            running.append((number, value))
            assert forecast.backlog_s > before_s
        elif doing == "end" and running:
            request, tokens = running.pop(value % len(running))
            forecast.give_back(request, tokens, served=flag)
            assert forecast.backlog_s <= before_s
        elif doing == "wait":
            now += value
        elif doing == "report":
            made += value
            forecast.calibrate(made, now, alone=flag)
        assert 0.02 <= forecast.speed <= 50
        assert forecast.credit_s(1000) <= forecast.credit_s(1)
        assert len(forecast._starting) <= len(doings)
    for request, tokens in running:
        forecast.give_back(request, tokens)
    forecast.advance(now + 1)
    assert forecast.backlog_s == 0
    assert not forecast._sent
    assert not forecast._starting


@settings(max_examples=50, deadline=None)
@given(st.floats(0.05, 20), st.integers(10, 3000), st.integers(0, 100))
def test_a_steady_load_leaves_no_prefill_behind(speed, prompt, burst):
    """After a burst, with an engine that is faster than the forecast believes and tells no counter."""
    forecast = Forecast(LLAMA3_8B_A100, 2048, 0.0)
    for request in range(burst):
        forecast.take(-request - 1, 2600, None)
    forecast.advance(0.1)
    for request in range(burst):
        forecast.give_back(-request - 1, 2600)
    for second in range(300):
        now = 1.0 + second
        forecast.advance(now)
        forecast.take(second, prompt, 0.05)
        forecast.advance(now + 0.9 / max(1.0, speed))
        forecast.give_back(second, prompt)
        assert len(forecast._starting) <= 2
    assert forecast.backlog_s < 1.0
