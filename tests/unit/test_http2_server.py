"""The server on asyncio, with grpcio's own client as its peer, and with peers that behave badly."""

import asyncio
import contextlib
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from support.http2 import cut, data, headers, settings
from support.wait import eventually
from tidegate.http2 import frames
from tidegate.http2 import server as server_module
from tidegate.http2.grpc import CallError, Status, pack
from tidegate.http2.server import Handler, Server, ServerCall, tls_context
from tidegate.http2.settings import Limits


class Handlers:
    """Some methods, and what became of their calls."""

    def __init__(self) -> None:
        self.ends: list[str] = []
        self.methods: dict[str, Handler] = {
            "/x/Echo": self.echo,
            "/x/Fail": self.fail,
            "/x/Break": self.break_,
            "/x/Hang": self.hang,
            "/x/Pour": self.pour,
        }

    async def echo(self, call: ServerCall) -> None:
        while (message := await call.read()) is not None:
            await call.write(message)

    async def fail(self, call: ServerCall) -> None:
        await call.read()
        raise CallError(Status.NOT_FOUND, "näh, 100%")

    async def break_(self, call: ServerCall) -> None:
        raise RuntimeError("a secret")

    async def hang(self, call: ServerCall) -> None:
        try:
            await call.write(b"here")
            await asyncio.Event().wait()
        finally:
            self.ends.append("hang")

    async def pour(self, call: ServerCall) -> None:
        """Megabytes, as fast as the peer takes them."""
        for _ in range(64):
            await call.write(bytes(1 << 20))
            self.ends.append("poured")


@pytest.fixture
def handlers() -> Handlers:
    return Handlers()


