"""Load on an HTTP/1.1 address from keep-alive connections, as cheap as asyncio makes it; and what
a process has used.
"""

import asyncio
import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Target:
    """Where to, and the bytes of a request."""

    port: int
    request: bytes


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


async def connect(target: Target, count: int) -> list[Connection]:
    loop, made = asyncio.get_running_loop(), []
    for _ in range(count):
        _, one = await loop.create_connection(lambda: Connection(target.request), "127.0.0.1", target.port)
        made.append(one)
    return made


async def throughput(target: Target, count: int, seconds: float) -> float:
    """Closed loop over so many connections; requests/s that were answered."""
    connections = await connect(target, count)
    end, done, began = time.perf_counter() + seconds, 0, time.perf_counter()

    async def loop(one: Connection) -> None:
        nonlocal done
        while time.perf_counter() < end:
            await one.send()
            done += 1

    await asyncio.gather(*(loop(c) for c in connections))
    close(connections)
    return done / (time.perf_counter() - began)


async def latencies(target: Target, seconds: float, rate: float, spare: int = 64) -> list[float]:
    """Open loop at a fixed rate; milliseconds from when each was due, sorted."""
    everyone = await connect(target, spare)
    free: asyncio.Queue[Connection] = asyncio.Queue()
    for connection in everyone:
        free.put_nowait(connection)
    found: list[float] = []
    tasks: set[asyncio.Task[None]] = set()
    start = time.perf_counter()

    async def one(due: float) -> None:
        connection = await free.get()  # one that waits here is late too
        await connection.send()
        found.append((time.perf_counter() - due) * 1000)
        free.put_nowait(connection)

    for index in range(int(seconds * rate)):
        due = start + index / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.create_task(one(due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    close(everyone)
    return sorted(found)


def close(connections: list[Connection]) -> None:
    bad = sum(c.bad for c in connections)
    if bad:
        raise RuntimeError(f"{bad} answers were not 200")
    for c in connections:
        if c.transport is not None:
            c.transport.close()


def at(values: list[float], share: float) -> float:
    """A percentile of sorted values."""
    return values[min(len(values) - 1, int(share * len(values)))]


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mb(pid: int) -> float:
    """Resident memory, megabytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
