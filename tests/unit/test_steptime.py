"""The step-time fit: its published reference points, its clamps, its guards."""

import json
from dataclasses import replace

import pytest

from tidegate.core.steptime import LLAMA2_70B_H100_TP8, Branch, StepFit, StepFitError
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


# JSON


@pytest.mark.parametrize("fit", [FIT, LLAMA2_70B_H100_TP8], ids=lambda f: f.name)
def test_json_gives_the_same_fit_back(fit):
    assert StepFit.from_json(json.loads(json.dumps(fit.to_json()))) == fit


def test_json_says_its_version_and_leaves_out_what_there_is_not():
    assert FIT.to_json()["version"] == 1
    assert "residual" not in FIT.to_json()
    assert LLAMA2_70B_H100_TP8.to_json()["residual"] == {"median": 0.024, "p90": 0.08, "samples": 38}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"version": 2}, "version must be 1, not 2", id="another version"),
        pytest.param({"name": 5}, "name must be a string, not 5", id="a name"),
        pytest.param({"knee": 512.5}, "knee must be a whole number, not 512.5", id="half a token"),
        pytest.param({"knee": -1}, "knee must be at least 0, not -1", id="a negative knee"),
        pytest.param({"floor_s": "1"}, "floor_s must be a finite number, not '1'", id="a string"),
        pytest.param({"floor_s": True}, "floor_s must be a finite number, not True", id="a truth value"),
        pytest.param({"floor_s": float("nan")}, "floor_s must be a finite number, not nan", id="no number"),
        pytest.param({"low": []}, "low must be an object, not", id="a list"),
        pytest.param({"low": {"base_s": 1}}, "low.per_decode_context_s is required", id="half a line"),
        pytest.param({"speed": 2}, "speed is not a known field; known here: floor_s,", id="unknown"),
        pytest.param({"unidentified": "x"}, "unidentified must be a list of strings", id="no list"),
        pytest.param({"unidentified": [1]}, "unidentified[0] must be a string, not 1", id="an item"),
        pytest.param({"residual": {"median": 1}}, "residual.p90 is required", id="half a residual"),
        pytest.param({"residual": 1}, "residual must be an object, not 1", id="no residual"),
    ],
)
def test_json_that_is_no_fit_names_the_field(change, message):
    with pytest.raises(StepFitError) as error:
        StepFit.from_json(FIT.to_json() | change)
    assert str(error.value).startswith(message)


def test_json_without_a_field_names_it():
    data = FIT.to_json()
    del data["high"]
    with pytest.raises(StepFitError, match=r"^high is required$"):
        StepFit.from_json(data)
    with pytest.raises(StepFitError, match=r"^the fit must be an object, not None$"):
        StepFit.from_json(None)


def test_a_number_deep_inside_is_named():
    data = FIT.to_json()
    data["low"]["base_s"] = None
    with pytest.raises(StepFitError, match=r"^low\.base_s must be a finite number, not None$"):
        StepFit.from_json(data)


def test_coefficients_that_are_not_monotone_are_refused():
    data = FIT.to_json()
    data["low"]["per_decode_context_s"] = -1.0
    with pytest.raises(ValueError, match="only the decode rate above the knee may be negative"):
        StepFit.from_json(data)


def test_one_line_may_price_a_decode_below_a_prompt_token():
    line = Branch(0.01, 0.0, 2e-4, 1e-4, 0.0, 0.0)
    fit = replace(FIT, low=line, high=line, knee=100)
    assert fit.seconds(200, 50) == pytest.approx(0.01 + 200 * 2e-4 + 50 * 1e-4)
    with pytest.raises(ValueError, match="a decode must cost at least"):
        replace(FIT, low=line)
