"""Envoy's side of an ext_proc exchange, played by a test."""

from collections.abc import Iterable
from typing import Any

from envoy.service.ext_proc.v3 import external_processor_pb2 as pb


def headers(pairs: dict[str, str], *, end: bool = False) -> pb.HttpHeaders:
    message = pb.HttpHeaders(end_of_stream=end)
    for name, value in pairs.items():
        header = message.headers.headers.add()
        header.key, header.raw_value = name, value.encode()
    return message


def request_headers(
    path: str = "/v1/chat/completions", *, method: str = "POST", end: bool = False, **more: str
) -> pb.ProcessingRequest:
    extra = {name.replace("_", "-"): value for name, value in more.items()}
    return pb.ProcessingRequest(request_headers=headers({":method": method, ":path": path, **extra}, end=end))


def request_body(chunks: Iterable[bytes], *, trailers: bool = False) -> list[pb.ProcessingRequest]:
    """The chunks, the last of which ends the stream, or trailers that do."""
    parts = list(chunks) or [b""]
    last = len(parts) - 1
    result = [
        pb.ProcessingRequest(request_body=pb.HttpBody(body=part, end_of_stream=i == last and not trailers))
        for i, part in enumerate(parts)
    ]
    if trailers:
        result.append(pb.ProcessingRequest(request_trailers=pb.HttpTrailers()))
    return result


def response_headers(status: int = 200, *, end: bool = False) -> pb.ProcessingRequest:
    return pb.ProcessingRequest(response_headers=headers({":status": str(status)}, end=end))


def response_trailers() -> pb.ProcessingRequest:
    return pb.ProcessingRequest(response_trailers=pb.HttpTrailers())


def kinds(replies: Iterable[pb.ProcessingResponse]) -> list[str]:
    return [str(r.WhichOneof("response")) for r in replies]


def streamed(replies: Iterable[pb.ProcessingResponse]) -> list[Any]:
    """The body chunks among the replies."""
    return [
        r.request_body.response.body_mutation.streamed_response
        for r in replies
        if r.WhichOneof("response") == "request_body"
    ]


def set_headers(reply: pb.ProcessingResponse) -> dict[str, str]:
    mutation = reply.request_headers.response.header_mutation
    return {o.header.key: o.header.raw_value.decode() for o in mutation.set_headers}
