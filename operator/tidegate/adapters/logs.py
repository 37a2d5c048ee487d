"""Log lines on stderr: for people or for machines, the same of every part."""

import logging
import sys
import time
from typing import Final

import orjson

LEVELS: Final = ("debug", "info", "warning", "error")
_NOISY: Final = ("aiohttp", "asyncio", "grpc", "httpcore", "httpx", "kopf", "kubernetes", "urllib3")
"""Libraries whose remarks are for their own developers: only their warnings are shown."""
_KOPF_SIGNALS: Final = "OS signals are ignored"
"""What kopf warns of on a thread of its own, where the signals are ours to handle."""


class _Lines(logging.Formatter):
    """`2026-01-31T12:00:00.123Z info    tidegate.picker: text`, in UTC."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(level)-7s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Write one record; a traceback follows on lines of its own."""
        record.level = record.levelname.lower()
        return super().format(record)

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: ARG002, N802
        """RFC 3339 with milliseconds."""
        whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        return f"{whole}.{int(record.msecs):03}Z"


class _JsonLines(_Lines):
    """The same as one JSON object a line; a traceback is its `exception`."""

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


def configure(level: str, *, json_lines: bool = False) -> None:
    """Log to stderr from `level` on. Raises ValueError for a level that there is not."""
    if level.lower() not in LEVELS:
        raise ValueError(f"{level!r} is none of {', '.join(LEVELS)}")
    number = logging.getLevelNamesMapping()[level.upper()]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if json_lines else _Lines())
    logging.basicConfig(level=number, handlers=[handler], force=True)
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(number, logging.WARNING))
    logging.getLogger("kopf._core.reactor.running").addFilter(_not_about_signals)


def _not_about_signals(record: logging.LogRecord) -> bool:
    return _KOPF_SIGNALS not in record.getMessage()
