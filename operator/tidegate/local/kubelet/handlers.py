"""Runs what probes and hooks ask for: an HTTP request, a connection, a command, a pause."""

import asyncio
import contextlib
import os
from collections.abc import Mapping
from typing import Final

import aiohttp

from tidegate.local.kubelet.images import Command
from tidegate.local.kubelet.model import Exec, Handler, HttpGet, Sleep, TcpSocket
from tidegate.local.kubelet.processes import Processes
from tidegate.local.kubelet.template import LaunchError

Result = tuple[bool, str]
"""Whether it went well, and if not, what was seen."""
_MAX_OUTPUT: Final = 10 * 1024
"""The kubelet keeps this much of a probe's output."""


class Handlers:
    """One for all pods, since it holds the shared HTTP session."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        # As the kubelet: every probe is a connection of its own, and certificates are not checked.
        connector = aiohttp.TCPConnector(force_close=True, limit=0, ssl=False)
        headers = {"User-Agent": "kube-probe/tidegate", "Accept": "*/*"}
        self._session = aiohttp.ClientSession(
            connector=connector, headers=headers, cookie_jar=aiohttp.DummyCookieJar()
        )

    async def close(self) -> None:
        """Close the session."""
        await self._session.close()

    async def run(self, handler: Handler, *, pod_ip: str, env: Mapping[str, str], timeout_s: float) -> Result:
        """Run a handler for at most `timeout_s`; never raises for what it meets."""
        try:
            async with asyncio.timeout(timeout_s):
                match handler:
                    case HttpGet():
                        return await self._get(handler, pod_ip)
                    case TcpSocket():
                        return await _connect(handler, pod_ip)
                    case Exec():
                        return await self._execute(handler, env)
                    case Sleep():
                        await asyncio.sleep(handler.seconds)
                        return True, ""
        except TimeoutError:
            return False, f"no answer within {timeout_s:g} s"
        except (aiohttp.ClientError, OSError, ValueError, LaunchError) as error:
            return False, str(error) or type(error).__name__

    async def _get(self, handler: HttpGet, pod_ip: str) -> Result:
        path = handler.path if handler.path.startswith("/") else f"/{handler.path}"
        url = f"{handler.scheme.lower()}://{handler.host or pod_ip}:{handler.port}{path}"
        async with self._session.get(url, headers=handler.headers, allow_redirects=False) as response:
            if 200 <= response.status < 400:
                return True, ""
            return False, f"HTTP probe failed with statuscode: {response.status}"

    async def _execute(self, handler: Exec, env: Mapping[str, str]) -> Result:
        out, into = os.pipe()
        try:
            try:
                process = await self._processes.start(Command(handler.command), env, into)
            finally:
                os.close(into)
            try:
                code = await asyncio.shield(process.exited)
            finally:
                process.kill_session()
                self._processes.forget(process)
            os.set_blocking(out, False)
            text = b""
            with contextlib.suppress(BlockingIOError):
                text = os.read(out, _MAX_OUTPUT)
        finally:
            os.close(out)
        message = text.decode(errors="replace").strip()
        return code == 0, "" if code == 0 else f"exit code {code}: {message}"


async def _connect(handler: TcpSocket, pod_ip: str) -> Result:
    _, writer = await asyncio.open_connection(handler.host or pod_ip, handler.port)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True, ""
