"""The picker's own service behind a real Envoy, its world made by hand: no cluster is needed."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from envoy.service.accesslog.v3 import als_pb2_grpc
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as pb_grpc

from support.gateway import EnvoyProcess
from support.ports import free_ports
from tidegate.core.flow import Endpoint, Flow, Model
from tidegate.core.load import EngineReport
from tidegate.core.types import Objectives, QoSClass, TenantFrom, Tenants
from tidegate.facts.endpoints import ServedModel, World
from tidegate.picker.desk import Desk
from tidegate.picker.fronts import GRPC_OPTIONS, Processor
from tidegate.picker.measure.server import AccessLogs
from tidegate.picker.service import Service, Settings

KEY, TRITON = ("team-a", "chat"), ("team-b", "ranker")
CLASSES = {
    "high": QoSClass(
        "high",
        9,
        objectives=Objectives(ttft_s=1.5, tpot_s=0.2, window_s=3600.0),
        tenants=Tenants(TenantFrom.HEADER, "x-tenant"),
    ),
    "low": QoSClass("low", 1, objectives=Objectives(completion_s=1.0)),
}


class Nobody:
    """Identity is not asked: the class header is trusted."""


@contextlib.asynccontextmanager
async def gateway(
    folder: Path, engine: str, flow: Flow | None = None, *, measured: bool = True
) -> AsyncIterator[tuple[Desk, str]]:
    """Desk and URL. `measured` False: as behind a gateway that knows nothing of measuring."""
    ext_proc, logs = free_ports(2)
    desk = Desk(flow or Flow())
    models = {
        KEY: ServedModel(KEY, ("m",), ("high", "low"), "OpenAI", "vLLM", gpus=4),
        TRITON: ServedModel(TRITON, ("t",), ("high", "low"), "KServeV2", "Triton"),
    }
    # One address serves one model; 127.0.0.2 is the same engine.
    places = (
        Endpoint(engine, KEY, "high", 100),
        Endpoint(engine.replace("127.0.0.1", "127.0.0.2"), TRITON, "high", 100),
    )
    known = {key: Model(key, model.classes) for key, model in models.items()}
    desk.set_world(World(CLASSES, models, {"m": KEY, "t": TRITON}, places, known))
    for place in places:
        desk.report(place.address, EngineReport(desk.clock() + 1e6, 0, 0, 0.0, 1 << 30), (0, 0))
    nobody: Any = Nobody()
    service = Service(desk, nobody, Settings(trust_class_header=True))
    server = grpc.aio.server(options=GRPC_OPTIONS)
    pb_grpc.add_ExternalProcessorServicer_to_server(Processor(service), server)
    als_pb2_grpc.add_AccessLogServiceServicer_to_server(AccessLogs(desk.book, desk.clock), server)
    for port in (ext_proc, logs):
        server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    envoy = EnvoyProcess(folder, ext_proc, logs if measured else None)
    running = asyncio.create_task(desk.run())
    try:
        await asyncio.to_thread(envoy.start)
        yield desk, envoy.url
    finally:
        envoy.stop()
        running.cancel()
        await server.stop(0)
