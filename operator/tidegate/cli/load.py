"""`tidegate load`: replay a scenario against a gateway and count what the client saw."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tidegate.load.runner import Run


def load(
    scenario: Annotated[Path, typer.Argument(help="Scenario as YAML or JSON.")],
    gateway: Annotated[str, typer.Option(help="Base URL of the gateway.")],
    out: Annotated[Path | None, typer.Option(help="Write one JSON line a request to this file.")] = None,
    drain: Annotated[float, typer.Option(help="Seconds to wait for what is under way at the end.")] = 60.0,
    progress: Annotated[bool, typer.Option(help="A JSON line a second on standard error.")] = True,
) -> None:
    """Send a scenario's requests and print, as JSON, what was answered, refused and lost."""
    import asyncio
    import gc

    import orjson

    from tidegate.load import runner
    from tidegate.load.results import summarise
    from tidegate.load.scenario import Scenario, ScenarioError

    try:
        plan = Scenario.load(scenario)
        gc.disable()  # a run is short; a collection in the middle of it would be counted as latency
        state = asyncio.run(
            runner.run(plan, gateway, drain_s=drain, observe=_print_progress if progress else None)
        )
    except ScenarioError as error:
        raise typer.BadParameter(str(error), param_hint="SCENARIO") from error
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(b"".join(orjson.dumps(r) + b"\n" for r in state.records))
    result = {"classes": summarise(state.records, plan.seconds), "lag_ms": runner.lag_ms(state.lags_s)}
    typer.echo(orjson.dumps(result, option=orjson.OPT_INDENT_2).decode())


def _print_progress(state: "Run") -> None:
    import orjson

    from tidegate.load.runner import recent

    typer.echo(orjson.dumps(recent(state)).decode(), err=True)
