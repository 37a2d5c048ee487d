"""Headers that a client makes up: what of them reaches the picker's decisions, and what an engine."""

import asyncio
from collections.abc import Mapping
from typing import Any

import orjson
import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from support.ext_proc import request_body, set_headers
from tidegate.adapters.kube import ApiError, Kind
from tidegate.api.identity import IdentitySources, parse
from tidegate.core.flow import Endpoint, Flow, Model
from tidegate.core.load import EngineReport
from tidegate.core.types import QoSClass
from tidegate.facts.endpoints import ServedModel, World
from tidegate.picker.desk import Desk
from tidegate.picker.handover import VLLM_PRIORITY_HEADER
from tidegate.picker.identity import Identity
from tidegate.picker.service import Service, Settings
from tidegate.render.envoy import DESTINATION_HEADER
from tidegate.render.measure import REQUEST_HEADER

KEY = ("ns", "m")
SERVED = ServedModel(KEY, ("m",), ("high", "low"), "OpenAI", "vLLM")
WORLD = World(
    {"high": QoSClass("high", 900), "low": QoSClass("low", 10)},
    {KEY: SERVED},
    {"m": KEY},
    (Endpoint("10.0.0.1:8000", KEY, "low", 4),),
    {KEY: Model(KEY, ("high", "low"), startable=False)},
)
PRIORITY = {"high": str(1_000_000_000 - 900), "low": str(1_000_000_000 - 10)}
USERS = {"vip": "vip", "poor": "poor"}
GATEWAY = parse({"apiKeys": {"enabled": True, "userPrefix": ""}})
JWT = parse(
    {
        "jwt": {
            "providers": [
                {"name": "a", "issuer": "i", "audiences": ["t"], "jwks": {"inline": '{"keys": [{}]}'}}
            ]
        }
    }
)


def told(reply: pb.ProcessingResponse) -> dict[str, str]:
    """What the engine is told, beside the request's ids."""
    own = ("x-request-id", REQUEST_HEADER)
    return {name: value for name, value in set_headers(reply).items() if name not in own}


class Server:
    """`vip` may use both classes, everybody else low, and anonymous nothing."""

    def __init__(self) -> None:
        self.error: ApiError | None = None
        self.asked = 0

    async def create(self, kind: Kind, obj: Mapping[str, Any]) -> dict[str, Any]:
        self.asked += 1
        if self.error is not None:
            raise self.error
        spec = obj["spec"]
        if kind.name == "TokenReview":
            user = USERS.get(spec["token"])
            return {"status": {"authenticated": user is not None, "user": {"username": user or ""}}}
        allowed = {"vip": {"high", "low"}, "system:anonymous": set()}.get(spec["user"], {"low"})
        return {"status": {"allowed": spec["resourceAttributes"]["name"] in allowed}}


def envelope(pairs: list[tuple[str, str]]) -> pb.ProcessingRequest:
    message = pb.HttpHeaders()
    for name, value in [(":method", "POST"), (":path", "/v1/chat/completions"), *pairs]:
        header = message.headers.headers.add()
        header.key, header.raw_value = name, value.encode("latin-1")
    return pb.ProcessingRequest(request_headers=message)


async def serve(
    first: pb.ProcessingRequest, sources: IdentitySources | None = None, server: Server | None = None
) -> list[pb.ProcessingResponse]:
    """What the picker answers to a request with this beginning."""
    desk = Desk(Flow(), clock=lambda: 0.0)
    desk.set_world(WORLD)
    desk.report("10.0.0.1:8000", EngineReport(0.0, 0, 0), (0, 0))
    settings = Settings(sources=sources or IdentitySources())
    service = Service(desk, Identity(server or Server(), desk.clock), settings)
    messages: asyncio.Queue[pb.ProcessingRequest | None] = asyncio.Queue()
    for message in [first, *request_body([b'{"model":"m","prompt":"x"}'])]:
        messages.put_nowait(message)
    written: list[pb.ProcessingResponse] = []

    async def write(reply: pb.ProcessingResponse) -> None:
        if not written:
            messages.put_nowait(None)
        written.append(reply)

    await asyncio.wait_for(service.serve(messages.get, write), timeout=5)
    return written


async def ask(
    pairs: list[tuple[str, str]], sources: IdentitySources | None = None, server: Server | None = None
) -> list[pb.ProcessingResponse]:
    return await serve(envelope(pairs), sources, server)


def error_of(replies: list[pb.ProcessingResponse]) -> tuple[int, str]:
    [reply] = replies
    answer = reply.immediate_response
    return answer.status.code, orjson.loads(answer.body)["error"]["code"]


POOR = ("authorization", "Bearer poor")
VIP = ("authorization", "Bearer vip")

MASTERS = "system:masters"
SUBSET = "x-gateway-destination-endpoint-subset"
RAISES = {
    "our own words": [
        ("x-tidegate-class", "high"),
        ("x-tidegate-user", "vip"),
        ("x-tidegate-groups", MASTERS),
    ],
    "the gateway's words, where none is configured": [
        ("x-tidegate-client", "vip"),
        ("x-tidegate-jwt", "eyJzdWIiOiJ2aXAifQ"),
    ],
    "the engine's priority": [("x-vllm-priority", "0"), ("x-vllm-priority", "-5")],
    "another endpoint": [(DESTINATION_HEADER, "10.9.9.9:80"), (SUBSET, "10.9.9.9:80")],
    "identity headers of others": [
        ("x-forwarded-user", "vip"),
        ("x-remote-user", "vip"),
        ("x-forwarded-groups", "g"),
    ],
    "a proxy's chain": [("x-forwarded-for", "127.0.0.1"), ("forwarded", "for=::1"), ("x-real-ip", "::1")],
    "a client certificate": [("x-forwarded-client-cert", "Subject=CN=vip")],
    "impersonation as kubectl does it": [("impersonate-user", "vip"), ("impersonate-group", MASTERS)],
    "odd case": [("X-Tidegate-User", "vip"), ("X-VLLM-Priority", "0"), ("X-Tidegate-CLIENT", "vip")],
    "many values": [("x-tidegate-client", f"vip-{i}") for i in range(50)],
    "no value": [("x-tidegate-client", ""), ("x-tidegate-qos", ""), ("x-vllm-priority", "")],
}


