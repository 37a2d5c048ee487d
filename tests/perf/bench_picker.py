"""What the picker costs: requests/s through Envoy with it and without, its CPU, the time it adds.

Envoy, pickers, engine (a second Envoy that answers at once) and load share this machine, so CPU a
request and the ratios within one run count: every gateway is measured in turn, run by run. The
gateways: Envoy alone, with the picker on its own HTTP/2 frames, with the same picker on grpcio,
and proxies of others that are installed. `--quick` shows that it runs, and claims nothing.
"""

import argparse
import asyncio
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx
from httpload import Target, at, close, connect, cpu_s, latencies, rss_mb, throughput
from report import Row, record, row

from support.ports import free_ports
from tidegate.local import binaries
from tidegate.render.envoy import DESTINATION_HEADER, bootstrap

BODY_BYTES = 2_000
CONNECTIONS = (32, 128)
RATE = 200.0
"""Requests/s at which added time is measured."""
QUEUED = 10_000
TOKEN_BYTES = 4
ALONE, FRAMES, GRPCIO = "alone", "frames", "grpcio"
PEERS = {
    "smg": ["smg", "launch"],
    "vllm-router": ["vllm-router"],
}
"""Other proxies, measured where they are installed; both take --host, --port and --worker-urls."""


# ── the picker, with facts but without a cluster ────────────────────────────────────────────────


async def serve_picker(
    server: str, port: int, health: int, engine: str, slots: int, measure_port: int
) -> None:
    """The real front over the real service; the API server's answers are made up. 0: nothing is measured."""
    import grpc
    from envoy.service.accesslog.v3 import als_pb2_grpc

    from tidegate.core.flow import Endpoint, Flow, Model
    from tidegate.core.load import EngineReport
    from tidegate.core.types import QoSClass
    from tidegate.facts.endpoints import ServedModel, World
    from tidegate.picker.desk import Desk
    from tidegate.picker.fronts import Health, Listen, ServerName, front
    from tidegate.picker.identity import Identity
    from tidegate.picker.measure.server import AccessLogs
    from tidegate.picker.service import Service

    class Always:
        async def create(self, _kind: Any, _obj: Mapping[str, Any]) -> dict[str, Any]:
            return {"status": {"authenticated": True, "allowed": True, "user": {"username": "bench"}}}

    desk, key = Desk(Flow()), ("ns", "m")
    model = ServedModel(key, ("m",), ("high", "low"), "OpenAI", "vLLM")
    endpoints = (Endpoint(engine, key, "high", slots),)
    classes = {
        "high": QoSClass("high", 9, queue_max_requests=2 * QUEUED),
        "low": QoSClass("low", 1),
    }
    desk.set_world(World(classes, {key: model}, {"m": key}, endpoints, {key: Model(key, model.classes)}))
    desk.report(engine, EngineReport(math.inf, 0, 0, 0.0, 1 << 40), (0, 0))
    service = Service(desk, Identity(Always(), desk.clock))
    made = front(ServerName(server), service, Health(), Listen("127.0.0.1", port, health))
    await made.start()
    if measure_port:
        logs = grpc.aio.server()
        als_pb2_grpc.add_AccessLogServiceServicer_to_server(AccessLogs(desk.book, desk.clock), logs)
        logs.add_insecure_port(f"127.0.0.1:{measure_port}")
        await logs.start()
    await desk.run()
    await made.stop()


# ── processes ───────────────────────────────────────────────────────────────────────────────────


def gateway(listen: int, admin: int, picker: int | None) -> dict[str, Any]:
    """The gateway's bootstrap; without a picker the client names the destination itself."""
    config = bootstrap(
        listen_host="127.0.0.1",
        listen_port=listen,
        admin_port=admin,
        picker_host="127.0.0.1",
        picker_port=picker or 1,
        max_connections=2 * QUEUED,
    )
    if picker is None:
        manager = _manager(config)
        manager["http_filters"] = manager["http_filters"][-1:]
        straight = {"match": {"prefix": "/"}, "route": {"cluster": "engines", "timeout": "0s"}}
        manager["route_config"]["virtual_hosts"][0]["routes"] = [straight]
    return config


