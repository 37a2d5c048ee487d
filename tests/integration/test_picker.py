"""The picker behind a real Envoy, asking a real API server, in front of small fake engines."""

import asyncio
import json
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from support.chat import Caller
from support.fake_engine import FakeEngine
from support.gateway import EnvoyProcess, PickerProcess
from support.served import error_of, make_pod, set_ready, token_for
from support.wait import eventually
from tidegate.adapters.kube import Kube, kinds
from tidegate.cli.main import app
from tidegate.local import binaries
from tidegate.local.cluster import LocalCluster
from tidegate.render.envoy import ATTEMPTS, bootstrap

HIGH, LOW, PACED = "pick-high", "pick-low", "pick-paced"
CLASSES = {
    HIGH: {"priority": 900, "objectives": {"timeToFirstToken": "1s"}, "queue": {"maxWait": "5s"}},
    LOW: {"priority": 10, "reclaim": "Always", "queue": {"maxRequests": 3, "maxWait": "20s"}},
    # A step of the fit's engine takes 14.5 ms: beside anything else it is too slow for this.
    PACED: {"priority": 950, "objectives": {"timeToFirstToken": "1s", "timePerOutputToken": "20ms"}},
}


@dataclass
class Model:
    """A model with one fake engine for each lane, and clients of it."""

    name: str
    namespace: str
    picker: PickerProcess
    client: httpx.AsyncClient
    kube: Kube
    both: Caller
    low: Caller
    nobody: Caller
    engines: list[FakeEngine] = field(default_factory=list)

    def endpoint(self, engine: FakeEngine) -> dict[str, Any]:
        return next(e for e in self.picker.state()["endpoints"] if e["address"] == f"127.0.0.1:{engine.port}")

    async def settled(self) -> None:
        """Wait until nothing is in flight and every engine has been heard."""

        async def busy() -> int:
            return sum(self.endpoint(e)["requests"] for e in self.engines)

        await eventually(busy, until=lambda n: n == 0)

    def ended(self, outcome: str) -> float:
        return self.picker.metric("tidegate_requests_total", model=self.name, outcome=outcome)


@pytest.fixture(scope="module", params=["frames", "grpcio"])
def server(request: pytest.FixtureRequest) -> list[str]:
    """Flags of a picker: all of this holds whichever server speaks gRPC."""
    return ["--server", request.param]


@pytest.fixture(scope="module")
def picker(
    server: list[str], control_plane: LocalCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PickerProcess]:
    folder = tmp_path_factory.mktemp("picker")
    account = control_plane.layout.kubeconfig_of("tidegate-picker")
    one = PickerProcess(folder, account, ["--max-body-bytes", "300000", "--drain-seconds", "3", *server])
    yield one.start()
    one.stop()


@pytest.fixture(scope="module")
def gateway(picker: PickerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EnvoyProcess]:
    envoy = EnvoyProcess(tmp_path_factory.mktemp("envoy"), picker.ports[0], picker.ports[3])
    yield envoy.start()
    envoy.stop()


@pytest.fixture
async def classes(kube: Kube) -> None:
    for name, spec in CLASSES.items():
        full = {"metadata": {"name": name}, "spec": {"allowedNamespaces": {}, **spec}}
        await kube.apply(kinds.QOS_CLASS, full, manager="test", force=True)


MakeModel = Callable[..., Awaitable[Model]]


@pytest.fixture
async def make_model(
    kube: Kube, namespace: str, classes: None, picker: PickerProcess, gateway: EnvoyProcess
) -> AsyncIterator[MakeModel]:
    """`await make_model(lanes=[HIGH, LOW], slots=4)`: fake engines, pods, tokens, all known to the picker."""
    engines: list[FakeEngine] = []
    async with httpx.AsyncClient(
        base_url=gateway.url, timeout=30, limits=httpx.Limits(max_connections=None)
    ) as client:

        async def make(
            lanes: list[str] | None = None,
            *,
            slots: int = 4,
            high: str = HIGH,
            engine: dict[str, Any] | None = None,
            behind: PickerProcess = picker,
            via: httpx.AsyncClient = client,
        ) -> Model:
            name = f"m-{uuid.uuid4().hex[:8]}"
            spec = {
                "model": {"name": name, "uri": "hf://test/test", "aliases": [f"alias/{name}"]},
                "engine": engine or {"type": "vLLM"},
                "classes": [{"qosClass": high}, {"qosClass": LOW}],
            }
            await kube.create(
                kinds.MODEL_DEPLOYMENT, {"metadata": {"name": name, "namespace": namespace}, "spec": spec}
            )
            callers = [
                Caller(via, await token_for(kube, namespace, f"{name}-{who}", uses))
                for who, uses in (("both", [high, LOW]), ("low", [LOW]), ("nobody", []))
            ]
            model = Model(name, namespace, behind, via, kube, *callers)
            for lane in lanes if lanes is not None else [LOW]:
                one = await FakeEngine().start()
                engines.append(one)
                model.engines.append(one)
                await make_pod(kube, namespace, name, lane, one.port, slots=slots)

            async def known() -> bool:
                state = behind.state()
                by = {e["address"]: e for e in state["endpoints"]}
                mine = [by.get(f"127.0.0.1:{e.port}", {}) for e in model.engines]
                return name in state["models"] and all(e.get("kv_tokens") for e in mine)

            await eventually(known)
            return model

        yield make
        for engine in engines:
            await engine.stop()


