"""Recorded requests in CSV files: read, checked row by row, and replayed."""

import csv
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Final

from tidegate.sim.scenario import ScenarioError
from tidegate.sim.workload import Length, Times

_COLUMNS: Final = {
    "timestamp": ("timestamp", "arrival_s"),
    "prompt": ("prompt", "prompt_tokens", "contexttokens"),
    "output": ("output", "output_tokens", "generatedtokens"),
    "class": ("class", "qos_class"),
    "tenant": ("tenant",),
    "model": ("model",),
}
"""Names of columns, in any case: ours, those of `tidegate load`, those of the Azure traces."""


@dataclass(frozen=True, slots=True)
class Row:
    """A recorded request. `time_s` is None where the file has no timestamps."""

    time_s: float | None
    length: Length
    qos_class: str = ""
    tenant: str = ""
    model: str = ""


@dataclass(frozen=True, slots=True)
class Trace:
    """A file's requests, by time where it has times; `columns` are those it has, by our names."""

    path: Path
    columns: frozenset[str]
    rows: tuple[Row, ...]

    @property
    def lengths(self) -> tuple[Length, ...]:
        """Prompts and outputs, in their order."""
        return tuple(row.length for row in self.rows)

    @property
    def times_s(self) -> tuple[float, ...]:
        """Seconds since the first request. Raises ScenarioError where there are none to go by."""
        times = [row.time_s for row in self.rows if row.time_s is not None]
        if not times:
            raise ScenarioError(f"{self.path} has no column timestamp; set arrivals or outstanding")
        if len(times) < 2 or times[-1] <= times[0]:
            raise ScenarioError(f"{self.path}: needs at least two rows with different timestamps")
        return tuple(t - times[0] for t in times)

    @property
    def period_s(self) -> float:
        """After how long it begins again: its span, and one mean gap."""
        times = self.times_s
        return times[-1] * len(times) / (len(times) - 1)


@cache
def read(path: Path) -> Trace:
    """Read a CSV; lines that begin with `#` are passed over.

    Raises:
        ScenarioError: It cannot be read, lacks a column, or a row is wrong: named by its number.
    """
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(line for line in file if not line.startswith("#"))
            columns = _columns(path, reader.fieldnames or ())
            rows = [_row(path, number, raw, columns) for number, raw in enumerate(reader, 1)]
    except OSError as error:
        raise ScenarioError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ScenarioError(f"{path}: not CSV: {error}") from error
    if not rows:
        raise ScenarioError(f"{path}: has no rows")
    rows.sort(key=lambda row: row.time_s or 0.0)
    return Trace(path, frozenset(columns), tuple(rows))


def _columns(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Our names of the columns that are there, to the file's."""
    given = {name.strip().lower(): name for name in names}
    found = {ours: given[alias] for ours, aliases in _COLUMNS.items() for alias in aliases if alias in given}
    for needed in ("prompt", "output"):
        if needed not in found:
            there = ", ".join(names) or "nothing"
            raise ScenarioError(
                f"{path}: has no column {needed}; the columns are timestamp, prompt, output, class, tenant,"
                f" model, of which prompt and output are needed; there is {there}"
            )
    return found


def _row(path: Path, number: int, raw: dict[str, str], columns: dict[str, str]) -> Row:
    def text(name: str) -> str:
        return (raw.get(columns[name]) or "").strip() if name in columns else ""

    try:
        prompt, output = (int(text(name)) for name in ("prompt", "output"))
        time_s = _seconds(text("timestamp")) if "timestamp" in columns else None
    except ValueError as error:
        raise ScenarioError(f"{path}: row {number}: {error}") from error
    # An engine computes at least one token of each; recorded zeros are answers that were cut off.
    length = Length(max(1, prompt), max(1, output))
    return Row(time_s, length, text("class"), text("tenant"), text("model"))


def _seconds(text: str) -> float:
    """A number of seconds, or a date and time (UTC where it names no zone)."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"timestamp {text!r} is neither seconds nor a date such as 2026-05-01T12:00:00Z"
        ) from None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def recorded(times_s: Sequence[float], period_s: float, stretch: float = 1.0) -> Times:
    """Arrivals at these times, again every `period_s`, all of it `stretch` times as long."""

    def times(_rng: random.Random) -> Iterator[float]:
        turn = 0
        while True:
            for each in times_s:
                yield (turn * period_s + each) * stretch
            turn += 1

    return times
