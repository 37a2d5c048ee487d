"""gRPC over HTTP/2 without I/O: messages in their frames, statuses, time limits, what a call is.

Follows grpc/doc/PROTOCOL-HTTP2.md. Nothing is compressed, and nothing compressed is taken.
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from struct import Struct
from typing import Final

from tidegate.http2.headers import Headers, Request

MAX_MESSAGE: Final = 16 << 20
_PREFIX: Final = Struct(">BI")
_MOST_TEXT: Final = 2_048
_UNITS: Final = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


class Status(IntEnum):
    """Status codes of gRPC."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class CallError(Exception):
    """Ends a call with a status that is not OK."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


OK_HEADERS: Final[Headers] = ((":status", "200"), ("content-type", "application/grpc"))


def pack(message: bytes) -> bytes:
    """A message with its prefix."""
    return _PREFIX.pack(0, len(message)) + message


class Unpacker:
    """Cuts the data of one call, however it was chunked, into messages."""

    def __init__(self, most: int = MAX_MESSAGE) -> None:
        self._most = most
        self._parts: list[bytes] = []
        self._size, self._need = 0, _PREFIX.size

    @property
    def held(self) -> int:
        """Bytes of a message that is not complete."""
        return self._size

    def clear(self) -> None:
        """Forget what is not complete."""
        self._parts, self._size = [], 0

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are complete now. Raises CallError."""
        if self._parts:
            self._parts.append(data)
            self._size += len(data)
            if self._size < self._need:
                return []
            data = b"".join(self._parts)
            self._parts, self._size = [], 0
        elif (
            data[:1] == b"\0"
            and len(data) == _PREFIX.size + int.from_bytes(data[1:5], "big")
            and len(data) <= _PREFIX.size + self._most
        ):
            return [data[_PREFIX.size :]]  # one message, as nearly always
        messages, at, end = [], 0, len(data)
        self._need = _PREFIX.size
        while end - at >= _PREFIX.size:
            compressed, length = _PREFIX.unpack_from(data, at)
            if compressed:
                raise CallError(
                    Status.UNIMPLEMENTED if compressed == 1 else Status.INTERNAL,
                    "compressed messages are not taken: send grpc-encoding identity",
                )
            if length > self._most:
                raise CallError(
                    Status.RESOURCE_EXHAUSTED, f"a message of {length} bytes; {self._most} are taken"
                )
            stop = at + _PREFIX.size + length
            if stop > end:
                self._need = _PREFIX.size + length
                break
            messages.append(data[at + _PREFIX.size : stop])
            at = stop
        if at < end:
            self._parts, self._size = [data[at:]], end - at
        return messages


@dataclass(frozen=True, slots=True)
class Call:
    """What a request asks for. `refusal` is the whole answer where it is no call of gRPC."""

    method: str
    timeout_s: float | None = None
    refusal: Headers = ()


@lru_cache(maxsize=256)
def read_call(request: Request) -> Call:
    """Read a request's headers."""
    if request.method != "POST":
        return Call("", refusal=((":status", "405"), ("allow", "POST")))
    kind = request.get("content-type").partition(";")[0].strip()
    if kind != "application/grpc" and not kind.startswith("application/grpc+"):
        return Call("", refusal=((":status", "415"), ("content-type", "text/plain")))
    encoding = request.get("grpc-encoding")
    if encoding not in ("", "identity"):
        message = f"messages in {encoding} are not taken: send grpc-encoding identity"
        refusal = (*error_headers(Status.UNIMPLEMENTED, message), ("grpc-accept-encoding", "identity"))
        return Call(request.path, refusal=refusal)
    limit = request.get("grpc-timeout")
    timeout_s = _seconds(limit) if limit else None
    if limit and timeout_s is None:
        message = f"grpc-timeout {limit[:32]!r} is not up to eight digits and one of HMSmun"
        return Call(request.path, refusal=error_headers(Status.INTERNAL, message))
    return Call(request.path, timeout_s)


def _seconds(text: str) -> float | None:
    digits, unit = text[:-1], text[-1]
    if unit not in _UNITS or not digits.isascii() or not digits.isdecimal() or len(digits) > 8:
        return None
    return int(digits) * _UNITS[unit]


def trailers(status: Status, message: str = "") -> Headers:
    """What ends a call."""
    if not message:
        return (("grpc-status", str(int(status))),)
    return (("grpc-status", str(int(status))), ("grpc-message", _percent(message)))


def error_headers(status: Status, message: str) -> Headers:
    """An answer that is nothing but a status."""
    return (*OK_HEADERS, *trailers(status, message))


def _percent(message: str) -> str:
    """Printable ASCII as it is, everything else and the sign itself as %XX of its UTF-8."""
    data = message.encode(errors="replace")[:_MOST_TEXT]
    return "".join(chr(b) if 0x20 <= b <= 0x7E and b != 0x25 else f"%{b:02X}" for b in data)
