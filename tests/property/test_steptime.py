"""More work never takes less time, across the knee and beyond what the fit was trained on."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.core.steptime import LLAMA2_70B_H100_TP8, Branch, StepFit, attended
from tidegate.core.steptime import LLAMA3_8B_A100 as FIT

TOKENS = st.integers(0, 4096)
CONTEXT = st.integers(0, 400_000)
MORE = st.integers(0, 4096)


@pytest.mark.parametrize("fit", [FIT, LLAMA2_70B_H100_TP8], ids=lambda f: f.name)
@given(
    batch=st.tuples(TOKENS, TOKENS, CONTEXT, CONTEXT),
    more=st.tuples(MORE, MORE, MORE, MORE),
)
def test_monotone_in_every_argument(fit, batch, more):
    larger = tuple(a + b for a, b in zip(batch, more, strict=True))
    assert fit.seconds(*larger) >= fit.seconds(*batch) - 1e-12


@given(prefill=st.integers(480, 540), decodes=st.integers(480, 540))
def test_one_more_token_at_the_knee(prefill, decodes):
    for p, d in ((prefill, 0), (0, decodes), (prefill - 480, decodes - 20), (prefill - 20, decodes - 480)):
        assert FIT.seconds(p + 1, d) >= FIT.seconds(p, d)
        assert FIT.seconds(p, d + 1) >= FIT.seconds(p, d)


RATE = st.floats(0, 1e-3)
LINE = st.builds(Branch, st.floats(0, 1), RATE, RATE, RATE, RATE, RATE)


@given(line=LINE, high=LINE, knee=st.integers(0, 4096), floor_s=st.floats(0, 1))
def test_json_keeps_every_bit(line, high, knee, floor_s):
    low = Branch(line.base_s, line.per_token_s, 0.0, line.per_decode_s, 0.0, line.per_prefill_context_s)
    fit = StepFit("a", "b", low, high, knee, floor_s, 1)
    assert StepFit.from_json(json.loads(json.dumps(fit.to_json()))) == fit


@given(
    batch=st.tuples(TOKENS, TOKENS, CONTEXT, CONTEXT),
    more=st.tuples(MORE, MORE, MORE, MORE),
    pairs=st.floats(0, 1e9),
)
def test_attention_keeps_it_monotone(batch, more, pairs):
    fit = replace(FIT, per_prefill_pair_s=1e-7)
    larger = tuple(a + b for a, b in zip(batch, more, strict=True))
    assert fit.seconds(*larger) >= fit.seconds(*batch) * (1 - 1e-9)
    assert fit.seconds(*larger, pairs + 1) >= fit.seconds(*batch, pairs) * (1 - 1e-9)
    assert StepFit.from_json(json.loads(json.dumps(fit.to_json()))) == fit


@given(chunks=st.lists(st.tuples(st.integers(1, 2048), st.integers(0, 100_000)), min_size=1, max_size=4))
def test_one_chunk_is_the_most_that_tokens_can_attend_to(chunks):
    exact = sum(attended(tokens, before) for tokens, before in chunks)
    assert exact <= attended(*map(sum, zip(*chunks, strict=True)))


@given(
    line=LINE,
    knee=st.integers(0, 4096),
    batch=st.tuples(TOKENS, TOKENS, CONTEXT, CONTEXT),
    more=st.tuples(MORE, MORE, MORE, MORE),
)
def test_one_line_is_monotone_whatever_its_rates(line, knee, batch, more):
    fit = StepFit("a", "b", line, line, knee, 0.0, 1)
    larger = tuple(a + b for a, b in zip(batch, more, strict=True))
    assert fit.seconds(*larger) >= fit.seconds(*batch) * (1 - 1e-9)
