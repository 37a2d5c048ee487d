"""The emulated Triton, over HTTP and as tritonclient sees it over gRPC."""

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Iterator

import httpx
import numpy as np
import pytest
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

from support.engines import LIMIT_S, EngineProcess, samples
from support.ports import free_port
from support.wait import eventually
from tidegate.adapters.triton import readiness

MODEL = 'model="llama",version="1"'


class Ports:
    """The three ports of a Triton."""

    def __init__(self) -> None:
        self.http, self.grpc, self.metrics = free_port(), free_port(), free_port()

    @property
    def args(self) -> list[str]:
        return [f"--http-port={self.http}", f"--grpc-port={self.grpc}", f"--metrics-port={self.metrics}"]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"


@pytest.fixture(scope="module")
def triton(tmp_path_factory) -> Iterator[Ports]:
    """A server with two models, one loaded; two slots each."""
    ports = Ports()
    env = {
        "TIDEGATE_EMULATOR_MODELS": "llama,spare",
        "TIDEGATE_EMULATOR_MAX_NUM_SEQS": "2",
        "TIDEGATE_EMULATOR_SPEED": "5",
    }
    args = [
        "tritonserver",
        *ports.args,
        "--model-control-mode=explicit",
        "--load-model=llama",
        "--log-info=1",
    ]
    log = tmp_path_factory.mktemp("triton") / "log"
    with EngineProcess("triton", args, log, env) as engine:
        engine.wait_for(f"{ports.url}/v2/health/ready")
        yield ports
        engine.terminate()
        assert engine.exit_code() == 0
        assert "--log-info: accepted, not emulated" in log.read_text()


@pytest.fixture
async def client(triton) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=triton.url, timeout=LIMIT_S) as client:
        yield client


@pytest.fixture
async def official(triton) -> AsyncIterator[InferenceServerClient]:
    async with InferenceServerClient(f"127.0.0.1:{triton.grpc}") as client:
        yield client


async def metrics(triton: Ports) -> dict[str, float]:
    async with httpx.AsyncClient(timeout=LIMIT_S) as client:
        answer = await client.get(f"http://127.0.0.1:{triton.metrics}/metrics")
    return samples(answer.text)


def ask(tokens: int, **more) -> dict:
    return {"text_input": "hello there", "max_tokens": tokens, "ignore_eos": True, **more}


def text_input(*texts: str) -> InferInput:
    tensor = InferInput("text_input", [len(texts)], "BYTES")
    tensor.set_data_from_numpy(np.array([t.encode() for t in texts], dtype=np.object_))
    return tensor


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v2/health/live", 200),
        ("/v2/health/ready", 200),
        ("/v2/models/llama/ready", 200),
        ("/v2/models/llama/versions/1/ready", 200),
        ("/v2/models/llama/versions/2/ready", 404),
        ("/v2/models/spare/ready", 404),
        ("/v2/models/nobody/ready", 404),
    ],
)
async def test_health(client, path, status):
    assert (await client.get(path)).status_code == status


async def test_metadata_and_configuration(client):
    assert "generate" in (await client.get("/v2")).json()["extensions"]
    assert (await client.get("/v2/models/llama")).json()["inputs"][0]["name"] == "text_input"
    config = (await client.get("/v2/models/llama/config")).json()
    assert config["dynamic_batching"]["priority_levels"] >= 3
    assert config["parameters"]["max_num_seqs"] == {"string_value": "2"}


async def test_generate(client):
    answer = await client.post("/v2/models/llama/generate", json=ask(3))
    assert answer.json() == {
        "model_name": "llama",
        "model_version": "1",
        "text_output": "hello there tok tok tok",
    }


async def test_generate_stream_is_one_event_for_each_token(client):
    answer = await client.post("/v2/models/llama/generate_stream", json=ask(3))
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line]
    assert events == [{"model_name": "llama", "model_version": "1", "text_output": " tok"}] * 3


async def test_infer_as_json(client):
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["hi"]}
    body = {"id": "7", "inputs": [tensor], "parameters": {"max_tokens": 2, "ignore_eos": True, "priority": 1}}
    answer = (await client.post("/v2/models/llama/infer", json=body)).json()
    assert answer["id"] == "7"
    assert answer["outputs"] == [
        {"name": "text_output", "datatype": "BYTES", "shape": [1], "data": ["hi tok tok"]}
    ]


