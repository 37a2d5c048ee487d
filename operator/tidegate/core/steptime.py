"""How long one step of an engine takes, as a function of what is in the batch.

The fit is QoServe's, for Llama-3-8B on one A100. As published it has traps that a policy would
exploit: its two branches do not meet at 512 tokens (512 decodes cost 69 ms, 513 cost 6 ms), and
above 512 tokens each further decode makes the step shorter. Here every fit is made monotone in
each of its arguments and kept above a floor, so that more work never costs less time.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Branch:
    """One linear piece of a fit: seconds, and seconds per token of each kind."""

    base_s: float
    per_token_s: float
    per_prefill_s: float
    per_decode_s: float
    per_decode_context_s: float
    per_prefill_context_s: float


@dataclass(frozen=True, slots=True)
class StepFit:
    """A published step-time fit: `low` up to `knee` tokens in the batch, `high` above.

    `trained_up_to` is the largest batch, in tokens, that the fit has seen: beyond it a time is an
    extrapolation and no claim should rest on it.
    """

    name: str
    source: str
    low: Branch
    high: Branch
    knee: int
    floor_s: float
    trained_up_to: int

    def __post_init__(self) -> None:
        """Refuse coefficients for which `seconds` would not be monotone."""
        low, high = self.low, self.high
        rates = (
            low.per_token_s + low.per_prefill_s,
            high.per_token_s + high.per_prefill_s,
            low.per_decode_context_s,
            low.per_prefill_context_s,
            high.per_decode_context_s,
            high.per_prefill_context_s,
        )
        if min(rates) < 0:
            raise ValueError(f"{self.name}: only the decode rate above the knee may be negative")
        if low.per_decode_s < low.per_prefill_s:
            raise ValueError(f"{self.name}: below the knee a decode must cost at least a prefill token")

    def seconds(self, prefill: int, decodes: int, decode_context: int = 0, prefill_context: int = 0) -> float:
        """The time of one step, in seconds; 0 for an empty one.

        Args:
            prefill: prompt tokens computed in this step, of all requests.
            decodes: requests that get one output token in this step.
            decode_context: tokens that those decodes attend to, summed.
            prefill_context: tokens that were computed before this step's chunks, summed.
        """
        tokens = prefill + decodes
        if tokens == 0:
            return 0.0
        low = self.low
        # Up to the knee this is the fit. Above it, it is the dearest batch at the knee that this
        # one contains: what the step costs at least. A decode is dearer than a prefill token, so
        # that batch takes the decodes first; decodes beyond the knee go on at the lower rate.
        held = prefill if tokens <= self.knee else max(0, self.knee - decodes)
        time_s = (
            low.base_s
            + low.per_token_s * (held + decodes)
            + low.per_prefill_s * held
            + low.per_decode_s * decodes
            + low.per_decode_context_s * decode_context
            + low.per_prefill_context_s * prefill_context
        )
        if tokens > self.knee:
            high = self.high
            above_s = (
                high.base_s
                + (high.per_token_s + high.per_prefill_s) * prefill
                # Published negative: clamped, since a further decode cannot shorten a step.
                + max(0.0, high.per_token_s + high.per_decode_s) * decodes
                + high.per_decode_context_s * decode_context
                + high.per_prefill_context_s * prefill_context
            )
            time_s = max(time_s, above_s)
        return max(time_s, self.floor_s)


LLAMA3_8B_A100 = StepFit(
    name="llama-3-8b-a100",
    source="QoServe, fitted step time of Llama-3-8B on A100, chunks up to 2,552 tokens",
    low=Branch(0.014936, 5.882e-5, 2.248e-5, 3.635e-5, 1.111e-7, 7.555e-7),
    high=Branch(0.005004, 2.719e-5, 6.863e-5, -4.144e-5, 1.663e-7, 2.727e-6),
    knee=512,
    # A step reads all the weights, whatever it carries: just under the fit's own constant.
    floor_s=0.0145,
    trained_up_to=2552,
)
