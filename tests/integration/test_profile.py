"""`tidegate profile` against the emulated vLLM, whose step time is known, and against broken engines."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
import yaml
from aiohttp import web
from typer.testing import CliRunner

from support.engines import EngineProcess
from support.ports import free_port
from tidegate.cli.main import app
from tidegate.core.steptime import LLAMA3_8B_A100, StepFit
from tidegate.profile.client import EngineError
from tidegate.profile.run import Profile, Settings, profile


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Iterator[Callable[..., str]]:
    """Starts emulated engines; gives their URLs."""
    engines: list[EngineProcess] = []

    def make(*args: str, **env: str) -> str:
        port = free_port()
        log = tmp_path_factory.mktemp("vllm") / "log"
        engine = EngineProcess("vllm", ["--model", "llama", "--port", str(port), *args], log, env)
        engines.append(engine)
        engine.wait_for(f"http://127.0.0.1:{port}/health")
        return f"http://127.0.0.1:{port}"

    yield make
    for engine in engines:
        with engine:
            pass


def quiet(_: str) -> None:
    """No progress."""


async def test_the_emulated_engine_is_found_again(start):
    """Steps as slow as they are on the A100, since what the machine adds is then small beside them."""
    lines: list[str] = []
    found = await profile(Settings(start(), "llama", streams=16, seconds=24.0), lines.append)
    fit = found.fitted.fit
    told = "\n".join([str(fit), *found.notes, *lines])
    # A busy machine may make the residuals poor; what is predicted must be right all the same.
    assert [n for n in found.notes if not n.startswith("half of the samples")] == [], told
    assert found.rounds >= 1, told
    assert fit.trained_up_to > 2000
    for prefill in (0, 64, 256, 600, 1200, 1800):
        for decodes in (0, 1, 4, 16):
            for context in (64, 500):
                if prefill + decodes:
                    step = (prefill, decodes, decodes * context)
                    truth = LLAMA3_8B_A100.seconds(*step)
                    assert fit.seconds(*step) == pytest.approx(truth, rel=0.1), f"{step}\n{told}"
    assert found.took_s < 35
    assert 0 <= found.fitted.request_s < 0.02


async def test_a_smaller_chunk_than_said_is_noticed(start):
    url = start("--max-num-batched-tokens", "1024", TIDEGATE_EMULATOR_SPEED="2")
    found = await profile(Settings(url, "llama", streams=2, seconds=8.0), quiet)
    assert any(n.startswith("prompts were cut into smaller chunks than 2048") for n in found.notes), found


async def test_streams_that_the_engine_does_not_run_together_are_given_up(start):
    url = start("--max-num-seqs", "4", TIDEGATE_EMULATOR_SPEED="4")
    found = await profile(Settings(url, "llama", streams=16, seconds=8.0), quiet)
    assert any(n.startswith("16 streams of 64 tokens did not decode together") for n in found.notes), found
    assert max(s.decodes for sample in found.samples for s in sample.steps) <= 8


async def test_too_little_time_is_told(start):
    found = await profile(Settings(start(), "llama", streams=16, seconds=6.0), quiet)
    assert found.took_s < 12
    assert found.rounds < 1
    (note,) = [n for n in found.notes if n.startswith("the time was over after")]
    assert note.endswith("more --seconds")


def test_the_command_writes_a_configmap_and_progress(start, tmp_path):
    out = tmp_path / "made" / "profile.yaml"
    args = ["profile", start(), "--model", "llama", "--seconds", "6", "--streams", "4"]
    result = CliRunner().invoke(app, [*args, "-o", "configmap", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "prefill 32:" in result.stderr
    manifest = yaml.safe_load(out.read_text())
    assert manifest["metadata"]["name"] == "step-time-llama"
    fit = StepFit.from_json(json.loads(manifest["data"]["step-time.json"]))
    assert 0.01 < fit.seconds(0, 1, 64) < 0.02


@pytest.mark.parametrize(
    ("args", "message"),
    [
        pytest.param(["--model", "gpt"], "model gpt is not served here; served: llama", id="model"),
        pytest.param(["--model", "llama", "--chunk", "32"], "chunk must be at least 64", id="chunk"),
        pytest.param(["--model", "llama", "--token-env", "NO_SUCH"], "$NO_SUCH is empty", id="token"),
    ],
)
def test_the_command_says_what_is_wrong(start, args, message):
    result = CliRunner().invoke(app, ["profile", start(), *args])
    assert result.exit_code != 0
    assert message in result.stderr


@pytest.mark.parametrize("url", ["localhost", "ftp://x/", "http://", "http://127.0.0.1:99999"])
def test_no_url(url):
    result = CliRunner().invoke(app, ["profile", url, "--model", "llama"])
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith(f"Cannot profile {url}: ")
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_nobody_there():
    result = CliRunner().invoke(app, ["profile", f"http://127.0.0.1:{free_port()}", "--model", "llama"])
    assert result.exit_code == 1
    assert "GET /v1/models: ClientConnectorError" in result.stderr


# Engines that do not behave

SERVED = {"data": [{"id": "llama", "max_model_len": 1024}]}
Complete = Callable[[web.Request, dict], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def engine_that(complete: Complete, models: object = None) -> AsyncIterator[str]:
    """An engine whose completions are up to the test."""

    async def serve(request: web.Request) -> web.StreamResponse:
        return await complete(request, json.loads(await request.read()))

    async def list_models(_: web.Request) -> web.Response:
        return web.json_response(SERVED if models is None else models)

    app = web.Application(client_max_size=1 << 26)
    app.router.add_get("/v1/models", list_models)
    app.router.add_post("/v1/completions", serve)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def stream(
    request: web.Request,
    body: dict,
    *,
    made: int | None = None,
    in_each: int = 1,
    usage: bool = True,
    running: bool = False,
    reason: bool = False,
    step_s: float = 0.0005,
) -> web.StreamResponse:
    """A stream of as many tokens as were asked for, or `made`, so many in each event."""
    response = web.StreamResponse()
    await response.prepare(request)
    tokens = body["max_tokens"] if made is None else made
    counts = {"prompt_tokens": len(body["prompt"]) // 4}
    for at in range(0, tokens, in_each):
        # A prompt takes longer than a token; that is all there is of a model here.
        await asyncio.sleep(step_s if at else step_s + len(body["prompt"]) * 1e-6)
        event: dict = {"choices": [{"text": "a"}]}
        if running:
            event["usage"] = {**counts, "completion_tokens": min(at + in_each, tokens)}
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
    if reason:
        await response.write(b'data: {"choices": [{"text": "", "finish_reason": "length"}]}\n\n')
    if usage:
        last = json.dumps({"choices": [], "usage": {**counts, "completion_tokens": tokens}})
        await response.write(b"data: " + last.encode() + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    return response


async def refuse(_request: web.Request, _body: dict) -> web.Response:
    return web.json_response({"error": {"message": "out of memory"}}, status=500)


async def hang(_request: web.Request, _body: dict) -> web.Response:
    await asyncio.sleep(60)
    return web.Response()


async def fail_inside(request: web.Request, _body: dict) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b'data: {"error": {"message": "EngineCore died"}}\n\n')
    return response


async def talk_nonsense(_request: web.Request, _body: dict) -> web.Response:
    return web.Response(text="data: <html>\n\n")


def streaming(**how) -> Complete:
    return lambda request, body: stream(request, body, **how)


@pytest.mark.parametrize(
    ("complete", "message"),
    [
        pytest.param(refuse, "a prompt of 128 characters: 500 out of memory", id="refuses"),
        pytest.param(hang, "no answer to the first requests within 1 s", id="hangs"),
        pytest.param(fail_inside, "a prompt of 128 characters: EngineCore died", id="fails in the stream"),
        pytest.param(talk_nonsense, "the stream is not OpenAI's", id="no JSON"),
        pytest.param(streaming(usage=False), "the stream ended without usage", id="no usage"),
        pytest.param(streaming(made=0), "0 tokens came, 1 were asked for", id="ends by itself"),
        pytest.param(
            streaming(in_each=2), "4 tokens came in 2 events, not one in each", id="two tokens in an event"
        ),
    ],
)
async def test_an_engine_that_does_not_behave_is_told(complete, message):
    async with engine_that(complete) as url:
        with pytest.raises(EngineError) as error:
            await profile(Settings(url, "llama", seconds=1.0), quiet)
    assert message in str(error.value)


@pytest.mark.parametrize("models", [[], {"data": [{"name": "llama"}]}, "x"])
async def test_a_list_of_models_that_is_none(models):
    async with engine_that(streaming(), models) as url:
        with pytest.raises(EngineError, match=r"is not OpenAI's list of models|is not served here"):
            await profile(Settings(url, "llama", seconds=1.0), quiet)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({}, id="a token in each event"),
        pytest.param({"in_each": 2, "running": True}, id="two, and each event tells how many"),
        pytest.param({"reason": True}, id="the reason of the end apart"),
    ],
)
async def test_ways_to_stream(how):
    async with engine_that(streaming(**how)) as url:
        found = await profile(Settings(f"{url}/v1", "llama", streams=2, seconds=2.0), quiet)
    assert found.samples
    assert not [n for n in found.notes if "events" in n]


async def test_an_engine_that_breaks_down_is_left_alone():
    answered = 0

    async def complete(request: web.Request, body: dict) -> web.StreamResponse:
        nonlocal answered
        answered += 1
        return await (stream(request, body) if answered <= 3 else refuse(request, body))

    async with engine_that(complete) as url:
        with pytest.raises(EngineError, match=r"3 experiments in a row failed; the last: .*out of memory"):
            await profile(Settings(url, "llama", streams=2, seconds=30.0), quiet)


async def test_an_engine_that_fails_now_and_then_is_profiled_all_the_same():
    answered = 0

    async def complete(request: web.Request, body: dict) -> web.StreamResponse:
        nonlocal answered
        answered += 1
        return await (refuse(request, body) if answered % 20 == 0 else stream(request, body))

    async with engine_that(complete) as url:
        found: Profile = await profile(Settings(url, "llama", streams=2, seconds=3.0), quiet)
    assert [n for n in found.notes if "500 out of memory" in n]
    assert len(found.samples) > 10


async def test_an_engine_that_is_not_alone_is_noticed():
    async def complete(request: web.Request, body: dict) -> web.StreamResponse:
        return await stream(request, body, step_s=random.choice((0.0005, 0.004)))

    async with engine_that(complete) as url:
        found = await profile(Settings(url, "llama", streams=2, seconds=6.0), quiet)
    assert any(n.startswith("half of the samples are off by") for n in found.notes), found.notes


async def test_no_prompt_begins_like_another_in_this_profile_or_the_next():
    """What an engine has in its prefix cache must not be measured."""
    begun: list[str] = []

    async def complete(request: web.Request, body: dict) -> web.StreamResponse:
        begun.append(body["prompt"][:12])
        return await stream(request, body)

    async with engine_that(complete) as url:
        for _ in range(2):
            await profile(Settings(url, "llama", streams=2, seconds=1.5), quiet)
    assert len(begun) > 40
    assert len(set(begun)) == len(begun)
