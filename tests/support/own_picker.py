"""The picker's own request path behind a real gRPC port, with facts made up: no cluster is needed."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from support.small_picker import POOL, serving
from tidegate.core.flow import Endpoint, Flow, Model, Policy
from tidegate.core.load import EngineReport
from tidegate.core.types import QoSClass
from tidegate.facts.endpoints import ServedModel, World
from tidegate.picker.desk import Desk
from tidegate.picker.fronts import Processor
from tidegate.picker.identity import Identity
from tidegate.picker.service import Service, Settings

KEY = ("ns", "m")


class NobodyToAsk:
    """A gateway before it is trusted, so nobody asks who a caller is."""

    async def create(self, kind: Any, obj: Any) -> dict[str, Any]:
        raise AssertionError("the gateway is trusted")


def desk_of(endpoints: Iterable[Endpoint], *, fallbacks: int = 0, queue: int = 40) -> Desk:
    """A desk that knows model `m` at these endpoints, which report that they are idle."""
    desk = Desk(Flow(Policy(fallbacks=fallbacks)))
    served = ServedModel(KEY, ("m",), ("low",), "OpenAI", "vLLM")
    classes = {"low": QoSClass("low", 1, queue_max_requests=queue, queue_max_wait_s=5.0)}
    listed = tuple(endpoints)
    model = Model(KEY, ("low",), startable=True)
    desk.set_world(World(classes, {KEY: served}, {"m": KEY}, listed, {KEY: model}))
    for one in listed:
        desk.report(one.address, EngineReport(desk.clock(), 0, 0), (0, 0))
    return desk


@asynccontextmanager
async def own_picker(**more: Any) -> AsyncIterator[tuple[str, Desk]]:
    """Serve it with the pool of `small_picker`; yields `host:port` and the desk behind it."""
    desk = desk_of((Endpoint(one, KEY, "low", 20) for one in POOL), **more)
    service = Service(desk, Identity(NobodyToAsk(), desk.clock), Settings(trust_class_header=True))
    async with serving(Processor(service)) as address:
        yield address, desk
