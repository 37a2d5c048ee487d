"""The load generator: traffic is what the scenario says, and the counts are the client's."""

import asyncio
import itertools
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from tidegate.load import runner
from tidegate.load.results import ANSWERED, LOST, REFUSED, Record, percentile, summarise
from tidegate.load.scenario import Phase, Scenario, ScenarioError, Stream
from tidegate.load.traffic import read_lengths, requests, warp

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture
def lengths(tmp_path: Path) -> Path:
    path = tmp_path / "chat.csv"
    rows = [f"{i * 0.5 + (i % 7) * 0.05:.2f},{100 + i},{5 + i % 3}" for i in range(200)]
    path.write_text("# where it is from\narrival_s,prompt_tokens,output_tokens\n" + "\n".join(rows) + "\n")
    return path


def a_stream(lengths: Path, **changes: object) -> Stream:
    fields: dict[str, object] = {
        "name": "chat",
        "qos_class": "interactive",
        "models": ["a", "b"],
        "lengths": lengths,
        "phases": [Phase(seconds=10, per_second=4), Phase(seconds=5, per_second=12)],
    }
    return Stream.model_validate(fields | changes)


def test_each_phase_has_its_own_rate(lengths: Path) -> None:
    scenario = Scenario(seconds=15, streams=[a_stream(lengths)])
    times = [r.at_s for r in requests(scenario.streams[0], scenario)]
    assert times == sorted(times)
    assert sum(t < 10 for t in times) == pytest.approx(40, abs=2)
    assert sum(t >= 10 for t in times) == pytest.approx(60, abs=2)


def test_same_seed_same_requests_and_another_seed_others(lengths: Path) -> None:
    def of(seed: int) -> list[object]:
        scenario = Scenario(seconds=15, seed=seed, streams=[a_stream(lengths)])
        return list(requests(scenario.streams[0], scenario))

    assert of(1) == of(1)
    assert of(1) != of(2)


def test_warp_keeps_the_shape_of_bursts() -> None:
    times = list(warp([0, 0.1, 0.2, 3.0, 3.1, 3.2, 6.0], [Phase(seconds=6, per_second=1)]))
    assert len(times) == 7
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert gaps[0] == pytest.approx(0.1)
    assert gaps[2] == pytest.approx(2.8)


def test_closed_loop_has_no_end_and_lengths_are_capped(lengths: Path) -> None:
    stream = a_stream(lengths, phases=[], outstanding=4, max_output_tokens=5, max_prompt_tokens=150)
    scenario = Scenario(seconds=1, streams=[stream])
    some = list(itertools.islice(requests(stream, scenario), 500))
    assert {r.at_s for r in some} == {None}
    assert max(r.output_tokens for r in some) == 5
    assert max(r.prompt_tokens for r in some) == 150


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seconds: 5\nstreams: []\n", "streams"),
        ("seconds: 0\n", "seconds"),
        ("seconds: [\n", "not YAML"),
        (
            "seconds: 5\nstreams: [{name: a, qos_class: b, models: [m], lengths: x.csv}]\n",
            "exactly one of phases",
        ),
        ("seconds: 5\nstrems: 1\n", "strems"),
    ],
    ids=["no stream", "no time", "not yaml", "no arrivals", "unknown field"],
)
def test_a_wrong_scenario_names_the_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(ScenarioError, match=message):
        Scenario.load(path)


def test_a_token_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.yaml"
    one = "{name: a, qos_class: b, models: [m], lengths: x.csv, outstanding: 1, token_env: TIDE_TOKEN}"
    path.write_text(f"seconds: 5\nstreams: [{one}]\n")
    monkeypatch.delenv("TIDE_TOKEN", raising=False)
    with pytest.raises(ScenarioError, match=r"stream a: token_env: \$TIDE_TOKEN is not set"):
        Scenario.load(path)
    monkeypatch.setenv("TIDE_TOKEN", "t-1")
    assert Scenario.load(path).streams[0].token == "t-1"


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "examples/load").glob("*.yaml")))
def test_example_scenarios_can_be_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CHAT_TOKEN", "PIPELINE_TOKEN"):
        monkeypatch.setenv(name, "t")
    scenario = Scenario.load(path)
    for stream in scenario.streams:
        assert next(requests(stream, scenario)).prompt_tokens > 0


