"""Header blocks: HPACK by the `hpack` package, and what RFC 9113 section 8 asks of a request.

Envoy's requests differ in nothing but what they carry, so their header blocks are the same few
bytes again and again. A block that left HPACK's table alone, and so means the same as long as
nothing else touches the table, is read once and remembered.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import hpack

from tidegate.http2.errors import ConnectionFaultError, ErrorCode

Headers = tuple[tuple[str, str], ...]

_MOST_REMEMBERED: Final = 64
_MOST_REMEMBERED_BYTES: Final = 1_024
_PSEUDO: Final = frozenset({":method", ":scheme", ":authority", ":path"})
_OF_CONNECTIONS: Final = frozenset(
    {"connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade"}
)
_NEW_SIZE_ZERO: Final = b"\x20"
"""HPACK's order to keep no table. Sent once, it makes every block of ours mean the same anywhere."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request's headers. `malformed` says why it is none, where it is none."""

    method: str
    path: str
    headers: Headers
    malformed: str = ""

    def get(self, name: str) -> str:
        """The first value of a header; empty where it is not there."""
        return next((value for key, value in self.headers if key == name), "")


class HeaderReader:
    """Reads the header blocks of one connection, in their order."""

    def __init__(self, max_bytes: int) -> None:
        self._decoder = hpack.Decoder(max_header_list_size=max_bytes)
        self._known: dict[bytes, Request] = {}

    def read(self, block: bytes) -> Request:
        """A block's request. Raises ConnectionFaultError where the table cannot be trusted any more."""
        known = self._known.get(block)
        if known is not None:
            return known
        try:
            raw = self._decoder.decode(block, raw=True)
        except hpack.OversizedHeaderListError as error:
            raise ConnectionFaultError(ErrorCode.ENHANCE_YOUR_CALM, f"headers too large: {error}") from error
        except (hpack.HPACKError, ValueError, IndexError) as error:
            raise ConnectionFaultError(ErrorCode.COMPRESSION_ERROR, f"HPACK: {error}") from error
        request = _request((_text(name), _text(value)) for name, value in raw)
        if not leaves_table_alone(block):
            self._known.clear()
        elif len(block) <= _MOST_REMEMBERED_BYTES:
            if len(self._known) >= _MOST_REMEMBERED:
                self._known.clear()
            self._known[block] = request
        return request


def leaves_table_alone(block: bytes) -> bool:
    """Whether a valid block neither adds to HPACK's table nor changes its size (RFC 7541, section 6)."""
    at = 0
    while at < len(block):
        first = block[at]
        if first & 0x80:  # indexed
            _, at = _integer(block, at, 7)
        elif first & 0x60:  # added to the table, or its size
            return False
        else:  # a literal that is not added: its name, when new, and its value
            index, at = _integer(block, at, 4)
            for _ in range(1 if index else 2):
                length, at = _integer(block, at, 7)
                at += length
    return True


def _integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    """HPACK's integer and where it ends (RFC 7541, section 5.1)."""
    most = (1 << bits) - 1
    value = block[at] & most
    at += 1
    if value < most:
        return value, at
    shift = 0
    while True:
        byte = block[at]
        value += (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")


def _request(pairs: Iterable[tuple[str, str]]) -> Request:
    headers = tuple(pairs)
    pseudo = {name: value for name, value in headers if name[:1] == ":"}
    method, path = pseudo.get(":method", ""), pseudo.get(":path", "")
    return Request(method, path, headers, _malformed(headers) or _incomplete(headers, pseudo))


def _malformed(headers: Headers) -> str:
    """Why these cannot be headers of any request (RFC 9113, 8.2); empty where they can."""
    regular = False
    for name, value in headers:
        if name.startswith(":"):
            if regular:
                return f"{name} comes after other headers"
        else:
            regular = True
            if not name or name != name.lower() or any(not "!" <= c <= "~" for c in name) or ":" in name:
                return f"{name!r} is no header name"
            if name in _OF_CONNECTIONS:
                return f"{name} belongs to HTTP/1"
            if name == "te" and value != "trailers":
                return "te is not trailers"
        if value != value.strip(" \t") or any(c in value for c in "\0\r\n"):
            return f"the value of {name} is not allowed"
    return ""


def _incomplete(headers: Headers, pseudo: dict[str, str]) -> str:
    """Why no request can be made of them (RFC 9113, 8.3.1); empty where one can."""
    if len(pseudo) != sum(name[:1] == ":" for name, _ in headers):
        return "a pseudo-header came twice"
    if unknown := pseudo.keys() - _PSEUDO:
        return f"{min(unknown)} is no pseudo-header of a request"
    if not pseudo.get(":method"):
        return ":method is missing"
    if pseudo[":method"] != "CONNECT" and not (pseudo.get(":scheme") and pseudo.get(":path")):
        return ":scheme or :path is missing"
    return ""


def bad_trailers(request: Request) -> str:
    """Why these cannot be trailers; empty where they can."""
    if any(name[:1] == ":" for name, _ in request.headers):
        return "a pseudo-header in trailers"
    return _malformed(request.headers)


class HeaderWriter:
    """Writes the header blocks of one connection. It uses no table, so blocks may go in any order."""

    def __init__(self) -> None:
        self._prefix = _NEW_SIZE_ZERO

    def write(self, headers: Headers) -> bytes:
        """The block; to be sent before any that is written later."""
        prefix, self._prefix = self._prefix, b""
        return prefix + _encoded(headers)


@lru_cache(maxsize=256)
def _encoded(headers: Headers) -> bytes:
    """A block of literals that no table keeps: so it is the same for every connection."""
    encoder = hpack.Encoder()
    block: bytes = encoder.encode([hpack.NeverIndexedHeaderTuple(*pair) for pair in headers], huffman=False)
    return block
