"""What a picker answered to one request, read from its messages. Pure."""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

DESTINATION: Final = "x-gateway-destination-endpoint"
NAMESPACE: Final = "envoy.lb"
_Action = base_pb2.HeaderValueOption.HeaderAppendAction
_REPLACES: Final = (_Action.OVERWRITE_IF_EXISTS_OR_ADD, _Action.OVERWRITE_IF_EXISTS)


@dataclass(slots=True)
class Answer:
    """One exchange as the proxy saw it.

    Attributes:
        kinds: The replies' kinds in their order, such as `request_headers`.
        header: The last value that the destination header was set to; None where it never was.
        replaces: Whether it takes the place of a header of that name which the client sent.
        metadata: The destination in the dynamic metadata, None where there is none.
        immediate: Status of the immediate response, None without one.
        body: What is to be sent on as the request's body.
        chunks: Sizes of its pieces.
        ends: For each piece, whether it ends the request.
        problem: Why the exchange did not come to its end: a gRPC status, or that nothing came in time.
    """

    kinds: list[str] = field(default_factory=list)
    header: str | None = None
    replaces: bool = False
    metadata: str | None = None
    immediate: int | None = None
    immediate_headers: dict[str, str] = field(default_factory=dict)
    immediate_body: bytes = b""
    body: bytes = b""
    chunks: list[int] = field(default_factory=list)
    ends: list[bool] = field(default_factory=list)
    response_body: bytes = b""
    response_ends: list[bool] = field(default_factory=list)
    problem: str | None = None

    @property
    def endpoints(self) -> list[str]:
        """The endpoints that it names, the first to be tried first."""
        value = self.header if self.header is not None else self.metadata
        return [] if value is None else [part.strip() for part in value.split(",")]

    @property
    def words(self) -> str:
        """The answer in a few words, for a report."""
        if self.problem:
            return self.problem
        if self.immediate is not None:
            return f"an immediate response {self.immediate} {self.immediate_body[:120]!r}"
        if self.header is None and self.metadata is None:
            return f"no destination in {', '.join(self.kinds) or 'no reply at all'}"
        return f"the destination {self.header if self.header is not None else self.metadata!r}"


def read(replies: Iterable[pb.ProcessingResponse], sent: bytes = b"") -> Answer:
    """Read replies in their order.

    Args:
        replies: As they came.
        sent: The request's body: a reply that does not change it sends it on as it is.
    """
    answer = Answer()
    for reply in replies:
        kind = reply.WhichOneof("response") or "nothing"
        answer.kinds.append(kind)
        _metadata(answer, reply)
        match kind:
            case "immediate_response":
                _immediate(answer, reply.immediate_response)
            case "request_headers":
                _mutation(answer, reply.request_headers.response.header_mutation)
            case "request_body":
                _mutation(answer, reply.request_body.response.header_mutation)
                _request_body(answer, reply.request_body.response, sent)
            case "response_body":
                _response_body(answer, reply.response_body.response)
    return answer


def _metadata(answer: Answer, reply: pb.ProcessingResponse) -> None:
    if not reply.HasField("dynamic_metadata") or NAMESPACE not in reply.dynamic_metadata.fields:
        return
    inner = reply.dynamic_metadata.fields[NAMESPACE].struct_value.fields
    if DESTINATION in inner:
        value = inner[DESTINATION]
        kind = value.WhichOneof("kind")
        answer.metadata = value.string_value if kind == "string_value" else f"<{kind}>"


def _mutation(answer: Answer, mutation: Any) -> None:
    for option in mutation.set_headers:
        if option.header.key.lower() == DESTINATION:
            answer.header = header_text(option.header)
            # Old pickers say it by the deprecated `append`, whose absence means the action.
            given = option.HasField("append")
            answer.replaces = not option.append.value if given else option.append_action in _REPLACES


def _immediate(answer: Answer, immediate: pb.ImmediateResponse) -> None:
    answer.immediate = immediate.status.code
    answer.immediate_body = bytes(immediate.body)
    for option in immediate.headers.set_headers:
        answer.immediate_headers[option.header.key.lower()] = header_text(option.header)


def _request_body(answer: Answer, common: pb.CommonResponse, sent: bytes) -> None:
    mutation = common.body_mutation
    match mutation.WhichOneof("mutation"):
        case "streamed_response":
            piece, end = bytes(mutation.streamed_response.body), mutation.streamed_response.end_of_stream
        case "body":
            piece, end = bytes(mutation.body), True
        case "clear_body":
            piece, end = b"", True
        case _:
            piece, end = sent, True
    answer.body += piece
    answer.chunks.append(len(piece))
    answer.ends.append(end)


def _response_body(answer: Answer, common: pb.CommonResponse) -> None:
    mutation = common.body_mutation
    if mutation.WhichOneof("mutation") == "streamed_response":
        answer.response_body += mutation.streamed_response.body
        answer.response_ends.append(mutation.streamed_response.end_of_stream)


def header_text(header: base_pb2.HeaderValue) -> str:
    """A header's value, in whichever of the two fields it came."""
    return bytes(header.raw_value).decode("latin-1") if header.raw_value else str(header.value)


def bad_endpoint(text: str) -> str:
    """Why this is no `ip:port`, or ""."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdecimal() or not 1 <= int(port) <= 65535:
        return f"{text!r} does not end in a port"
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        version = ipaddress.ip_address(bare).version
    except ValueError:
        return f"{text!r} does not begin with an IP address"
    if (version == 6) != (bare != host):
        return f"{text!r}: an IPv6 address stands in brackets, and no other does"
    return ""
