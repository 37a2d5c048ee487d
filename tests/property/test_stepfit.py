"""Fits recover what made the samples, stay monotone, and say when they cannot know."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from support.profiles import design, line
from tidegate.core.leastsquares import nnls
from tidegate.core.stepfit import Sample, Step, fit_steps
from tidegate.core.steptime import Branch, StepFit

# What an engine may be like: a step of 1 to 50 ms, a prompt token of 2 to 200 µs, a decode of 20 µs
# to 2 ms, contexts of up to 0.5 and 5 µs a token.
LINES = st.builds(
    Branch,
    st.floats(1e-3, 5e-2),
    st.just(0.0),
    st.floats(2e-6, 2e-4),
    st.floats(2e-5, 2e-3),
    st.floats(0, 5e-7),
    st.floats(0, 5e-6),
)
SEEDS = st.integers(0, 2**32)


def fit(samples: list[Sample]) -> StepFit:
    return fit_steps(samples, name="a", source="b").fit


@given(truth=LINES, request_s=st.floats(0, 0.02))
@settings(max_examples=12, deadline=None)
def test_without_noise_every_term_that_is_claimed_is_right(truth, request_s):
    samples = design(line(truth), request_s=request_s)
    found = fit(samples)
    assert found.residual.p90 < 0.06
    if not found.unidentified:
        # Within a percent, or within a percent of the time of any step that it has a part in.
        steps = [step for sample in samples for step in sample.steps]
        largest = [1, *(max(step[i] for step in steps) for i in range(4))]
        names = ("base_s", "per_prefill_s", "per_decode_s", "per_decode_context_s", "per_prefill_context_s")
        for name, most in zip(names, largest, strict=True):
            for side in (found.low, found.high):
                error = abs(getattr(side, name) - getattr(truth, name))
                assert error <= max(0.01 * getattr(truth, name), 0.01 * truth.base_s / most)


@given(truth=LINES, seed=SEEDS)
@settings(max_examples=12, deadline=None)
def test_with_noise_steps_are_predicted_within_a_tenth(truth, seed):
    samples = design(line(truth), noise=0.02, rng=random.Random(seed), rounds=2)
    found = fit(samples)
    for sample in design(line(truth)):
        if len(sample.steps) == 1:
            assert abs(found.seconds(*sample.steps[0]) / sample.seconds - 1) < 0.1


STEP = st.builds(Step, st.integers(1, 2048), st.integers(0, 64), st.integers(0, 10**5), st.integers(0, 10**5))
SAMPLE = st.builds(
    Sample, st.lists(STEP, min_size=1, max_size=3).map(tuple), st.floats(1e-6, 10), st.integers(0, 1)
)


@given(
    samples=st.lists(SAMPLE, min_size=4, max_size=24),
    batch=st.tuples(*[st.integers(0, 4096)] * 4),
    more=st.tuples(*[st.integers(0, 4096)] * 4),
)
@settings(max_examples=40, deadline=None)
def test_whatever_was_measured_more_work_never_takes_less_time(samples, batch, more):
    found = fit(samples)
    larger = tuple(a + b for a, b in zip(batch, more, strict=True))
    assert found.seconds(*larger) >= found.seconds(*batch) * (1 - 1e-9)
    assert found.trained_up_to == max(s.prefill + s.decodes for sample in samples for s in sample.steps)
    assert StepFit.from_json(found.to_json()) == found


@given(data=st.data(), rows=st.integers(3, 12), count=st.integers(1, 3), seed=SEEDS)
@settings(deadline=None)
def test_no_other_non_negative_solution_is_better(data, rows, count, seed):
    rng = random.Random(seed)
    columns = [[rng.gauss(0.3, 1) for _ in range(rows)] for _ in range(count)]
    target = [rng.gauss(0, 1) for _ in range(rows)]

    def loss(x: list[float]) -> float:
        fitted = [sum(v * c[i] for v, c in zip(x, columns, strict=True)) for i in range(rows)]
        return sum((f - t) ** 2 for f, t in zip(fitted, target, strict=True))

    best = nnls(columns, target)
    assert min(best) >= 0
    other = data.draw(st.lists(st.floats(0, 5), min_size=count, max_size=count))
    near = [b + (o - b) / 100 for b, o in zip(best, other, strict=True)]
    assert loss(best) <= min(loss(other), loss(near)) + 1e-9
