"""Keeps the desk's facts in step with the cluster: watches, and builds the world anew on change."""

import asyncio
import logging
import time
from typing import Any, Final

from tidegate.adapters.kube import Kube, Reflector, kinds
from tidegate.api.common import InvalidObject, LabelSelector
from tidegate.api.modeldeployment import ModelDeployment
from tidegate.api.names import LABEL_MODEL
from tidegate.api.qosclass import QoSClass
from tidegate.core.flow import ModelKey
from tidegate.facts.classes import default_class, qos_class
from tidegate.facts.endpoints import World, start_times, world
from tidegate.picker.desk import Desk

log = logging.getLogger(__name__)

_GATHER_S: Final = 0.02
"""Events come in groups; this long more of them are waited for."""

Raw = dict[str, Any]


class Cluster:
    """Reflectors of classes, models and their pods."""

    def __init__(self, kube: Kube, desk: Desk) -> None:
        self._kube, self._desk = kube, desk
        self._dirty = asyncio.Event()
        self._classes = Reflector(kube, kinds.QOS_CLASS, on_change=self._changed)
        self._models = Reflector(kube, kinds.MODEL_DEPLOYMENT, on_change=self._changed)
        self._pods = Reflector(kube, kinds.POD, labels=LABEL_MODEL, on_change=self._changed)
        # Pods of External engines carry whatever labels their makers chose.
        self._foreign: dict[tuple[str, str], tuple[Reflector, asyncio.Task[None]]] = {}
        self._parsed: dict[tuple[str, str], Any] = {}
        self._notes: frozenset[str] = frozenset()
        self._starts: dict[ModelKey, float] = {}

    @property
    def connected(self) -> bool:
        """Whether the API server answers; without it the last facts stay in force."""
        return all(r.connected for r in (self._classes, self._models, self._pods))

    async def run(self) -> None:
        """Follow the cluster until cancelled."""
        reflectors = (self._classes, self._models, self._pods)
        tasks = [asyncio.create_task(r.run()) for r in reflectors]
        try:
            for reflector in reflectors:
                await reflector.synced.wait()
            while True:
                self._dirty.clear()
                deployments = self._read(ModelDeployment, self._models)
                self._follow_foreign(deployments)
                self._rebuild(deployments)
                await self._dirty.wait()
                await asyncio.sleep(_GATHER_S)
        finally:
            tasks += [task for _, task in self._foreign.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _changed(self, _event: str, _obj: Raw) -> None:
        self._dirty.set()

    def _rebuild(self, deployments: list[ModelDeployment]) -> None:
        objects = self._read(QoSClass, self._classes)
        pods = {
            _uid(p): p
            for r in (self._pods, *(r for r, _ in self._foreign.values()))
            for p in r.objects.values()
        }
        self._starts = start_times(deployments, pods.values(), self._starts)
        found = world(
            deployments,
            pods.values(),
            {c.metadata.name: qos_class(c) for c in objects},
            default_class(objects),
            self._starts,
            time.time(),
        )
        self._tell(found)
        self._desk.set_world(found)

    def _read(self, kind: type[Any], reflector: Reflector) -> list[Any]:
        """Objects as their pydantic models, parsed once for each version; bad ones are left out."""
        result = []
        for raw in reflector.objects.values():
            key = (_uid(raw), raw["metadata"]["resourceVersion"])
            if key not in self._parsed:
                try:
                    self._parsed[key] = kind.from_object(raw)
                except InvalidObject as error:
                    self._parsed[key] = None
                    log.warning("%s %s is left out: %s", kind.__name__, raw["metadata"]["name"], error)
            if self._parsed[key] is not None:
                result.append(self._parsed[key])
        alive = {
            (_uid(raw), raw["metadata"]["resourceVersion"])
            for r in (self._classes, self._models)
            for raw in r.objects.values()
        }
        self._parsed = {key: value for key, value in self._parsed.items() if key in alive}
        return result

    def _follow_foreign(self, deployments: list[ModelDeployment]) -> None:
        """One watch for each selector of an External engine."""
        wanted = {
            (d.metadata.namespace or "default", _selector(d.spec.engine.endpoints.selector))
            for d in deployments
            if d.spec.engine.endpoints is not None
        }
        for key in self._foreign.keys() - wanted:
            _, task = self._foreign.pop(key)
            task.cancel()
        for namespace, labels in sorted(wanted - self._foreign.keys()):
            reflector = Reflector(
                self._kube, kinds.POD, namespace=namespace, labels=labels, on_change=self._changed
            )
            task = asyncio.create_task(reflector.run())
            self._foreign[namespace, labels] = (reflector, task)

    def _tell(self, found: World) -> None:
        notes = frozenset(found.notes)
        for note in sorted(notes - self._notes):
            log.warning("%s", note)
        self._notes = notes


def _selector(selector: LabelSelector) -> str:
    """A label selector as the API's query string."""
    parts = [f"{k}={v}" for k, v in selector.match_labels.items()]
    for e in selector.match_expressions:
        values = ",".join(e.values)
        parts.append(
            {
                "In": f"{e.key} in ({values})",
                "NotIn": f"{e.key} notin ({values})",
                "Exists": e.key,
                "DoesNotExist": f"!{e.key}",
            }[e.operator]
        )
    return ",".join(parts)


def _uid(raw: Raw) -> str:
    return str(raw["metadata"]["uid"])
