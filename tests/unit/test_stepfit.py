"""Fits of step time: what is recovered, what is named as not told, and the second published fit."""

import csv
import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from support.profiles import design, line
from tidegate.core.leastsquares import dependent, nnls
from tidegate.core.stepfit import FitError, Fitted, Sample, Step, fit_steps
from tidegate.core.steptime import LLAMA2_70B_H100_TP8, LLAMA3_8B_A100, Branch, StepFit

ONE = line(Branch(0.010, 0.0, 1e-4, 2e-4, 1e-7, 1e-6))
TWO = StepFit(
    "two",
    "",
    Branch(0.020, 0.0, 2e-5, 2e-4, 1e-7, 1e-6),
    Branch(0.004, 0.0, 1e-4, 5e-5, 2e-7, 2e-6),
    200,
    0,
    1,
)


def fit(samples: list[Sample]) -> Fitted:
    return fit_steps(samples, name="a model", source="a test")


def terms(branch: Branch) -> tuple[float, ...]:
    """Base, and what a token of each kind costs in all."""
    return (
        branch.base_s,
        branch.per_token_s + branch.per_prefill_s,
        branch.per_token_s + branch.per_decode_s,
        branch.per_decode_context_s,
        branch.per_prefill_context_s,
    )


# Least squares


@pytest.mark.parametrize(
    ("columns", "target", "expected"),
    [
        pytest.param([[1, 1, 1], [0, 1, 2]], [1, 3, 5], [1, 2], id="exact"),
        pytest.param([[1, 1, 1], [0, 1, 2]], [3, 2, 1], [2, 0], id="a falling slope is held at zero"),
        pytest.param([[1, 0], [0, 1]], [-1, -2], [0, 0], id="all held at zero"),
        pytest.param([[1, 0], [0, 1]], [0, 0], [0, 0], id="nothing to explain"),
        pytest.param([[1e-9, 2e-9], [1, 1]], [5, 8], [3e9, 2], id="columns of very different size"),
    ],
)
def test_non_negative_least_squares(columns, target, expected):
    assert nnls(columns, target) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("columns", "first"),
    [
        pytest.param([[1, 1, 1], [0, 1, 2]], None, id="none"),
        pytest.param([[1, 1, 1], [0, 0, 0]], 1, id="nothing in it"),
        pytest.param([[1, 1, 1], [0, 1, 2], [2, 3, 4]], 2, id="a sum of two"),
        pytest.param([[1, 1], [1, 2], [1, 3]], 2, id="more columns than rows"),
    ],
)
def test_the_first_dependent_column(columns, first):
    assert dependent(columns) == first


# Recovery


def test_one_line_is_recovered():
    found = fit(design(ONE, request_s=0.004))
    assert found.fit.low == found.fit.high
    assert terms(found.fit.low) == pytest.approx(terms(ONE.low), rel=0.01)
    assert found.request_s == pytest.approx(0.004, rel=0.01)
    assert found.fit.unidentified == ()
    assert found.fit.residual.p90 < 1e-3
    assert found.fit.trained_up_to == 2048


def test_two_lines_and_their_knee_are_recovered():
    found = fit(design(TWO, request_s=0.004))
    # The knee is only told to lie between two sizes that were seen.
    assert 128 <= found.fit.knee < 256
    assert terms(found.fit.low)[:3] == pytest.approx(terms(TWO.low)[:3], rel=0.01)
    assert terms(found.fit.high) == pytest.approx(terms(TWO.high), rel=0.01)
    assert found.request_s == pytest.approx(0.004, rel=0.02)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("truth", [pytest.param(ONE, id="one line"), pytest.param(TWO, id="two lines")])
def test_noise_of_three_percent_stays_out_of_the_steps(truth, seed):
    samples = design(truth, noise=0.03, rng=random.Random(seed), rounds=3)
    found = fit(samples)
    assert 0.01 < found.fit.residual.median < 0.04
    for prefill, decodes in [(0, 1), (0, 32), (64, 8), (100, 0), (600, 0), (600, 32), (1500, 8)]:
        context = 100 * decodes
        expected = truth.seconds(prefill, decodes, context)
        assert found.fit.seconds(prefill, decodes, context) == pytest.approx(expected, rel=0.07)


