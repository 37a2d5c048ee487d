"""How long one step of an engine takes, as a function of what is in the batch.

The fit is QoServe's, for Llama-3-8B on one A100. As published it has traps that a policy would
exploit: its two branches do not meet at 512 tokens (512 decodes cost 69 ms, 513 cost 6 ms), and
above 512 tokens each further decode makes the step shorter. Here every fit is made monotone in
each of its arguments and kept above a floor, so that more work never costs less time.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

JSON_VERSION: Final = 1
"""Of the plain form that `StepFit.to_json` writes."""


class StepFitError(ValueError):
    """JSON that is no step-time fit; the message names the field and what it takes."""


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
class Residual:
    """How far a fit is from the samples it was made from: absolute relative errors, 0.05 is 5%."""

    median: float
    p90: float
    samples: int


def attended(tokens: int, before: int) -> float:
    """Pairs of a chunk's tokens and the tokens that each attends to: those `before`, and half its own."""
    return tokens * (before + tokens / 2)


@dataclass(frozen=True, slots=True)
class StepFit:
    """A step-time fit: `low` up to `knee` tokens in the batch, `high` above; equal ones are one line.

    `trained_up_to` is the largest batch, in tokens, that the fit has seen: beyond it a time is an
    extrapolation and no claim should rest on it. `unidentified` names the terms that its samples
    say nothing about, such as `high.per_decode_s`: their values are defaults, not findings.

    `per_prefill_pair_s` is for engines whose attention shows: seconds for each pair of a prompt token
    and a token that it attends to, below and above the knee. The published fits have none.
    """

    name: str
    source: str
    low: Branch
    high: Branch
    knee: int
    floor_s: float
    trained_up_to: int
    unidentified: tuple[str, ...] = ()
    residual: Residual | None = None
    per_prefill_pair_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse coefficients for which `seconds` would not be monotone."""
        low, high = self.low, self.high
        rates = (
            low.per_token_s + low.per_prefill_s,
            high.per_token_s + high.per_prefill_s,
            low.per_token_s + low.per_decode_s,
            low.per_decode_context_s,
            low.per_prefill_context_s,
            high.per_decode_context_s,
            high.per_prefill_context_s,
            self.per_prefill_pair_s,
        )
        if min(rates) < 0:
            raise ValueError(f"{self.name}: only the decode rate above the knee may be negative")
        # One line is monotone anyway; two are joined at a batch that holds the decodes first.
        if low != high and low.per_decode_s < low.per_prefill_s:
            raise ValueError(f"{self.name}: below the knee a decode must cost at least a prefill token")

    def seconds(
        self,
        prefill: int,
        decodes: int,
        decode_context: int = 0,
        prefill_context: int = 0,
        prefill_pairs: float | None = None,
    ) -> float:
        """The time of one step, in seconds; 0 for an empty one.

        Args:
            prefill: prompt tokens computed in this step, of all requests.
            decodes: requests that get one output token in this step.
            decode_context: tokens that those decodes attend to, summed.
            prefill_context: tokens that were computed before this step's chunks, summed.
            prefill_pairs: what `attended` says of each of this step's chunks, summed; None takes all
                prompt tokens as one chunk behind all of that context, which is the most it can be.
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
        if self.per_prefill_pair_s:
            pairs = attended(prefill, prefill_context) if prefill_pairs is None else prefill_pairs
            time_s += self.per_prefill_pair_s * pairs
        return max(self.floor_s, time_s)

    def to_json(self) -> dict[str, Any]:
        """The fit as plain JSON: what `from_json` reads, and what a `profileRef` ConfigMap holds."""
        plain = dataclasses.asdict(self)
        plain["unidentified"] = list(self.unidentified)
        if self.residual is None:
            del plain["residual"]
        return {"version": JSON_VERSION, **plain}

    @classmethod
    def from_json(cls, data: object) -> "StepFit":
        """Read what `to_json` wrote. What has a default may be left out.

        Raises:
            StepFitError: a field is missing, unknown or not what it must be; names it.
            ValueError: the coefficients are not monotone.
        """
        plain = _fields(
            data, "", {"version"} | _names(cls), {"unidentified", "residual", "per_prefill_pair_s"}
        )
        if plain["version"] != JSON_VERSION:
            raise StepFitError(f"version must be {JSON_VERSION}, not {plain['version']!r}")
        knee, trained = (_number(plain[n], n, whole=True) for n in ("knee", "trained_up_to"))
        residual = plain.get("residual")
        return cls(
            name=_text(plain["name"], "name"),
            source=_text(plain["source"], "source"),
            low=_branch(plain["low"], "low"),
            high=_branch(plain["high"], "high"),
            knee=int(knee),
            floor_s=_number(plain["floor_s"], "floor_s"),
            trained_up_to=int(trained),
            unidentified=_texts(plain.get("unidentified", []), "unidentified"),
            residual=None if residual is None else _residual(residual),
            per_prefill_pair_s=_number(plain.get("per_prefill_pair_s", 0.0), "per_prefill_pair_s"),
        )


