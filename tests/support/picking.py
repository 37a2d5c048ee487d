"""A picker's service without a network: a small world, callers by token, and Envoy played by a test."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from support.ext_proc import request_body, request_headers
from tidegate.adapters.kube import Kind
from tidegate.core.flow import Endpoint, Flow, Model
from tidegate.core.load import EngineReport
from tidegate.core.types import QoSClass
from tidegate.facts.endpoints import ServedModel, World
from tidegate.picker.desk import Desk
from tidegate.picker.identity import Identity
from tidegate.picker.service import Service, Settings

HTTP, GRPC = "10.0.0.1:8000", "10.0.0.1:8001"
CHAT, RANK, BARE, EMPTY = ("ns", "chat"), ("ns", "rank"), ("ns", "bare"), ("ns", "empty")
CLASSES = {"high": QoSClass("high", 900), "low": QoSClass("low", 10, queue_max_requests=1)}
MODELS = (
    ServedModel(
        CHAT, ("chat", "talk", "sql"), ("high", "low"), "OpenAI", "vLLM",
        engine_names={"talk": "chat", "sql": "lora-1"}, adapters=frozenset({"sql"}),
    ),
    ServedModel(
        RANK, ("rank", "sort"), ("high", "low"), "KServeV2", "Triton",
        engine_names={"rank": "org/rank", "sort": "org/rank"},
    ),
    ServedModel(BARE, ("bare",), ("low",), "KServeV2", "Triton"),
    ServedModel(EMPTY, ("empty",), ("low",), "OpenAI", "vLLM"),
)  # fmt: skip
ENDPOINTS = (
    Endpoint(HTTP, CHAT, "low", 1),
    Endpoint("10.0.0.2:8000", RANK, "low", 1),
    Endpoint("10.0.0.3:8000", BARE, "low", 1),
)
WORLD = World(
    CLASSES,
    {m.key: m for m in MODELS},
    {name: m.key for m in MODELS for name in m.names},
    ENDPOINTS,
    {m.key: Model(m.key, m.classes, startable=False) for m in MODELS},
    grpc_addresses={"10.0.0.2:8000": "10.0.0.2:8001"},
)


class Cluster:
    """An API server that knows the token `good`, who may use everything, and `poor`, who may nothing."""

    def __init__(self, *, away: bool = False) -> None:
        self.away = away

    async def create(self, kind: Kind, obj: Mapping[str, Any]) -> dict[str, Any]:
        if self.away:
            from tidegate.adapters.kube import ApiError

            raise ApiError(0, "Unreachable", "no answer")
        if kind.name == "TokenReview":
            token = obj["spec"]["token"]
            return {"status": {"authenticated": token in ("good", "poor"), "user": {"username": token}}}
        return {"status": {"allowed": obj["spec"]["user"] == "good"}}


def service(*, away: bool = False, informed: bool = True, **settings: Any) -> Service:
    desk = Desk(Flow(), clock=lambda: 0.0)
    if informed:
        desk.set_world(WORLD)
        for endpoint in ENDPOINTS:
            desk.flow.report(endpoint.address, EngineReport(0.0, 0, 0), 0, 0)
    return Service(desk, Identity(Cluster(away=away), desk.clock), Settings(**settings))


def request(
    path: str, body: bytes | Sequence[bytes] = b"", *, method: str = "POST", token: str = "good", **more: str
) -> list[pb.ProcessingRequest]:
    """The messages of a whole request."""
    headers = {"authorization": f"Bearer {token}"} if token else {}
    chunks = [body] if isinstance(body, bytes) else list(body)
    end = method == "GET"
    first = request_headers(path, method=method, end=end, **headers, **more)
    return [first] if end else [first, *request_body(chunks)]


async def play(
    at: Service, messages: Iterable[pb.ProcessingRequest], *, then: Iterable[pb.ProcessingRequest] = ()
) -> list[pb.ProcessingResponse]:
    """Serve one exchange; `then` follows what was answered first. Returns everything that was written."""
    queue: asyncio.Queue[pb.ProcessingRequest | None] = asyncio.Queue()
    for message in messages:
        queue.put_nowait(message)
    written: list[pb.ProcessingResponse] = []
    rest = list(then)

    async def write(reply: pb.ProcessingResponse) -> None:
        if not written:
            for message in [*rest, None]:
                queue.put_nowait(message)
        written.append(reply)

    await asyncio.wait_for(at.serve(queue.get, write), timeout=10)
    return written


def immediate_headers(reply: pb.ProcessingResponse) -> dict[str, str]:
    return {o.header.key: o.header.raw_value.decode() for o in reply.immediate_response.headers.set_headers}
