"""The kubelet's clock, and Kubernetes' way of writing time."""

import time
from datetime import UTC, datetime


class Clock:
    """Seconds since 1970 that never go back: the wall clock at the start, then monotonic."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def now(self) -> float:
        """Return the time now."""
        return self._offset + time.monotonic()


def rfc3339(seconds: float) -> str:
    """Write a time as metav1.Time does: whole seconds, UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def rfc3339_micro(seconds: float) -> str:
    """Write a time as metav1.MicroTime does."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def parse(text: str | None) -> float:
    """Read either form; nothing is 0."""
    if not text:
        return 0.0
    return datetime.fromisoformat(text).timestamp()
