"""`tidegate extender`."""

import asyncio
import logging
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import orjson
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


def extender(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port for kube-scheduler; 0: any.")] = 9100,
    kubeconfig: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Default: $KUBECONFIG, or the pod's own account."),
    ] = None,
    log_level: Annotated[LogLevel, typer.Option(help="debug shows every filter decision.")] = LogLevel.INFO,
    log_format: Annotated[LogFormat, typer.Option()] = LogFormat.TEXT,
) -> None:
    """Answer kube-scheduler: where a pod may be placed, and who gives way."""
    from tidegate.extender.server import Options, serve

    _log(log_level, log_format)
    asyncio.run(serve(Options(host, port, str(kubeconfig) if kubeconfig else None)))


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line).decode()


def _log(level: LogLevel, form: LogFormat) -> None:
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_JsonLines() if form is LogFormat.JSON else text)
    logging.basicConfig(level=level.value.upper(), handlers=[handler])
    for noisy in ("kubernetes", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
