"""`tidegate extender`."""

import asyncio
from typing import Annotated

import typer

from tidegate.cli.options import Format, Host, Kubeconfig, Level, LogFormat, LogLevel, log_to_stderr, path


def extender(
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port for kube-scheduler; 0: any.")] = 9100,
    kubeconfig: Kubeconfig = None,
    log_level: Level = LogLevel.INFO,
    log_format: Format = LogFormat.TEXT,
) -> None:
    """Answer kube-scheduler: where a pod may be placed, and who gives way."""
    from tidegate.extender.server import Options, serve

    log_to_stderr(log_level, log_format)
    asyncio.run(serve(Options(host, port, path(kubeconfig))))
