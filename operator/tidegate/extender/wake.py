"""Makes kube-scheduler look again at pods that wait.

A change of a GPUPool or a QoSClass is no event to kube-scheduler, and a refused pod may wait for
five minutes otherwise. An update of the pod itself is one, so an annotation is touched.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any, Final

from tidegate.adapters.kube import ApiError, Kube, kinds
from tidegate.api.names import ANNOTATION_WOKEN
from tidegate.extender.metrics import Metrics

log = logging.getLogger(__name__)

PER_SECOND: Final = 20.0
"""Pods touched a second at most; a backlog of thousands must not burden the API server."""
MAX_WAITING: Final = 1000
"""Pods that wait to be touched at most; later ones find their turn at the next change."""


class Waker:
    """A bounded, deduplicated queue of pods to touch."""

    def __init__(self, kube: Kube, pods: Mapping[str, Mapping[str, Any]], metrics: Metrics) -> None:
        self._kube, self._pods, self._metrics = kube, pods, metrics
        self._queue: dict[str, None] = {}
        self._something = asyncio.Event()

    def wake(self, uid: str) -> None:
        """Touch this pod soon."""
        if len(self._queue) < MAX_WAITING:
            self._queue[uid] = None
            self._something.set()

    def wake_pending(self, scheduler: str) -> None:
        """Touch every pod of this scheduler that waits, higher priority first."""
        waiting = [
            (-(raw["spec"].get("priority") or 0), raw["metadata"]["creationTimestamp"], uid)
            for uid, raw in self._pods.items()
            if raw["spec"].get("schedulerName") == scheduler
            and not raw["spec"].get("nodeName")
            and "deletionTimestamp" not in raw["metadata"]
        ]
        for _, _, uid in sorted(waiting):
            self.wake(uid)

    async def run(self) -> None:
        """Touch what is queued, until cancelled."""
        while True:
            await self._something.wait()
            uid = next(iter(self._queue))
            del self._queue[uid]
            if not self._queue:
                self._something.clear()
            raw = self._pods.get(uid)
            if raw is not None and not raw["spec"].get("nodeName"):
                await self._touch(raw["metadata"])
                await asyncio.sleep(1 / PER_SECOND)

    async def _touch(self, meta: Mapping[str, Any]) -> None:
        patch = {"metadata": {"uid": meta["uid"], "annotations": {ANNOTATION_WOKEN: f"{time.time():.3f}"}}}
        try:
            await self._kube.merge(kinds.POD, meta["name"], patch, meta["namespace"])
            self._metrics.woken.inc()
        except ApiError as error:
            if error.status not in (404, 409):  # gone, or another pod of that name by now
                log.warning("could not wake pod %s/%s: %s", meta["namespace"], meta["name"], error)
