"""Fits a step-time model to measurements, and says what they do not tell.

The model is `StepFit`: seconds are linear in what a step holds, with one line or with one up to a
knee and one above it. Coefficients are at least zero, so that more work never costs less time.
The sum of squared *relative* errors is made small: a step of 15 ms and one of 500 ms count alike.
A second line is taken only where the samples are explained very much better with it. So is a price for
each pair of tokens that attention works on, in place of one for each token that a chunk finds computed.

A term that the samples do not tell apart from the others is left out and named:
- the price of a prompt token or of a decode is then that of the other kind, in the same line;
- what a line does not tell of its base and contexts is then what the other line says, or zero.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import mul
from statistics import median
from typing import Final, NamedTuple

from tidegate.core.leastsquares import dependent, dot, invert, nnls, symmetric
from tidegate.core.steptime import Branch, Residual, StepFit, attended

BASE, PREFILL, DECODE, DECODE_CONTEXT, PREFILL_CONTEXT = range(5)
_TERMS: Final = (
    "base_s",
    "per_prefill_s",
    "per_decode_s",
    "per_decode_context_s",
    "per_prefill_context_s",
)
_SIDES: Final = ("low", "high")
_REQUEST: Final = (2, 0)
"""The cell of what a request costs outside of its steps; no part of the model."""
_PAIRS: Final = (3, 0)
"""The cell of `StepFit.per_prefill_pair_s`, which both lines share."""

# A clock around a network and an engine is not better than this, whatever the residuals say.
_LEAST_NOISE: Final = 0.005
# Errors above this, and above two standard deviations as the median error tells them, count in
# proportion, not squared: a hiccup of the machine is no finding.
_OUTLIER: Final = 0.05
_SIGMAS: Final = 2 * 1.4826
# A term is told by the samples when twice its standard error is below half of it, or too small
# to matter: a twentieth of the time of any sample that it could change.
_TOLD_SHARE: Final = 0.5
_MATTERS: Final = 0.05
# A larger model must explain the samples so much better (difference of BIC; above 10 is "very strong"
# evidence, Kass and Raftery 1995).
_STRONG: Final = 10.0
_SIDE_SAMPLES: Final = 4
_COARSE: Final = 12
_REWEIGHTED: Final = 8
_SETTLED: Final = 1e-3

Cell = tuple[int, int]
Parameter = tuple[Cell, ...]
"""The coefficients that are one number: (side, term) each."""


class Step(NamedTuple):
    """What one step held, with one chunk of one prompt at most; the arguments of `StepFit.seconds`."""

    prefill: int
    decodes: int = 0
    decode_context: int = 0
    prefill_context: int = 0


class Sample(NamedTuple):
    """Steps, one or several in a row, and the seconds that they took together.

    `requests` is how often those seconds hold the fixed cost of a request outside of the engine's
    steps: 1 for a time to first token, 0 for a gap between two tokens.
    """

    steps: tuple[Step, ...]
    seconds: float
    requests: int = 0


@dataclass(frozen=True, slots=True)
class Fitted:
    """A fit, its seconds of each request outside of steps, and the samples' signed relative errors."""

    fit: StepFit
    request_s: float
    errors: tuple[float, ...]

    def predict(self, sample: Sample) -> float:
        """What the fit says a sample takes, in seconds."""
        return sum(self.fit.seconds(*s) for s in sample.steps) + self.request_s * sample.requests


class FitError(ValueError):
    """Samples that nothing can be fitted to."""


@dataclass(frozen=True, slots=True)
class _Solution:
    """Coefficients by cell, the cells that the samples do not tell, and how good it is (BIC)."""

    knee: int | None
    values: dict[Cell, float]
    untold: frozenset[Cell]
    bic: float


def fit_steps(samples: Sequence[Sample], *, name: str, source: str) -> Fitted:
    """Fit a step-time model to samples. The order of the samples does not matter.

    Raises:
        FitError: there are fewer than four samples, or one is not positive or holds no token.
    """
    _check(samples)
    # In one order, since a sum of floats depends on it.
    ordered = sorted(samples)
    best = _better(_solve(ordered, None), _solve(ordered, None, pairs=True))
    paired = _PAIRS in best.values
    best = _better(best, _two_lines(ordered, pairs=False))
    if paired:
        best = _better(best, _two_lines(ordered, pairs=True))
    return _fitted(samples, best, name, source)


def _better(best: _Solution, larger: _Solution | None) -> _Solution:
    """The larger model, where it earns what it has more."""
    return larger if larger is not None and larger.bic < best.bic - _STRONG else best


def _two_lines(samples: Sequence[Sample], *, pairs: bool) -> _Solution | None:
    """The best place of a knee: among some, then among all beside the best of those."""
    knees = list(_knees(samples))
    stride = 1 + len(knees) // _COARSE
    coarse = _best(samples, knees[::stride], pairs=pairs)
    if coarse is None or stride == 1:
        return coarse
    at = knees.index(coarse.knee or 0)
    return _best(samples, knees[max(0, at - stride + 1) : at + stride], pairs=pairs)


