"""Log lines for people or for machines."""

import logging
import sys
from typing import Final

import orjson

_LEVELS: Final = ("debug", "info", "warning", "error")


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Write time (unix seconds), level, logger, message and, where there is one, the traceback."""
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line).decode()


def configure(level: str, *, json_lines: bool) -> None:
    """Log to stderr. Raises ValueError for an unknown level."""
    if level.lower() not in _LEVELS:
        raise ValueError(f"must be one of {', '.join(_LEVELS)}, not {level!r}")
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if json_lines else text)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