def test_a_wrong_trace_names_the_row(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("prompt_tokens,output_tokens\n1,2\n3,many\n")
    with pytest.raises(ScenarioError, match="row 2"):
        read_lengths(path)
    with pytest.raises(ScenarioError, match=r"missing.csv"):
        read_lengths(tmp_path / "missing.csv")


def test_percentiles_keep_what_never_came() -> None:
    records = [Record("s", "c", "m", 1, 1, 0.0, first_token_s=0.1, outcome=ANSWERED) for _ in range(9)]
    records.append(Record("s", "c", "m", 1, 1, 0.0, outcome=REFUSED))
    figures = summarise(records, 10)["c"]
    assert figures["ttft_p50_s"] == pytest.approx(0.1)
    assert math.isinf(figures["ttft_p99_s"])
    assert (figures["requests_sent"], figures["answered"], figures["refused"], figures["lost"]) == (
        10,
        9,
        1,
        0,
    )
    assert math.isnan(percentile([], 0.5))


def test_only_tokens_inside_the_window_count() -> None:
    record = Record("s", "c", "m", 1, 4, 0.0, outcome=ANSWERED, tokens=4, tokens_in_window=2)
    assert summarise([record], 10)["c"]["tokens_per_s"] == pytest.approx(0.2)


async def chat(request: web.Request) -> web.StreamResponse:
    """A gateway that answers by the model's name."""
    body = await request.json()
    match body["model"]:
        case "refused":
            return web.json_response({"error": {"message": "full"}}, status=429)
        case "broken":
            return web.json_response({"error": {"message": "oops"}}, status=500)
        case "slow":
            await asyncio.sleep(1)
    if not body["stream"]:
        return web.json_response({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await response.write(b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n')
    for _ in range(body["max_tokens"]):
        await response.write(b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n')
    await response.write(b'data: {"choices":[],"usage":{"completion_tokens":1}}\n\n')
    if body["model"] != "truncated":
        await response.write(b"data: [DONE]\n\n")
    return response


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", handler)
    server = web.AppRunner(app)
    await server.setup()
    await web.TCPSite(server, "127.0.0.1", 0).start()
    try:
        host, port = server.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await server.cleanup()


@pytest.mark.parametrize(
    ("model", "streamed", "outcome"),
    [
        ("fine", True, ANSWERED),
        ("fine", False, ANSWERED),
        ("refused", True, REFUSED),
        ("broken", True, LOST),
        ("truncated", True, LOST),
        ("slow", True, LOST),
    ],
)
async def test_outcomes(lengths: Path, model: str, streamed: bool, outcome: str) -> None:
    phases = [Phase(seconds=1, per_second=10)]
    stream = a_stream(lengths, models=[model], phases=phases, stream=streamed, timeout_s=0.5)
    async with serving(chat) as url:
        state = await runner.run(Scenario(seconds=1, streams=[stream]), url, drain_s=5)
    assert {r.outcome for r in state.records} == {outcome}
    assert len(state.records) >= 9
    if outcome == ANSWERED:
        assert all(r.tokens == r.output_tokens for r in state.records)
    assert runner.lag_ms(state.lags_s)["max"] >= 0


async def test_a_closed_loop_keeps_its_number_outstanding(lengths: Path) -> None:
    active: set[int] = set()
    seen: list[int] = []

    async def slow(request: web.Request) -> web.Response:
        active.add(id(request))
        seen.append(len(active))
        await asyncio.sleep(0.02)
        active.discard(id(request))
        return web.json_response({"usage": {"completion_tokens": 3}})

    stream = a_stream(lengths, phases=[], outstanding=5, stream=False)
    async with serving(slow) as url:
        state = await runner.run(Scenario(seconds=1, streams=[stream]), url, drain_s=5)
    assert max(seen) == 5
    assert len(state.records) > 50
    assert summarise(state.records, 1)["interactive"]["tokens_per_s"] > 100
    assert runner.recent(state)["classes"]["interactive"]["answered"] == len(state.records)


async def test_a_gateway_that_is_not_there_loses_requests_but_not_the_run(lengths: Path) -> None:
    stream = a_stream(lengths, phases=[Phase(seconds=1, per_second=5)])
    state = await runner.run(Scenario(seconds=1, streams=[stream]), "http://127.0.0.1:9", drain_s=1)
    assert {r.outcome for r in state.records} == {LOST}
    assert "Connect" in state.records[0].detail
