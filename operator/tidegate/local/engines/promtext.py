"""Prometheus text, written by hand: an engine process must import little and scrape cheaply."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping


def labels(pairs: Mapping[str, object]) -> str:
    """`a="x",b="y"`, escaped as the text format wants it."""
    return ",".join(f'{name}="{_escape(str(value))}"' for name, value in pairs.items())


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def family(name: str, kind: str, help_: str, samples: Iterable[tuple[str, float]]) -> list[str]:
    """A counter or gauge: its head, and a line for each (label text, value)."""
    lines = [f"# HELP {name} {help_}", f"# TYPE {name} {kind}"]
    lines += [f"{name}{{{text}}} {_number(value)}" for text, value in samples]
    return lines


def _number(value: float) -> str:
    return repr(float(value))


class Histogram:
    """Counts in buckets; `observe` costs a bisection."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Iterable[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value; a value on a bound belongs below it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """Values seen."""
        return sum(self.counts)

    def render(self, name: str, help_: str, text: str) -> list[str]:
        """The histogram's lines, with `text` as the labels common to all of them."""
        lines = [f"# HELP {name} {help_}", f"# TYPE {name} histogram"]
        seen = 0
        for bound, count in zip((*self.bounds, None), self.counts, strict=True):
            seen += count
            edge = "+Inf" if bound is None else _number(bound)
            lines.append(f'{name}_bucket{{{text},le="{edge}"}} {_number(seen)}')
        lines.append(f"{name}_sum{{{text}}} {_number(self.total)}")
        lines.append(f"{name}_count{{{text}}} {_number(seen)}")
        return lines
