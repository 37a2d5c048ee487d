"""A picker that has just started knows no model yet: it holds requests, and never calls them unknown."""

import asyncio
from typing import Any

from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from support.ext_proc import request_body, request_headers
from tidegate.core.flow import Endpoint, Flow, Model
from tidegate.core.load import EngineReport
from tidegate.core.types import QoSClass
from tidegate.facts.endpoints import ServedModel, World
from tidegate.picker.desk import Desk
from tidegate.picker.identity import Identity
from tidegate.picker.service import Service, Settings

KEY = ("ns", "m")
SERVED = ServedModel(KEY, ("m",), ("low",), "OpenAI", "vLLM")
WORLD = World(
    {"low": QoSClass("low", 1)},
    {KEY: SERVED},
    {"m": KEY},
    (Endpoint("a:1", KEY, "low", 4),),
    {KEY: Model(KEY, ("low",), startable=False)},
)


class NobodyToAsk:
    async def create(self, kind: Any, obj: Any) -> dict[str, Any]:
        raise AssertionError("the gateway is trusted")


async def ask(desk: Desk, *, informed_after_s: float | None) -> list[pb.ProcessingResponse]:
    """What a request for model `m` is answered that comes before the facts do."""
    own = Settings(trust_class_header=True, start_patience_s=0.2)
    service = Service(desk, Identity(NobodyToAsk(), desk.clock), own)
    messages: asyncio.Queue[pb.ProcessingRequest | None] = asyncio.Queue()
    for message in [request_headers(), *request_body([b'{"model":"m","prompt":"x"}'])]:
        messages.put_nowait(message)
    written: list[pb.ProcessingResponse] = []

    async def write(reply: pb.ProcessingResponse) -> None:
        written.append(reply)
        messages.put_nowait(None)  # once it is answered Envoy has no more to say

    serving = asyncio.create_task(service.serve(messages.get, write))
    if informed_after_s is not None:
        await asyncio.sleep(informed_after_s)
        desk.set_world(WORLD)
        desk.report("a:1", EngineReport(0.0, 0, 0), (0, 0))
    await serving
    return written


def test_a_request_that_comes_before_the_facts_is_held_and_then_sent() -> None:
    first, *_ = asyncio.run(ask(Desk(Flow(), clock=lambda: 0.0), informed_after_s=0.05))
    assert first.WhichOneof("response") == "request_headers"


def test_facts_that_do_not_come_are_a_503_and_no_404() -> None:
    [answer] = asyncio.run(ask(Desk(Flow(), clock=lambda: 0.0), informed_after_s=None))
    assert answer.immediate_response.status.code == 503
    assert b'"starting"' in answer.immediate_response.body


def test_who_asks_whether_it_lives_is_answered_at_once() -> None:
    async def live() -> list[pb.ProcessingResponse]:
        desk = Desk(Flow(), clock=lambda: 0.0)
        service = Service(desk, Identity(NobodyToAsk(), desk.clock), Settings(trust_class_header=True))
        written: list[pb.ProcessingResponse] = []
        messages = [request_headers("/v2/health/live", method="GET", end=True), None]

        async def read() -> pb.ProcessingRequest | None:
            return messages.pop(0)

        async def write(reply: pb.ProcessingResponse) -> None:
            written.append(reply)

        await asyncio.wait_for(service.serve(read, write), timeout=1)
        return written

    [answer] = asyncio.run(live())
    assert answer.immediate_response.status.code == 200
