"""Runs h2spec, where it is installed, against the frame layer: `python tests/support/h2spec.py`.

h2spec (github.com/summerwind/h2spec, `go install …/cmd/h2spec@latest`) asks with GET for a page, so
the connection is put behind a few lines that answer every request with one.
"""

import asyncio
import os
import shutil
import sys
import time
from pathlib import Path
from typing import cast

from tidegate.http2.connection import Connection, RequestReceived, Terminated
from tidegate.http2.settings import Limits

_PAGE = b"a page of some bytes\n" * 8
_DELAY_S = 0.05
"""Streams stay open so long, else there would never be many at once."""


class Page(asyncio.Protocol):
    """One connection that answers every request with a page."""

    def __init__(self) -> None:
        self.http = Connection(Limits(max_streams=100))
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._flush()

    def data_received(self, data: bytes) -> None:
        for event in self.http.receive(data, time.monotonic()):
            if isinstance(event, RequestReceived):
                asyncio.get_running_loop().call_later(_DELAY_S, self._answer, event.stream)
            elif isinstance(event, Terminated) and self.transport is not None:
                self._flush()
                self.transport.close()
        self._flush()

    def _answer(self, stream: int) -> None:
        self.http.send_headers(stream, ((":status", "200"), ("content-type", "text/plain")))
        self.http.send_data(stream, _PAGE)
        self.http.end(stream)
        self._flush()

    def _flush(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(self.http.out.take())


async def run(program: str) -> int:
    server = await asyncio.get_running_loop().create_server(Page, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    done = await asyncio.create_subprocess_exec(program, "-h", "127.0.0.1", "-p", str(port), "-o", "2")
    code = await done.wait()
    server.close()
    return code


def main() -> int:
    go = Path(os.environ.get("GOPATH", str(Path.home() / "go"))) / "bin" / "h2spec"
    program = os.environ.get("H2SPEC") or shutil.which("h2spec") or (str(go) if go.exists() else None)
    if program is None:
        print("h2spec is not installed: go install github.com/summerwind/h2spec/cmd/h2spec@latest")
        return 2
    return asyncio.run(run(program))


if __name__ == "__main__":
    sys.exit(main())
