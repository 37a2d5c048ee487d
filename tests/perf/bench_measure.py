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
from contextlib import ExitStack
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench_picker
from bench_picker import BODY_BYTES, FRAMES, QUEUED, Stage, answers, body, engine, post
from httpload import Target, cpu_s, throughput
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
    request = post(BODY_BYTES)
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


def gateways(stage: Stage, to: str) -> tuple[subprocess.Popen[bytes], dict[str, tuple[int, int]]]:
    """A picker that sends to `to`, and port and pid of both gateways in front of it."""
    port, health, measure_port = free_ports(3)
    command = [sys.executable, str(Path(bench_picker.__file__).resolve()), "--serve", FRAMES]
    picker = stage.run([*command, str(port), str(health), to, str(QUEUED), str(measure_port)])
    found = {}
    for arm in ARMS:
        listen, admin = free_ports(2)
        config = bootstrap(
            listen_host="127.0.0.1",
            listen_port=listen,
            admin_port=admin,
            picker_host="127.0.0.1",
            picker_port=port,
            measure_port=measure_port if arm == "measured" else None,
        )
        found[arm] = (listen, stage.envoy(f"{arm}-{listen}", config))
        answers(f"http://127.0.0.1:{listen}/v1/completions", picker, body(BODY_BYTES))
    return picker, found


def whole(stage: Stage, runs: int, seconds: float, *, quick: bool) -> list[Row]:
    """Small answers as fast as they come."""
    back, admin = free_ports(2)
    config = engine(back, admin)
    routes = bench_picker._manager(config)["route_config"]["virtual_hosts"][0]["routes"]
    routes[0]["direct_response"]["body"]["inline_string"] = ANSWER
    routes[0]["response_headers_to_add"] = [{"header": {"key": "content-type", "value": "application/json"}}]
    stage.envoy("engine", config)
    picker, found = gateways(stage, f"127.0.0.1:{back}")
    rates: dict[str, list[float]] = {arm: [] for arm in ARMS}
    cpu: dict[tuple[str, str], list[float]] = {}
    for number in range(runs):
        for arm in ARMS if number % 2 else reversed(ARMS):
            port, envoy = found[arm]
            before = cpu_s(picker.pid), cpu_s(envoy)
            rate = asyncio.run(throughput(Target(port, post(BODY_BYTES)), STREAMS, seconds))
            time.sleep(0.4)  # the log's last batch
            rates[arm].append(rate)
            done = rate * seconds
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


def streamed(stage: Stage, runs: int, seconds: float, *, quick: bool) -> list[Row]:
    """Streams at the pace of tokens."""
    back, runs = free_ports(1)[0], 1 if quick else max(3, runs // 2)
    stage.run([sys.executable, str(Path(__file__).resolve()), "--serve-streams", str(back)])
    wait_for_port(back)
    _, found = gateways(stage, f"127.0.0.1:{back}")
    cpu: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for number in range(runs):
        for arm in ARMS if number % 2 else reversed(ARMS):
            port, envoy = found[arm]
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
            with ExitStack() as stack:
                rows += part(Stage(Path(name), stack), runs, seconds, quick=args.quick)
    record("measure", rows)


if __name__ == "__main__":
    main()