def _best(samples: Sequence[Sample], knees: Sequence[int], *, pairs: bool) -> _Solution | None:
    found = [s for knee in knees if _both_told(s := _solve(samples, knee, pairs=pairs))]
    return min(found, key=lambda s: (s.bic, s.knee or 0), default=None)


def _both_told(solution: _Solution) -> bool:
    """Whether each line has the price of at least one kind of token of its own."""
    return all(not {(side, PREFILL), (side, DECODE)} <= solution.untold for side in (0, 1))


def _check(samples: Sequence[Sample]) -> None:
    if len(samples) < 4:
        raise FitError(f"a fit needs at least 4 samples, there are {len(samples)}")
    for sample in samples:
        if not (math.isfinite(sample.seconds) and sample.seconds > 0):
            raise FitError(f"a sample's seconds must be positive, not {sample.seconds}")
        if not sample.steps or any(s.prefill + s.decodes < 1 or min(s) < 0 for s in sample.steps):
            raise FitError(f"each step of a sample must hold a token: {sample}")


def _knees(samples: Sequence[Sample]) -> Iterator[int]:
    """Where the lines may part: at batches with samples enough on either side, of different sizes."""
    sizes = sorted({s.prefill + s.decodes for sample in samples for s in sample.steps})
    for knee in sizes[2:-2]:
        above = sum(any(s.prefill + s.decodes > knee for s in sample.steps) for sample in samples)
        if above >= _SIDE_SAMPLES <= len(samples) - above:
            yield knee


def _cells(sample: Sample, knee: int | None) -> dict[Cell, float]:
    """How much of each coefficient a sample holds."""
    held: dict[Cell, float] = {}
    for step in sample.steps:
        side = int(knee is not None and step.prefill + step.decodes > knee)
        for term, amount in enumerate((1, *step)):
            if amount:
                held[side, term] = held.get((side, term), 0.0) + amount
        held[_PAIRS] = held.get(_PAIRS, 0.0) + attended(step.prefill, step.prefill_context)
    if sample.requests:
        held[_REQUEST] = float(sample.requests)
    return held


def _solve(samples: Sequence[Sample], knee: int | None, *, pairs: bool = False) -> _Solution:
    """The best coefficients for one place of the knee, with as many terms as the samples tell."""
    rows = [_cells(s, knee) for s in samples]
    seconds = [s.seconds for s in samples]
    # A gap of almost nothing must not count a thousand times.
    least = median(seconds) / 10
    scales = [max(s, least) for s in seconds]
    sides = (0,) if knee is None else (0, 1)
    terms = range(PREFILL_CONTEXT) if pairs else range(PREFILL_CONTEXT + 1)
    parameters: list[Parameter] = [((side, term),) for term in terms for side in sides]
    parameters += [(_PAIRS,), (_REQUEST,)] if pairs else [(_REQUEST,)]
    untold: set[Cell] = set()
    while True:
        columns = [_column(rows, p) for p in parameters]
        at = dependent([[v / s for v, s in zip(c, scales, strict=True)] for c in columns])
        if at is None:
            found = _robust(columns, seconds, scales)
            at = _worst(columns, found, sum(p != (_REQUEST,) for p in parameters))
        if at is None:
            values = {cell: value for p, value in zip(parameters, found.x, strict=True) for cell in p}
            # Joined lines need a decode that costs at least a prompt token (`StepFit`).
            if knee is None or values.get((0, DECODE), 0.0) >= values.get((0, PREFILL), 0.0):
                return _Solution(knee, values, frozenset(untold), _bic(found, knee))
            parameters = _merge(parameters, ((0, DECODE),), (0, PREFILL))
            continue
        untold.update(parameters[at])
        parameters = _without(parameters, parameters[at])


def _column(rows: Sequence[dict[Cell, float]], parameter: Parameter) -> list[float]:
    return [math.fsum(row.get(cell, 0.0) for cell in parameter) for row in rows]


def _without(parameters: list[Parameter], named: Parameter) -> list[Parameter]:
    """Leave a parameter out: one that can stand in for it takes its place, else it is zero."""
    side, term = named[0]
    if named[0] in {_REQUEST, _PAIRS}:
        partner = None
    elif term in {PREFILL, DECODE}:
        partner = (side, PREFILL + DECODE - term)
    else:
        partner = (1 - side, term)
    if partner is None or partner in named or not any(partner in p for p in parameters):
        return [p for p in parameters if p != named]
    return _merge(parameters, named, partner)


def _merge(parameters: list[Parameter], gone: Parameter, partner: Cell) -> list[Parameter]:
    """Make two parameters one number."""
    moved = next(p for p in parameters if gone[0] in p)
    return [p + moved if partner in p else p for p in parameters if p != moved]


class _Robust(NamedTuple):
    """A solution; and of each sample what its error counts relative to, the error, and its weight."""

    x: list[float]
    scales: list[float]
    errors: list[float]
    weights: list[float]


