"""Copies of everything that the loop reads from the cluster."""

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any, Final

from tidegate.adapters.kube import Kind, Kube, Reflector
from tidegate.adapters.kube import kinds as k
from tidegate.adapters.kube.reflector import Key
from tidegate.api import names
from tidegate.controller.optional import OptionalKinds

log = logging.getLogger(__name__)

Object = dict[str, Any]

OWN_KINDS: Final = (k.QOS_CLASS, k.GPU_POOL, k.MODEL_DEPLOYMENT)
CHILD_KINDS: Final = (k.DEPLOYMENT, k.SERVICE, k.PRIORITY_CLASS)
OPTIONAL_KINDS: Final = (k.INFERENCE_POOL, k.HTTP_ROUTE)
"""Children of kinds that a cluster may not have, in the order to apply them."""
RESYNC_S: Final = 15.0
"""The three kinds are listed this often whatever events say."""

_WRITTEN_S: Final = 10.0
"""How long a write's own answer is believed without the watch having shown it."""

_CHILDREN: Final = f"{names.LABEL_MANAGED_BY}={names.FIELD_MANAGER}"


class World:
    """The three kinds, listed when marked; everything else by list and watch.

    Args:
        kube: Connection.
        dirty: Called when something changed that a plan may depend on.
    """

    def __init__(self, kube: Kube, dirty: Callable[[], None]) -> None:
        self._kube, self._dirty = kube, dirty
        self._own: dict[Kind, dict[Key, Object]] = {}
        self._listed_at: dict[Kind, float] = {}
        self._marked: set[Kind] = set(OWN_KINDS)
        self._written: dict[tuple[Kind, Key], tuple[float, Object]] = {}
        live = "status.phase!=Succeeded,status.phase!=Failed"
        self._watches = {
            k.POD: Reflector(kube, k.POD, fields=live, on_change=self._changed),
            k.NODE: Reflector(kube, k.NODE, on_change=self._changed),
            k.NAMESPACE: Reflector(kube, k.NAMESPACE, on_change=self._changed),
            **{c: Reflector(kube, c, labels=_CHILDREN, on_change=self._changed) for c in CHILD_KINDS},
        }
        self._optional = OptionalKinds(kube, OPTIONAL_KINDS, _CHILDREN, self._changed)

    def mark(self, kind: Kind) -> None:
        """Objects of one of the three kinds changed: list them before the next plan."""
        self._marked.add(kind)
        self._dirty()

    async def run(self) -> None:
        """Keep the watched copies until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._optional.run(), name="optional kinds")
            for reflector in self._watches.values():
                tasks.create_task(reflector.run(), name=f"watch {reflector.kind.plural}")

    def installed(self, kind: Kind) -> bool:
        """Whether the cluster has one of `OPTIONAL_KINDS`."""
        return self._optional.installed(kind)

    @property
    def missing(self) -> list[str]:
        """Kinds that were never listed."""
        unlisted = [r.kind.plural for r in self._watches.values() if not r.synced.is_set()]
        return unlisted + [kind.plural for kind in OWN_KINDS if kind not in self._listed_at]

    @property
    def stale(self) -> list[str]:
        """Kinds whose copy may be old, because the API server does not answer."""
        return [r.kind.plural for r in self._watches.values() if not r.connected]

    async def refresh(self, now: float, resync_s: float = RESYNC_S) -> None:
        """List those of the three kinds that are marked, or were last listed `resync_s` ago.

        Raises:
            ApiError: A listing failed; its mark stays.
        """
        for kind in OWN_KINDS:
            due = now - self._listed_at.get(kind, float("-inf")) >= resync_s
            if kind in self._marked or due:
                self._marked.discard(kind)
                try:
                    items, _ = await self._kube.list(kind)
                except BaseException:
                    self._marked.add(kind)
                    raise
                self._own[kind] = {_key(i): i for i in items}
                self._listed_at[kind] = now

    def objects(self, kind: Kind) -> list[Object]:
        """All objects of a kind, by namespace and name."""
        found = self._of(kind)
        return [found[key] for key in sorted(found)]

    def get(self, kind: Kind, name: str, namespace: str = "") -> Object | None:
        """One object of the copy."""
        return self._of(kind).get((namespace, name))

    def written(self, kind: Kind, obj: Object) -> None:
        """Take in what a write returned: until the watch has caught up, it is the newer copy."""
        self._written[kind, _key(obj)] = (asyncio.get_running_loop().time(), obj)

    def forget(self, kind: Kind, name: str, namespace: str = "") -> None:
        """Take out what is deleted."""
        self._written.pop((kind, (namespace, name)), None)
        self._copy(kind).pop((namespace, name), None)

    def _copy(self, kind: Kind) -> dict[Key, Object]:
        if kind in OPTIONAL_KINDS:
            return self._optional.objects(kind)
        return self._own.get(kind, {}) if kind in OWN_KINDS else self._watches[kind].objects

    def _of(self, kind: Kind) -> dict[Key, Object]:
        copy = dict(self._copy(kind))
        now = asyncio.get_running_loop().time()
        for (of, key), (at, obj) in list(self._written.items()):
            if of is kind:
                seen = copy.get(key)
                if now - at > _WRITTEN_S or (seen is not None and _version(seen) >= _version(obj)):
                    del self._written[of, key]
                else:
                    copy[key] = obj
        return copy

    def _changed(self, event: str, obj: Object) -> None:
        if event == "DELETED":
            known = (*self._watches, *OPTIONAL_KINDS)
            kind = next((x for x in known if x.name == obj.get("kind")), None)
            if kind is not None:
                self._written.pop((kind, _key(obj)), None)
        self._dirty()


def _version(obj: Object) -> int:
    # Comparable as numbers: https://kubernetes.io/docs/reference/using-api/api-concepts/#resource-versions
    return int(obj["metadata"]["resourceVersion"])


def _key(obj: Object) -> Key:
    meta = obj["metadata"]
    return (meta.get("namespace", ""), meta["name"])


def owned(children: Iterable[Object], uid: str) -> list[Object]:
    """Those children whose controller is the object with this UID."""
    return [
        c for c in children if any(r.get("uid") == uid for r in c["metadata"].get("ownerReferences") or ())
    ]
