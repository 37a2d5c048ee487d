"""gRPC over HTTP/2: what a call is, and how it ends."""

import pytest

from support.http2 import CALL
from tidegate.http2.grpc import CallError, Status, Unpacker, error_headers, pack, read_call, trailers
from tidegate.http2.headers import Request


def request(*, method: str = "POST", kind: str = "application/grpc", **more: str) -> Request:
    rest = [(name, value) for name, value in CALL if name != "content-type"]
    extra = [(name.replace("_", "-"), value) for name, value in more.items()]
    return Request(method, "/x/Echo", (*rest, ("content-type", kind), *extra))


@pytest.mark.parametrize("kind", ["application/grpc", "application/grpc+proto", "application/grpc;a=b"])
def test_a_call(kind: str) -> None:
    call = read_call(request(kind=kind))
    assert (call.method, call.timeout_s, call.refusal) == ("/x/Echo", None, ())


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1H", 3600.0), ("2M", 120.0), ("3S", 3.0), ("250m", 0.25), ("5u", 5e-6), ("99999999n", 0.099999999)],
)
def test_time_limits(text: str, seconds: float) -> None:
    assert read_call(request(grpc_timeout=text)).timeout_s == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("asked", "status", "grpc_status"),
    [
        (request(method="GET"), "405", None),
        (request(kind="application/json"), "415", None),
        (request(kind="application/grpc-web"), "415", None),
        (request(grpc_encoding="gzip"), "200", "12"),
        (request(grpc_timeout="123456789S"), "200", "13"),
        (request(grpc_timeout="1x"), "200", "13"),
        (request(grpc_timeout="S"), "200", "13"),
        (request(grpc_timeout="-1S"), "200", "13"),
    ],
)
def test_what_is_no_call_that_is_taken(asked: Request, status: str, grpc_status: str | None) -> None:
    refusal = dict(read_call(asked).refusal)
    assert (refusal[":status"], refusal.get("grpc-status")) == (status, grpc_status)


def test_an_encoding_that_is_refused_says_which_is_not() -> None:
    assert dict(read_call(request(grpc_encoding="gzip")).refusal)["grpc-accept-encoding"] == "identity"


def test_messages_that_are_not_taken() -> None:
    for raw, status in (
        (b"\x01\x00\x00\x00\x01x", Status.UNIMPLEMENTED),
        (b"\x02\x00\x00\x00\x01x", Status.INTERNAL),
        (b"\x00\x00\x00\x00\x65", Status.RESOURCE_EXHAUSTED),  # said before any of it comes
    ):
        with pytest.raises(CallError) as caught:
            Unpacker(100).feed(raw)
        assert caught.value.status == status
    assert Unpacker(100).feed(pack(bytes(100))) == [bytes(100)]


def test_a_status_message_is_printable_whatever_it_says() -> None:
    assert trailers(Status.OK) == (("grpc-status", "0"),)
    assert dict(error_headers(Status.NOT_FOUND, "100% ä\n"))["grpc-message"] == "100%25 %C3%A4%0A"
    assert len(dict(trailers(Status.INTERNAL, "\n" * 100_000))["grpc-message"]) <= 6_144
