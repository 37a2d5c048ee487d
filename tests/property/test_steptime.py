"""More work never takes less time, across the knee and beyond what the fit was trained on."""

from hypothesis import given
from hypothesis import strategies as st

from tidegate.core.steptime import LLAMA3_8B_A100 as FIT

TOKENS = st.integers(0, 4096)
CONTEXT = st.integers(0, 400_000)
MORE = st.integers(0, 4096)


@given(
    batch=st.tuples(TOKENS, TOKENS, CONTEXT, CONTEXT),
    more=st.tuples(MORE, MORE, MORE, MORE),
)
def test_monotone_in_every_argument(batch, more):
    larger = tuple(a + b for a, b in zip(batch, more, strict=True))
    assert FIT.seconds(*larger) >= FIT.seconds(*batch) - 1e-12


@given(prefill=st.integers(480, 540), decodes=st.integers(480, 540))
def test_one_more_token_at_the_knee(prefill, decodes):
    for p, d in ((prefill, 0), (0, decodes), (prefill - 480, decodes - 20), (prefill - 20, decodes - 480)):
        assert FIT.seconds(p + 1, d) >= FIT.seconds(p, d)
        assert FIT.seconds(p, d + 1) >= FIT.seconds(p, d)