async def test_infer_with_the_binary_tensor_extension(client):
    """As tritonclient's HTTP side sends it by default."""
    raw = struct.pack("<I", 2) + b"hi"
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 6}}
    parameters = {"max_tokens": 2, "ignore_eos": True, "binary_data_output": True}
    head = json.dumps({"inputs": [tensor], "parameters": parameters}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    answer = await client.post("/v2/models/llama/infer", content=head + raw, headers=headers)
    length = int(answer.headers["Inference-Header-Content-Length"])
    output = json.loads(answer.content[:length])["outputs"][0]
    assert output["parameters"]["binary_data_size"] == 14
    assert answer.content[length:] == struct.pack("<I", 10) + b"hi tok tok"


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        pytest.param("models/nobody/generate", ask(1), 404, "unknown model: 'nobody'", id="unknown model"),
        pytest.param("models/spare/generate", ask(1), 404, "no available versions", id="not loaded"),
        pytest.param("models/llama/versions/3/infer", {}, 404, "version 3 is not found", id="version"),
        pytest.param("models/llama/generate", {}, 400, "text_input", id="no input"),
        pytest.param("models/llama/infer", {"inputs": [1]}, 400, "with a name", id="no tensor"),
        pytest.param("models/llama/generate", ask(9000), 400, "exceed the model's 8192", id="too long"),
        pytest.param("models/llama/generate", ask(1, priority=-1), 400, "priority", id="priority"),
        pytest.param("repository/models/nobody/load", {}, 400, "failed to load 'nobody'", id="load"),
        pytest.param("nowhere", {}, 404, "Not Found", id="route"),
    ],
)
async def test_errors_have_tritons_shape(client, path, body, status, message):
    answer = await client.post(f"/v2/{path}", json=body)
    assert answer.status_code == status
    assert set(answer.json()) == {"error"}
    assert message in answer.json()["error"]


async def test_statistics_and_metrics_count_what_was_served(client, triton):
    before, old = await metrics(triton), (await client.get("/v2/models/llama/stats")).json()["model_stats"][0]
    await client.post("/v2/models/llama/generate", json=ask(20))
    after, new = await metrics(triton), (await client.get("/v2/models/llama/stats")).json()["model_stats"][0]

    def grown(name: str) -> float:
        return after[f"nv_inference_{name}{{{MODEL}}}"] - before[f"nv_inference_{name}{{{MODEL}}}"]

    assert grown("request_success") == grown("count") == grown("exec_count") == 1
    assert grown("request_duration_us") >= grown("compute_infer_duration_us") > 0
    assert after[f"nv_inference_pending_request_count{{{MODEL}}}"] == 0
    assert f'nv_inference_request_failure{{{MODEL},reason="REJECTED"}}' in after
    assert new["inference_count"] - old["inference_count"] == 1
    assert new["inference_stats"]["success"]["ns"] > old["inference_stats"]["success"]["ns"]
    assert [m["name"] for m in (await client.get("/v2/models/stats")).json()["model_stats"]] == ["llama"]


async def until(triton: Ports, sample: str, value: float) -> None:
    """Wait until a sample has a value."""

    async def look() -> float:
        return (await metrics(triton))[sample]

    await eventually(look, until=lambda got: got == value)


async def test_priority_one_goes_before_those_who_wait(client, triton):
    pending = f"nv_inference_pending_request_count{{{MODEL}}}"
    done: list[str] = []

    async def post(name: str, tokens: int, priority: int) -> None:
        await client.post("/v2/models/llama/generate", json=ask(tokens, priority=priority))
        done.append(name)

    # Triton does not tell what runs. Of three one waits; without one of them two hold both slots.
    tasks = [asyncio.create_task(post("holder", 8000, 1)) for _ in range(3)]
    await until(triton, pending, 1)
    tasks.pop().cancel()
    await until(triton, pending, 0)
    for count, (name, priority) in enumerate((("default", 0), ("batch", 3), ("person", 1)), start=1):
        tasks.append(asyncio.create_task(post(name, 100, priority)))
        await until(triton, pending, count)
    assert done == [], "nobody is preempted for a slot"
    tasks[0].cancel()
    await asyncio.gather(*tasks[2:])
    tasks[1].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert done == ["person", "batch", "default"], "0 is the default level, the middle one"


