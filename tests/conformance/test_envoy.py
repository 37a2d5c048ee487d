"""The picker behind a real Envoy in each body mode that gateways use: requests and responses pass whole."""

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web

from support.own_picker import KEY, NobodyToAsk, desk_of
from support.ports import free_port, free_ports
from support.small_picker import serving
from support.wait import eventually
from tidegate.core.flow import Endpoint
from tidegate.local import binaries
from tidegate.picker.desk import Desk
from tidegate.picker.fronts import Processor
from tidegate.picker.identity import Identity
from tidegate.picker.service import Service, Settings
from tidegate.render.envoy import bootstrap

MODES = {
    "as our own Envoy": {},
    "responses too": {"response_body_mode": "FULL_DUPLEX_STREAMED"},
    "responses shown": {"response_body_mode": "STREAMED"},
    "requests buffered": {"request_body_mode": "BUFFERED"},
    "requests buffered, responses too": {
        "request_body_mode": "BUFFERED",
        "response_body_mode": "FULL_DUPLEX_STREAMED",
    },
}
SENT = {"model": "m", "prompt": "word " * 40_000}
TOKENS = [f"data: {n}\n\n" for n in range(50)] + ["x" * 200_000, "data: [DONE]\n\n"]


@asynccontextmanager
async def engine(seen: list[bytes]) -> AsyncIterator[str]:
    async def answer(request: web.Request) -> web.StreamResponse:
        seen.append(await request.read())
        response = web.StreamResponse(headers={"x-engine": "yes"})
        await response.prepare(request)
        for token in TOKENS:
            await response.write(token.encode())
        return response

    app = web.Application(client_max_size=1 << 24)
    app.router.add_post("/v1/completions", answer)
    runner, port = web.AppRunner(app), free_port()
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def envoy(
    folder: Path, picker: str, mode: dict[str, str], hosts: Sequence[str] = ()
) -> AsyncIterator[str]:
    """Ours, with another body mode, or with `hosts` as a gateway has them: by the list in the metadata."""
    listen, admin = free_ports(2)
    host, _, port = picker.rpartition(":")
    config = bootstrap(
        listen_host="127.0.0.1", listen_port=listen, admin_port=admin, picker_host=host, picker_port=int(port)
    )
    _filter(config)["processing_mode"].update(mode)
    if hosts:
        _by_list(config, hosts)
    path, log = folder / "envoy.json", folder / "envoy.log"
    path.write_text(json.dumps(config))
    command = [binaries.find_tool("envoy"), "-c", str(path), "--disable-hot-restart"]
    command += ["--concurrency", "1", "--log-level", "error"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)  # noqa: ASYNC220 -- returns at once
    try:
        async with httpx.AsyncClient(trust_env=False) as client:

            async def ready() -> bool:
                assert process.poll() is None, log.read_text()
                try:
                    return (await client.get(f"http://127.0.0.1:{admin}/ready")).status_code == 200
                except httpx.HTTPError:
                    return False

            await eventually(ready)
        yield f"http://127.0.0.1:{listen}"
    finally:
        process.kill()
        process.wait()


def _by_list(config: dict[str, Any], hosts: Sequence[str]) -> None:
    """Engines as InferencePool gateways have them: all known, and the picker's list tried in order."""
    clusters = config["static_resources"]["clusters"]
    engines = next(c for c in clusters if c["name"] == "engines")
    del engines["original_dst_lb_config"]
    source = {"metadata": {"key": "envoy.lb", "path": [{"key": "x-gateway-destination-endpoint"}]}}
    fallback = _policy("round_robin", "round_robin.v3.RoundRobin")
    override = _policy(
        "override_host",
        "override_host.v3.OverrideHost",
        override_host_sources=[source],
        fallback_policy={"policies": [fallback]},
    )
    addresses = [h.rpartition(":") for h in hosts]
    places = [
        {"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(port)}}}}
        for host, _, port in addresses
    ]
    engines |= {
        "type": "STATIC",
        "load_balancing_policy": {"policies": [override]},
        "load_assignment": {"cluster_name": "engines", "endpoints": [{"lb_endpoints": places}]},
    }
    del engines["lb_policy"]


def _policy(name: str, kind: str, **fields: Any) -> dict[str, Any]:
    typed = {"@type": f"type.googleapis.com/envoy.extensions.load_balancing_policies.{kind}", **fields}
    return {
        "typed_extension_config": {"name": f"envoy.load_balancing_policies.{name}", "typed_config": typed}
    }


def _filter(config: Any) -> dict[str, Any]:
    """The settings of the filter that asks the picker, wherever it stands."""
    if isinstance(config, dict):
        if config.get("name") == "envoy.filters.http.ext_proc":
            return config["typed_config"]
        return next((f for value in config.values() if (f := _filter(value))), {})
    return next((f for item in config if (f := _filter(item))), {}) if isinstance(config, list) else {}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
async def test_bodies_pass_whole_and_room_is_given_back(mode: dict[str, str], tmp_path: Path) -> None:
    seen: list[bytes] = []
    async with engine(seen) as address:
        desk: Desk = desk_of([Endpoint(address, KEY, "low", 4)])
        service = Service(desk, Identity(NobodyToAsk(), desk.clock), Settings(trust_class_header=True))
        async with serving(Processor(service)) as picker, envoy(tmp_path, picker, mode) as url:
            async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as client:
                for _ in range(3):
                    response = await client.post("/v1/completions", json=SENT)
                    assert response.status_code == 200, response.text[:500]
                    assert response.text == "".join(TOKENS)
                    assert response.headers["x-engine"] == "yes"
                refused = await client.post("/v1/completions", json={"model": "another"})
                assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
            assert [json.loads(body) for body in seen] == [SENT] * 3

            async def held() -> tuple[int, int]:
                return desk.flow.held(address)

            await eventually(held, until=lambda h: h == (0, 0))


async def test_a_gateway_goes_down_the_list_when_the_first_is_not_there(tmp_path: Path) -> None:
    seen: list[bytes] = []
    strange: list[bytes] = []
    async with engine(seen) as alive, engine(strange) as stranger:
        dead = f"127.0.0.1:{free_port()}"
        desk = desk_of([Endpoint(one, KEY, "low", 1) for one in (alive, dead)], fallbacks=1)
        service = Service(desk, Identity(NobodyToAsk(), desk.clock), Settings(trust_class_header=True))
        async with (
            serving(Processor(service)) as picker,
            envoy(tmp_path, picker, {}, [stranger, alive, dead]) as url,
            httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as client,
        ):
            for _ in range(5):
                # One slot each: of two at once, one is sent to the endpoint that is not there.
                both = await asyncio.gather(*(client.post("/v1/completions", json=SENT) for _ in range(2)))
                assert [r.status_code for r in both] == [200, 200], both[0].text[:300]
        # The gateway went on by itself: nothing was asked of the picker again, and nobody else was tried.
        assert (
            sum(s.value for s in desk.metrics.arrivals.collect()[0].samples if s.name.endswith("_total"))
            == 10
        )
        assert (len(seen), len(strange)) == (10, 0)