Start = Callable[..., Any]
Connect = Callable[..., Any]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """`await connect(port)`: a reader and a writer."""
    writers: list[asyncio.StreamWriter] = []

    async def make(port: int, **more: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, **more)
        writers.append(writer)
        return reader, writer

    yield make
    for writer in writers:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of localhost and its key."""
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    return cert, key


@pytest.fixture
async def start(handlers: Handlers) -> AsyncIterator[Start]:
    servers: list[Server] = []

    async def make(
        limits: Limits | None = None, tls: ssl.SSLContext | None = None, **more: Any
    ) -> tuple[Server, int]:
        server = Server(handlers.methods, limits, **more)
        servers.append(server)
        return server, await server.listen("127.0.0.1", 0, tls)

    yield make
    for server in servers:
        await server.stop(0)


async def code_of(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()


@contextlib.asynccontextmanager
async def channel(port: int) -> AsyncIterator[grpc.aio.Channel]:
    options = [("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as made:
        yield made


# ── a good peer ─────────────────────────────────────────────────────────────────────────────────


async def test_streams_of_messages_beyond_every_window(start: Start) -> None:
    _, port = await start()
    sizes = [0, 1, 1_000, 16_384, 300_000, 5_000_000, 3]

    async def ask() -> AsyncIterator[bytes]:
        for size in sizes:
            yield bytes([size % 256]) * size

    async with channel(port) as ch:
        found = [answer async for answer in ch.stream_stream("/x/Echo")(ask())]
        assert found == [bytes([s % 256]) * s for s in sizes]
        several = await asyncio.gather(*(ch.unary_unary("/x/Echo")(bytes(50_000)) for _ in range(200)))
        assert several == [bytes(50_000)] * 200


async def test_statuses_reach_the_client(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    _, port = await start(max_message=1_000)
    async with channel(port) as ch:
        unary = ch.unary_unary
        assert await code_of(unary("/x/Fail")(b"")) == (grpc.StatusCode.NOT_FOUND, "näh, 100%")
        assert await code_of(unary("/x/No")(b"")) == (
            grpc.StatusCode.UNIMPLEMENTED,
            "there is no method /x/No",
        )
        assert await code_of(unary("/x/Break")(b"")) == (grpc.StatusCode.INTERNAL, "the server failed")
        assert "a secret" in caplog.text
        code, text = await code_of(unary("/x/Echo")(bytes(1_001)))
        assert (code, text) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "a message of 1001 bytes; 1000 are taken")
        gzip = grpc.Compression.Gzip
        code, text = await code_of(unary("/x/Echo")(b"x" * 900, compression=gzip))
        assert code == grpc.StatusCode.UNIMPLEMENTED
        assert "identity" in text
        assert await unary("/x/Echo")(b"still here") == b"still here"


async def test_a_deadline_ends_a_call(start: Start, connect: Connect, handlers: Handlers) -> None:
    _, port = await start()
    reader, writer = await connect(port)
    of = [*_call("/x/Hang"), ("grpc-timeout", "50m")]
    writer.write(frames.PREFACE + settings() + headers(1, of=of))
    raw = await asyncio.wait_for(_until(reader, lambda raw: b"grpc-status" in raw), 5)
    assert b"grpc-status\x014" in raw.replace(b"\x7f", b"")
    assert handlers.ends == ["hang"]
    async with channel(port) as ch:
        call = ch.unary_stream("/x/Hang")(b"", timeout=0.1)
        assert await call.read() == b"here"
        assert (await code_of(call.read()))[0] == grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(_count(handlers.ends), until=lambda n: n == 2)


async def test_a_client_that_cancels_ends_its_handler(start: Start, handlers: Handlers) -> None:
    server, port = await start()
    async with channel(port) as ch:
        calls = [ch.unary_stream("/x/Hang")(b"") for _ in range(20)]
        for call in calls:
            assert await call.read() == b"here"
        for call in calls:
            call.cancel()
        await eventually(_count(handlers.ends), until=lambda n: n == 20)
        assert await ch.unary_unary("/x/Echo")(b"on") == b"on"
    assert all(not c.calls and c.held == 0 for c in server.connections)


async def test_what_came_before_a_reset_is_heard(start: Start, connect: Connect, handlers: Handlers) -> None:
    heard: list[bytes | None] = []

    async def listen(call: ServerCall) -> None:
        await asyncio.sleep(0.05)
        while (message := await call.read()) is not None:
            heard.append(message)
        heard.append(None)

    handlers.methods["/x/Listen"] = listen
    _, port = await start()
    _, writer = await connect(port)
    sent = data(1, pack(b"one") + pack(b"two")) + frames.rst_stream(1, 8)
    writer.write(frames.PREFACE + settings() + headers(1, of=_call("/x/Listen")) + sent)
    await eventually(_count(heard), until=lambda n: n == 3)
    assert heard == [b"one", b"two", None]
    writer.close()


async def test_tls(start: Start, connect: Connect, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    _, port = await start(tls=tls_context(str(cert), str(key)))
    trusted = grpc.ssl_channel_credentials(cert.read_bytes())
    async with grpc.aio.secure_channel(
        f"localhost:{port}", trusted, [("grpc.default_authority", "localhost")]
    ) as ch:
        assert await ch.unary_unary("/x/Echo")(bytes(100_000)) == bytes(100_000)
    client = ssl.create_default_context(cafile=str(cert))
    client.set_alpn_protocols(["http/1.1"])
    with contextlib.suppress(OSError):  # TLS refuses it, or we hang up
        reader, _ = await connect(port, ssl=client, server_hostname="localhost")
        assert await asyncio.wait_for(reader.read(), 5) == b""


# ── the end ─────────────────────────────────────────────────────────────────────────────────────


async def test_a_stop_lets_calls_finish_and_takes_no_new_ones(start: Start) -> None:
    server, port = await start()
    async with channel(port) as ch:
        call = ch.stream_stream("/x/Echo")()
        await call.write(b"a")
        assert await call.read() == b"a"
        stopping = asyncio.create_task(server.stop(10))
        await asyncio.sleep(0.2)
        assert not stopping.done()
        await call.write(b"b")
        assert await call.read() == b"b"
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        await asyncio.wait_for(stopping, 5)
        assert (await code_of(ch.unary_unary("/x/Echo")(b"")))[0] == grpc.StatusCode.UNAVAILABLE


async def test_a_stop_whose_grace_is_over_cancels(start: Start, handlers: Handlers) -> None:
    server, port = await start()
    async with channel(port) as ch:
        call = ch.unary_stream("/x/Hang")(b"")
        assert await call.read() == b"here"
        await server.stop(0.1)
        assert handlers.ends == ["hang"]
        assert (await code_of(call.read()))[0] in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)


# ── bad peers ───────────────────────────────────────────────────────────────────────────────────


async def test_a_peer_that_reads_nothing_holds_little(
    start: Start, connect: Connect, handlers: Handlers
) -> None:
    server, port = await start()
    _, writer = await connect(port)
    wide = frames.window_update(0, (1 << 30))
    writer.write(frames.PREFACE + settings((4, 1 << 30)) + wide + headers(1, end=True, of=_call("/x/Pour")))
    await eventually(_count(handlers.ends), until=lambda n: n > 0)
    await asyncio.sleep(0.3)
    poured = len(handlers.ends)
    assert poured < 20  # the sockets' buffers, and what waits here at most
    [connection] = server.connections
    assert connection.http.queued(1) <= 2 << 20
    writer.close()
    await eventually(_count(server.connections), until=lambda n: n == 0)


async def test_a_peer_that_asks_and_never_reads_is_hung_up_on(start: Start, connect: Connect) -> None:
    server, port = await start(Limits(calm_burst=1_000_000))
    _, writer = await connect(port)
    writer.write(frames.PREFACE + settings())
    pings = frames.frame(frames.PING, 0, 0, bytes(8)) * 1_000
    await eventually(_count(server.connections), until=lambda n: n == 1)
    with contextlib.suppress(OSError):
        for _ in range(3_000):
            writer.write(pings)
            await asyncio.wait_for(writer.drain(), 10)
            if not server.connections:
                break
    await eventually(_count(server.connections), until=lambda n: n == 0)


async def test_a_silent_peer_is_asked_and_then_hung_up_on(
    start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_ALIVE_S", 0.1)
    server, port = await start()
    reader, writer = await connect(port)
    writer.write(frames.PREFACE + settings())
    raw = await asyncio.wait_for(reader.read(), 5)  # until it hangs up
    assert [f[0] for f in cut(raw)].count(frames.PING) == 1
    async with channel(port) as ch:  # one that answers pings stays
        call = ch.unary_stream("/x/Hang")(b"")
        assert await call.read() == b"here"
        await asyncio.sleep(0.5)
        assert len(server.connections) == 1
        call.cancel()


async def test_no_more_connections_than_allowed(start: Start, connect: Connect) -> None:
    server, port = await start(max_connections=2)
    for _ in range(2):
        await connect(port)
    await eventually(_count(server.connections), until=lambda n: n == 2)
    reader, _ = await connect(port)
    with contextlib.suppress(ConnectionResetError):
        assert await asyncio.wait_for(reader.read(), 5) == b""
    assert len(server.connections) == 2


async def test_unread_messages_are_bounded(
    start: Start, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_HELD_BYTES", 100_000)
    server, port = await start()
    reader, writer = await connect(port)
    writer.write(frames.PREFACE + settings())
    for stream in (1, 3, 5):
        writer.write(headers(stream, of=_call("/x/Hang")))
        writer.write(data(stream, pack(bytes(10_000))) * 4)
    raw = await asyncio.wait_for(_until(reader, lambda raw: b"grpc-message" in raw), 5)
    assert b"too many messages wait on this connection" in raw
    [connection] = server.connections
    assert connection.held <= 100_000
    writer.close()


async def test_a_stream_reset_before_its_handler_began_leaves_nothing(
    start: Start, connect: Connect, handlers: Handlers
) -> None:
    server, port = await start()
    _, writer = await connect(port)
    flood = b"".join(headers(n, of=_call("/x/Hang")) + frames.rst_stream(n, 8) for n in range(1, 2_001, 2))
    writer.write(frames.PREFACE + settings() + flood + headers(2_001, end=True, of=_call("/x/Hang")))
    await eventually(_count(server.connections), until=lambda n: n == 1)
    [connection] = server.connections
    await eventually(_count(connection.calls), until=lambda n: n == 1)
    assert handlers.ends == []
    writer.close()


def _call(path: str) -> list[tuple[str, str]]:
    from support.http2 import CALL

    return [(name, path if name == ":path" else value) for name, value in CALL]


def _count(things: Any) -> Any:
    async def count() -> int:
        return len(things)

    return count


async def _until(reader: asyncio.StreamReader, found: Callable[[bytes], bool]) -> bytes:
    raw = b""
    while not found(raw):
        more = await reader.read(1 << 16)
        assert more, raw
        raw += more
    return raw
