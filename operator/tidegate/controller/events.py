"""Events of events.k8s.io/v1, deduplicated: the same news of one object is one Event with a series."""

import hashlib
import logging
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from tidegate.adapters.kube import ApiError, Kube
from tidegate.adapters.kube import kinds as k
from tidegate.api import names

log = logging.getLogger(__name__)

_QUIET_S: Final = 60.0
"""The same news within this time is not told again; after it, its series counts one more."""
_NOTE: Final = 1000
"""The API server takes notes of up to 1 kB."""


class Events:
    """Posts events; a failure to do so is logged and changes nothing else."""

    def __init__(self, kube: Kube) -> None:
        self._kube = kube
        self._told: dict[str, tuple[float, int]] = {}

    async def post(
        self,
        about: Mapping[str, Any],
        action: str,
        reason: str,
        note: str,
        *,
        now: float,
        warning: bool = False,
    ) -> None:
        """Tell something about an object.

        Args:
            about: The raw object, with apiVersion and kind.
            action: What was done, in one CamelCase word.
            reason: From the catalogue.
            note: For people.
            now: Unix seconds.
            warning: Whether somebody should look.
        """
        meta = about["metadata"]
        identity = "|".join((meta["uid"], action, reason, note))
        name = f"{meta['name'][:200]}.{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        last, count = self._told.get(name, (float("-inf"), 0))
        if now - last < _QUIET_S:
            return
        self._told[name] = (now, count + 1)
        if len(self._told) > 2000:
            self._told = {n: t for n, t in self._told.items() if now - t[0] < 3600}
        namespace = meta.get("namespace") or "default"
        time = micro_time(now)
        series = {"count": count + 1, "lastObservedTime": time}
        try:
            if count:
                await self._kube.merge(k.EVENT, name, {"series": series}, namespace)
            else:
                event = _event(about, action, reason, note, time, warning=warning)
                event["metadata"] = {"name": name, "namespace": namespace}
                await self._kube.create(k.EVENT, event)
        except ApiError as error:
            if error.status == 409:  # told before a restart
                self._told[name] = (now, 2)
            elif error.status == 404:  # expired
                self._told.pop(name, None)
            else:
                log.info("event %s about %s could not be posted: %s", reason, meta["name"], error)


def micro_time(now: float) -> str:
    """Kubernetes' MicroTime."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _event(
    about: Mapping[str, Any], action: str, reason: str, note: str, time: str, *, warning: bool
) -> dict[str, Any]:
    meta = about["metadata"]
    regarding = {
        "apiVersion": about.get("apiVersion"),
        "kind": about.get("kind"),
        "name": meta["name"],
        "uid": meta["uid"],
        "resourceVersion": meta.get("resourceVersion"),
    }
    if namespace := meta.get("namespace"):
        regarding["namespace"] = namespace
    return {
        "eventTime": time,
        "reportingController": f"{names.GROUP}/controller",
        "reportingInstance": socket.gethostname()[:128] or "controller",
        "action": action,
        "reason": reason,
        "regarding": regarding,
        "note": note[:_NOTE],
        "type": "Warning" if warning else "Normal",
    }
