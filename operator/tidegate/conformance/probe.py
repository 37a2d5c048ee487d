"""What the checks are given: the picker, and requests that it should be able to serve."""

import contextlib
import ipaddress
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import grpc

from tidegate.conformance.answer import Answer, bad_endpoint
from tidegate.conformance.rules import BrokenError, NotRunError
from tidegate.conformance.wire import SUBSET_KEY, SUBSET_NAMESPACE, BodyMode, Picker, Request

NOWHERE: Final = ("192.0.2.1:1", "[2001:db8::1]:1")
"""Addresses for documentation (RFC 5737 and 3849): no endpoint of any pool."""

_LOOKED_AT: Final = 8


@dataclass(frozen=True, slots=True)
class Target:
    """Which picker is asked, and with what.

    Attributes:
        model: Name of a model that it serves.
        path: Path of an inference request.
        headers: Sent with each request, such as a token.
        body: The request's JSON in place of the suite's own; its `model` stays as given.
        endpoints: What may be chosen, `ip:port`; empty where nobody says.
        mode: How bodies are sent.
        timeout_s: For each exchange.
        parallel: Streams at once.
        overload: Requests to hold open at once until one is refused; 0: not tried.
    """

    model: str
    path: str = "/v1/chat/completions"
    headers: Sequence[tuple[str, str]] = ()
    body: Mapping[str, Any] | None = None
    endpoints: Sequence[str] = ()
    mode: BodyMode = BodyMode.FULL_DUPLEX
    timeout_s: float = 10.0
    parallel: int = 32
    overload: int = 0


@dataclass(slots=True)
class Probe:
    """One run against one picker. `health` is the channel for health checks, None where there is none."""

    picker: Picker
    target: Target
    health: grpc.aio.Channel | None = None
    _known: list[str] = field(default_factory=list)

    def body(self, text: str = "Which endpoint is it?") -> bytes:
        """A request's body; `text` makes it another one."""
        if self.target.body is not None:
            return json.dumps({**self.target.body, "user": text}).encode()
        message = {"role": "user", "content": text}
        fields: dict[str, Any] = {"model": self.target.model, "max_tokens": 1}
        if self.target.path.endswith("/completions") and "chat" not in self.target.path:
            fields["prompt"] = text
        elif self.target.path.endswith(("/embeddings", "/responses")):
            fields["input"] = text
        else:
            fields["messages"] = [message]
        return json.dumps(fields).encode()

    def request(self, body: Sequence[bytes] | None = None, **more: Any) -> Request:
        """An inference request in one piece, or in these."""
        pieces = [self.body()] if body is None else body
        length = ("content-length", str(sum(map(len, pieces))))
        return Request([*self.head("POST"), length], pieces, **more)

    def head(self, method: str, path: str | None = None) -> list[tuple[str, str]]:
        """Headers as Envoy orders them."""
        return [
            (":method", method),
            (":path", path or self.target.path),
            (":scheme", "http"),
            (":authority", "conformance.example"),
            ("content-type", "application/json"),
            *((name.lower(), value) for name, value in self.target.headers),
        ]

    def hinted(self, hint: Any, **more: Any) -> Request:
        """A request whose subset hint is this value."""
        return self.request(metadata={SUBSET_NAMESPACE: {SUBSET_KEY: hint}}, **more)

    async def ask(self, request: Request) -> Answer:
        """Put one request on a stream of its own."""
        return await self.picker.ask(request)

    async def chosen(self, request: Request, what: str = "a request") -> Answer:
        """Put one request that must be given an endpoint. Raises BrokenError."""
        answer = await self.ask(request)
        if answer.problem or answer.immediate is not None or not answer.endpoints:
            raise BrokenError(f"{what} got {answer.words}, and no endpoint")
        return answer

    async def refused(self, request: Request, status: int, what: str) -> Answer:
        """Put one request that must get an immediate response with this status. Raises BrokenError."""
        answer = await self.ask(request)
        if answer.problem or answer.immediate != status:
            raise BrokenError(f"{what} got {answer.words}, not an immediate response {status}")
        return answer

    async def known(self) -> list[str]:
        """Endpoints that can be chosen: as given, else those that some requests at once were sent to.

        Raises:
            NotRunError: None is known, because the picker names none.
        """
        if self.target.endpoints:
            return list(self.target.endpoints)
        if not self._known:
            async with contextlib.AsyncExitStack() as stack:
                for _ in range(_LOOKED_AT):  # held open, so that who looks at the load takes others, too
                    stream = await stack.enter_async_context(self.picker.stream())
                    found = (await stream.ask(self.request())).endpoints
                    self._known += [e for e in found if not bad_endpoint(e) and e not in self._known]
        if not self._known:
            raise NotRunError("the picker names no endpoint, and no --endpoint is given")
        return list(self._known)


def same_place(one: str, other: str) -> bool:
    """Whether two `ip:port` are the same, however they are written."""
    return _place(one) == _place(other)


def _place(text: str) -> tuple[str, str]:
    host, _, port = text.rpartition(":")
    bare = host.strip("[]")
    try:
        return str(ipaddress.ip_address(bare)), port
    except ValueError:
        return bare, port
