"""Bound B: more batch requests than this no policy can get out of one replica beside its load.

A linear programme over what the steps of an hour sum up to: how many there were, and how many
prompt tokens, decodes and context tokens they carried. The programme knows no order and no
deadlines, splits requests at will, and counts no context of prompts; whatever a scheduler does is
one of its points. It is concave in the load, so the mean load is safe for a load that varies.

scipy is needed (the extra `sim`) and imported only when a bound is asked for.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tidegate.core.steptime import Branch, StepFit
from tidegate.sim.types import EngineConfig

# Columns of the programme: the batch rate, then steps, prefill, decodes and context a second in
# steps of up to `knee` tokens, then the same in larger ones.
_BATCH, _LOW, _HIGH, _COLUMNS = 0, 1, 5, 9


@dataclass(frozen=True, slots=True)
class Means:
    """What one request of a class costs on average, in tokens.

    `decodes` are its steps after the one that ends its prompt and gives its first token; `context`
    is what all of them together attend to.
    """

    prompt: float
    decodes: float
    context: float

    def __post_init__(self) -> None:
        """Refuse what no request can be."""
        if self.prompt <= 0 or self.decodes < 0 or self.context < 0:
            raise ValueError("prompt must be positive, decodes and context not negative")


NOTHING = Means(1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Bound:
    """The answer, and what a second or a token more would be worth.

    `prices` are shadow prices by constraint, in batch requests a second for one unit more of it;
    those that do not bind are left out. `time`'s unit is a second of the engine a second.
    """

    requests_per_s: float
    prices: dict[str, float]


def means(lengths: Iterable[tuple[int, int]]) -> Means:
    """Means of requests with (prompt, output) tokens.

    Raises:
        ValueError: there are none.
    """
    rows = list(lengths)
    if not rows:
        raise ValueError("lengths must not be empty")
    # The decode that follows output token i attends to the prompt and the i tokens so far.
    context = sum((output - 1) * prompt + output * (output - 1) / 2 for prompt, output in rows)
    return Means(
        prompt=sum(prompt for prompt, _ in rows) / len(rows),
        decodes=sum(output - 1 for _, output in rows) / len(rows),
        context=context / len(rows),
    )


def bound(
    batch: Means,
    fit: StepFit,
    config: EngineConfig,
    interactive: Means = NOTHING,
    interactive_per_s: float = 0.0,
) -> Bound:
    """The most batch requests a second that one replica can serve beside its interactive load.

    Raises:
        ValueError: the interactive load alone is more than the replica can serve.
        RuntimeError: scipy is not installed.
    """
    if interactive_per_s < 0:
        raise ValueError(f"interactive_per_s must not be negative, got {interactive_per_s}")
    limits = _limits(fit, config)
    totals = [
        ("prefill", 1, batch.prompt, interactive.prompt),
        ("decodes", 2, batch.decodes, interactive.decodes),
        ("context", 3, batch.context, interactive.context),
    ]
    # What the steps carry is what the requests need: exactly, since work cannot be left out.
    equal = [_row({_LOW + i: 1.0, _HIGH + i: 1.0, _BATCH: -need}) for _, i, need, _ in totals]
    cap = config.max_num_batched_tokens
    solved = _solver()(
        _row({_BATCH: -1.0}),
        A_ub=[row for _, row, _ in limits],
        b_ub=[right for _, _, right in limits],
        A_eq=equal,
        b_eq=[interactive_per_s * each for _, _, _, each in totals],
        # An engine whose budget is within the knee makes no larger steps.
        bounds=[(0, 0 if i >= _HIGH and cap <= fit.knee else None) for i in range(_COLUMNS)],
        method="highs",
    )
    if solved.status == 2:
        raise ValueError(
            f"interactive_per_s of {interactive_per_s:g} is more than one replica serves: lower it"
        )
    if solved.status != 0:
        raise ArithmeticError(f"the bound was not found: {solved.message}")
    prices = {name: -price for (name, _, _), price in zip(limits, solved.ineqlin.marginals, strict=True)}
    return Bound(float(solved.x[_BATCH]), {name: float(p) for name, p in prices.items() if p > 1e-12})


def _solver() -> Callable[..., Any]:
    try:
        from scipy.optimize import linprog  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise RuntimeError("bound B needs scipy: pip install 'tidegate[sim]'") from error
    solve: Callable[..., Any] = linprog
    return solve


def _limits(fit: StepFit, config: EngineConfig) -> list[tuple[str, list[float], float]]:
    """What the engine can hold and do: (name, row, right side), each row · x ≤ right side."""
    cap, seqs, kv = config.max_num_batched_tokens, config.max_num_seqs, config.kv_tokens
    low, high = _seconds(_LOW, fit.low), _seconds(_HIGH, fit.high)
    limits: list[tuple[str, list[float], float]] = [("time", _row({**low, **high}), 1.0)]
    for name, at, tokens in (("low", _LOW, min(fit.knee, cap)), ("high", _HIGH, cap)):
        limits += [
            (f"tokens, {name}", _row({at + 1: 1.0, at + 2: 1.0, at: -float(tokens)}), 0.0),
            (f"slots, {name}", _row({at + 2: 1.0, at: -float(seqs)}), 0.0),
            (f"kv, {name}", _row({at + 3: 1.0, at: -float(kv)}), 0.0),
        ]
    # A step counts as large only with more tokens than the knee: its fit is cheap below.
    limits.append(("knee", _row({_HIGH: float(fit.knee), _HIGH + 1: -1.0, _HIGH + 2: -1.0}), 0.0))
    return limits


def _seconds(at: int, branch: Branch) -> dict[int, float]:
    """The time of the steps whose columns begin at `at`, by column."""
    return {
        at: branch.base_s,
        at + 1: branch.per_token_s + branch.per_prefill_s,
        # Published negative above the knee; the engine clamps it too.
        at + 2: max(0.0, branch.per_token_s + branch.per_decode_s),
        at + 3: branch.per_decode_context_s,
    }


def _row(entries: dict[int, float]) -> list[float]:
    return [entries.get(i, 0.0) for i in range(_COLUMNS)]