def _names(kind: type) -> set[str]:
    return {f.name for f in dataclasses.fields(kind)}


def _fields(data: object, path: str, known: set[str], optional: set[str]) -> Mapping[str, Any]:
    """An object with exactly the known fields, less optional ones. `path` ends with a dot, or is empty."""
    if not isinstance(data, Mapping):
        raise StepFitError(f"{path.rstrip('.') or 'the fit'} must be an object, not {data!r}")
    if missing := sorted(known - optional - data.keys()):
        raise StepFitError(f"{path}{missing[0]} is required")
    if unknown := sorted(str(k) for k in data.keys() - known):
        raise StepFitError(f"{path}{unknown[0]} is not a known field; known here: {', '.join(sorted(known))}")
    return data


def _number(value: object, path: str, *, least: float = 0.0, whole: bool = False) -> float:
    """A finite number; True is none, whatever Python says."""
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
        raise StepFitError(f"{path} must be a {'whole' if whole else 'finite'} number, not {value!r}")
    if value < least:
        raise StepFitError(f"{path} must be at least {least:g}, not {value!r}")
    return value


def _text(value: object, path: str) -> str:
    if not isinstance(value, str):
        raise StepFitError(f"{path} must be a string, not {value!r}")
    return value


def _texts(value: object, path: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise StepFitError(f"{path} must be a list of strings, not {value!r}")
    return tuple(_text(v, f"{path}[{i}]") for i, v in enumerate(value))


def _branch(value: object, path: str) -> Branch:
    plain = _fields(value, f"{path}.", _names(Branch), set())
    return Branch(**{n: _number(v, f"{path}.{n}", least=-math.inf) for n, v in plain.items()})


def _residual(value: object) -> Residual:
    plain = _fields(value, "residual.", _names(Residual), set())
    samples = _number(plain["samples"], "residual.samples", whole=True)
    median, p90 = (_number(plain[n], f"residual.{n}") for n in ("median", "p90"))
    return Residual(median, p90, int(samples))


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

LLAMA2_70B_H100_TP8 = StepFit(
    name="llama-2-70b-h100-tp8",
    source=(
        "SplitwiseSim's perf_model.csv (MIT), h100-80gb, tensor parallel 8, medians of 19 points;"
        " no step of it mixes prompts and decodes, and context made no difference up to 8,256 tokens"
    ),
    low=Branch(0.03023, 0.0, 4.839e-5, 2.934e-4, 0.0, 0.0),
    high=Branch(0.03023, 0.0, 9.132e-5, 9.132e-5, 0.0, 0.0),
    knee=2048,
    floor_s=0.03023,
    # A step of prompts; decodes were seen up to 64 at once.
    trained_up_to=32768,
    unidentified=(
        "low.per_decode_context_s",
        "low.per_prefill_context_s",
        "high.base_s",
        "high.per_decode_s",
        "high.per_decode_context_s",
        "high.per_prefill_context_s",
    ),
    # Worst are the two smallest prompts: 128 and 256 tokens took as long as 512, which two lines
    # cannot show (−37 and −17%). All others are within 9%.
    residual=Residual(0.024, 0.080, 38),
)