@pytest.mark.parametrize("seed", range(3))
def test_attention_is_recovered_where_there_is_any(seed):
    truth = replace(line(Branch(0.006, 0.0, 7e-5, 2e-4, 7e-7, 0.0)), per_prefill_pair_s=7e-8)
    samples = design(truth, request_s=0.004, noise=0.03, rng=random.Random(seed), rounds=3)
    # Little and much behind whole chunks: a token's price with a context, not a step's.
    samples += [
        Sample((*[Step(2048, 0, 0, 2048 * i) for i in range(n)], Step(60, 0, 0, 2048 * n)), seconds, 1)
        for n in (1, 4)
        for seconds in [
            truth.seconds(60, 0, 0, 2048 * n) + sum(truth.seconds(2048, 0, 0, 2048 * i) for i in range(n))
        ]
    ]
    found = fit(samples).fit
    assert found.per_prefill_pair_s == pytest.approx(7e-8, rel=0.1)
    assert found.unidentified == ()
    for step in (Step(60), Step(2048), Step(60, 8, 1000, 8192), Step(2048, 0, 0, 8192)):
        assert found.seconds(*step) == pytest.approx(truth.seconds(*step), rel=0.1)


def test_no_attention_is_found_where_there_is_none():
    for truth in (ONE, TWO, LLAMA3_8B_A100):
        assert fit(design(truth, request_s=0.004)).fit.per_prefill_pair_s == 0


@pytest.mark.parametrize("seed", range(5))
def test_coefficients_survive_noise(seed):
    found = fit(design(ONE, noise=0.03, rng=random.Random(seed), rounds=3))
    assert found.fit.low == found.fit.high
    assert terms(found.fit.low)[:3] == pytest.approx(terms(ONE.low)[:3], rel=0.1)


def test_hiccups_do_not_move_it():
    samples = design(ONE, noise=0.01, rng=random.Random(1))
    samples = [s._replace(seconds=s.seconds * (5 if i % 12 == 0 else 1)) for i, s in enumerate(samples)]
    assert terms(fit(samples).fit.low)[:3] == pytest.approx(terms(ONE.low)[:3], rel=0.1)


def test_gaps_of_almost_nothing_do_not_move_it():
    samples = design(ONE, noise=0.01, rng=random.Random(1))
    samples = [s._replace(seconds=1e-6 if i % 12 == 0 else s.seconds) for i, s in enumerate(samples)]
    assert terms(fit(samples).fit.low)[:3] == pytest.approx(terms(ONE.low)[:3], rel=0.15)


def test_the_published_fit_is_found_again():
    found = fit(design(LLAMA3_8B_A100, request_s=0.002)).fit
    assert 400 <= found.knee <= 620
    assert terms(found.low)[:4] == pytest.approx(terms(LLAMA3_8B_A100.low)[:4], rel=0.03)
    assert terms(found.high)[1] == pytest.approx(terms(LLAMA3_8B_A100.high)[1], rel=0.03)


def test_a_falling_time_becomes_a_flat_one():
    samples = [Sample((Step(0, n, 100 * n),), 0.03 - 0.0001 * n) for n in range(1, 33)]
    found = fit(samples).fit
    times = [found.seconds(0, n, 100 * n) for n in range(1, 64)]
    assert times == sorted(times)


def test_the_order_of_samples_does_not_matter():
    samples = design(TWO, noise=0.02, rng=random.Random(2))
    assert fit(samples[::-1]).fit == fit(samples).fit


def test_decodes_cheaper_than_prompt_tokens_are_kept_in_one_line():
    truth = line(Branch(0.010, 0.0, 2e-4, 5e-5, 0.0, 0.0))
    found = fit(design(truth)).fit
    assert terms(found.low)[:3] == pytest.approx(terms(truth.low)[:3], rel=0.01)


# What is not told


def both(*names: str) -> set[str]:
    return {f"{side}.{name}" for side in ("low", "high") for name in names}


PREFILLS = [Sample((Step(p),), ONE.seconds(p, 0), 1) for p in (32, 64, 128, 256, 512, 1024, 2000)]
DECODES = [Sample((Step(0, n, n * 64),), ONE.seconds(0, n, n * 64)) for n in (1, 2, 4, 8, 16, 32)]
LONG = [Sample((Step(0, n, n * c),), ONE.seconds(0, n, n * c)) for n, c in ((1, 8000), (8, 4000), (32, 2000))]
CHUNKS = [Sample((Step(p, 0, 0, 50_000),), ONE.seconds(p, 0, 0, 50_000), 1) for p in (100, 1000, 2000)]