def _robust(columns: Sequence[Sequence[float]], seconds: Sequence[float], scales: list[float]) -> _Robust:
    """Least squares of relative errors, outliers weighted down (Huber), by weighting again and again.

    `scales` is what errors are relative to at first.

    Errors are relative to what is fitted, not to what was measured: else the samples that a late
    packet made short would count the most, and noise alone would pull the fit below the truth.
    """
    least = min(scales) / 10
    weights = [1.0] * len(seconds)
    for _ in range(_REWEIGHTED):
        factors = [w / s for w, s in zip(weights, scales, strict=True)]
        x = nnls([[*map(mul, factors, c)] for c in columns], [*map(mul, factors, seconds)])
        fitted = [dot(row, x) for row in zip(*columns, strict=True)]
        scales = [max(p, least) for p in fitted]
        errors = [(p - s) / c for p, s, c in zip(fitted, seconds, scales, strict=True)]
        limit = max(_OUTLIER, _SIGMAS * median(map(abs, errors)))
        before, weights = weights, [1.0 if abs(e) <= limit else math.sqrt(limit / abs(e)) for e in errors]
        if max(abs(a - b) for a, b in zip(before, weights, strict=True)) < _SETTLED:
            break
    return _Robust(x, scales, errors, weights)


def _worst(columns: Sequence[Sequence[float]], found: _Robust, lines: int) -> int | None:
    """The parameter that the samples tell least of, when there is one that they do not tell.

    `lines` is how many parameters the model itself still has.
    """
    count = len(found.errors)
    free = count - len(columns)
    spread = math.sqrt(_loss(found) / max(free, 1))
    # With as many coefficients as samples every error is zero, and says nothing.
    noise = max(spread, _LEAST_NOISE if free > 0 else _OUTLIER)
    relative = [[v / s for v, s in zip(c, found.scales, strict=True)] for c in columns]
    weighted = [[*map(mul, found.weights, c)] for c in relative]
    lengths = [math.sqrt(dot(c, c)) for c in weighted]
    unit = [[v / length for v in c] for c, length in zip(weighted, lengths, strict=True)]
    inverse = invert(symmetric(unit))
    worst, worst_share = None, _MATTERS
    # What is left at the end stays: an uncertain time is better than none.
    for j, column in enumerate(relative if lines > 1 else ()):
        doubt = 2.0 * noise * math.sqrt(max(0.0, inverse[j][j])) / lengths[j]
        share = doubt * max(column)
        if doubt > _TOLD_SHARE * found.x[j] and share > worst_share:
            worst, worst_share = j, share
    return worst


def _loss(found: _Robust) -> float:
    """The sum of squared errors, outliers counted in proportion."""
    return math.fsum((w * e) ** 2 for w, e in zip(found.weights, found.errors, strict=True))


def _bic(found: _Robust, knee: int | None) -> float:
    """Bayes' information criterion."""
    count = len(found.errors)
    free = len(found.x) + (knee is not None)
    return count * math.log(max(_loss(found) / count, _LEAST_NOISE**2)) + free * math.log(count)


def _fitted(samples: Sequence[Sample], solution: _Solution, name: str, source: str) -> Fitted:
    sides = (0,) if solution.knee is None else (0, 1)
    largest = max(s.prefill + s.decodes for sample in samples for s in sample.steps)
    lines = [_line(solution.values, side) for side in sides]
    fit = StepFit(
        name=name,
        source=source,
        low=lines[0],
        high=lines[-1],
        knee=largest if solution.knee is None else solution.knee,
        floor_s=lines[0].base_s,
        trained_up_to=largest,
        unidentified=_names(solution, samples),
        per_prefill_pair_s=_rounded(solution.values.get(_PAIRS, 0.0)),
    )
    fitted = Fitted(fit, _rounded(solution.values.get(_REQUEST, 0.0)), ())
    errors = tuple(fitted.predict(s) / s.seconds - 1.0 for s in samples)
    ordered = sorted(map(abs, errors))
    median_error, p90 = (_rounded(quantile(ordered, share)) for share in (0.5, 0.9))
    residual = Residual(median_error, p90, len(samples))
    return replace(fitted, fit=replace(fit, residual=residual), errors=errors)


def _line(values: dict[Cell, float], side: int) -> Branch:
    told = (_rounded(values.get((side, t), 0.0)) for t in range(5))
    base, prefill, decode, decode_context, prefill_context = told
    return Branch(base, 0.0, prefill, decode, decode_context, prefill_context)


def _rounded(value: float) -> float:
    """Four digits: no measurement of time has more."""
    return float(f"{value:.4g}")


def _names(solution: _Solution, samples: Sequence[Sample]) -> tuple[str, ...]:
    """The terms that were not told, as `StepFit.unidentified` names them."""
    untold = solution.untold - {_PAIRS}
    if _REQUEST in untold:
        untold -= {_REQUEST}
        if any(s.requests for s in samples):
            # What a request costs outside of steps is then within the base.
            untold |= {(0, BASE)}
    if solution.knee is None:
        untold |= {(1, term) for _, term in untold}
    return tuple(f"{_SIDES[side]}.{_TERMS[term]}" for side, term in sorted(untold))


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value that `share` of the values, in rising order, do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
