"""Options that the servers share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class LogFormat(StrEnum):
    """How log lines look."""

    TEXT = "text"
    JSON = "json"


class LogLevel(StrEnum):
    """The least that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


Host = Annotated[str, typer.Option(help="Address to listen on.")]
Kubeconfig = Annotated[
    Path | None,
    typer.Option(
        exists=True, dir_okay=False, help="Kubeconfig; left out: $KUBECONFIG, or the pod's own account."
    ),
]
Level = Annotated[LogLevel, typer.Option("--log-level", case_sensitive=False, help="The least to log.")]
Format = Annotated[
    LogFormat, typer.Option("--log-format", case_sensitive=False, help="Lines for people or machines.")
]


def path(kubeconfig: Path | None) -> str | None:
    """The kubeconfig as the client takes it."""
    return str(kubeconfig) if kubeconfig else None


def log_to_stderr(level: LogLevel, form: LogFormat) -> None:
    """Set logging up for a server."""
    from tidegate.adapters.logs import configure

    configure(level.value, json_lines=form is LogFormat.JSON)