@pytest.mark.parametrize(
    ("samples", "untold"),
    [
        pytest.param(
            PREFILLS,
            both("base_s", "per_decode_s", "per_decode_context_s", "per_prefill_context_s"),
            id="prompts alone: the base may be the requests'",
        ),
        pytest.param(
            DECODES,
            both("per_prefill_s", "per_decode_context_s", "per_prefill_context_s"),
            id="decodes at one context",
        ),
        pytest.param(
            DECODES + LONG, both("per_prefill_s", "per_prefill_context_s"), id="decodes at several contexts"
        ),
        pytest.param(
            PREFILLS + DECODES,
            both("per_decode_context_s", "per_prefill_context_s"),
            id="prompts and decodes",
        ),
        pytest.param(PREFILLS + DECODES + LONG, both("per_prefill_context_s"), id="no chunks"),
        pytest.param(PREFILLS + DECODES + LONG + CHUNKS, set(), id="everything"),
        pytest.param(
            DECODES[3:4] * 6,
            both("per_prefill_s", "per_decode_s", "per_decode_context_s", "per_prefill_context_s"),
            id="one batch again and again",
        ),
    ],
)
def test_what_the_samples_do_not_tell_is_named(samples, untold):
    found = fit(samples)
    assert set(found.fit.unidentified) == untold
    assert found.fit.residual.p90 < 0.02


def test_an_unknown_kind_of_token_is_priced_as_the_other():
    assert terms(fit(PREFILLS).fit.low)[2] == terms(fit(PREFILLS).fit.low)[1] == pytest.approx(1e-4)
    # With one context a stream's context is part of its price.
    price = 2e-4 + 64 * 1e-7
    assert terms(fit(DECODES).fit.low)[1] == terms(fit(DECODES).fit.low)[2] == pytest.approx(price)


def test_a_term_that_drowns_in_noise_is_not_claimed():
    rng = random.Random(4)
    far = [Sample((Step(0, 1, c),), 0.02 * (1 + rng.gauss(0, 0.2))) for c in (100, 200, 300, 400) * 3]
    assert "low.per_decode_context_s" in fit(far).fit.unidentified


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        pytest.param([], "at least 4 samples, there are 0", id="none"),
        pytest.param(DECODES[:3], "at least 4 samples, there are 3", id="three"),
        pytest.param([*DECODES, Sample((Step(1),), 0.0)], "must be positive, not 0", id="no time"),
        pytest.param(
            [*DECODES, Sample((Step(1),), float("nan"))], "must be positive, not nan", id="no number"
        ),
        pytest.param([*DECODES, Sample((Step(0),), 0.1)], "must hold a token", id="an empty step"),
        pytest.param([*DECODES, Sample((), 0.1)], "must hold a token", id="no step"),
        pytest.param([*DECODES, Sample((Step(1, -1),), 0.1)], "must hold a token", id="less than nothing"),
    ],
)
def test_samples_that_cannot_be_fitted(samples, message):
    with pytest.raises(FitError, match=message):
        fit(samples)


# Llama-2-70B


def published() -> list[Sample]:
    """The medians of the 19 points, two samples each: the prompt's step, and a decode in mid-answer."""
    path = Path(__file__).parent / "data/splitwise_llama2_70b_h100_tp8.csv"
    points: dict[tuple[int, ...], list[tuple[float, float]]] = defaultdict(list)
    with path.open(newline="") as file:
        for row in csv.DictReader(text for text in file if not text.startswith("#")):
            key = tuple(int(row[name]) for name in ("prompt_size", "batch_size", "token_size"))
            points[key].append((float(row["prompt_time"]) / 1e3, float(row["token_time"]) / 1e3))
    samples = []
    for (prompt, batch, tokens), times in points.items():
        context = batch * (prompt + tokens // 2)
        samples.append(Sample((Step(prompt * batch),), median(t for t, _ in times)))
        samples.append(Sample((Step(0, batch, context),), median(t for _, t in times)))
    return samples


def test_the_second_published_fit_is_what_its_rows_give():
    found = fit(published()).fit
    constant = LLAMA2_70B_H100_TP8
    assert (constant.low, constant.high) == (found.low, found.high)
    assert (constant.knee, constant.trained_up_to) == (found.knee, found.trained_up_to)
    assert constant.unidentified == found.unidentified
    residual = constant.residual
    assert (found.residual.median, found.residual.p90) == pytest.approx(
        (residual.median, residual.p90), abs=1e-3
    )
    assert found.residual.samples == residual.samples == 2 * 19


@pytest.mark.parametrize("sample", published(), ids=lambda s: str(s.steps[0][:3]))
def test_the_second_published_fit_is_as_near_to_its_rows_as_it_says(sample):
    step = sample.steps[0]
    error = LLAMA2_70B_H100_TP8.seconds(*step) / sample.seconds - 1.0
    stated = {128: 0.38, 256: 0.18}.get(step.prefill, 0.09)
    assert abs(error) <= stated
