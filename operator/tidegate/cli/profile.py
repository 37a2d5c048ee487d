"""`tidegate profile`: measure a running engine and fit its step time."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Output(StrEnum):
    """How the profile is printed."""

    TEXT = "text"
    JSON = "json"
    CONFIGMAP = "configmap"


def profile(
    url: Annotated[str, typer.Argument(help="Base URL of the engine, such as http://127.0.0.1:8000.")],
    model: Annotated[str, typer.Option(help="Name that the engine serves the model under.")],
    chunk: Annotated[
        int, typer.Option(help="Tokens that a step holds at most: the engine's --max-num-batched-tokens.")
    ] = 2048,
    streams: Annotated[int, typer.Option(help="Most streams at once.")] = 32,
    seconds: Annotated[float, typer.Option(help="Most seconds that the measuring takes.")] = 60.0,
    output: Annotated[Output, typer.Option("--output", "-o", help="What to print.")] = Output.TEXT,
    out: Annotated[Path | None, typer.Option(help="Write it to this file instead.")] = None,
    token_env: Annotated[
        str | None, typer.Option(help="Environment variable with the engine's bearer token.")
    ] = None,
    progress: Annotated[bool, typer.Option(help="A line an experiment on standard error.")] = True,
) -> None:
    """Measure a running OpenAI-compatible engine and fit its step-time model.

    The engine should be idle: other traffic would be measured as its own.
    """
    import asyncio
    import gc

    import orjson

    from tidegate.core.stepfit import FitError
    from tidegate.profile import report
    from tidegate.profile.client import EngineError
    from tidegate.profile.run import Settings
    from tidegate.profile.run import profile as measure

    settings = Settings(url, model, chunk, streams, seconds, _token(token_env))
    gc.disable()  # a run is short; a collection in the middle of it would be counted as a step
    try:
        found = asyncio.run(measure(settings, lambda line: typer.echo(line, err=True) if progress else None))
    except (EngineError, FitError, ValueError) as error:
        typer.echo(f"Cannot profile {url}: {error}", err=True)
        raise typer.Exit(1) from error
    finally:
        gc.enable()
    match output:
        case Output.TEXT:
            text = report.as_text(found) + "\n"
        case Output.JSON:
            text = orjson.dumps(report.as_json(found), option=orjson.OPT_INDENT_2).decode() + "\n"
        case Output.CONFIGMAP:
            text = report.as_configmap(found)
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")


def _token(variable: str | None) -> str | None:
    if variable is None:
        return None
    token = os.environ.get(variable)
    if not token:
        raise typer.BadParameter(f"${variable} is empty", param_hint="--token-env")
    return token
