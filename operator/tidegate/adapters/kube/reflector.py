"""A local copy of one kind's objects, kept by list and watch."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import aiohttp

from tidegate.adapters.kube.client import ApiError, Kind, Kube

log = logging.getLogger(__name__)

Key = tuple[str, str]
"""Namespace ("" for cluster-scoped kinds) and name."""
Listener = Callable[[str, dict[str, Any]], None]
"""Called with ADDED, MODIFIED or DELETED and the object, after the copy has changed."""

_BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0)
_STEADY_S = 10.0
"""A watch that held this long was a good one: what ends it is a new fault, not the last one again."""
_SHORTEST_S = 1.0
"""Watches that the server ends are asked for again at most this often; it grants minutes."""


class Reflector:
    """Lists, then watches, then lists again when the watch is lost or too old.

    `objects` is always a whole, consistent copy: a relisting replaces it at once, and listeners
    hear the difference. A lost API server keeps the last copy; `synced` is set after the first.
    """

    def __init__(
        self,
        kube: Kube,
        kind: Kind,
        *,
        namespace: str | None = None,
        labels: str = "",
        fields: str = "",
        on_change: Listener | None = None,
    ) -> None:
        self.kind = kind
        self.objects: dict[Key, dict[str, Any]] = {}
        self.synced = asyncio.Event()
        self.connected = False
        self._kube, self._namespace, self._labels, self._fields = kube, namespace, labels, fields
        self._on_change = on_change or (lambda _type, _obj: None)

    async def run(self) -> None:
        """Keep the copy until cancelled. Never raises for what the API server does."""
        failures, clock = 0, asyncio.get_running_loop().time
        while True:
            followed = None
            try:
                version = await self._relist()
                followed = clock()
                await self._follow(version)
            except (ApiError, aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                self.connected = False
                expired = isinstance(error, ApiError) and error.status == 410
                # A listing alone proves little: it may work while the watch is refused each time.
                if followed is not None and clock() - followed > _STEADY_S:
                    failures = 0
                if not expired or failures:
                    delay = _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)]
                    log.warning("watch of %s lost (%s); again in %.1f s", self.kind.plural, error, delay)
                    await asyncio.sleep(delay)
                failures += 1

    async def _relist(self) -> str:
        items, version = await self._kube.list(
            self.kind, self._namespace, labels=self._labels, fields=self._fields
        )
        fresh = {_key(item): item for item in items}
        old, self.objects = self.objects, fresh
        self.connected = True
        for key, item in fresh.items():
            before = old.get(key)
            if before is not None and before["metadata"]["uid"] != item["metadata"]["uid"]:
                # Deleted and made again while nobody watched: two objects, not one that changed.
                self._on_change("DELETED", before)
                before = None
            if before is None:
                self._on_change("ADDED", item)
            elif before["metadata"]["resourceVersion"] != item["metadata"]["resourceVersion"]:
                self._on_change("MODIFIED", item)
        for key, item in old.items():
            if key not in fresh:
                self._on_change("DELETED", item)
        self.synced.set()
        return version

    async def _follow(self, version: str) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            began = clock()
            async for event, obj in self._kube.watch(
                self.kind, self._namespace, since=version, labels=self._labels, fields=self._fields
            ):
                version = obj["metadata"]["resourceVersion"]
                if event == "BOOKMARK":
                    continue
                if event == "DELETED":
                    self.objects.pop(_key(obj), None)
                else:
                    self.objects[_key(obj)] = obj
                self._on_change(event, obj)
            if clock() - began < _SHORTEST_S:  # ended at once, without a word
                await asyncio.sleep(_SHORTEST_S)


def _key(obj: dict[str, Any]) -> Key:
    meta = obj["metadata"]
    return (meta.get("namespace", ""), meta["name"])
