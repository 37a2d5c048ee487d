"""From a scenario to the requests that are sent: pure, and the same for the same seed."""

import csv
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tidegate.load.scenario import Phase, Scenario, ScenarioError, Stream


@dataclass(frozen=True, slots=True)
class Length:
    """One row of a trace: tokens in and out, and when it arrived there (0 where that is unknown)."""

    prompt_tokens: int
    output_tokens: int
    arrival_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Request:
    """One request to send. `at_s` counts from the start of the run; None means as soon as there is room."""

    index: int
    stream: str
    model: str
    prompt_tokens: int
    output_tokens: int
    at_s: float | None = None


def read_lengths(path: Path) -> list[Length]:
    """Read a trace. Raises ScenarioError naming the file and line."""
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    except OSError as error:
        raise ScenarioError(f"lengths: {path}: {error.strerror}") from error
    lengths = []
    for number, row in enumerate(rows, start=1):
        try:
            arrival = float(row.get("arrival_s") or 0.0)
            lengths.append(Length(int(row["prompt_tokens"]), int(row["output_tokens"]), arrival))
        except (KeyError, TypeError, ValueError) as error:
            raise ScenarioError(
                f"lengths: {path}: row {number}: prompt_tokens and output_tokens must be integers ({error})"
            ) from error
    if not lengths:
        raise ScenarioError(f"lengths: {path}: no rows")
    return lengths


def warp(arrivals: Sequence[float], phases: Sequence[Phase]) -> Iterator[float]:
    """Stretch a trace's arrivals so that each phase has its own mean rate.

    The trace's clock is scaled to one arrival per unit of work, and the phases' rates are
    integrated to tell when that much work is due: bursts and gaps stay in the order and shape that
    they had. What is scaled is as much of the trace as the phases need, so that the mean is theirs
    also where the trace starts with a burst; it is repeated when they outlast it. Yields seconds
    from the start.
    """
    needed = round(sum(phase.seconds * phase.per_second for phase in phases))
    gaps = [max(0.0, b - a) for a, b in pairwise(arrivals[: needed + 1])]
    total = sum(gaps)
    if total <= 0:
        raise ScenarioError("lengths: an open loop needs arrival_s to grow from row to row")
    unit = [gap * len(gaps) / total for gap in gaps]
    done, phase_start, index = 0.0, 0.0, 0
    for phase in phases:
        phase_work = phase.seconds * phase.per_second
        while done <= phase_work:
            yield phase_start + done / phase.per_second
            done += unit[index % len(unit)]
            index += 1
        done -= phase_work
        phase_start += phase.seconds


def requests(stream: Stream, scenario: Scenario) -> Iterator[Request]:
    """Yield the requests of one stream: finitely many for an open loop, else without end.

    Rows are taken in the trace's order from a place that the seed chooses; models by a generator
    of the stream's own, so that adding a stream changes no other.
    """
    rows = read_lengths(stream.lengths)
    rng = random.Random(f"{scenario.seed}/{stream.name}")  # noqa: S311 - a replay, not a secret
    first = rng.randrange(len(rows))
    rows = rows[first:] + rows[:first]
    times: Iterator[float | None]
    if stream.phases:
        times = (stream.start_s + t for t in warp(_unrolled(rows), stream.phases))
    else:
        times = iter(lambda: None, 0)
    for index, at_s in enumerate(times):
        if at_s is not None and at_s >= scenario.seconds:
            return
        row = rows[index % len(rows)]
        yield Request(
            index=index,
            stream=stream.name,
            model=rng.choice(stream.models),
            prompt_tokens=max(1, min(row.prompt_tokens, stream.max_prompt_tokens)),
            output_tokens=max(1, min(row.output_tokens, stream.max_output_tokens)),
            at_s=at_s,
        )


def _unrolled(rows: Sequence[Length]) -> list[float]:
    """Arrivals of a rotated trace, made to grow again where it wraps around."""
    offset, last, result = 0.0, rows[0].arrival_s, []
    for row in rows:
        if row.arrival_s < last:
            offset += last
        last = row.arrival_s
        result.append(offset + row.arrival_s)
    return result
