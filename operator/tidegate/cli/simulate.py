"""`tidegate simulate`: a fleet in virtual time, under production's queue and under others."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer

if TYPE_CHECKING:
    from tidegate.sim.contest import Outcome
    from tidegate.sim.parallel import Progress
    from tidegate.sim.scenario import Scenario

_LINE_S: Final = 5.0
"""Where progress is not drawn, it is a line this often."""


class Output(StrEnum):
    """What goes to standard output."""

    table = "table"
    json = "json"


_Scenario = Annotated[Path, typer.Argument(help="Scenario as YAML or JSON (docs/tasks/simulate.md).")]
_Compare = Annotated[
    str,
    typer.Option(
        help="Arms, separated by commas: ours is production's queue, fifo one queue in arrival order."
    ),
]
_Seeds = Annotated[int | None, typer.Option(min=1, help="Seeds, instead of the scenario's.")]
_Seconds = Annotated[
    str | None, typer.Option(help="What to simulate, such as 600 or 10m, instead of the scenario's.")
]
_Gpus = Annotated[
    int | None,
    typer.Option(help="What if there were so many GPUs more, or fewer: -20. The lowest class gives first."),
]
_Replicas = Annotated[int | None, typer.Option(min=1, help="What if there were so many replicas in all.")]
_Reserve = Annotated[
    list[str] | None,
    typer.Option(
        help="What if a class had so many GPUs reserved: interactive=8 (needs plan; may be repeated)."
    ),
]
_Output = Annotated[Output, typer.Option("--output", "-o", help="What to print on standard output.")]
_Out = Annotated[Path | None, typer.Option(help="Write result.json and plots into this folder.")]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on standard error.")]


def simulate(
    scenario: _Scenario,
    compare: _Compare = "ours",
    seeds: _Seeds = None,
    seconds: _Seconds = None,
    gpus: _Gpus = None,
    replicas: _Replicas = None,
    reserve: _Reserve = None,
    output: _Output = Output.table,
    out: _Out = None,
    quiet: _Quiet = False,
) -> None:
    """Simulate a fleet of replicas: who waits how long, and how much gets done.

    Production's own queue runs in virtual time before engines that are modelled step by step. With
    `plan` in the scenario production's planner and placement make and move the replicas; without it
    they stay as they are. Ctrl-C prints what has ended.
    """
    from tidegate.sim.scenario import Scenario, ScenarioError

    names = _arms(compare)
    if out is not None:
        _need_plots()
    try:
        plan = Scenario.load(scenario)
        plan = _what_if(plan, seeds, seconds, gpus, replicas, reserve or (), quiet=quiet)
        outcomes, whole = _run(plan, names, quiet=quiet)
    except ScenarioError as error:
        _refuse(str(error))
    ordered = sorted(outcomes, key=lambda o: (names.index(o.arm), o.seed))
    if ordered:
        _show(plan, ordered, output, out, whole=whole)
    if not whole:
        typer.echo(
            f"simulate: stopped; {len(outcomes)} of {plan.seeds * len(names)} runs had ended", err=True
        )
        raise typer.Exit(130)


def _arms(compare: str) -> list[str]:
    """The names that are compared, each of them one of the registry."""
    from tidegate.sim.fleet_arms.registry import arm

    names = list(dict.fromkeys(name.strip() for name in compare.split(",")))
    try:
        for name in names:
            arm(name)
    except ValueError as error:
        _refuse(f"--compare: {error}")
    return names


def _run(plan: "Scenario", names: "Sequence[str]", *, quiet: bool) -> "tuple[Sequence[Outcome], bool]":
    """Run every arm with every seed; returns what ended, and whether all did. Raises ScenarioError."""
    from concurrent.futures.process import BrokenProcessPool

    from tidegate.sim import build
    from tidegate.sim.cluster.build import cluster
    from tidegate.sim.fleet_arms.registry import arm
    from tidegate.sim.parallel import Job, contest

    cluster(plan, build.setting(plan))  # whatever is wrong is said before anything runs
    if plan.plan and (own := [name for name in names if arm(name).lanes]):
        _refuse(f"arm {own[0]} parts the replicas itself, and here the plan does")
    jobs = [Job(name, seed) for seed in range(1, plan.seeds + 1) for name in names]
    try:
        with _telling(quiet=quiet) as tell:
            return contest(plan, jobs, tell)
    except BrokenProcessPool as error:
        typer.secho("simulate: a run was killed; was there memory for so many requests?", fg="red", err=True)
        raise typer.Exit(1) from error


def _refuse(message: str) -> NoReturn:
    typer.secho(f"simulate: {message}", fg="red", err=True)
    raise typer.Exit(2)


def _need_plots() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        _refuse(
            "--out draws plots with matplotlib, which is not installed: pip install 'tidegate[demo]',"
            " or leave --out away and use -o json"
        )


def _what_if(
    plan: "Scenario",
    seeds: int | None,
    seconds: str | None,
    gpus: int | None,
    replicas: int | None,
    reserve: "Sequence[str]",
    *,
    quiet: bool,
) -> "Scenario":
    """The scenario with what the options change. Raises ScenarioError."""
    from tidegate.sim import whatif
    from tidegate.sim.scenario import ScenarioError

    if gpus is not None and replicas is not None:
        raise ScenarioError("--gpus and --replicas are two ways to say one thing; give one of them")
    if seeds is not None:
        plan = plan.model_copy(update={"seeds": seeds})
    if seconds is not None:
        plan = whatif.with_seconds(plan, seconds)
    before = plan
    if gpus is not None:
        plan = whatif.with_gpus(plan, gpus)
    if replicas is not None:
        plan = whatif.with_replicas(plan, replicas)
    for text in reserve:
        plan = whatif.with_reservation(plan, text)
    changed = whatif.difference(before, plan)
    if changed and not quiet:
        what = "pool" if plan.plan else "replicas"
        typer.echo(f"what if: {what} {', '.join(changed)}", err=True)
    return plan


def _show(
    plan: "Scenario",
    outcomes: "Sequence[Outcome]",
    output: Output,
    out: Path | None,
    *,
    whole: bool,
) -> None:
    import orjson

    from tidegate.sim.summary import summarise, tables

    result = summarise(plan, outcomes, whole=whole)
    text = orjson.dumps(result, option=orjson.OPT_INDENT_2).decode()
    if out is not None:
        from tidegate.sim import plots

        out.mkdir(parents=True, exist_ok=True)
        (out / "result.json").write_text(text + "\n")
        written = [out / "result.json", *plots.write(plan, outcomes, out)]
        typer.echo(f"wrote {', '.join(str(p) for p in written)}", err=True)
    if output is Output.json:
        typer.echo(text)
        return
    console = _console()
    console.print(tables(plan, outcomes))
    for note in result["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def _console() -> Any:
    """The terminal; where there is none, wide enough that no line is folded."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=160)


# ── progress ────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _telling(*, quiet: bool) -> "Iterator[Callable[[Progress], None]]":
    """Something that shows progress on standard error."""
    if quiet:
        yield lambda _progress: None
    elif sys.stderr.isatty():
        with _bar() as tell:
            yield tell
    else:
        yield _lines()


@contextmanager
def _bar() -> "Iterator[Callable[[Progress], None]]":
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("simulating", total=None)

        def tell(progress: "Progress") -> None:
            text = f"simulating, {progress.ended} of {progress.runs} runs"
            bar.update(task, description=text, completed=progress.seconds, total=progress.of_seconds)

        yield tell


def _lines() -> "Callable[[Progress], None]":
    last = time.monotonic()

    def tell(progress: "Progress") -> None:
        nonlocal last
        if time.monotonic() - last >= _LINE_S:
            last = time.monotonic()
            typer.echo(
                f"simulate: {progress.seconds:.0f} of {progress.of_seconds:.0f} s,"
                f" {progress.ended} of {progress.runs} runs",
                err=True,
            )

    return tell
