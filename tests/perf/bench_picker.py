"""What the picker costs: requests/s through Envoy with it and without, its CPU, the time it adds.

Envoy, picker, engine (a second Envoy that answers at once) and load share this machine, so the
ratios within one run count. `--quick` shows that it runs, and claims nothing.
"""

import argparse
import asyncio
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx
from report import Row, record, row

from support.ports import free_ports
from tidegate.local import binaries
from tidegate.render.envoy import DESTINATION_HEADER, bootstrap

BODY = json.dumps({"model": "m", "max_tokens": 16, "prompt": "x" * 2000}).encode()
CONNECTIONS = 64
MEASURED = ("alone", "with the picker")


# ── the picker, with facts but without a cluster ────────────────────────────────────────────────


async def serve_picker(port: int, engine: str) -> None:
    """The real server's gRPC face over the real service; the API server's answers are made up."""
    import grpc
    from envoy.service.accesslog.v3 import als_pb2_grpc
    from envoy.service.ext_proc.v3 import external_processor_pb2_grpc as pb_grpc

    from tidegate.core.flow import Endpoint, Flow, Model
    from tidegate.core.load import EngineReport
    from tidegate.core.types import QoSClass
    from tidegate.facts.endpoints import ServedModel, World
    from tidegate.picker.desk import Desk
    from tidegate.picker.identity import Identity
    from tidegate.picker.measure.server import AccessLogs
    from tidegate.picker.server import GRPC_OPTIONS, Processor
    from tidegate.picker.service import Service

    class Always:
        async def create(self, _kind: Any, _obj: Mapping[str, Any]) -> dict[str, Any]:
            return {"status": {"authenticated": True, "allowed": True, "user": {"username": "bench"}}}

    desk, key = Desk(Flow()), ("ns", "m")
    model = ServedModel(key, ("m",), ("high", "low"), "OpenAI", "vLLM")
    endpoints = tuple(Endpoint(engine, key, lane, 10_000) for lane in ("high",))
    classes = {"high": QoSClass("high", 9), "low": QoSClass("low", 1)}
    desk.set_world(World(classes, {key: model}, {"m": key}, endpoints, {key: Model(key, model.classes)}))
    desk.report(engine, EngineReport(math.inf, 0, 0, 0.0, 1 << 40), (0, 0))
    server = grpc.aio.server(options=GRPC_OPTIONS)
    pb_grpc.add_ExternalProcessorServicer_to_server(
        Processor(Service(desk, Identity(Always(), desk.clock))), server
    )
    als_pb2_grpc.add_AccessLogServiceServicer_to_server(AccessLogs(desk.book, desk.clock), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await asyncio.gather(server.wait_for_termination(), desk.run())


# ── Envoys ──────────────────────────────────────────────────────────────────────────────────────


def gateway(listen: int, admin: int, picker: int, *, with_picker: bool) -> dict[str, Any]:
    """The gateway's bootstrap; alone, the client names the destination itself."""
    config = bootstrap(
        listen_host="127.0.0.1",
        listen_port=listen,
        admin_port=admin,
        picker_host="127.0.0.1",
        picker_port=picker,
    )
    if not with_picker:
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
    config = gateway(listen, admin, 1, with_picker=False)
    answer = {"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": "ok"}}}
    _manager(config)["route_config"]["virtual_hosts"][0]["routes"] = [answer]
    return config


def start_envoy(folder: Path, name: str, config: dict[str, Any]) -> subprocess.Popen[bytes]:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    command = [binaries.find_tool("envoy"), "-c", str(path), "--disable-hot-restart"]
    process = subprocess.Popen([*command, "--concurrency", "1", "--log-level", "error"])
    port = config["admin"]["address"]["socket_address"]["port_value"]
    deadline = time.monotonic() + 30
    while True:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                return process
        except httpx.HTTPError:
            pass
        if time.monotonic() > deadline or process.poll() is not None:
            raise RuntimeError(f"Envoy {name} is not ready")
        time.sleep(0.05)


# ── load ────────────────────────────────────────────────────────────────────────────────────────


class Connection(asyncio.Protocol):
    """One keep-alive connection, one request at a time."""

    def __init__(self, request: bytes) -> None:
        self.request = request
        self.transport: asyncio.Transport | None = None
        self.answer: asyncio.Future[None] | None = None
        self.bad = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.bad += not data.startswith(b"HTTP/1.1 200")
        if self.answer is not None and not self.answer.done():
            self.answer.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(exc or ConnectionError("closed"))

    async def send(self) -> None:
        assert self.transport is not None
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(self.request)
        await self.answer


