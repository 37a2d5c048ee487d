"""`tidegate controller`."""

from typing import Annotated

import typer

from tidegate.cli.options import Format, Host, Kubeconfig, Level, LogFormat, LogLevel, log_to_stderr, path


def controller(
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of /metrics, /readyz and /debug/decisions.")] = 9090,
    kubeconfig: Kubeconfig = None,
    picker_url: Annotated[
        list[str] | None, typer.Option(help="URL of a picker to read the demand from; may be repeated.")
    ] = None,
    prometheus_url: Annotated[
        str | None, typer.Option(help="URL of a Prometheus server to read the demand from instead.")
    ] = None,
    period: Annotated[str, typer.Option(help="Time between two plans, such as 1s.")] = "1s",
    start_time: Annotated[
        str, typer.Option(help="How long a replica takes to start, where it was not measured.")
    ] = "60s",
    log_level: Level = LogLevel.INFO,
    log_format: Format = LogFormat.TEXT,
) -> None:
    """Run the controller: it turns the three kinds into lanes, and plans replicas every period."""
    import asyncio

    from tidegate.controller.loop import Options
    from tidegate.controller.run import Serving, StartError, run
    from tidegate.core.plan.types import Policy

    log_to_stderr(log_level, log_format)
    options = Options(
        kubeconfig=path(kubeconfig),
        picker_urls=tuple(picker_url or ()),
        prometheus_url=prometheus_url,
        period_s=_seconds(period, "--period"),
        policy=Policy(start_time_s=_seconds(start_time, "--start-time")),
    )
    try:
        asyncio.run(run(Serving(host, port, options)))
    except StartError as error:
        typer.echo(f"tidegate controller: {error}", err=True)
        raise typer.Exit(1) from error


def _seconds(text: str, option: str) -> float:
    from tidegate.api.common import parse_duration

    try:
        value = parse_duration(text).total_seconds()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error
    if value <= 0:
        raise typer.BadParameter("must be longer than 0s", param_hint=option)
    return value
