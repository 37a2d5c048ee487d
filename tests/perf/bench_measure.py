"""What measuring costs: requests/s through Envoy and the picker with it and without, and CPU.

Two gateways in front of one picker and one engine, in turn, run by run; one of them looks at answers
and logs them. All share this machine, so the ratios within one run count. `--quick` shows that it
runs, and claims nothing.
"""

import argparse
import asyncio
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench_picker
from bench_picker import cpu_s, engine, start_envoy, throughput, wait_for_picker
from report import Row, record, row

from support.ports import free_ports
from tidegate.render.envoy import bootstrap

ARMS: Final = ("without", "measured")
ANSWER: Final = (
    '{"id":"cmpl-0123456789abcdef","object":"text_completion","created":1700000000,"model":"m","choices":['
    '{"index":0,"text":"%s","finish_reason":"length","stop_reason":null}],"usage":{"prompt_tokens":500,'
    '"total_tokens":516,"completion_tokens":16,"prompt_tokens_details":null}}' % (" word" * 16)
)
STREAMS, EVENTS, GAP_S = 32, 60, 0.01
_EVENT: Final = (
    b'data: {"id":"cmpl-0123456789abcdef","object":"text_completion","created":1700000000,"model":"m",'
    b'"choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":null,"stop_reason":null}]}\n\n'
)


async def serve_streams(port: int) -> None:
    """An engine whose answers are so many events, one at a time."""
    chunk = b"%x\r\n%s\r\n" % (len(_EVENT), _EVENT)
    start = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                if b"chunked" in head.lower():
                    while await reader.readuntil(b"\r\n") != b"0\r\n":
                        await reader.readuntil(b"\r\n")
                    await reader.readuntil(b"\r\n")
                writer.write(start)
                for _ in range(EVENTS):
                    writer.write(chunk)
                    await asyncio.sleep(GAP_S)
                writer.write(b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", port)
    await server.serve_forever()


async def stream(port: int, seconds: float) -> int:
    """STREAMS clients, one stream after the other; returns the events that came."""
    body = bench_picker.BODY
    request = (
        f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer bench\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    end, events = time.perf_counter() + seconds, 0

    async def one() -> None:
        nonlocal events
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < end:
            writer.write(request)
            answer = await reader.readuntil(b"\r\n0\r\n\r\n")
            if not answer.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(answer[:200].decode(errors="replace"))
            events += EVENTS
        writer.close()

    await asyncio.gather(*(one() for _ in range(STREAMS)))
    return events


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


class Bench:
    """Processes, and what was measured of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[bytes]] = []

    def run(self, *command: str) -> subprocess.Popen[bytes]:
        self.started.append(subprocess.Popen([sys.executable, *command]))
        return self.started[-1]

    def stop(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()

    def gateways(self, to: str) -> tuple[subprocess.Popen[bytes], dict[str, tuple[int, int]]]:
        """A picker that sends to `to`, and port and pid of both gateways in front of it."""
        port, found = free_ports(1)[0], {}
        picker = self.run(str(Path(bench_picker.__file__).resolve()), "--serve", str(port), to)
        for arm in ARMS:
            listen, admin = free_ports(2)
            config = bootstrap(
                listen_host="127.0.0.1",
                listen_port=listen,
                admin_port=admin,
                picker_host="127.0.0.1",
                picker_port=port,
                measure_port=port if arm == "measured" else None,
            )
            envoy = start_envoy(self.folder, f"{arm}-{listen}", config)
            self.started.append(envoy)
            found[arm] = (listen, envoy.pid)
            wait_for_picker(listen)
        return picker, found


def whole(bench: Bench, runs: int, seconds: float, *, quick: bool) -> list[Row]:
    """Small answers as fast as they come."""
    back, admin = free_ports(2)
    answers = engine(back, admin)
    routes = bench_picker._manager(answers)["route_config"]["virtual_hosts"][0]["routes"]
    routes[0]["direct_response"]["body"]["inline_string"] = ANSWER
    routes[0]["response_headers_to_add"] = [{"header": {"key": "content-type", "value": "application/json"}}]
    bench.started.append(start_envoy(bench.folder, "engine", answers))
    to = f"127.0.0.1:{back}"
    picker, gateways = bench.gateways(to)
    rates: dict[str, list[float]] = {arm: [] for arm in ARMS}
    cpu: dict[tuple[str, str], list[float]] = {}
    for number in range(runs):
        for arm in ARMS if number % 2 else reversed(ARMS):
            port, envoy = gateways[arm]
            before = cpu_s(picker.pid), cpu_s(envoy)
            done = asyncio.run(throughput(port, to, seconds))
            time.sleep(0.4)  # the log's last batch
            rates[arm].append(done / seconds)
            for what, pid, was in (("picker", picker.pid, before[0]), ("Envoy", envoy, before[1])):
                cpu.setdefault((what, arm), []).append((cpu_s(pid) - was) / done * 1e6)
    ratio = [b / a for a, b in zip(rates["without"], rates["measured"], strict=True)]
    both = {arm: [a + b for a, b in zip(cpu["picker", arm], cpu["Envoy", arm], strict=True)] for arm in ARMS}
    dearer = [b / a for a, b in zip(both["without"], both["measured"], strict=True)]
    return [
        row("requests/s without", rates["without"], "1/s", claims=False),
        row("requests/s measured", rates["measured"], "1/s", claims=False),
        row("measured ÷ without", ratio, "ratio", at_least=0.95, claims=not quick),
        row("CPU of Envoy and picker, measured ÷ without", dearer, "ratio", claims=False),
        *(row(f"{what} CPU per request {arm}", cpu[what, arm], "µs", claims=False) for what, arm in cpu),
    ]


def streamed(bench: Bench, runs: int, seconds: float, *, quick: bool) -> list[Row]:
    """Streams at the pace of tokens."""
    back, runs = free_ports(1)[0], 1 if quick else max(3, runs // 2)
    bench.run(str(Path(__file__).resolve()), "--serve-streams", str(back))
    wait_for_port(back)
    _, gateways = bench.gateways(f"127.0.0.1:{back}")
    cpu: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for number in range(runs):
        for arm in ARMS if number % 2 else reversed(ARMS):
            port, envoy = gateways[arm]
            before = cpu_s(envoy)
            events = asyncio.run(stream(port, seconds))
            cpu[arm].append((cpu_s(envoy) - before) / events * 1e6)
    return [row(f"Envoy CPU per streamed event {arm}", cpu[arm], "µs", claims=False) for arm in ARMS]


def main() -> None:
    """Start everything, measure, stop everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short run, claims nothing")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement (default 2)")
    parser.add_argument("--serve-streams", type=int, metavar="PORT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_streams:
        asyncio.run(serve_streams(args.serve_streams))
        return
    runs, seconds = (1, 1.0) if args.quick else (args.runs, args.seconds)
    with tempfile.TemporaryDirectory() as name:
        rows = []
        for part in (whole, streamed):
            bench = Bench(Path(name))
            try:
                rows += part(bench, runs, seconds, quick=args.quick)
            finally:
                bench.stop()
    record("measure", rows)


if __name__ == "__main__":
    main()
