"""`tidegate picker`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class PolicyName(StrEnum):
    """Ways to run the queue."""

    QOS = "qos"
    FIFO = "fifo"


class LogFormat(StrEnum):
    """Ways to write logs."""

    TEXT = "text"
    JSON = "json"


def picker(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    ext_proc_port: Annotated[int, typer.Option(help="Port of Envoy's external processor.")] = 9002,
    health_port: Annotated[int, typer.Option(help="Port of gRPC health checks.")] = 9003,
    http_port: Annotated[int, typer.Option(help="Port of /metrics, /readyz and /debug/state.")] = 9091,
    kubeconfig: Annotated[
        Path | None, typer.Option(help="Kubeconfig; left out: $KUBECONFIG, or the pod's own account.")
    ] = None,
    policy: Annotated[
        PolicyName, typer.Option(help="qos, or fifo: one queue a model in arrival order, to compare with.")
    ] = PolicyName.QOS,
    trust_class_header: Annotated[
        bool,
        typer.Option(
            "--trust-class-header", help="Believe x-tidegate-qos: a gateway before this one checks callers."
        ),
    ] = False,
    max_body_bytes: Annotated[int, typer.Option(min=1024, help="Largest request body.")] = 16 << 20,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="How long requests under way may take after SIGTERM.")
    ] = 10.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    log_format: Annotated[LogFormat, typer.Option(help="text or json lines.")] = LogFormat.TEXT,
) -> None:
    """Run the endpoint picker: Envoy asks it where each request goes, and when."""
    import asyncio

    from tidegate.picker.logs import configure
    from tidegate.picker.server import Options, run

    try:
        configure(log_level, json_lines=log_format is LogFormat.JSON)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--log-level") from error
    options = Options(
        host=host,
        ext_proc_port=ext_proc_port,
        health_port=health_port,
        http_port=http_port,
        kubeconfig=str(kubeconfig) if kubeconfig else None,
        qos=policy is PolicyName.QOS,
        trust_class_header=trust_class_header,
        max_body=max_body_bytes,
        drain_s=drain_seconds,
    )
    try:
        asyncio.run(run(options))
    except OSError as error:
        typer.echo(f"tidegate picker: {error}", err=True)
        raise typer.Exit(1) from error