def _manager(config: dict[str, Any]) -> dict[str, Any]:
    """The connection manager that faces clients."""
    listener = config["static_resources"]["listeners"][0]
    found: dict[str, Any] = listener["filter_chains"][0]["filters"][0]["typed_config"]
    return found


def engine(listen: int, admin: int) -> dict[str, Any]:
    """An Envoy that answers everything with two bytes."""
    config = gateway(listen, admin, None)
    answer = {"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": "ok"}}}
    manager = _manager(config)
    manager["route_config"]["virtual_hosts"][0]["routes"] = [answer]
    # It takes the whole request before it answers, as engines do: else a long one is cut off now and then.
    buffer = {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.buffer.v3.Buffer",
        "max_request_bytes": 16 << 20,
    }
    manager["http_filters"].insert(0, {"name": "envoy.filters.http.buffer", "typed_config": buffer})
    return config


@dataclass
class Stage:
    """Everything that runs, by name; stopped at the end of the block."""

    folder: Path
    stack: ExitStack
    engine_port: int = 0
    ports: dict[str, int] = field(default_factory=dict)
    """Of the gateways."""
    pids: dict[str, int] = field(default_factory=dict)
    """Of what is measured in each: the picker, or the proxy itself."""

    def run(self, command: list[str]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command)

        def stop() -> None:
            process.kill()
            process.wait()

        self.stack.callback(stop)
        return process

    def envoy(self, name: str, config: dict[str, Any]) -> int:
        """Start an Envoy; returns its process id once it is ready."""
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(config))
        command = [binaries.find_tool("envoy"), "-c", str(path), "--disable-hot-restart"]
        process = self.run([*command, "--concurrency", "1", "--log-level", "error"])
        port = config["admin"]["address"]["socket_address"]["port_value"]
        answers(f"http://127.0.0.1:{port}/ready", process)
        return process.pid

    def start(self) -> None:
        """The engine and Envoy alone."""
        self.engine_port, admin, listen, other = free_ports(4)
        self.envoy("engine", engine(self.engine_port, admin))
        self.pids[ALONE] = self.envoy(ALONE, gateway(listen, other, None))
        self.ports[ALONE] = listen

    def picker(self, name: str, server: str, slots: int = QUEUED) -> None:
        """A picker and an Envoy in front of it. Without slots everything waits."""
        port, health, listen, admin = free_ports(4)
        to = f"127.0.0.1:{self.engine_port}"
        command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        process = self.run([*command, server, str(port), str(health), to, str(slots), "0"])
        self.pids[name], self.ports[name] = process.pid, listen
        self.envoy(name, gateway(listen, admin, port))
        if slots:
            answers(f"http://127.0.0.1:{listen}/v1/completions", process, body(BODY_BYTES))
        else:
            answers(f"http://127.0.0.1:{listen}/v2/health/live", process)

    def peer(self, name: str, command: list[str]) -> None:
        """Another's proxy, where it is installed."""
        found = shutil.which(command[0])
        if found is None:
            print(f"{name} is not installed, and so not measured")
            return
        [port] = free_ports(1)
        worker = f"http://127.0.0.1:{self.engine_port}"
        flags = ["--host", "127.0.0.1", "--port", str(port), "--worker-urls", worker]
        process = self.run([found, *command[1:], *flags])
        try:
            answers(f"http://127.0.0.1:{port}/v1/completions", process, body(BODY_BYTES))
        except RuntimeError as error:  # it may want more of an engine than two bytes
            print(f"{name} is not measured: {error}")
            return
        self.pids[name], self.ports[name] = process.pid, port

    def target(self, name: str, size: int = BODY_BYTES) -> Target:
        return Target(self.ports[name], post(size, f"{DESTINATION_HEADER}: 127.0.0.1:{self.engine_port}"))


def body(size: int) -> bytes:
    return json.dumps({"model": "m", "max_tokens": 16, "prompt": "x" * size}).encode()