# ── configuration ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("picker_host", ["127.0.0.1", "picker.tidegate-system.svc"], ids=["address", "name"])
def test_envoy_accepts_the_bootstrap(tmp_path: Path, picker_host: str) -> None:
    config = bootstrap(
        listen_host="127.0.0.1", listen_port=1, picker_host=picker_host, access_log="/dev/stderr"
    )
    path = tmp_path / "envoy.json"
    path.write_text(json.dumps(config))
    done = subprocess.run(
        [binaries.find_tool("envoy"), "--mode", "validate", "-c", str(path)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# ── the way through ─────────────────────────────────────────────────────────────────────────────


async def test_a_request_reaches_the_engine_with_its_class_and_without_what_was_forged(
    make_model: MakeModel,
) -> None:
    model = await make_model([HIGH])
    forged = {
        "x-gateway-destination-endpoint": "127.0.0.1:1",
        "x-vllm-priority": "-5",
        "x-envoy-upstream-rq-timeout-ms": "1",
    }
    response = await model.both.chat(model.name, headers=forged)
    assert response.status_code == 200, response.text
    [seen] = model.engines[0].seen
    assert seen.headers["x-vllm-priority"] == str(1_000_000_000 - 900)
    assert seen.headers["x-gateway-destination-endpoint"] == f"127.0.0.1:{model.engines[0].port}"
    assert "authorization" not in seen.headers
    assert "x-envoy-upstream-rq-timeout-ms" not in seen.headers
    assert seen.body["model"] == model.name
    await model.settled()
    assert model.ended("answered") == 1


async def test_the_header_lowers_the_class_and_an_alias_names_the_model(make_model: MakeModel) -> None:
    model = await make_model()
    for header in ("x-tidegate-qos", "x-llm-d-inference-objective", "x-gateway-inference-objective"):
        response = await model.both.chat(f"alias/{model.name}", headers={header: LOW})
        assert response.status_code == 200, response.text
    assert [s.headers["x-vllm-priority"] for s in model.engines[0].seen] == [str(1_000_000_000 - 10)] * 3


async def test_a_stream_arrives_whole_and_holds_its_room_until_its_last_byte(make_model: MakeModel) -> None:
    model = await make_model()
    model.engines[0].gate.clear()
    async with model.both.stream(model.name) as lines:
        # The engine's headers are here, its first token is not.
        assert model.endpoint(model.engines[0])["requests"] == 1
        model.engines[0].gate.set()
        assert [line async for line in lines][-1] == "[DONE]"
    await model.settled()


async def test_a_body_larger_than_a_chunk_arrives_unchanged(make_model: MakeModel) -> None:
    model = await make_model()
    prompt = "".join(chr(97 + i % 26) for i in range(200_000))
    assert (await model.both.chat(model.name, prompt=prompt)).status_code == 200
    assert model.engines[0].seen[0].body["messages"][0]["content"] == prompt


async def test_triton_gets_its_priority_in_the_body(make_model: MakeModel) -> None:
    model = await make_model(engine={"type": "Triton"})
    body = {"text_input": "hello", "parameters": {"temperature": 0, "priority": 7}}
    headers = model.both.headers | {"x-tidegate-qos": LOW}
    response = await model.client.post(f"/v2/models/{model.name}/generate", json=body, headers=headers)
    assert response.status_code == 200, response.text
    assert model.engines[0].seen[0].body["parameters"] == {"temperature": 0, "priority": 2}
    assert (await model.client.get(f"/v2/models/{model.name}/ready")).status_code == 200
    assert (await model.client.get("/v2/health/ready")).status_code == 200
    mismatch = await model.both.chat(model.name)
    assert (mismatch.status_code, error_of(mismatch)["code"]) == (400, "protocol_mismatch")


# ── what is refused, and how it looks ───────────────────────────────────────────────────────────


async def test_refusals_have_openai_s_shape_and_say_why(make_model: MakeModel) -> None:
    model = await make_model()
    url, mine = "/v1/chat/completions", model.both.headers
    post = model.client.post
    cases = {
        "no such model": (await model.both.chat("nothing"), 404, "'nothing' does not exist"),
        "no such path": (await model.client.get("/v1/nothing", headers=mine), 404, "GET /v1/nothing"),
        "engine's own paths": (
            await post("/v1/load_lora_adapter", json={}, headers=mine),
            404,
            "there is no",
        ),
        "not JSON": (await post(url, content=b"{", headers=mine), 400, "not valid JSON"),
        "no model": (await post(url, json={}, headers=mine), 400, "model must be a string"),
        "too large": (await post(url, content=b"x" * 300_001, headers=mine), 413, "300000 bytes"),
        "bad token": (await Caller(model.client, "nonsense").chat(model.name), 401, "not valid"),
        "no right": (await model.nobody.chat(model.name), 403, "may not use class"),
        "anonymous": (await Caller(model.client, None).chat(model.name), 403, "system:anonymous"),
        "raised by header": (
            await model.low.chat(model.name, headers={"x-tidegate-qos": HIGH}),
            403,
            f"may not use class {HIGH}",
        ),
        "class not served": (
            await model.both.chat(model.name, headers={"x-tidegate-qos": "gold"}),
            403,
            f"it serves {HIGH}, {LOW}",
        ),
    }
    for name, (response, status, words) in cases.items():
        error = error_of(response)
        assert response.status_code == status, (name, response.text)
        assert words in error["message"], name
    assert not model.engines[0].seen
    kserve = await post("/v2/models/nothing/infer", json={"inputs": []}, headers=mine)
    assert (kserve.status_code, kserve.json()) == (404, {"error": "the model 'nothing' does not exist"})


async def test_only_models_are_listed_that_the_caller_may_use(make_model: MakeModel) -> None:
    model = await make_model()
    stranger = Caller(model.client, None)
    for who, caller, shown in (
        ("both", model.both, True),
        ("low", model.low, True),
        ("nobody", model.nobody, False),
        ("stranger", stranger, False),
    ):
        listed = await model.client.get("/v1/models", headers=caller.headers)
        assert listed.status_code == 200, who
        names = {m["id"] for m in listed.json()["data"]}
        assert ({model.name, f"alias/{model.name}"} <= names) is shown, who
        assert (model.name in names) is shown, who
        one = await model.client.get(f"/v1/models/{model.name}", headers=caller.headers)
        assert one.status_code == (200 if shown else 404), who
    assert error_of(one)["message"] == f"the model '{model.name}' does not exist"


async def test_a_body_too_large_is_refused_before_all_of_it_came(make_model: MakeModel) -> None:
    model = await make_model()

    url = httpx.URL(str(model.client.base_url))
    reader, writer = await asyncio.open_connection(url.host, url.port)
    token = model.both.headers["Authorization"]
    writer.write(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\n"
        "Transfer-Encoding: chunked\r\n\r\n".encode()
    )
    for _ in range(7):  # of a body that never ends
        writer.write(b"c350\r\n" + b"x" * 50_000 + b"\r\n")
    answer = await asyncio.wait_for(reader.readuntil(b"}}"), 10)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"body_too_large"' in answer
    writer.close()


async def test_a_full_queue_is_429_with_retry_after_and_no_replica_is_503(make_model: MakeModel) -> None:
    model = await make_model(slots=1)
    engine = model.engines[0]
    engine.gate.clear()
    running = [asyncio.create_task(model.low.chat(model.name)) for _ in range(4)]  # 1 runs, 3 wait
    queue = model.picker.metric

    async def waiting() -> float:
        return queue("tidegate_queue_requests", model=model.name, qos_class=LOW)

    await eventually(waiting, until=lambda n: n == 3)
    refused = await model.low.chat(model.name)
    assert (refused.status_code, error_of(refused)["code"]) == (429, "QueueFull")
    assert int(refused.headers["retry-after"]) >= 1
    engine.gate.set()
    assert [r.status_code for r in await asyncio.gather(*running)] == [200] * 4
    assert engine.peak == 1

    other = await make_model([])
    pinned = {"spec": {"scaling": {"replicas": {HIGH: 0, LOW: 0}}}}
    await model.kube.merge(kinds.MODEL_DEPLOYMENT, other.name, pinned, other.namespace)

    async def asked() -> int:
        return (await other.low.chat(other.name)).status_code

    await eventually(asked, until=lambda status: status == 503)
    error = error_of(await other.low.chat(other.name))
    assert error["code"] == "NoReadyEndpoint"


async def test_a_request_waits_for_a_replica_that_is_starting(make_model: MakeModel) -> None:
    model = await make_model([])
    engine = await FakeEngine().start()
    try:
        pod = await make_pod(model.kube, model.namespace, model.name, LOW, engine.port, ready=False)
        waiting = asyncio.create_task(model.low.chat(model.name))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        await set_ready(model.kube, model.namespace, pod, True)
        assert (await waiting).status_code == 200
    finally:
        await engine.stop()


async def test_without_a_replica_it_is_said_when_one_is_expected(make_model: MakeModel) -> None:
    model = await make_model([])
    first = await make_pod(model.kube, model.namespace, model.name, LOW, 1, ready=False)
    await set_ready(model.kube, model.namespace, first, True, started_s=40)  # a start takes 40 s

    async def ready() -> bool:
        return any(e["ready"] for e in model.picker.state()["endpoints"] if e["model"] == model.name)

    await eventually(ready)
    await model.kube.delete(kinds.POD, first, model.namespace)
    second = await make_pod(model.kube, model.namespace, model.name, LOW, 2, ready=False)
    await set_ready(model.kube, model.namespace, second, False, started_s=10)  # 30 s are left
    refused = await model.both.chat(model.name)  # after the five seconds that its class waits
    assert (refused.status_code, error_of(refused)["code"]) == (503, "NoReadyEndpoint")
    assert 15 <= int(refused.headers["retry-after"]) <= 26
    assert "one is expected in" in error_of(refused)["message"]


async def test_envoy_s_own_errors_have_openai_s_shape(make_model: MakeModel) -> None:
    model = await make_model()
    await model.engines[0].kill()  # its pod still says that it is ready
    response = await model.both.chat(model.name)
    assert response.status_code == 503
    assert error_of(response)["type"] == "gateway_error"
    await model.settled()
    assert model.ended("lost") == 1 + ATTEMPTS  # each attempt was placed, and lost, by itself


# ── order ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_higher_class_overtakes_in_the_queue(make_model: MakeModel) -> None:
    model = await make_model(slots=1)
    engine = model.engines[0]
    engine.gate.clear()
    first = asyncio.create_task(model.low.chat(model.name))

    async def running() -> int:
        return engine.running

    await eventually(running, until=lambda n: n == 1)
    low = asyncio.create_task(model.low.chat(model.name, prompt="low"))
    await asyncio.sleep(0.2)
    high = asyncio.create_task(model.both.chat(model.name, prompt="high"))
    await asyncio.sleep(0.2)
    engine.gate.set()
    await asyncio.gather(first, low, high)
    order = [s.body["messages"][0]["content"] for s in engine.seen[1:]]
    assert order == ["high", "low"]


# ── ends of all kinds ───────────────────────────────────────────────────────────────────────────


async def test_clients_that_leave_free_their_place_at_once(make_model: MakeModel) -> None:
    model = await make_model(slots=1)
    engine = model.engines[0]
    engine.gate.clear()
    running = asyncio.create_task(model.low.chat(model.name))

    async def seen() -> tuple[int, float]:
        waiting = model.picker.metric("tidegate_queue_requests", model=model.name)
        return (engine.running, waiting)

    await eventually(seen, until=lambda s: s == (1, 0))
    queued = asyncio.create_task(model.low.chat(model.name))
    await eventually(seen, until=lambda s: s == (1, 1))
    queued.cancel()  # while it waits
    await eventually(seen, until=lambda s: s == (1, 0), within_s=3)
    running.cancel()  # before its answer
    await eventually(seen, until=lambda s: s == (0, 0), within_s=3)
    await model.settled()

    leaving = asyncio.create_task(_hang(model))
    await eventually(seen, until=lambda s: s == (1, 0))
    leaving.cancel()  # in the middle of its stream
    await eventually(seen, until=lambda s: s == (0, 0), within_s=3)
    await model.settled()
    engine.gate.set()
    assert (await model.low.chat(model.name)).status_code == 200


async def test_batch_is_taken_back_from_beside_a_burst_of_people_and_answered_later(
    make_model: MakeModel,
) -> None:
    model = await make_model(slots=16, high=PACED)
    engine = model.engines[0]
    engine.gate.clear()
    batch = [asyncio.create_task(model.low.chat(model.name)) for _ in range(2)]
    stream = asyncio.create_task(model.low.chat(model.name, stream=True))

    async def seen() -> tuple[int, int]:
        return engine.running, engine.left

    await eventually(seen, until=lambda s: s == (3, 0))
    await asyncio.sleep(0.1)
    people = [asyncio.create_task(model.both.chat(model.name)) for _ in range(8)]
    # What streams stays: it could not be begun again.
    await eventually(seen, until=lambda s: s == (9, 2))
    engine.gate.set()
    assert [(await one).status_code for one in (*people, *batch, stream)] == [200] * 11
    assert model.picker.metric("tidegate_recalls_total", model=model.name, qos_class=LOW) >= 2
    await model.settled()


async def _hang(model: Model) -> None:
    async with model.low.stream(model.name) as lines:
        async for _ in lines:
            await asyncio.Event().wait()


async def test_an_engine_killed_in_mid_stream_frees_its_room_and_others_go_on(make_model: MakeModel) -> None:
    model = await make_model([LOW, LOW])
    for engine in model.engines:
        engine.gate.clear()
    streams = [asyncio.create_task(_consume(model)) for _ in range(6)]

    async def running() -> list[int]:
        return [e.running for e in model.engines]

    await eventually(running, until=lambda n: sum(n) == 6 and min(n) > 0)
    victim, survivor = model.engines
    lost = victim.running
    await victim.kill()
    survivor.gate.set()
    ends = await asyncio.gather(*streams)
    assert (ends.count("cut"), ends.count("whole")) == (lost, 6 - lost)
    await model.settled()


async def _consume(model: Model) -> str:
    try:
        async with model.low.stream(model.name) as lines:
            return "whole" if [line async for line in lines][-1:] == ["[DONE]"] else "cut"
    except httpx.RemoteProtocolError:
        return "cut"


async def test_a_killed_picker_comes_back_with_the_right_counts(
    make_model: MakeModel, control_plane: LocalCluster, server: list[str], tmp_path: Path
) -> None:
    account = control_plane.layout.kubeconfig_of("tidegate-picker")
    own = PickerProcess(tmp_path, account, server).start()
    envoy = EnvoyProcess(tmp_path, own.ports[0]).start()
    try:
        async with httpx.AsyncClient(base_url=envoy.url, timeout=30) as client:
            model = await make_model(slots=4, behind=own, via=client)
            [engine] = model.engines
            engine.gate.clear()
            tasks = [asyncio.create_task(model.both.chat(model.name)) for _ in range(6)]

            async def running() -> int:
                return engine.running

            await eventually(running, until=lambda n: n == 4)  # and two wait in the picker
            own.kill()
            engine.extra_running = 3  # of what it had sent, some still runs: the engine knows
            own.start()

            async def foreign() -> int:
                return int(model.endpoint(engine)["foreign_requests"])

            await eventually(foreign, until=lambda n: n >= 3)
            more = [asyncio.create_task(model.both.chat(model.name)) for _ in range(3)]
            for _ in range(20):
                held = model.endpoint(engine)
                assert held["requests"] <= 1  # of four slots three are taken
                await asyncio.sleep(0.05)
            engine.extra_running = 0
            engine.gate.set()
            for response in await asyncio.gather(*tasks, *more):
                if response.status_code != 200:  # then with a reason
                    assert response.status_code in (429, 503)
                    assert error_of(response)["message"]
            await model.settled()
            await eventually(foreign, until=lambda n: n == 0)
            assert (await model.both.chat(model.name)).status_code == 200
    finally:
        envoy.stop()
        own.stop()


async def test_sigterm_finishes_what_is_under_way_and_exits_0(
    make_model: MakeModel, control_plane: LocalCluster, server: list[str], tmp_path: Path
) -> None:
    own = PickerProcess(tmp_path, control_plane.layout.kubeconfig_of("tidegate-picker"), server).start()
    envoy = EnvoyProcess(tmp_path, own.ports[0]).start()
    try:
        async with httpx.AsyncClient(base_url=envoy.url, timeout=30) as client:
            model = await make_model(behind=own, via=client)
            [engine] = model.engines
            engine.gate.clear()
            under_way = asyncio.create_task(model.low.chat(model.name))

            async def running() -> int:
                return engine.running

            await eventually(running, until=lambda n: n == 1)
            ending = asyncio.create_task(asyncio.to_thread(own.terminate))
            await asyncio.sleep(0.5)
            assert not ending.done()
            engine.gate.set()
            assert (await under_way).status_code == 200
            assert await ending == 0, own.log
    finally:
        envoy.stop()
        own.stop()


async def test_health_over_grpc(picker: PickerProcess) -> None:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async with grpc.aio.insecure_channel(f"127.0.0.1:{picker.ports[1]}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "liveness", "readiness", "envoy.service.ext_proc.v3.ExternalProcessor"):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING, name


async def test_a_trusted_gateway_s_header_needs_no_token(
    make_model: MakeModel, control_plane: LocalCluster, server: list[str], tmp_path: Path
) -> None:
    flags = ["--trust-class-header", "--policy", "fifo", *server]
    own = PickerProcess(tmp_path, control_plane.layout.kubeconfig_of("tidegate-picker"), flags).start()
    envoy = EnvoyProcess(tmp_path, own.ports[0]).start()
    try:
        async with httpx.AsyncClient(base_url=envoy.url, timeout=30) as client:
            model = await make_model(behind=own, via=client)
            anybody = Caller(client, None)
            response = await anybody.chat(model.name, headers={"x-tidegate-qos": HIGH})
            assert response.status_code == 200
            assert (await anybody.chat(model.name)).status_code == 200
            # In arrival order every class has the same priority in the engine too.
            assert [s.headers["x-vllm-priority"] for s in model.engines[0].seen] == ["0", "0"]
            await model.settled()
            answered = {
                name: own.metric("tidegate_requests_total", model=model.name, qos_class=name)
                for name in (HIGH, LOW)
            }
            assert answered == {HIGH: 1, LOW: 1}  # without a header: the least important
    finally:
        envoy.stop()
        own.stop()


async def test_it_conforms_to_the_endpoint_picker_protocol(make_model: MakeModel) -> None:
    """The process as it ships, asked by the suite as a gateway of somebody else's would, token and all."""
    model = await make_model(lanes=[HIGH, LOW], slots=100)
    ext_proc, health, *_ = model.picker.ports

    async def conformance(*arguments: str) -> dict[str, str]:
        command = [sys.executable, "-m", "tidegate", "conformance", "epp", f"127.0.0.1:{ext_proc}"]
        command += ["--model", model.name, "--health", f"127.0.0.1:{health}", "-o", "json"]
        command += ["--header", f"authorization: {model.both.headers['Authorization']}", *arguments]
        for engine in model.engines:
            command += ["--endpoint", f"127.0.0.1:{engine.port}"]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        out, _ = await process.communicate()
        assert process.returncode == 0, out.decode()
        return {rule["id"]: rule["verdict"] for rule in json.loads(out)["rules"]}

    verdicts = await conformance("--skip", "refusal")
    assert {name for name, verdict in verdicts.items() if verdict != "kept"} == {"body.binary"}
    assert len(verdicts) > 40
    # Of the class whose queue is short.
    arguments = ["--rule", "refusal", "--overload", "300", "--header", f"x-tidegate-qos: {LOW}"]
    assert set((await conformance(*arguments)).values()) == {"kept"}
    await model.settled()


async def test_what_is_measured_is_shown(make_model: MakeModel) -> None:
    """Envoy's log reaches the picker's process; its metrics, its state and `tidegate top` tell."""
    model = await make_model()
    for stream in (True, False):
        response = await model.both.chat(model.name, stream=stream)
        assert response.status_code == 200

    async def seen() -> float:
        return model.picker.metric("tidegate_completion_seconds_count", model=model.name, qos_class=HIGH)

    await eventually(seen, until=lambda n: n == 2)
    assert model.picker.metric("tidegate_ttft_seconds_count", model=model.name) == 1
    assert model.picker.metric("tidegate_promises_total", model=model.name, outcome="kept") == 1
    command = ["top", "--picker", model.picker.url, "-o", "json"]
    done = await asyncio.to_thread(CliRunner().invoke, app, command)
    assert done.exit_code == 0, done.output
    rows = [row for row in json.loads(done.stdout) if row["model"] == model.name]
    [row] = [row for row in rows if row["qos_class"] == HIGH]
    assert (row["judged"], row["attainment"], row["attainment_objective"]) == (1, 1.0, 0.99)
    assert 0 < row["ttft_p50_s"] < 1
