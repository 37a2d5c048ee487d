"""Asks whether a server is ready: one small HTTP request, or a TCP connection."""

import asyncio
import contextlib
import ssl
from urllib.parse import urlsplit

from tidegate.local.components import Probe

_LIMIT_S = 2.0


async def is_ready(probe: Probe) -> bool:
    """Whether the server answers 200 (http, https) or accepts (tcp) within two seconds."""
    try:
        async with asyncio.timeout(_LIMIT_S):
            return await _ask(probe)
    except (OSError, TimeoutError, ssl.SSLError, asyncio.IncompleteReadError, ValueError):
        return False


async def _ask(probe: Probe) -> bool:
    url = urlsplit(probe.url)
    tls = ssl.create_default_context(cafile=str(probe.ca)) if url.scheme == "https" else None
    reader, writer = await asyncio.open_connection(url.hostname, url.port, ssl=tls)
    try:
        if url.scheme == "tcp":
            return True
        writer.write(f"GET {url.path} HTTP/1.1\r\nHost: {url.netloc}\r\nConnection: close\r\n\r\n".encode())
        status_line = await reader.readuntil(b"\r\n")
        return status_line.split()[1:2] == [b"200"]
    finally:
        writer.close()
        with contextlib.suppress(OSError, ssl.SSLError):
            await writer.wait_closed()
