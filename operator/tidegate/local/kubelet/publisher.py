"""Writes one pod's status to the API server: the latest, only when it changed, until it is heard."""

import asyncio
import logging
from typing import Any, Final

from tidegate.adapters.kube import ApiError, Kube
from tidegate.adapters.kube.kinds import POD
from tidegate.local.kubelet.model import Pod

log = logging.getLogger(__name__)

_STRATEGIC: Final = "application/strategic-merge-patch+json"
_RETRY_S: Final = (0.2, 0.5, 1.0, 2.0)


class Publisher:
    """Status and end of one pod. Conditions are merged by type: those of other writers stay."""

    def __init__(self, kube: Kube, pod: Pod) -> None:
        self._kube, self._pod = kube, pod
        self._wanted: dict[str, Any] = {}
        self._sent: dict[str, Any] = {}
        self._task: asyncio.Task[None] | None = None
        self._gone = False

    @property
    def wanted(self) -> dict[str, Any]:
        """The status last asked for."""
        return self._wanted

    def publish(self, status: dict[str, Any]) -> None:
        """Ask for a status; returns at once."""
        if status == self._wanted or self._gone:
            return
        self._wanted = status
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._send())

    async def finalize(self) -> None:
        """Write the last status, then delete the object, of this UID only."""
        if self._task is not None:
            await self._task
        failures = 0
        while not self._gone:
            try:
                await self._kube.delete(
                    POD, self._pod.name, self._pod.namespace, grace_s=0, uid=self._pod.uid
                )
            except ApiError as error:
                if error.status == 409:  # the name belongs to another pod by now
                    return
                await self._wait(error, failures)
                failures += 1
            else:
                return

    def stop(self) -> None:
        """Write nothing more: the object is gone, or the kubelet stops."""
        self._gone = True
        if self._task is not None:
            self._task.cancel()

    async def _send(self) -> None:
        path = POD.path(self._pod.namespace, self._pod.name, "status")
        failures = 0
        while self._sent != self._wanted and not self._gone:
            status = self._wanted
            patch = {"metadata": {"uid": self._pod.uid}, "status": status}
            try:
                await self._kube.request("PATCH", path, body=patch, content_type=_STRATEGIC)
            except ApiError as error:
                if error.status in {404, 409}:
                    self._gone = True
                    return
                await self._wait(error, failures)
                failures += 1
            else:
                self._sent, failures = status, 0

    async def _wait(self, error: ApiError, failures: int) -> None:
        delay = _RETRY_S[min(failures, len(_RETRY_S) - 1)]
        level = logging.ERROR if error.status in {400, 403, 422} else logging.INFO
        log.log(level, "pod %s/%s: %s; again in %.1f s", self._pod.namespace, self._pod.name, error, delay)
        await asyncio.sleep(delay)
