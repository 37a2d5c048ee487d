"""`tidegate snapshot`: a live cluster as a scenario for `tidegate simulate`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from tidegate.cli.options import Kubeconfig, path

_HEADER: Final = """\
# A cluster as it was on {when}, for `tidegate simulate`: replicas as they were, and what came.
# notes say what is assumed; change whatever you know better.
"""


class Form(StrEnum):
    """How the scenario is written."""

    yaml = "yaml"
    json = "json"


def snapshot(
    kubeconfig: Kubeconfig = None,
    picker: Annotated[
        list[str] | None,
        typer.Option(help="URL of a picker, for arrivals and lengths (port 9091); may be repeated."),
    ] = None,
    controller: Annotated[
        str | None, typer.Option(help="URL of the controller, for the GPUs that are idle (port 9090).")
    ] = None,
    window: Annotated[str, typer.Option(help="How long to count arrivals, such as 10s.")] = "10s",
    output: Annotated[Form, typer.Option("--output", "-o", help="How to write it.")] = Form.yaml,
    out: Annotated[Path | None, typer.Option(help="Write to this file instead of standard output.")] = None,
) -> None:
    """Read a cluster and write it as a scenario, to ask what if: `tidegate simulate` takes it.

    Only reads. It holds names of objects and numbers, and nothing of callers or prompts. What could
    not be read is assumed; the notes say what, and standard error why.
    """
    import asyncio

    from tidegate.sim import build
    from tidegate.sim.cluster.build import cluster
    from tidegate.sim.scenario import Scenario, ScenarioError
    from tidegate.sim.snapshot import NothingToSimulateError, document
    from tidegate.sim.survey import ClusterError, Survey

    survey = Survey(picker or (), controller, _window(window), lambda text: typer.echo(text, err=True))
    try:
        found = document(asyncio.run(survey.run(path(kubeconfig))))
    except (ClusterError, NothingToSimulateError) as error:
        for problem in (*survey.problems, error):
            typer.secho(f"snapshot: {problem}", fg="red", err=True)
        raise typer.Exit(1) from error
    try:
        scenario = Scenario.read(found)
        cluster(scenario, build.setting(scenario))
    except ScenarioError as error:
        survey.problems.append(f"the scenario has to be changed before it can be simulated: {error}")
    text = _text(found, output)
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
    for problem in survey.problems:  # last, where they are seen
        typer.secho(f"snapshot: {problem}", fg="yellow", err=True)


def _window(text: str) -> float:
    from tidegate.api.common import parse_duration

    try:
        value = parse_duration(text).total_seconds()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--window") from error
    if value <= 0:
        raise typer.BadParameter("must be longer than 0s", param_hint="--window")
    return value


def _text(found: dict[str, Any], output: Form) -> str:
    from datetime import UTC, datetime

    import orjson
    import yaml

    if output is Form.json:
        return orjson.dumps(found, option=orjson.OPT_INDENT_2).decode() + "\n"
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return _HEADER.format(when=when) + yaml.safe_dump(found, sort_keys=False, width=110, allow_unicode=True)
