"""Least squares with non-negative coefficients, for a dozen columns and some hundred rows.

Plain Python: problems this small do not earn a numerical library in every part that reads a fit.
"""

import math
from collections.abc import Sequence
from operator import mul

Column = Sequence[float]

_ENOUGH_ROUNDS = 100
"""Lawson and Hanson's rounds are finite; a dozen columns have never been seen to take forty."""


def dot(a: Column, b: Column) -> float:
    """The inner product of two columns of one length."""
    return sum(map(mul, a, b), 0.0)


def symmetric(columns: Sequence[Column]) -> list[list[float]]:
    """The inner products of all pairs of columns."""
    half = [[dot(a, b) for b in columns[: i + 1]] for i, a in enumerate(columns)]
    return [[half[max(i, j)][min(i, j)] for j in range(len(columns))] for i in range(len(columns))]


def nnls(columns: Sequence[Column], target: Column) -> list[float]:
    """The x ≥ 0 that minimises |Σ x·column − target|², by Lawson and Hanson's active sets (1974).

    Args:
        columns: linearly independent (see `dependent`), each as long as `target`.
        target: the right side.

    Raises:
        ArithmeticError: the columns are not independent.
    """
    # Columns of unit length keep the normal equations as well conditioned as they can be.
    lengths = [math.sqrt(dot(c, c)) or 1.0 for c in columns]
    unit = [[v / length for v in c] for c, length in zip(columns, lengths, strict=True)]
    gram = symmetric(unit)
    moment = [dot(c, target) for c in unit]
    tolerance = 1e-12 * max(map(abs, moment), default=0.0)
    free: list[int] = []
    x = [0.0] * len(columns)
    for _ in range(_ENOUGH_ROUNDS):
        slope = {j: moment[j] - dot(gram[j], x) for j in range(len(x)) if j not in free}
        best = max(slope, key=lambda j: slope[j], default=None)
        if best is None or slope[best] <= tolerance:
            break
        free = sorted([*free, best])
        free, x = _settle(gram, moment, free, x)
    return [value / length for value, length in zip(x, lengths, strict=True)]


def _settle(
    gram: list[list[float]], moment: list[float], free: list[int], x: list[float]
) -> tuple[list[int], list[float]]:
    """Solve for the free coefficients; those that would turn negative are held at zero."""
    while True:
        inverse = invert([[gram[i][j] for j in free] for i in free])
        wanted = dict(zip(free, (dot(row, [moment[j] for j in free]) for row in inverse), strict=True))
        if all(value > 0 for value in wanted.values()):
            return free, [wanted.get(j, 0.0) for j in range(len(x))]
        # Go towards the solution until the first coefficient reaches zero, and hold that one there.
        parts = {j: x[j] / (x[j] - v) if x[j] > 0 else 0.0 for j, v in wanted.items() if v <= 0}
        part = min(parts.values())
        free = [j for j in free if parts.get(j, math.inf) > part]
        x = [old + part * (wanted[j] - old) if j in free else 0.0 for j, old in enumerate(x)]


def invert(matrix: Sequence[Sequence[float]]) -> list[list[float]]:
    """The inverse, by Gauss and Jordan with row pivots.

    Raises:
        ArithmeticError: the matrix is singular.
    """
    size = len(matrix)
    rows = [[*row, *(float(i == j) for j in range(size))] for i, row in enumerate(matrix)]
    for at in range(size):
        pivot = max(range(at, size), key=lambda i: abs(rows[i][at]))
        if abs(rows[pivot][at]) < 1e-14:
            raise ArithmeticError("the columns are not independent")
        rows[at], rows[pivot] = rows[pivot], rows[at]
        rows[at] = [v / rows[at][at] for v in rows[at]]
        for i in range(size):
            if i != at and (factor := rows[i][at]):
                rows[i] = [v - factor * p for v, p in zip(rows[i], rows[at], strict=True)]
    return [row[size:] for row in rows]


def dependent(columns: Sequence[Column], tolerance: float = 1e-4) -> int | None:
    """The first column that is zero or, within `tolerance` of its length, a sum of those before it.

    None when all are independent. By Gram and Schmidt, each projection taken twice.
    """
    basis: list[list[float]] = []
    for index, column in enumerate(columns):
        length = math.sqrt(dot(column, column))
        rest = list(column)
        for other in (*basis, *basis):
            share = dot(rest, other)
            rest = [v - share * o for v, o in zip(rest, other, strict=True)]
        left = math.sqrt(dot(rest, rest))
        if left <= tolerance * length:
            return index
        basis.append([v / left for v in rest])
    return None