def post(size: int, *more: str) -> bytes:
    """A whole request with a body of about this size; `more` are lines of its head."""
    data = body(size)
    head = [
        "POST /v1/completions HTTP/1.1",
        "Host: bench",
        "Authorization: Bearer bench",
        "Content-Type: application/json",
        *more,
        f"Content-Length: {len(data)}",
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + data


def answers(url: str, process: subprocess.Popen[bytes], content: bytes | None = None) -> None:
    """Wait until an address answers 200."""
    deadline = time.monotonic() + 60
    headers = {"Authorization": "Bearer bench", "Content-Type": "application/json"}
    while True:
        try:
            method = "GET" if content is None else "POST"
            if httpx.request(method, url, content=content, headers=headers).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        if time.monotonic() > deadline or process.poll() is not None:
            raise RuntimeError(f"{url} does not answer")
        time.sleep(0.1)


# ── what is measured ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Plan:
    runs: int
    seconds: float
    queued: int

    @property
    def claims(self) -> bool:
        return self.runs > 1


@dataclass
class Found:
    """Samples, one for each run, by gateway."""

    rate: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    cpu: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    times: dict[str, list[list[float]]] = field(default_factory=lambda: defaultdict(list))


async def in_turn(stage: Stage, plan: Plan) -> Found:
    """All gateways one after the other, run by run, so that a noisy neighbour disturbs all."""
    found = Found()
    for _ in range(plan.runs):
        for count in CONNECTIONS:
            for name, pid in stage.pids.items():
                before = cpu_s(pid)
                rate = await throughput(stage.target(name), count, plan.seconds)
                found.rate[name, count].append(rate)
                found.cpu[name, count].append((cpu_s(pid) - before) / (rate * plan.seconds) * 1e6)
        for name in stage.pids:
            found.times[name].append(await latencies(stage.target(name), plan.seconds, RATE))
    return found


def throughput_rows(found: Found, names: list[str], plan: Plan) -> list[Row]:
    rows = []
    first = CONNECTIONS[0]
    for count in CONNECTIONS:
        alone = found.rate[ALONE, count]
        rows.append(row(f"Envoy alone, {count} connections", alone, "1/s", claims=False))
        for name in names:
            rate, ours = found.rate[name, count], name == FRAMES and count == first
            least = 5000 if ours else None
            label = f"{name}, {count} connections"
            rows.append(row(label, rate, "1/s", at_least=least, claims=plan.claims and ours))
            ratio = [a / b for a, b in zip(rate, alone, strict=True)]
            rows.append(row(f"{label} ÷ Envoy alone", ratio, "ratio", claims=False))
            most = 120 if ours else None
            cpu = found.cpu[name, count]
            rows.append(row(f"{label}: CPU a request", cpu, "µs", at_most=most, claims=plan.claims and ours))
    for count in CONNECTIONS:
        pairs = zip(found.rate[FRAMES, count], found.rate[GRPCIO, count], strict=True)
        rows.append(
            row(f"frames ÷ grpcio, {count} connections", [a / b for a, b in pairs], "ratio", claims=False)
        )
    return rows


def added_rows(found: Found, names: list[str], plan: Plan) -> list[Row]:
    rows = []
    for name in names:
        for share, text in ((0.5, "p50"), (0.99, "p99")):
            both = zip(found.times[ALONE], found.times[name], strict=True)
            added = [at(b, share) - at(a, share) for a, b in both]
            ours = name == FRAMES and share > 0.9
            most = 2 if ours else None
            label = f"{name}: added {text} at {RATE:.0f}/s"
            rows.append(row(label, added, "ms", at_most=most, claims=plan.claims and ours))
    return rows


async def prompts(stage: Stage, plan: Plan) -> list[Row]:
    """Long prompts: what they cost, and what a stream of them does to others."""
    rows, names = [], (ALONE, FRAMES, GRPCIO)
    for tokens in (10_000, 100_000):
        rate: dict[str, list[float]] = defaultdict(list)
        cpu: list[float] = []
        for _ in range(plan.runs):
            for name in names:
                before = cpu_s(stage.pids[name])
                rate[name].append(
                    await throughput(stage.target(name, tokens * TOKEN_BYTES), 8, plan.seconds / 2)
                )
                if name == FRAMES:
                    spent = cpu_s(stage.pids[name]) - before
                    cpu.append(spent / (rate[name][-1] * plan.seconds / 2) * 1e6)
        label = f"prompts of {tokens} tokens"
        rows += [row(f"{label}, {name}", rate[name], "1/s", claims=False) for name in names]
        rows.append(row(f"{label}: CPU a request", cpu, "µs", claims=False))
    more: dict[str, list[float]] = defaultdict(list)
    for _ in range(plan.runs):
        for name in names:
            quiet = await latencies(stage.target(name), plan.seconds, RATE)
            beside = await _beside_long_prompts(stage, name, plan.seconds)
            more[name].append(at(beside, 0.99) - at(quiet, 0.99))
    for name in names:
        most = 5 if name == FRAMES else None
        label = f"{name}: others' p99 beside a stream of prompts of 100,000 tokens, more"
        rows.append(row(label, more[name], "ms", at_most=most, claims=plan.claims and name == FRAMES))
    return rows


async def _beside_long_prompts(stage: Stage, name: str, seconds: float) -> list[float]:
    """Latencies of short requests while another client sends one long prompt after the other."""
    [other] = await connect(stage.target(name, 100_000 * TOKEN_BYTES), 1)

    async def keep_sending() -> None:
        while True:
            await other.send()
            await asyncio.sleep(0.1)

    task = asyncio.create_task(keep_sending())
    try:
        return await latencies(stage.target(name), seconds, RATE)
    finally:
        task.cancel()
        close([other])


async def queued(stage: Stage, plan: Plan) -> list[Row]:
    """Memory of a picker that holds a full queue."""
    pid, target = stage.pids["queue"], stage.target("queue")
    before = rss_mb(pid)
    connections = await connect(target, plan.queued)
    waiting = [asyncio.ensure_future(c.send()) for c in connections]
    await asyncio.sleep(0)
    last, still = 0.0, 0
    while still < 10:  # until it grows no more
        await asyncio.sleep(0.5)
        now = rss_mb(pid)
        still, last = (still + 1 if now <= last + 0.5 else 0), max(now, last)
    if any(task.done() for task in waiting):
        raise RuntimeError("what should wait in the queue was answered")
    over = rss_mb(pid) - before - plan.queued * len(body(BODY_BYTES)) / 1e6
    for task in waiting:
        task.cancel()
    for connection in connections:
        if connection.transport is not None:
            connection.transport.abort()
    await asyncio.gather(*waiting, return_exceptions=True)
    label = f"memory with {plan.queued} queued, over their bodies"
    return [row(label, [over], "MB", at_most=100, claims=plan.claims)]


def main() -> None:
    """Start everything, measure, stop everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short run, claims nothing")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement (default 4)")
    parser.add_argument("--serve", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        server, port, health, to, slots, measure = args.serve
        asyncio.run(serve_picker(server, int(port), int(health), to, int(slots), int(measure)))
        return
    plan = Plan(1, 1.0, 500) if args.quick else Plan(args.runs, args.seconds, QUEUED)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stage = Stage(Path(folder), stack)
        stage.start()
        stage.picker(FRAMES, FRAMES)
        stage.picker(GRPCIO, GRPCIO)
        for name, command in PEERS.items():
            stage.peer(name, command)
        names = [name for name in stage.pids if name != ALONE]
        found = asyncio.run(in_turn(stage, plan))
        rows = throughput_rows(found, names, plan) + added_rows(found, names, plan)
        rows += asyncio.run(prompts(stage, plan))
        stage.picker("queue", FRAMES, slots=0)
        rows += asyncio.run(queued(stage, plan))
    print(f"alone {median(found.rate[ALONE, CONNECTIONS[0]]):.0f} requests/s")
    record("picker", rows)


if __name__ == "__main__":
    main()
