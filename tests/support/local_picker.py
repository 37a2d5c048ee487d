"""A picker in a thread of this process, with facts that a test gives it, behind an Envoy of its own."""

import asyncio
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as pb_grpc

from support.gateway import EnvoyProcess
from support.picking import Cluster
from support.ports import free_port
from tidegate.core.flow import Endpoint, Flow, Model
from tidegate.core.load import EngineReport
from tidegate.core.types import QoSClass
from tidegate.facts.endpoints import ServedModel, World
from tidegate.picker.desk import Desk
from tidegate.picker.fronts import GRPC_OPTIONS, Processor
from tidegate.picker.identity import Identity
from tidegate.picker.service import Service, Settings

CLASSES = {"high": QoSClass("high", 900), "low": QoSClass("low", 10)}


def served(name: str, protocol: str, engine: str, **more: Any) -> ServedModel:
    """A model of both classes."""
    return ServedModel(("ns", name), (name, f"alias-{name}"), ("high", "low"), protocol, engine, **more)


class LocalPicker:
    """Callers are those of `support.picking.Cluster`. As a context manager it runs, and Envoy with it.

    Args:
        folder: Envoy's files.
        models: What is served, each by one endpoint with four slots.
        addresses: Of the endpoints, `ip:port`, in the models' order.
        grpc_addresses: By endpoint, where it speaks gRPC.
        settings: Of the service.
    """

    def __init__(
        self,
        folder: Path,
        models: Iterable[ServedModel],
        addresses: Iterable[str],
        grpc_addresses: dict[str, str] | None = None,
        **settings: Any,
    ) -> None:
        self.port = free_port()
        self.envoy = EnvoyProcess(folder, self.port)
        self.models = list(models)
        self.endpoints = [Endpoint(a, m.key, "low", 4) for m, a in zip(self.models, addresses, strict=True)]
        self._grpc = grpc_addresses or {}
        self._settings = settings
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.service: Service | None = None

    @property
    def url(self) -> str:
        return self.envoy.url

    @property
    def address(self) -> str:
        """Of the gateway, as gRPC clients want it."""
        return f"127.0.0.1:{self.envoy.ports[0]}"

    def in_flight(self) -> int:
        assert self.service is not None
        return sum(1 for _ in self.service.desk.flow.in_flight())

    def __enter__(self) -> "LocalPicker":
        self._thread.start()
        assert self._started.wait(30)
        self.envoy.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.envoy.stop()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        desk = Desk(Flow())
        self.service = Service(desk, Identity(Cluster(), desk.clock), Settings(**self._settings))
        desk.set_world(self._world())
        for endpoint in self.endpoints:
            desk.report(endpoint.address, EngineReport(desk.clock(), 0, 0, 0.0, 1 << 20), (0, 0))
        server = grpc.aio.server(options=GRPC_OPTIONS)
        pb_grpc.add_ExternalProcessorServicer_to_server(Processor(self.service), server)
        server.add_insecure_port(f"127.0.0.1:{self.port}")
        await server.start()
        ticking = asyncio.create_task(desk.run())
        self._started.set()
        await self._stop.wait()
        ticking.cancel()
        await server.stop(0)

    def _world(self) -> World:
        return World(
            CLASSES,
            {m.key: m for m in self.models},
            {name: m.key for m in self.models for name in m.names},
            tuple(self.endpoints),
            {m.key: Model(m.key, m.classes) for m in self.models},
            grpc_addresses=self._grpc,
        )
