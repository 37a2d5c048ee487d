"""`tidegate replay`: check a picker's decision log against the queue of this program."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.cli.local import Format, Output

if TYPE_CHECKING:
    from tidegate.sim.replay import Difference, Replayed


def replay(
    file: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, help="What `tidegate picker --decision-log` wrote."),
    ],
    output: Format = Output.text,
) -> None:
    """Give a recorded picker's calls to a fresh queue and compare every answer.

    Exit code 1 when one differs, 2 when the log cannot be read.
    """
    from tidegate.sim import replay as sim

    try:
        with file.open("rb") as lines:
            result = sim.replay(lines)
    except (sim.LogError, OSError) as error:
        typer.echo(f"error: {file}: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(_json(_as_object(result)) if output is Output.json else _text(result))
    if result.different:
        raise typer.Exit(1)


def _text(result: "Replayed") -> str:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in result.decisions.items())
    lines = [f"{result.compared:,} decisions in {result.calls:,} calls: {kinds}"]
    if result.cut is not None:
        lines.append(f"line {result.cut:,}, the last, is cut off, as by a kill; it was left out")
    if not result.different:
        lines.append("all answers are the same")
        return "\n".join(lines)
    lines.append(f"calls answered otherwise: {result.different:,}; the first of them:")
    for one in result.differences:
        lines += [_title(one), f"    expected  {_json(one.expected)}", f"    got       {_json(one.got)}"]
    return "\n".join(lines)


def _title(one: "Difference") -> str:
    entry = "" if one.nth is None else f", entry {one.nth + 1} of the answer"
    return f"  line {one.line}: {one.call}{entry}"


def _as_object(result: "Replayed") -> dict[str, Any]:
    return {
        "same": result.different == 0,
        "calls": result.calls,
        "compared": result.compared,
        "decisions": result.decisions,
        "different": result.different,
        "differences": result.differences,
        "cut": result.cut,
        "policy": result.policy,
    }


def _json(value: Any) -> str:
    import orjson

    return orjson.dumps(value).decode()
