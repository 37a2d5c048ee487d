"""The step-time fit: its published reference points, its clamps, its guards."""

from dataclasses import replace

import pytest

from tidegate.core.steptime import LLAMA3_8B_A100 as FIT


@pytest.mark.parametrize(
    ("prefill", "decodes", "context", "expected_ms"),
    [
        pytest.param(330, 32, 1000, 48.6, id="330 prefill tokens beside 32 decodes"),
        pytest.param(256, 0, 0, 35.7, id="prefill 256"),
        pytest.param(512, 0, 0, 56.6, id="prefill 512"),
        pytest.param(2048, 0, 0, 201.0, id="prefill 2048"),
        pytest.param(0, 1, 1000, 15.0, id="decode 1"),
        pytest.param(0, 32, 1000, 21.5, id="decode 32"),
        pytest.param(0, 128, 1000, 41.0, id="decode 128"),
    ],
)
def test_published_points_hold_within_one_percent(prefill, decodes, context, expected_ms):
    seconds = FIT.seconds(prefill, decodes, decodes * context)
    assert seconds * 1e3 == pytest.approx(expected_ms, rel=0.01)


def test_an_empty_step_takes_no_time():
    assert FIT.seconds(0, 0) == 0.0


def test_the_published_fall_at_the_knee_is_gone():
    assert FIT.seconds(0, 513) >= FIT.seconds(0, 512) > 0.06
    assert FIT.seconds(513, 0) >= FIT.seconds(512, 0)


def test_the_floor_holds_whatever_the_coefficients():
    fast = replace(FIT, low=replace(FIT.low, base_s=0.001))
    assert fast.seconds(1, 0) == fast.floor_s


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        pytest.param(replace(FIT.low, per_prefill_s=-1.0), "may be negative", id="negative prefill rate"),
        pytest.param(replace(FIT.low, per_decode_context_s=-1.0), "may be negative", id="context rate"),
        pytest.param(replace(FIT.low, per_decode_s=0.0), "at least a prefill token", id="decodes too cheap"),
    ],
)
def test_a_fit_that_cannot_be_monotone_is_refused(broken, message):
    with pytest.raises(ValueError, match=message):
        replace(FIT, low=broken)