async def connect(port: int, to: str, count: int) -> list[Connection]:
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer bench\r\n"
        f"{DESTINATION_HEADER}: {to}\r\nContent-Length: {len(BODY)}\r\n\r\n"
    ).encode()
    loop = asyncio.get_running_loop()
    made = [
        await loop.create_connection(lambda: Connection(head + BODY), "127.0.0.1", port) for _ in range(count)
    ]
    return [protocol for _, protocol in made]


async def throughput(port: int, to: str, seconds: float) -> int:
    """Closed loop over all connections; returns how many were answered."""
    connections = await connect(port, to, CONNECTIONS)
    end, done = time.perf_counter() + seconds, 0

    async def loop(one: Connection) -> None:
        nonlocal done
        while time.perf_counter() < end:
            await one.send()
            done += 1

    await asyncio.gather(*(loop(c) for c in connections))
    return close(connections, done)


async def latencies(port: int, to: str, seconds: float, rate: float) -> list[float]:
    """Open loop at a fixed rate; milliseconds from when each was due."""
    free = await connect(port, to, CONNECTIONS)
    everyone, found, tasks = list(free), [], set()
    start = time.perf_counter()

    async def one(due: float) -> None:
        connection = free.pop()
        await connection.send()
        found.append((time.perf_counter() - due) * 1000)
        free.append(connection)

    for index in range(int(seconds * rate)):
        due = start + index / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.create_task(one(due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    close(everyone, len(found))
    return sorted(found)


def close(connections: list[Connection], done: int) -> int:
    bad = sum(c.bad for c in connections)
    if bad:
        raise RuntimeError(f"{bad} of {done} answers were not 200")
    for c in connections:
        if c.transport is not None:
            c.transport.close()
    return done


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def at(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))]


async def measure(ports: dict[str, int], to: str, picker: int, runs: int, seconds: float) -> list[Row]:
    """Both gateways in turn, run by run, so that a noisy neighbour disturbs both."""
    alone, picked = MEASURED
    rates: dict[str, list[float]] = {name: [] for name in MEASURED}
    times: dict[str, list[list[float]]] = {name: [] for name in MEASURED}
    cpu = []
    for _ in range(runs):
        for name in MEASURED:
            before = cpu_s(picker)
            done = await throughput(ports[name], to, seconds)
            rates[name].append(done / seconds)
            if name == picked:
                cpu.append((cpu_s(picker) - before) / done * 1e6)
            times[name].append(await latencies(ports[name], to, seconds, 200))
    quick = runs == 1

    def added(share: float) -> list[float]:
        return [at(b, share) - at(a, share) for a, b in zip(times[alone], times[picked], strict=True)]

    ratio = [b / a for a, b in zip(rates[alone], rates[picked], strict=True)]
    print(f"alone {median(rates['alone']):.0f}/s, with the picker {median(rates['with the picker']):.0f}/s")
    return [
        row("requests through Envoy alone", rates[alone], "1/s", claims=False),
        row(
            "requests through Envoy with the picker",
            rates[picked],
            "1/s",
            at_least=5000,
            claims=not quick,
        ),
        row("with the picker ÷ alone", ratio, "ratio", claims=False),
        row("picker CPU per request", cpu, "µs", at_most=120, claims=not quick),
        row("added p50 at 200/s", added(0.5), "ms", claims=False),
        row("added p99 at 200/s", added(0.99), "ms", at_most=2, claims=not quick),
    ]


def main() -> None:
    """Start everything, measure, stop everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short run, claims nothing")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement (default 4)")
    parser.add_argument("--serve", nargs=2, metavar=("PORT", "ENGINE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve_picker(int(args.serve[0]), args.serve[1]))
        return
    runs, seconds = (1, 1.0) if args.quick else (args.runs, args.seconds)
    alone, alone_admin, full, full_admin, back, back_admin, port = free_ports(7)
    to = f"127.0.0.1:{back}"
    started: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            command = [sys.executable, str(Path(__file__).resolve()), "--serve", str(port), to]
            started.append(subprocess.Popen(command))
            started.append(start_envoy(folder, "engine", engine(back, back_admin)))
            for listen, admin, on in ((alone, alone_admin, False), (full, full_admin, True)):
                config = gateway(listen, admin, port, with_picker=on)
                started.append(start_envoy(folder, f"gateway-{on}", config))
            ports = dict(zip(MEASURED, (alone, full), strict=True))
            wait_for_picker(full)
            rows = asyncio.run(measure(ports, to, started[0].pid, runs, seconds))
        finally:
            for process in started:
                process.kill()
                process.wait()
    record("picker", rows)


def wait_for_picker(port: int) -> None:
    headers = {"Authorization": "Bearer bench"}
    deadline = time.monotonic() + 30
    while (
        httpx.post(
            f"http://127.0.0.1:{port}/v1/completions", content=BODY, headers=headers, timeout=30
        ).status_code
        != 200
    ):
        if time.monotonic() > deadline:
            raise RuntimeError("the picker does not answer")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
