"""Kinds whose CRDs may not be there: looked for, and watched while they are."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

from tidegate.adapters.kube import ApiError, Kind, Kube, Reflector
from tidegate.adapters.kube.reflector import Key

log = logging.getLogger(__name__)

LOOK_S: Final = 10.0
"""How often the API server is asked which of them it serves."""


class OptionalKinds:
    """Copies of those kinds that the API server serves; the others have none and are not installed.

    Args:
        kube: Connection.
        kinds: What to look for.
        labels: Selector of what is watched.
        on_change: Called with the event and the object, and with ("", {}) when a kind came or went.
    """

    def __init__(
        self, kube: Kube, kinds: tuple[Kind, ...], labels: str, on_change: Callable[[str, Any], None]
    ) -> None:
        self._kube, self._kinds, self._labels, self._on_change = kube, kinds, labels, on_change
        self._watches: dict[Kind, Reflector] = {}

    def installed(self, kind: Kind) -> bool:
        """Whether it is served, and was listed once."""
        return kind in self._watches and self._watches[kind].synced.is_set()

    def objects(self, kind: Kind) -> dict[Key, dict[str, Any]]:
        """The copy of one kind; empty while it is not installed."""
        return self._watches[kind].objects if kind in self._watches else {}

    async def run(self) -> None:
        """Look, and watch, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for kind in self._kinds:
                tasks.create_task(self._follow(kind), name=f"look for {kind.plural}")

    async def _follow(self, kind: Kind) -> None:
        while True:
            if await self._served(kind, before=False):
                log.info("%s is installed: watched from now on", kind.name)
                await self._watch(kind)
                log.info("%s is not installed any more", kind.name)
            await asyncio.sleep(LOOK_S)

    async def _watch(self, kind: Kind) -> None:
        """Watch a kind until it is not served any more."""
        watch = Reflector(self._kube, kind, labels=self._labels, on_change=self._on_change)
        task = asyncio.create_task(watch.run(), name=f"watch {kind.plural}")
        self._watches[kind] = watch
        try:
            await watch.synced.wait()
            self._on_change("", {})
            while await self._served(kind, before=True):  # noqa: ASYNC110 -- nobody tells
                await asyncio.sleep(LOOK_S)
        finally:
            self._watches.pop(kind, None)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self._on_change("", {})

    async def _served(self, kind: Kind, *, before: bool) -> bool:
        """Whether the API server serves it; as before where it does not answer."""
        try:
            listed = await self._kube.request("GET", f"/apis/{kind.api_version}")
        except ApiError as error:
            return before if error.status != 404 else False
        return any(r.get("name") == kind.plural for r in listed.get("resources") or ())
