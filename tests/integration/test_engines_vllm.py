"""The emulated vLLM over HTTP, as a process of its own."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from support.engines import LIMIT_S, EngineProcess, samples
from support.ports import free_port
from support.wait import eventually
from tidegate.local.engines.common import count_tokens, draw_output
from tidegate.sim.drive import Arrival, drive
from tidegate.sim.types import EngineConfig, Policy, Request

LABELS = 'model_name="llama",engine="0"'


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    """One engine with priorities, shared by the tests that leave it as they found it."""
    port = free_port()
    args = ["--model", "/models/llama", "--served-model-name", "llama", "chat", "--port", str(port)]
    args += [
        "--scheduling-policy",
        "priority",
        "--max-num-seqs",
        "2",
        "--max-model-len",
        "4096",
        "--swap-space",
        "4",
    ]
    log = tmp_path_factory.mktemp("vllm") / "log"
    with EngineProcess("vllm", args, log, {"TIDEGATE_EMULATOR_SPEED": "5"}) as engine:
        engine.wait_for(f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}"
        engine.terminate()
        assert engine.exit_code() == 0
        assert "--swap-space: accepted, not emulated" in log.read_text()


@pytest.fixture
async def client(url):
    async with httpx.AsyncClient(base_url=url, timeout=LIMIT_S) as client:
        yield client


def completion(tokens: int, **more) -> dict:
    return {"model": "llama", "prompt": "hello there", "max_tokens": tokens, "ignore_eos": True, **more}


def chat(text: str, **more) -> dict:
    return {"model": "llama", "messages": [{"role": "user", "content": text}], **more}


def events(text: str) -> list:
    """The data of an SSE body; the last must be [DONE]."""
    data = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert data.pop() == "[DONE]"
    return [json.loads(item) for item in data]


async def metrics(client) -> dict[str, float]:
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return samples(answer.text)


async def until(client, wanted: dict[str, float]) -> None:
    """Wait until gauges have the wanted values."""

    async def look() -> dict[str, float]:
        found = await metrics(client)
        return {name: found[f"vllm:{name}{{{LABELS}}}"] for name in wanted}

    await eventually(look, until=lambda got: got == wanted)


async def test_models_lists_every_served_name(client):
    answer = (await client.get("/v1/models")).json()
    assert [(m["id"], m["root"], m["max_model_len"]) for m in answer["data"]] == [
        ("llama", "/models/llama", 4096),
        ("chat", "/models/llama", 4096),
    ]


async def test_a_whole_chat_answer(client):
    answer = await client.post("/v1/chat/completions", json=chat("x" * 41, max_tokens=5, ignore_eos=True))
    body = answer.json()
    assert answer.status_code == 200
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": " tok" * 5}
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"] == {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}


async def test_a_chat_stream_is_one_event_for_each_token(client):
    request = chat("hi", max_tokens=4, ignore_eos=True, stream=True, stream_options={"include_usage": True})
    answer = await client.post("/v1/chat/completions", json=request)
    assert answer.headers["content-type"].startswith("text/event-stream")
    role, *tokens, usage = events(answer.text)
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [t["choices"][0]["delta"]["content"] for t in tokens] == [" tok"] * 4
    assert [t["choices"][0]["finish_reason"] for t in tokens] == [None, None, None, "length"]
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5}
    assert {e["object"] for e in (role, *tokens, usage)} == {"chat.completion.chunk"}
    assert len({e["id"] for e in (role, *tokens, usage)}) == 1


@pytest.mark.parametrize(
    ("prompt", "tokens", "choices"),
    [
        pytest.param("é" * 4, 2, 1, id="bytes count, not characters"),
        pytest.param([5, 6, 7], 3, 1, id="token ids"),
        pytest.param(["ab", "abcde"], 3, 2, id="list of strings"),
        pytest.param([[1], [2, 3]], 3, 2, id="list of token ids"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_completion_prompts(client, prompt, tokens, choices, stream):
    request = completion(3, prompt=prompt, stream=stream)
    if stream:
        request["stream_options"] = {"include_usage": True}
    answer = await client.post("/v1/completions", json=request)
    if stream:
        *chunks, last = events(answer.text)
        texts = ["" for _ in range(choices)]
        for chunk in chunks:
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    else:
        last = answer.json()
        texts = [c["text"] for c in last["choices"]]
    assert texts == [" tok" * 3] * choices
    assert last["usage"]["prompt_tokens"] == tokens
    assert last["usage"]["completion_tokens"] == 3 * choices


async def test_answers_that_end_by_themselves_are_the_same_each_time(client):
    async def ask(text: str) -> tuple[int, str]:
        body = (await client.post("/v1/chat/completions", json=chat(text, max_tokens=150))).json()
        return body["usage"]["completion_tokens"], body["choices"][0]["finish_reason"]

    first = await asyncio.gather(*(ask(f"question {i}") for i in range(8)))
    again = await asyncio.gather(*(ask(f"question {i}") for i in range(8)))
    assert first == again
    assert len(set(first)) > 3
    assert {reason for _, reason in first} == {"stop", "length"}
    assert all(n < 150 if reason == "stop" else n == 150 for n, reason in first)


async def test_min_tokens_is_kept(client):
    asked = [
        client.post("/v1/chat/completions", json=chat(f"q{i}", min_tokens=90, max_tokens=100))
        for i in range(6)
    ]
    assert all(a.json()["usage"]["completion_tokens"] >= 90 for a in await asyncio.gather(*asked))


BAD = [
    pytest.param(
        completion(4, model="gpt-5"), 404, "The model `gpt-5` does not exist.", "NotFoundError", id="model"
    ),
    pytest.param(b"{not json", 400, "JSON decode error", "Bad Request", id="no JSON"),
    pytest.param(b"[]", 400, "valid dictionary", "Bad Request", id="no object"),
    pytest.param(
        completion("4"), 400, "max_tokens: Input should be a valid integer", "Bad Request", id="type"
    ),
    pytest.param(completion(True), 400, "valid integer", "Bad Request", id="a boolean is no integer"),
    pytest.param(completion(0), 400, "max_tokens must be at least 1", "BadRequestError", id="zero"),
    pytest.param(completion(4, n=2), 400, "n must be 1", "BadRequestError", id="n"),
    pytest.param(completion(4, prompt={}), 400, "prompt: Input should be", "Bad Request", id="prompt"),
    pytest.param(completion(4, prompt=[]), 400, "prompt: Input should be", "Bad Request", id="empty prompt"),
    pytest.param(completion(4, stop=3), 400, "stop: Input should be", "BadRequestError", id="stop"),
    pytest.param(completion(4, temperature=-1), 400, "temperature", "BadRequestError", id="temperature"),
    pytest.param(
        completion(4, min_tokens=5), 400, "min_tokens must be in", "BadRequestError", id="min_tokens"
    ),
    pytest.param(completion(4, priority="high"), 400, "priority: Input should", "Bad Request", id="priority"),
    pytest.param(
        completion(4, stream_options={}), 400, "stream=True", "BadRequestError", id="stream options"
    ),
    pytest.param(
        completion(100, prompt="x" * 16000),
        400,
        "maximum context length is 4096",
        "BadRequestError",
        id="too long",
    ),
    pytest.param(
        completion(4, prompt="x" * 17000), 400, "contains 4250 input", "BadRequestError", id="prompt too long"
    ),
]


@pytest.mark.parametrize(("body", "status", "message", "kind"), BAD)
async def test_errors_have_vllms_shape(client, body, status, message, kind):
    raw = body if isinstance(body, bytes) else json.dumps(body)
    answer = await client.post("/v1/completions", content=raw, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == status
    assert set(error) == {"message", "type", "param", "code"}
    assert message in error["message"]
    assert (error["type"], error["code"]) == (kind, status)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        pytest.param([], "messages: Field required", id="none"),
        pytest.param(["hi"], "a message needs a role", id="no object"),
        pytest.param([{"role": "user", "content": [{"type": "image_url"}]}], "only text", id="image"),
    ],
)
async def test_bad_messages(client, messages, message):
    answer = await client.post("/v1/chat/completions", json={"model": "llama", "messages": messages})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


async def test_unknown_routes_and_methods_have_the_shape_too(client):
    assert (await client.get("/nope")).json()["error"]["code"] == 404
    assert (await client.get("/v1/completions")).json()["error"]["code"] == 405


async def test_other_content_types_are_refused(client):
    answer = await client.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert answer.status_code == 400
    assert "application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_its_slot_at_once(client, url, stream):
    async def ask() -> None:
        async with (
            httpx.AsyncClient(base_url=url, timeout=LIMIT_S) as other,
            other.stream("POST", "/v1/completions", json=completion(4000, stream=stream)) as answer,
        ):
            await answer.aread()

    tasks = [asyncio.create_task(ask()) for _ in range(3)]
    await until(client, {"num_requests_running": 2, "num_requests_waiting": 1})
    before = await metrics(client)
    assert before[f"vllm:kv_cache_usage_perc{{{LABELS}}}"] > 0
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until(client, {"num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0.0})
    aborted = f'vllm:request_success_total{{{LABELS},finished_reason="abort"}}'
    assert (await metrics(client))[aborted] - before[aborted] == 3


@pytest.fixture
async def holders(client) -> AsyncIterator[list[asyncio.Task]]:
    """Two long requests that hold both slots until they are cancelled."""
    tasks = [asyncio.create_task(client.post("/v1/completions", json=completion(4000))) for _ in range(2)]
    await until(client, {"num_requests_running": 2})
    yield tasks
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until(client, {"num_requests_running": 0})


@pytest.mark.usefixtures("holders")
async def test_headers_are_answered_before_the_first_token(client):
    """With both slots taken a stream is already answered, though nothing comes yet."""
    async with client.stream("POST", "/v1/completions", json=completion(1, stream=True)) as answer:
        assert answer.status_code == 200
        await until(client, {"num_requests_running": 2, "num_requests_waiting": 1})


async def test_priority_waits_for_a_slot_and_goes_before_those_who_wait(client, holders):
    done: list[str] = []

    async def ask(name: str, body: dict, headers: dict | None = None) -> None:
        await client.post("/v1/completions", json=completion(100, **body), headers=headers)
        done.append(name)

    tasks = [asyncio.create_task(ask("batch", {"priority": 7}))]
    await until(client, {"num_requests_waiting": 1})
    # The header goes before the body's own value.
    tasks.append(asyncio.create_task(ask("person", {"priority": 99}, {"X-Vllm-Priority": "-1"})))
    await until(client, {"num_requests_waiting": 2, "num_requests_running": 2})
    await asyncio.sleep(0.2)
    assert done == [], "nobody is preempted for a slot"
    holders[0].cancel()
    await asyncio.gather(*tasks)
    assert done == ["person", "batch"]


@pytest.mark.parametrize(
    ("header", "message"),
    [pytest.param("high", "X-Vllm-Priority must be an integer", id="no number")],
)
async def test_a_bad_priority_header_is_refused(client, header, message):
    answer = await client.post("/v1/completions", json=completion(1), headers={"X-Vllm-Priority": header})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("wanted", ["JSON", "TEXT", "json", None, "XML"])
async def test_orca_header(client, wanted):
    headers = {"endpoint-load-metrics-format": wanted} if wanted else {}
    answer = await client.post("/v1/completions", json=completion(1), headers=headers)
    report = answer.headers.get("endpoint-load-metrics")
    if wanted in ("JSON", "json"):
        assert json.loads(report.removeprefix("JSON ")) == {
            "named_metrics": {"kv_cache_usage_perc": 0.0, "num_requests_waiting": 0.0}
        }
    elif wanted == "TEXT":
        assert report == "TEXT named_metrics.kv_cache_usage_perc=0.0, named_metrics.num_requests_waiting=0.0"
    else:
        assert report is None


async def test_metrics_count_what_was_served(client):
    before = await metrics(client)
    await client.post("/v1/completions", json=completion(7, prompt="x" * 40, stream=True))
    after = await metrics(client)

    def grown(name: str, labels: str = LABELS) -> float:
        key = f"vllm:{name}{{{labels}}}"
        return after[key] - before[key]

    assert grown("prompt_tokens_total") == 10
    assert grown("generation_tokens_total") == 7
    assert grown("request_success_total", f'{LABELS},finished_reason="length"') == 1
    assert grown("time_to_first_token_seconds_count") == 1
    assert grown("inter_token_latency_seconds_count") == 6
    assert grown("request_queue_time_seconds_count") == 1
    assert grown("e2e_request_latency_seconds_count") == 1
    assert grown("e2e_request_latency_seconds_sum") > grown("time_to_first_token_seconds_sum") > 0
    assert grown("e2e_request_latency_seconds_bucket", f'{LABELS},le="+Inf"') == 1
    assert after[f'vllm:engine_sleep_state{{{LABELS},sleep_state="awake"}}'] == 1
    assert after[f"vllm:num_preemptions_total{{{LABELS}}}"] == 0
    assert after[f"vllm:prefix_cache_queries_total{{{LABELS}}}"] == 0
    (cache,) = [name for name in after if name.startswith("vllm:cache_config_info")]
    assert 'block_size="16"' in cache
    assert 'num_gpu_blocks="25000"' in cache
    assert after[f"tidegate_emulator_lag_seconds_count{{{LABELS}}}"] > 0


async def test_a_prompt_is_found_in_the_prefix_cache(tmp_path):
    """Two of a system prompt and one of token ids; full blocks only, and never the last token."""
    port = free_port()
    args = ["--model", "llama", "--port", str(port), "--enable-prefix-caching"]
    with EngineProcess("vllm", args, tmp_path / "log", {"TIDEGATE_EMULATOR_SPEED": "20"}) as engine:
        engine.wait_for(f"http://127.0.0.1:{port}/health")
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT_S) as client:
            system = "You answer in few words, and say so where you do not know. " * 4
            for prompt in (system + "Who?", system + "When was that?", list(range(33)), list(range(33))):
                answer = await client.post("/v1/completions", json=completion(1, prompt=prompt))
                assert answer.status_code == 200
            found = await metrics(client)
    tokens = count_tokens(system + "Who?") + count_tokens(system + "When was that?") + 33 + 33
    assert found[f"vllm:prefix_cache_queries_total{{{LABELS}}}"] == tokens
    assert found[f"vllm:prefix_cache_hits_total{{{LABELS}}}"] == len(system) // 64 * 16 + 32
    (cache,) = [name for name in found if name.startswith("vllm:cache_config_info")]
    assert 'enable_prefix_caching="True"' in cache


async def test_answers_end_in_the_order_of_the_pure_model(client):
    """Twelve prompts in one request, two slots, lengths drawn from the prompts."""
    prompts = [f"question {i} " * (i % 4 + 1) for i in range(12)]
    body = {"model": "llama", "prompt": prompts, "max_tokens": 120, "stream": True}
    answer = await client.post("/v1/completions", json=body)
    choices = [event["choices"][0] for event in events(answer.text)]
    ended = [str(c["index"]) for c in choices if c["finish_reason"]]
    tokens = [sum(c["index"] == i for c in choices) for i in range(12)]
    arrivals = [
        Arrival(0.0, Request(str(i), count_tokens(text), draw_output(text.encode(), 0, 120)[0]))
        for i, text in enumerate(prompts)
    ]
    run = drive(EngineConfig(max_num_seqs=2, policy=Policy.PRIORITY), arrivals)
    assert ended == run.finish_order
    assert tokens == [run.outcomes[str(i)].tokens for i in range(12)]


# Starting and ending


def start(tmp_path, *args: str, env: dict[str, str] | None = None) -> tuple[EngineProcess, str]:
    port = free_port()
    engine = EngineProcess("vllm", ["--model", "llama", "--port", str(port), *args], tmp_path / "log", env)
    return engine, f"http://127.0.0.1:{port}"


async def stream_and_terminate(engine: EngineProcess, url: str, tokens: int) -> str:
    """Send SIGTERM in the middle of a stream; return what arrives of it, and how it ended."""
    text = ""
    async with (
        httpx.AsyncClient(timeout=LIMIT_S) as client,
        client.stream("POST", f"{url}/v1/completions", json=completion(tokens, stream=True)) as answer,
    ):
        try:
            async for chunk in answer.aiter_text():
                if not text:
                    engine.terminate()
                text += chunk
        except httpx.RemoteProtocolError:
            return text + "cut off"
    return text


@pytest.mark.parametrize(
    ("args", "end"),
    [
        pytest.param([], "cut off", id="vLLM's default aborts what runs"),
        pytest.param(["--shutdown-timeout", "20"], "data: [DONE]\n\n", id="with a timeout it finishes"),
        pytest.param(["--shutdown-timeout", "0.05"], "cut off", id="but not longer than that"),
    ],
)
async def test_sigterm_in_the_middle_of_a_stream(tmp_path, args, end):
    engine, url = start(tmp_path, *args, env={"TIDEGATE_EMULATOR_SPEED": "2"})
    with engine:
        engine.wait_for(f"{url}/health")
        text = await stream_and_terminate(engine, url, 100)
        assert text.endswith(end)
        assert engine.exit_code() == 0


async def test_while_draining_nothing_new_is_taken(tmp_path):
    engine, url = start(tmp_path, "--shutdown-timeout", "20")
    with engine:
        engine.wait_for(f"{url}/health")
        async with httpx.AsyncClient(base_url=url, timeout=LIMIT_S) as kept:
            await kept.get("/health")
            running = asyncio.create_task(stream_and_terminate(engine, url, 150))
            await asyncio.to_thread(engine.wait_for_log, "Shutting down")
            # The connection that is already open still answers; a new one is not accepted.
            answer = await kept.post("/v1/completions", json=completion(1))
            assert answer.status_code == 503
            assert answer.json()["error"]["message"] == "The server is shutting down."
            async with httpx.AsyncClient(timeout=LIMIT_S) as fresh:
                with pytest.raises(httpx.ConnectError):
                    await fresh.get(f"{url}/health")
            assert (await running).endswith("[DONE]\n\n")
        assert engine.exit_code() == 0


def test_cold_start_keeps_the_port_closed(tmp_path):
    begin = time.monotonic()
    engine, url = start(tmp_path, env={"TIDEGATE_EMULATOR_COLD_START": "1.5"})
    with engine:
        engine.wait_for(f"{url}/health")
        assert time.monotonic() - begin >= 1.5


def test_sigterm_ends_a_cold_start(tmp_path):
    engine, _ = start(tmp_path, env={"TIDEGATE_EMULATOR_COLD_START": "600"})
    with engine:
        engine.wait_for_log("Cold start")
        engine.terminate()
        assert engine.exit_code() == 0


def test_it_listens_on_the_pods_own_address(tmp_path):
    port = free_port()
    args = ["llama", "--host", "0.0.0.0", "--port", str(port)]
    with EngineProcess("vllm", args, tmp_path / "log", {"POD_IP": "127.0.0.9"}) as engine:
        engine.wait_for(f"http://127.0.0.9:{port}/health")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}/health")


async def test_priorities_need_the_priority_policy(tmp_path):
    engine, url = start(tmp_path)
    with engine:
        engine.wait_for(f"{url}/health")
        async with httpx.AsyncClient(base_url=url, timeout=LIMIT_S) as client:
            for request in (
                {"json": completion(1, priority=1)},
                {"json": completion(1), "headers": {"X-Vllm-Priority": "1"}},
            ):
                answer = await client.post("/v1/completions", **request)
                assert answer.status_code == 400
                assert (
                    answer.json()["error"]["message"]
                    == "Got priority 1 but Priority scheduling is not enabled."
                )
            answer = await client.post(
                "/v1/completions", json=completion(1), headers={"X-Vllm-Priority": "0"}
            )
            assert answer.status_code == 200


async def test_preemption_shows_in_the_metrics_and_loses_nothing(tmp_path):
    """40 blocks of 16 tokens hold two such answers only for a while."""
    args = ["--num-gpu-blocks-override", "41", "--max-model-len", "600"]
    engine, url = start(tmp_path, *args, env={"TIDEGATE_EMULATOR_SPEED": "20"})
    with engine:
        engine.wait_for(f"{url}/health")
        async with httpx.AsyncClient(base_url=url, timeout=LIMIT_S) as client:
            body = completion(400, prompt="x" * 400)
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(2)))
            found = samples((await client.get("/metrics")).text)
    assert [a.json()["usage"]["completion_tokens"] for a in answers] == [400, 400]
    assert found[f"vllm:num_preemptions_total{{{LABELS}}}"] >= 1
    assert found[f"vllm:generation_tokens_total{{{LABELS}}}"] == 800


@pytest.mark.parametrize(
    ("args", "env", "code", "message"),
    [
        pytest.param(["--max-num-seqs", "0"], {}, 2, "must be at least 1", id="no slots"),
        pytest.param(["--scheduling-policy", "lifo"], {}, 2, "invalid choice: 'lifo'", id="policy"),
        pytest.param([], {"TIDEGATE_EMULATOR_SPEED": "fast"}, 2, "TIDEGATE_EMULATOR_SPEED", id="speed"),
    ],
)
def test_nonsense_ends_at_once(tmp_path, args, env, code, message):
    engine, _ = start(tmp_path, *args, env=env)
    with engine:
        assert engine.exit_code() == code
        assert message in engine.log.read_text()


def test_a_taken_port_is_told(tmp_path):
    first, url = start(tmp_path)
    port = url.rpartition(":")[2]
    with first:
        first.wait_for(f"{url}/health")
        with EngineProcess("vllm", ["--model", "m", "--port", port], tmp_path / "second") as second:
            assert second.exit_code() == 1
            assert "Cannot listen on 127.0.0.1" in second.log.read_text()
