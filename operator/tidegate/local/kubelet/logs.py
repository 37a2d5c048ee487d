"""Logs of containers: lines with a time, bounded in size, read back for `kubectl logs`.

A line of a file is `2026-11-22T19:52:45.123456Z F text`; `P` instead of `F` marks a piece of a
line that was too long. A full file becomes `<n>.log.old`, so at most two are kept for a run.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Self

from tidegate.local.kubelet.clock import Clock, parse, rfc3339_micro

MAX_BYTES: Final = 4 * 1024 * 1024
MAX_LINE: Final = 16 * 1024
"""Longer lines are cut into pieces, as container runtimes do."""
_FOLLOW_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class LogOptions:
    """The query of `GET /containerLogs`; None means no limit."""

    tail_lines: int | None = None
    since_s: float | None = None
    limit_bytes: int | None = None
    timestamps: bool = False
    follow: bool = False


def log_path(state_dir: Path, uid: str, container: str, run: int) -> Path:
    """File of one run of a container."""
    return state_dir / "pods" / uid / container / f"{run}.log"


class LogWriter:
    """Reads a pipe to its end and writes what came into a bounded file."""

    def __init__(self, path: Path, clock: Clock, *, max_bytes: int = MAX_BYTES) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._clock, self._max_bytes = path, clock, max_bytes
        self._file: BinaryIO = path.open("ab", buffering=0)
        self._size = self._file.tell()
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take in output; whole lines are written at once, the rest when it is complete."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        stamp = rfc3339_micro(self._clock.now()).encode()
        out: list[bytes] = []
        for line in lines:
            out += _pieces(stamp, line)
        while len(self._rest) > MAX_LINE:
            out.append(stamp + b" P " + self._rest[:MAX_LINE] + b"\n")
            self._rest = self._rest[MAX_LINE:]
        self._write(b"".join(out))

    def close(self) -> None:
        """Write an unfinished line and close the file."""
        if self._rest:
            self._write(rfc3339_micro(self._clock.now()).encode() + b" P " + self._rest + b"\n")
        self._rest = b""
        self._file.close()

    def _write(self, data: bytes) -> None:
        if not data:
            return
        if self._size and self._size + len(data) > self._max_bytes:
            self._file.close()
            self._path.replace(self._path.with_suffix(".log.old"))
            self._file = self._path.open("ab", buffering=0)
            self._size = 0
        self._file.write(data)
        self._size += len(data)


async def pump(fd: int, writer: LogWriter) -> None:
    """Copy a pipe into a log until every writer of it is gone; closes both."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def readable() -> None:
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            writer.feed(data)
        elif not ended.done():
            ended.set_result(None)

    os.set_blocking(fd, False)
    loop.add_reader(fd, readable)
    try:
        await ended
    finally:
        loop.remove_reader(fd)
        os.close(fd)
        writer.close()


def _pieces(stamp: bytes, line: bytes) -> Iterator[bytes]:
    for start in range(0, len(line) - MAX_LINE, MAX_LINE):
        yield stamp + b" P " + line[start : start + MAX_LINE] + b"\n"
    yield stamp + b" F " + line[(max(len(line) - 1, 0) // MAX_LINE) * MAX_LINE :] + b"\n"


def render(lines: list[bytes], options: LogOptions) -> bytes:
    """What `kubectl logs` shows of stored lines."""
    if options.since_s is not None:
        since = options.since_s
        lines = [line for line in lines if parse(line.split(b" ", 1)[0].decode()) >= since]
    if options.tail_lines is not None:
        lines = lines[-options.tail_lines :] if options.tail_lines else []
    shown = b"".join(_shown(line, options.timestamps) for line in lines)
    return shown if options.limit_bytes is None else shown[: options.limit_bytes]


def _shown(line: bytes, timestamps: bool) -> bytes:
    stamp, flag, text = line.split(b" ", 2)
    return (stamp + b" " if timestamps else b"") + text + (b"\n" if flag == b"F" else b"")


async def read(path: Path, options: LogOptions, alive: Callable[[], bool]) -> AsyncIterator[bytes]:
    """Yield a log, and with `follow` what is added to it until `alive()` says no.

    Raises FileNotFoundError when there is no such log.
    """
    with _Follower(path) as reader:
        sent = render(reader.more(), options)
        yield sent
        left = None if options.limit_bytes is None else options.limit_bytes - len(sent)
        plain = LogOptions(timestamps=options.timestamps)
        while options.follow and (left is None or left > 0):
            live = alive()
            chunk = render(reader.more(), plain)[:left]
            if chunk:
                yield chunk
                left = None if left is None else left - len(chunk)
            elif not live:
                return
            else:
                await asyncio.sleep(_FOLLOW_S)


class _Follower:
    """Reads whole lines as they are added, across a change of files; begins with the old file."""

    def __init__(self, path: Path) -> None:
        old = path.with_suffix(".log.old")
        self._path, self._rest = path, b""
        self._file: BinaryIO = (old if old.exists() else path).open("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def more(self) -> list[bytes]:
        """Return the whole lines added since the last call."""
        lines = self._read()
        while self._moved():
            lines += self._read()  # what was written between the last read and the change
            self._file.close()
            self._file = self._path.open("rb")
            lines += self._read()
        return lines

    def _read(self) -> list[bytes]:
        whole, newline, self._rest = (self._rest + self._file.read()).rpartition(b"\n")
        return _lines(whole + newline)

    def _moved(self) -> bool:
        try:
            return os.fstat(self._file.fileno()).st_ino != self._path.stat().st_ino
        except FileNotFoundError:
            return False


def _lines(data: bytes) -> list[bytes]:
    return data.split(b"\n")[:-1] if data else []
