"""KServe v2 through a real Envoy to an emulated Triton: REST, and gRPC as tritonclient speaks it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from tritonclient.grpc import InferInput, service_pb2
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from support.engines import EngineProcess
from support.local_picker import LocalPicker, served
from support.ports import free_port
from support.wait import eventually

GOOD, POOR = {"authorization": "Bearer good"}, {"authorization": "Bearer poor"}
MOST = 300_000


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
    """A Triton with the model `llama`, two slots."""
    found = {name: free_port() for name in ("http", "grpc", "metrics")}
    args = ["tritonserver", *(f"--{name}-port={port}" for name, port in found.items())]
    env = {
        "TIDEGATE_EMULATOR_MODELS": "llama",
        "TIDEGATE_EMULATOR_MAX_NUM_SEQS": "2",
        "TIDEGATE_EMULATOR_SPEED": "5",
    }
    log = tmp_path_factory.mktemp("triton") / "log"
    with EngineProcess("triton", args, log, env) as engine:
        engine.wait_for(f"http://127.0.0.1:{found['http']}/v2/health/ready")
        yield found


@pytest.fixture(scope="module")
def picker(ports: dict[str, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalPicker]:
    """Serves it as `rank` and `alias-rank`; a model without a gRPC port and one that is not there."""
    address = f"127.0.0.1:{ports['http']}"
    names = {"rank": "llama", "alias-rank": "llama"}
    models = [
        served("rank", "KServeV2", "Triton", engine_names=names),
        served("plain", "KServeV2", "Triton"),
        served("away", "KServeV2", "Triton"),
    ]
    away, other = (f"127.0.0.1:{free_port()}" for _ in range(2))
    grpc_addresses = {address: f"127.0.0.1:{ports['grpc']}", away: away}
    folder = tmp_path_factory.mktemp("envoy")
    with LocalPicker(
        folder, models, [address, other, away], grpc_addresses, max_body=MOST, show_endpoint=True
    ) as one:
        yield one


@pytest.fixture
async def triton(picker: LocalPicker) -> AsyncIterator[InferenceServerClient]:
    async with InferenceServerClient(picker.address) as client:
        yield client


@pytest.fixture
async def rest(picker: LocalPicker) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=picker.url, timeout=30, headers=GOOD) as client:
        yield client


def text(content: str = "hello", *, stream: bool = False) -> list[InferInput]:
    prompt = InferInput("text_input", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([content.encode()], dtype=object))
    flag = InferInput("stream", [1], "BOOL")
    flag.set_data_from_numpy(np.array([stream]))
    return [prompt, flag]


EIGHT = {"max_tokens": 8, "ignore_eos": True}


# ── REST ────────────────────────────────────────────────────────────────────────────────────────


async def test_rest_reaches_the_engine_by_its_own_name(
    rest: httpx.AsyncClient, ports: dict[str, int]
) -> None:
    body = {"text_input": "hello", "parameters": EIGHT}
    for name in ("rank", "alias-rank"):
        answer = await rest.post(f"/v2/models/{name}/generate", json=body, headers={"x-tidegate-qos": "low"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["text_output"] == "hello" + " tok" * 8
        assert answer.headers["x-tidegate-qos"] == "low"
        assert float(answer.headers["x-tidegate-queue-seconds"]) >= 0
        assert answer.headers["x-tidegate-endpoint"] == f"127.0.0.1:{ports['http']}"
        assert answer.headers["x-request-id"]
    async with rest.stream("POST", "/v2/models/rank/versions/1/generate_stream", json=body) as answer:
        assert len([line async for line in answer.aiter_lines() if line.startswith("data:")]) == 8
    inputs = [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["hello"]}]
    answer = await rest.post("/v2/models/rank/infer", json={"id": "7", "inputs": inputs, "parameters": EIGHT})
    assert (answer.status_code, answer.json()["id"]) == (200, "7")


async def test_rest_tells_of_models_and_server(rest: httpx.AsyncClient, picker: LocalPicker) -> None:
    for path in ("/v2/models/rank", "/v2/models/rank/versions/1", "/v2/models/alias-rank/config"):
        answer = await rest.get(path)
        assert (answer.status_code, answer.json()["name"]) == (200, "llama"), path
    assert (await rest.get("/v2/models/rank/stats")).json()["model_stats"][0]["name"] == "llama"
    assert (await rest.get("/v2")).json()["name"] == "tidegate"
    assert (await rest.get("/v2/models/rank/ready", headers={"authorization": ""})).status_code == 200
    assert (await rest.get("/v2/models/rank", headers=POOR)).status_code == 403
    assert (await rest.get("/v2/models/rank/versions/9")).status_code == 404


# ── gRPC ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["rank", "alias-rank"])
async def test_an_inference_over_grpc(triton: InferenceServerClient, picker: LocalPicker, name: str) -> None:
    answer = await triton.infer(name, text("hello"), headers=GOOD, parameters=EIGHT, request_id="7")
    assert answer.as_numpy("text_output")[0].decode() == "hello" + " tok" * 8
    assert answer.get_response().id == "7"
    await eventually(_of(picker.in_flight), until=lambda n: n == 0)


async def test_a_large_message_goes_through_in_pieces(triton: InferenceServerClient) -> None:
    prompt = "x" * 25_000
    answer = await triton.infer("rank", text(prompt), headers=GOOD, parameters=EIGHT)
    assert answer.as_numpy("text_output")[0].decode().startswith(prompt)


async def test_server_and_model_over_grpc(triton: InferenceServerClient) -> None:
    assert await triton.is_server_live()
    assert await triton.is_server_ready()
    assert await triton.is_model_ready("alias-rank")
    assert (await triton.get_server_metadata()).name == "triton"
    metadata = await triton.get_model_metadata("rank", headers=GOOD)
    assert (metadata.name, list(metadata.versions)) == ("llama", ["1"])
    with pytest.raises(InferenceServerException, match="may not use"):
        await triton.get_model_metadata("rank", headers=POOR)


async def test_a_stream_over_grpc_arrives_token_by_token(
    triton: InferenceServerClient, picker: LocalPicker
) -> None:
    async def asks() -> AsyncIterator[dict[str, Any]]:
        for number in range(2):
            yield {
                "model_name": "rank",
                "inputs": text(f"prompt {number}", stream=True),
                "request_id": str(number),
                "parameters": EIGHT,
            }

    got = []
    async for result, error in triton.stream_infer(asks(), headers=GOOD):
        assert error is None
        got.append(result.get_response().id)
    assert got == ["0"] * 8 + ["1"] * 8
    await eventually(_of(picker.in_flight), until=lambda n: n == 0)


async def test_a_stream_stays_open_while_its_client_thinks(
    triton: InferenceServerClient, picker: LocalPicker
) -> None:
    """The first message is answered before the second is written, and its room is held to the end."""
    answered = asyncio.Event()

    async def asks() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": "rank", "inputs": text("first"), "parameters": EIGHT}
        await asyncio.wait_for(answered.wait(), 20)
        assert picker.in_flight() == 1
        yield {"model_name": "rank", "inputs": text("second"), "parameters": EIGHT}

    texts = []
    async for result, error in triton.stream_infer(asks(), headers=GOOD):
        assert error is None
        texts.append(result.as_numpy("text_output")[0].decode().partition(" ")[0])
        answered.set()
    assert texts == ["first", "second"]
    await eventually(_of(picker.in_flight), until=lambda n: n == 0)


async def test_a_stream_that_turns_to_another_model_is_ended(
    triton: InferenceServerClient, picker: LocalPicker
) -> None:
    answered = asyncio.Event()

    async def asks() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": "rank", "inputs": text("first"), "parameters": EIGHT}
        await asyncio.wait_for(answered.wait(), 20)
        yield {"model_name": "plain", "inputs": text("second"), "parameters": EIGHT}

    got = []

    async def consume() -> None:
        async for result, error in triton.stream_infer(asks(), headers=GOOD):
            got.append((result, error))
            answered.set()

    with pytest.raises(grpc.aio.AioRpcError):  # reset: what began as a success cannot end as a refusal
        await consume()
    assert len(got) == 1
    await eventually(_of(picker.in_flight), until=lambda n: n == 0)


async def test_a_client_that_leaves_frees_its_room(
    triton: InferenceServerClient, picker: LocalPicker
) -> None:
    long = {"max_tokens": 4000, "ignore_eos": True}
    leaving = asyncio.create_task(triton.infer("rank", text(), headers=GOOD, parameters=long))
    await eventually(_of(picker.in_flight), until=lambda n: n == 1)
    leaving.cancel()
    await eventually(_of(picker.in_flight), until=lambda n: n == 0, within_s=5)


# ── refusals over gRPC ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "headers", "inputs", "status", "code"),
    [
        ("nothing", GOOD, None, grpc.StatusCode.NOT_FOUND, "model_not_found"),
        ("rank", POOR, None, grpc.StatusCode.PERMISSION_DENIED, "class_not_allowed"),
        ("rank", {}, None, grpc.StatusCode.PERMISSION_DENIED, "class_not_allowed"),
        (
            "rank",
            {"authorization": "Bearer bad"},
            None,
            grpc.StatusCode.UNAUTHENTICATED,
            "invalid_token",
        ),
        ("rank", GOOD, b"x" * (MOST + 1), grpc.StatusCode.RESOURCE_EXHAUSTED, "body_too_large"),
        ("", GOOD, None, grpc.StatusCode.INVALID_ARGUMENT, "model_required"),
        ("plain", GOOD, None, grpc.StatusCode.INVALID_ARGUMENT, "protocol_mismatch"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_refusals_are_grpc_statuses_with_a_code(
    picker: LocalPicker,
    name: str,
    headers: dict[str, str],
    inputs: bytes | None,
    status: grpc.StatusCode,
    code: str,
) -> None:
    for method in ("ModelInfer", "ModelStreamInfer"):
        error = await asyncio.to_thread(refused, picker.address, method, name, headers, inputs)
        assert error.code() is status, error.details()
        said = dict([*error.initial_metadata(), *error.trailing_metadata()])
        assert said["x-tidegate-code"] == code
        assert said["x-request-id"]


def refused(
    address: str,
    method: str,
    name: str,
    headers: dict[str, str],
    raw: bytes | None = None,
    compression: grpc.Compression | None = None,
) -> Any:
    """How a call ends. grpcio's own threads: its asyncio client loses a status that comes while it writes."""
    kind = "stream_stream" if "Stream" in method else "unary_unary"
    message = service_pb2.ModelInferRequest(model_name=name, raw_input_contents=[raw] if raw else [])
    with grpc.insecure_channel(address) as channel:
        call = getattr(channel, kind)(
            f"/inference.GRPCInferenceService/{method}",
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
        )
        what = message if kind == "unary_unary" else iter([message])
        with pytest.raises(grpc.RpcError) as raised:
            list(call(what, metadata=tuple(headers.items()), compression=compression, timeout=30))
    return raised.value


async def test_compressed_messages_are_refused_with_what_to_do(picker: LocalPicker) -> None:
    for method in ("ModelInfer", "ModelStreamInfer"):
        error = await asyncio.to_thread(
            refused, picker.address, method, "rank", GOOD, b"x" * 5000, grpc.Compression.Gzip
        )
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "compression_algorithm=None" in error.details()


async def test_an_engine_that_is_not_there_is_unavailable_in_plain_words(picker: LocalPicker) -> None:
    error = await asyncio.to_thread(refused, picker.address, "ModelInfer", "away", GOOD)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert '"error"' not in error.details()
    assert "try again" in error.details()
    await eventually(_of(picker.in_flight), until=lambda n: n == 0)


async def test_grpc_web_is_not_grpc(rest: httpx.AsyncClient) -> None:
    for kind in ("application/grpc-web+proto", "application/json"):
        path = "/inference.GRPCInferenceService/ModelInfer"
        answer = await rest.post(path, content=b"\0\0\0\0\0", headers={"content-type": kind})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")


def _of(read: Callable[[], int]) -> Callable[[], Any]:
    async def now() -> int:
        return read()

    return now