@pytest.mark.parametrize("forged", RAISES.values(), ids=RAISES)
async def test_no_header_makes_a_caller_more_than_its_token(forged: list[tuple[str, str]]) -> None:
    first, *_ = await ask([*forged, POOR])
    assert first.WhichOneof("response") == "request_headers"
    assert told(first) == {DESTINATION_HEADER: "10.0.0.1:8000", VLLM_PRIORITY_HEADER: PRIORITY["low"]}
    taken = set(first.request_headers.response.header_mutation.remove_headers)
    assert "authorization" in taken
    ours = {n.lower() for n, _ in forged if n.lower().startswith(("x-tidegate-", "x-gateway-", "x-vllm-"))}
    assert ours <= taken | set(set_headers(first))
    assert not taken & set(set_headers(first))  # what is set is not taken away again


@pytest.mark.parametrize("forged", RAISES.values(), ids=RAISES)
async def test_no_header_makes_somebody_of_nobody(forged: list[tuple[str, str]]) -> None:
    assert error_of(await ask(forged)) == (403, "class_not_allowed")


@pytest.mark.parametrize(
    "name", ["x-tidegate-qos", "x-llm-d-inference-objective", "x-gateway-inference-objective"]
)
async def test_a_header_lowers_the_class_and_never_raises_it(name: str) -> None:
    lowered, *_ = await ask([VIP, (name, "low")])
    assert set_headers(lowered)[VLLM_PRIORITY_HEADER] == PRIORITY["low"]
    unnamed, *_ = await ask([VIP])
    assert set_headers(unnamed)[VLLM_PRIORITY_HEADER] == PRIORITY["high"]
    assert error_of(await ask([POOR, (name, "high")])) == (403, "class_not_allowed")
    assert error_of(await ask([POOR, (name, "low,high")])) == (403, "class_not_allowed")
    # Said twice the first counts, and is checked like one that came alone.
    assert error_of(await ask([POOR, (name, "high"), (name, "low")])) == (403, "class_not_allowed")
    first, *_ = await ask([POOR, (name, "low"), (name, "high")])
    assert set_headers(first)[VLLM_PRIORITY_HEADER] == PRIORITY["low"]


@pytest.mark.parametrize(
    "pairs", [[POOR, VIP], [VIP, POOR], [POOR, POOR], [("Authorization", "Bearer poor"), VIP]]
)
async def test_two_tokens_are_one_too_many(pairs: list[tuple[str, str]]) -> None:
    server = Server()
    assert error_of(await ask(pairs, server=server)) == (400, "ambiguous_credentials")
    assert server.asked == 0


async def test_what_the_gateway_says_counts_once() -> None:
    said, *_ = await ask([("x-tidegate-client", "vip")], GATEWAY)
    assert set_headers(said)[VLLM_PRIORITY_HEADER] == PRIORITY["high"]
    twice = [("x-tidegate-client", "poor"), ("X-Tidegate-Client", "vip")]
    assert error_of(await ask(twice, GATEWAY)) == (400, "ambiguous_credentials")


async def test_a_payload_of_no_configured_issuer_is_nobody_s() -> None:
    assert error_of(await ask([("x-tidegate-jwt", "eyJpc3MiOiJ4Iiwic3ViIjoidmlwIn0")], JWT)) == (
        401,
        "invalid_token",
    )


async def test_metadata_and_attributes_say_nothing() -> None:
    """Another filter's dynamic metadata is not believed, whatever its name."""
    first = envelope([POOR])
    for namespace in ("envoy.filters.http.jwt_authn", "envoy.lb", "tidegate", "io.istio.authn"):
        struct = first.metadata_context.filter_metadata[namespace]
        struct.update({"user": "vip", "sub": "vip", "class": "high", DESTINATION_HEADER: "10.9.9.9:80"})
        first.attributes[namespace].update({"user": "vip"})
    reply, *_ = await serve(first)
    assert told(reply) == {DESTINATION_HEADER: "10.0.0.1:8000", VLLM_PRIORITY_HEADER: PRIORITY["low"]}
    assert reply.dynamic_metadata["envoy.lb"][DESTINATION_HEADER] == "10.0.0.1:8000"


@pytest.mark.parametrize(
    ("error", "expected"),
    [(ApiError(0, "ConnectionFailed", "refused"), (503, "identity_unknown")), (None, (401, "invalid_token"))],
)
async def test_what_an_unknown_token_is_answered(error: ApiError | None, expected: tuple[int, str]) -> None:
    server = Server()
    server.error = error
    replies = await ask([("authorization", "Bearer stranger")], server=server)
    assert error_of(replies) == expected
    named = {o.header.key: o.header.raw_value for o in replies[0].immediate_response.headers.set_headers}
    assert ("retry-after" in named) is (expected[0] == 503)
    assert ("www-authenticate" in named) is (expected[0] == 401)
