"""The picker's gRPC as Envoy and a prober see it: the same on its own frames and on grpcio."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as pb_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.ext_proc import kinds, request_body, request_headers, response_headers, set_headers, streamed
from support.ports import free_ports
from support.wait import eventually
from tidegate.core.flow import Endpoint, Flow, Model
from tidegate.core.load import EngineReport
from tidegate.core.types import QoSClass
from tidegate.facts.endpoints import ServedModel, World
from tidegate.picker.desk import Desk
from tidegate.picker.fronts import Front, Health, Listen, ServerName, front
from tidegate.picker.identity import Identity
from tidegate.picker.service import Service, Settings

KEY = ("ns", "m")
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class NobodyToAsk:
    async def create(self, kind: Any, obj: Any) -> dict[str, Any]:
        raise AssertionError("the gateway is trusted")


@dataclass
class Stage:
    front: Front
    desk: Desk
    health: Health
    service: Service
    ext_proc: str
    checks: str

    def held(self) -> tuple[int, int]:
        return self.desk.flow.held("a:1")

    @asynccontextmanager
    async def stub(self) -> AsyncIterator[Any]:
        async with grpc.aio.insecure_channel(self.ext_proc) as channel:
            yield pb_grpc.ExternalProcessorStub(channel)

    @asynccontextmanager
    async def prober(self) -> AsyncIterator[Any]:
        async with grpc.aio.insecure_channel(self.checks) as channel:
            yield health_pb2_grpc.HealthStub(channel)


@pytest.fixture(params=list(ServerName))
async def stage(request: pytest.FixtureRequest) -> AsyncIterator[Stage]:
    desk = Desk(Flow())
    model = ServedModel(KEY, ("m",), ("low",), "OpenAI", "vLLM")
    world = World(
        {"low": QoSClass("low", 1)},
        {KEY: model},
        {"m": KEY},
        (Endpoint("a:1", KEY, "low", 1),),
        {KEY: Model(KEY, ("low",), startable=False)},
    )
    desk.set_world(world)
    desk.report("a:1", EngineReport(0.0, 0, 0), (0, 0))
    service = Service(desk, Identity(NobodyToAsk(), desk.clock), Settings(trust_class_header=True))
    ext_proc, checks = free_ports(2)
    health = Health()
    made = front(request.param, service, health, Listen("127.0.0.1", ext_proc, checks))
    await made.start()
    yield Stage(made, desk, health, service, f"127.0.0.1:{ext_proc}", f"127.0.0.1:{checks}")
    await made.drain(0)
    await made.stop()


async def send(stream: Any, *messages: pb.ProcessingRequest) -> None:
    for message in messages:
        await stream.write(message)


async def read(stream: Any, count: int) -> list[pb.ProcessingResponse]:
    return [await asyncio.wait_for(stream.read(), 10) for _ in range(count)]


def body(size: int) -> bytes:
    return b'{"model":"m","prompt":"' + b"x" * size + b'"}'


async def test_an_exchange_from_headers_to_the_end(stage: Stage) -> None:
    async with stage.stub() as stub:
        stream = stub.Process()
        whole = body(200_000)
        await send(stream, request_headers(), *request_body([whole[:100_000], whole[100_000:]]))
        replies = await read(stream, 5)
        assert kinds(replies) == ["request_headers"] + ["request_body"] * 4
        assert set_headers(replies[0])["x-gateway-destination-endpoint"] == "a:1"
        assert b"".join(part.body for part in streamed(replies)) == whole
        assert stage.held()[0] == 1
        await send(stream, response_headers(200))
        assert kinds(await read(stream, 1)) == ["response_headers"]
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        assert await stream.code() == grpc.StatusCode.OK
    assert stage.held() == (0, 0)


async def test_bodies_as_large_as_the_picker_takes(stage: Stage) -> None:
    async with stage.stub() as stub:
        whole = body(15 << 20)
        parts = [whole[at : at + (1 << 20)] for at in range(0, len(whole), 1 << 20)]
        stream = stub.Process()
        await send(stream, request_headers(), *request_body(parts))
        count = 1 + -(-len(whole) // 62_000)
        assert b"".join(p.body for p in streamed(await read(stream, count))) == whole
        stream.cancel()


async def test_an_answer_of_the_picker_ends_the_call(stage: Stage) -> None:
    async with stage.stub() as stub:
        stream = stub.Process()
        await send(stream, request_headers("/v1/nothing"), *request_body([b"{}"]))
        [reply] = await read(stream, 1)
        assert reply.immediate_response.status.code == 404
        assert await stream.read() is grpc.aio.EOF
        assert await stream.code() == grpc.StatusCode.OK


async def test_who_leaves_gives_its_room_back(stage: Stage) -> None:
    async with stage.stub() as stub:
        streams = [stub.Process() for _ in range(6)]  # one runs, five wait
        for stream in streams:
            await send(stream, request_headers(), *request_body([body(10)]))

        async def counts() -> tuple[int, int]:
            return stage.held()[0], len(list(stage.desk.flow.waiting()))

        await eventually(counts, until=lambda c: c == (1, 5))
        for stream in streams:
            stream.cancel()
        await eventually(counts, until=lambda c: c == (0, 0))
    assert stage.service.receiving == 0


async def test_a_gateway_that_is_configured_otherwise_is_told(stage: Stage) -> None:
    async with stage.stub() as stub:
        stream = stub.Process()
        await send(stream, response_headers(200))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "FULL_DUPLEX_STREAMED" in caught.value.details()


async def test_what_is_no_message_fails_its_call_alone(stage: Stage) -> None:
    async with grpc.aio.insecure_channel(stage.ext_proc) as channel:
        path = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
        stream = channel.stream_stream(path)()
        await stream.write(b"\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/envoy.service.ext_proc.v3.ExternalProcessor/Nothing")(b"")
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    await test_an_answer_of_the_picker_ends_the_call(stage)


async def test_a_drain_finishes_what_is_under_way(stage: Stage) -> None:
    async with stage.stub() as stub:
        stream = stub.Process()
        await send(stream, request_headers(), *request_body([body(10)]))
        await read(stream, 2)
        draining = asyncio.create_task(stage.front.drain(10))
        await asyncio.sleep(0.3)
        assert not draining.done()
        await send(stream, response_headers(200, end=True))
        assert kinds(await read(stream, 1)) == ["response_headers"]
        await asyncio.wait_for(draining, 10)
    assert stage.held() == (0, 0)


async def test_health(stage: Stage) -> None:
    ask = health_pb2.HealthCheckRequest
    stage.health.set("readiness", False)
    async with stage.prober() as stub:
        assert (await stub.Check(ask(service="readiness"))).status == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(ask(service="nothing"))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        assert "'nothing'" in caught.value.details()
        watches = [stub.Watch(ask(service=name)) for name in ("readiness", "readiness", "nothing")]
        first = [(await w.read()).status for w in watches]
        assert first == [NOT_SERVING, NOT_SERVING, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN]
        watches[0].cancel()
        stage.health.set("readiness", True)
        stage.health.set("nothing", True)
        assert [(await w.read()).status for w in watches[1:]] == [SERVING, SERVING]


async def test_a_port_that_is_taken_is_named(stage: Stage) -> None:
    port = int(stage.ext_proc.rpartition(":")[2])
    [other] = free_ports(1)
    for name in ServerName:
        for where in (Listen("127.0.0.1", port, other), Listen("127.0.0.1", other, port)):
            second = front(name, stage.service, stage.health, where)
            with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}: is another picker"):
                await second.start()
            await second.drain(0)
            await second.stop()
