"""What clients are told when something is wrong: codes, and their shape in each protocol.

The same code is in OpenAI's `error.code` and, in every protocol, in the header `x-tidegate-code`:
KServe's errors are a text and nothing else, and gRPC has only its status.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import orjson

from tidegate.core.flowtypes import Reason, Refused
from tidegate.http2.grpc import Status

OPENAI: Final = "OpenAI"
KSERVE: Final = "KServeV2"

CODE_HEADER: Final = "x-tidegate-code"
RETRY_HEADER: Final = "retry-after"
PUSHBACK_HEADER: Final = "grpc-retry-pushback-ms"
"""How gRPC says Retry-After: clients with a retry policy wait for it."""


_MESSAGE: Final = 1000
"""Characters of a message at most: what a client sent may stand in it, and over gRPC it is a header."""


class Code(StrEnum):
    """What a program can tell errors apart by. Those of the queue are `core.flowtypes.Reason`."""

    INVALID_JSON = "invalid_json"
    INVALID_BODY = "invalid_body"
    MODEL_REQUIRED = "model_required"
    PROTOCOL_MISMATCH = "protocol_mismatch"
    AMBIGUOUS_CREDENTIALS = "ambiguous_credentials"
    INVALID_TOKEN = "invalid_token"  # noqa: S105 -- a word
    CLASS_NOT_ALLOWED = "class_not_allowed"
    MODEL_NOT_FOUND = "model_not_found"
    UNKNOWN_URL = "unknown_url"
    BODY_TOO_LARGE = "body_too_large"
    COMPRESSED = "compressed"
    STARTING = "starting"
    MEMORY_FULL = "memory_full"
    TOO_MANY_UNKNOWN = "too_many_unknown"
    IDENTITY_UNKNOWN = "identity_unknown"
    NOT_READY = "not_ready"


def http_status(status: int) -> int:
    """The HTTP status that an engine's gRPC status counts as: over gRPC it is 200 whatever came of it."""
    known: dict[int, int] = {Status.OK: 200, Status.UNAVAILABLE: 503}
    return known.get(status, 400)


@dataclass(frozen=True, slots=True)
class Kind:
    """How a code is said: HTTP status, gRPC status, and OpenAI's `type`."""

    http: int
    grpc: int
    type: str


_BAD: Final = Kind(400, Status.INVALID_ARGUMENT, "invalid_request_error")
_BUSY: Final = Kind(429, Status.RESOURCE_EXHAUSTED, "rate_limit_error")
_AWAY: Final = Kind(503, Status.UNAVAILABLE, "server_error")

CATALOGUE: Final[dict[str, Kind]] = {
    Code.INVALID_JSON: _BAD,
    Code.INVALID_BODY: _BAD,
    Code.MODEL_REQUIRED: _BAD,
    Code.PROTOCOL_MISMATCH: _BAD,
    Code.AMBIGUOUS_CREDENTIALS: _BAD,
    Code.INVALID_TOKEN: Kind(401, Status.UNAUTHENTICATED, "authentication_error"),
    Code.CLASS_NOT_ALLOWED: Kind(403, Status.PERMISSION_DENIED, "permission_error"),
    Code.MODEL_NOT_FOUND: Kind(404, Status.NOT_FOUND, "invalid_request_error"),
    Code.UNKNOWN_URL: Kind(404, Status.UNIMPLEMENTED, "invalid_request_error"),
    Code.BODY_TOO_LARGE: Kind(413, Status.RESOURCE_EXHAUSTED, "invalid_request_error"),
    Code.COMPRESSED: Kind(415, Status.UNIMPLEMENTED, "invalid_request_error"),
    Code.STARTING: _AWAY,
    Code.MEMORY_FULL: _AWAY,
    Code.TOO_MANY_UNKNOWN: _BUSY,
    Code.IDENTITY_UNKNOWN: _AWAY,
    Code.NOT_READY: _AWAY,
    Reason.QUEUE_FULL: _BUSY,
    Reason.MEMORY_FULL: _BUSY,
    Reason.WAITED_TOO_LONG: _BUSY,
    Reason.NO_ENDPOINT: _AWAY,
}
"""Every code that the picker answers with."""


class RefusedError(Exception):
    """Ends a request with an error answer. `param` is the field of the body that is wrong, if one is."""

    def __init__(
        self, code: Code | Reason, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message if len(message) <= _MESSAGE else f"{message[:_MESSAGE]}…"
        self.code, self.param, self.retry_after_s = code, param, retry_after_s

    @classmethod
    def of(cls, refused: Refused) -> "RefusedError":
        """The queue's refusal."""
        return cls(refused.reason, refused.message, retry_after_s=refused.retry_after_s)

    @property
    def kind(self) -> Kind:
        """How it is said."""
        return CATALOGUE[self.code]

    def headers(self, *, grpc: bool) -> dict[str, str]:
        """Headers that go with it; over gRPC they are its trailers."""
        found = {CODE_HEADER: str(self.code)}
        if self.retry_after_s is not None:
            found[RETRY_HEADER] = str(self.retry_after_s)
            if grpc:
                found[PUSHBACK_HEADER] = str(self.retry_after_s * 1000)
        if self.code is Code.INVALID_TOKEN:
            found["www-authenticate"] = "Bearer"
        return found

    def body(self, protocol: str) -> bytes:
        """The error in the protocol's shape."""
        if protocol == KSERVE:
            return orjson.dumps({"error": self.message})
        error = {"message": self.message, "type": self.kind.type, "param": self.param, "code": str(self.code)}
        return orjson.dumps({"error": error})
