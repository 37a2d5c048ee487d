"""Logging of the controller: one line a record, as text or JSON."""

import logging
import sys
import time

import orjson


class _JsonLines(logging.Formatter):
    """A record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%SZ"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line).decode()


def configure(level: str, *, json_lines: bool) -> None:
    """Log to stderr. Raises ValueError for a level that there is not."""
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"{level!r} is none of debug, info, warning, error")
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter = _JsonLines() if json_lines else text
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=number, handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "kopf", "asyncio", "urllib3"):
        logging.getLogger(noisy).setLevel(max(number, logging.WARNING))