@pytest.mark.parametrize("path", ["generate", "generate_stream"])
async def test_a_client_that_leaves_frees_its_slot(client, triton, path):
    cancelled = f'nv_inference_request_failure{{{MODEL},reason="CANCELED"}}'
    before = (await metrics(triton))[cancelled]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0):
            await client.post(f"/v2/models/llama/{path}", json=ask(8000))
    await until(triton, cancelled, before + 1)
    # With its two slots free again the model answers both of two at once.
    await asyncio.gather(*(client.post("/v2/models/llama/generate", json=ask(2)) for _ in range(2)))


async def test_tritonclient_over_grpc(official):
    assert await official.is_server_live()
    assert await official.is_server_ready()
    assert await official.is_model_ready("llama")
    assert not await official.is_model_ready("nobody")
    assert (await official.get_server_metadata()).name == "triton"
    assert (await official.get_model_metadata("llama")).outputs[0].name == "text_output"
    result = await official.infer(
        "llama", [text_input("hi", "you")], priority=1, parameters={"max_tokens": 2, "ignore_eos": True}
    )
    assert list(result.as_numpy("text_output")) == [b"hi tok tok", b"you tok tok"]
    statistics = await official.get_inference_statistics("llama")
    assert statistics.model_stats[0].inference_stats.success.count > 0


async def test_tritonclient_streams(official):
    async def asks():
        for name, stream in (("llama", True), ("nobody", True), ("llama", False)):
            flag = InferInput("stream", [1], "BOOL")
            flag.set_data_from_numpy(np.array([stream]))
            yield {
                "model_name": name,
                "inputs": [text_input("hi"), flag],
                "parameters": {"max_tokens": 3, "ignore_eos": True},
            }

    got = [
        str(error) if error else result.as_numpy("text_output")[0].decode()
        async for result, error in official.stream_infer(asks())
    ]
    assert got[:3] == [" tok"] * 3
    assert "unknown model: 'nobody'" in got[3]
    assert got[4:] == ["hi tok tok tok"]


async def test_tritonclient_loads_and_unloads(official):
    async def states() -> dict[str, str]:
        return {m.name: m.state for m in (await official.get_model_repository_index()).models}

    assert await states() == {"llama": "READY", "spare": "UNAVAILABLE"}
    await official.load_model("spare")
    assert await official.is_model_ready("spare")
    await official.unload_model("spare")
    assert await states() == {"llama": "READY", "spare": "UNAVAILABLE"}
    with pytest.raises(InferenceServerException, match="failed to load 'nobody'"):
        await official.load_model("nobody")
    with pytest.raises(InferenceServerException, match="unknown model: 'nobody'"):
        await official.infer("nobody", [text_input("hi")])


async def test_the_adapter_reads_it(triton):
    assert await readiness("127.0.0.1", triton.grpc) == "Triton is ready"


async def test_sigterm_lets_what_runs_finish_and_takes_nothing_new(tmp_path):
    ports = Ports()
    args = [*ports.args, "--load-model=llama"]
    with EngineProcess("triton", args, tmp_path / "log") as engine:
        engine.wait_for(f"{ports.url}/v2/health/ready")
        async with (
            httpx.AsyncClient(base_url=ports.url, timeout=LIMIT_S) as client,
            httpx.AsyncClient(base_url=ports.url, timeout=LIMIT_S) as other,
        ):
            # A connection that is open already: new ones are not accepted any more.
            await client.get("/v2")
            async with other.stream("POST", "/v2/models/llama/generate_stream", json=ask(150)) as running:
                lines = running.aiter_lines()
                await anext(lines)
                engine.terminate()
                await asyncio.to_thread(engine.wait_for_log, "Shutting down")
                refused = await client.get("/v2/health/ready")
                assert refused.status_code == 503
                rest = [line async for line in lines if line]
        assert len(rest) == 149
        assert engine.exit_code() == 0


@pytest.mark.parametrize("port", ["http", "grpc", "metrics"])
async def test_a_taken_port_is_told(triton, tmp_path, port):
    ports = Ports()
    setattr(ports, port, getattr(triton, port))
    with EngineProcess("triton", [*ports.args, "--load-model=m"], tmp_path / "log") as engine:
        assert engine.exit_code() == 1
        assert "Cannot listen on 127.0.0.1" in engine.log.read_text()


def test_no_models_ends_with_what_to_do(tmp_path):
    with EngineProcess("triton", ["--model-repository=/nowhere"], tmp_path / "log") as engine:
        assert engine.exit_code() == 1
        assert "TIDEGATE_EMULATOR_MODELS=NAME" in engine.log.read_text()
