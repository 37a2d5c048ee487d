"""Bodies: they pass the picker whole, whatever pieces they come in."""

import json
from typing import Final

from tidegate.conformance.answer import Answer
from tidegate.conformance.probe import Probe
from tidegate.conformance.rules import BrokenError, Level, NotRunError, rule
from tidegate.conformance.wire import BodyMode, Request, interleaved, split

LARGEST_CHUNK: Final = 64 << 10
"""Envoy ends the stream at a piece of this size."""
_ANSWERED: Final = range(200, 600)
_ORDER: Final = {"request_headers": 0, "request_body": 1, "request_trailers": 2}


def _whole(answer: Answer, sent: bytes, how: str) -> None:
    """The body is sent on as it came, or as JSON that still has every field."""
    if answer.body == sent:
        return
    try:
        before, after = json.loads(sent), json.loads(answer.body)
        kept = isinstance(after, dict) and before.keys() <= after.keys()
    except ValueError:
        kept = False
    if not kept:
        raise BrokenError(f"{how}: {len(sent)} bytes were sent, {len(answer.body)} others are sent on")


def _ends_once(answer: Answer, how: str, *, trailers: bool = False) -> None:
    wanted = [False] * len(answer.ends)
    if wanted and not trailers:
        wanted[-1] = True
    if answer.ends != wanted:
        raise BrokenError(f"{how}: end_of_stream of the pieces sent on is {answer.ends}")


@rule("body.whole", Level.MUST)
async def whole(probe: Probe) -> None:
    """The body is sent on whole: as it came, or rewritten with every field."""
    sent = probe.body("whole, ünd with more than ASCII ✓")
    answer = await probe.chosen(probe.request([sent]))
    _whole(answer, sent, "one piece")
    _ends_once(answer, "one piece")


@rule("body.pieces", Level.MUST)
async def pieces(probe: Probe) -> None:
    """It makes no difference in which pieces a body comes, empty ones too."""
    sent = probe.body("in pieces " * 20)
    cuts = {
        "single bytes": split(sent, 1),
        "seven bytes each": split(sent, 7),
        "empty pieces between": interleaved(split(sent, 50)),
        "an empty piece first": [b"", sent],
        "an empty piece that ends it": [sent, b""],
    }
    for how, cut in cuts.items():
        answer = await probe.chosen(probe.request(cut), f"a body in {how}")
        _whole(answer, sent, how)
        _ends_once(answer, how)


@rule("body.large", Level.MUST, "ext_proc")
async def large(probe: Probe) -> None:
    """A body of 200 kB is sent on whole, in pieces below 64 KiB: at that size Envoy ends the stream."""
    sent = probe.body("word " * 40_000)
    answer = await probe.chosen(probe.request(split(sent, 16 << 10)), "a body of 200 kB")
    _whole(answer, sent, "200 kB")
    if probe.target.mode is BodyMode.FULL_DUPLEX and max(answer.chunks) >= LARGEST_CHUNK:
        raise BrokenError(f"a piece of {max(answer.chunks)} bytes")


@rule("body.order", Level.MUST, "ext_proc")
async def order(probe: Probe) -> None:
    """The reply to the headers comes before the body's, and the trailers' last."""
    answer = await probe.chosen(probe.request(split(probe.body(), 30), trailers=True), "with trailers")
    ranks = [_ORDER.get(kind, 9) for kind in answer.kinds]
    if ranks != sorted(ranks) or ranks.count(0) != 1 or ranks.count(2) != 1 or 9 in ranks:
        raise BrokenError(f"the replies came as {', '.join(answer.kinds)}")


@rule("body.trailers", Level.MUST, "ext_proc")
async def trailers(probe: Probe) -> None:
    """With trailers the body is sent on whole, and they end the request, not a piece of the body."""
    sent = probe.body()
    answer = await probe.chosen(probe.request(split(sent, 40), trailers=True), "a request with trailers")
    _whole(answer, sent, "with trailers")
    if probe.target.mode is BodyMode.FULL_DUPLEX:
        _ends_once(answer, "with trailers", trailers=True)


@rule("body.empty", Level.MUST)
async def empty(probe: Probe) -> None:
    """A request with an empty body is answered: an endpoint, or an error."""
    for how, cut in {"one empty piece": [b""], "two empty pieces": [b"", b""]}.items():
        _answered(await probe.ask(probe.request(cut)), how)


@rule("body.none", Level.MUST)
async def none(probe: Probe) -> None:
    """A GET, which ends with its headers, is answered, and no body is sent on."""
    for path in ("/v1/models", probe.target.path):
        async with probe.picker.stream() as stream:
            answer = await stream.ask(Request(probe.head("GET", path)))
            _answered(answer, f"GET {path}")
            kinds = answer.kinds + ([] if answer.immediate else await stream.more())
        if len(kinds) > 1:
            raise BrokenError(f"GET {path}: the replies are {', '.join(kinds)}")


@rule("body.garbage", Level.MUST)
async def garbage(probe: Probe) -> None:
    """A body that is no JSON is answered; the stream does not break."""
    for sent in (b"\x00\xff\xfe", b"{", b"[]", b'{"model": 7}', b"{" * 5000):
        _answered(await probe.ask(probe.request([sent])), f"the body {sent[:20]!r}")


@rule("body.binary", Level.SHOULD)
async def binary(probe: Probe) -> None:
    """Bytes that are no text pass as they are, where they are sent on."""
    sent = bytes(range(256)) * 64
    answer = await probe.ask(probe.request(split(sent, 1000)))
    _answered(answer, "binary bytes")
    if answer.immediate is not None:
        raise NotRunError(f"it was answered by {answer.words}")
    if answer.body != sent:
        raise BrokenError(f"{len(sent)} bytes came, {len(answer.body)} others are sent on")


def _answered(answer: Answer, how: str) -> None:
    if answer.problem:
        raise BrokenError(f"{how}: {answer.problem}")
    if answer.immediate is not None and answer.immediate not in _ANSWERED:
        raise BrokenError(f"{how}: an immediate response with the status {answer.immediate}")
    if answer.immediate is None and not answer.endpoints:
        raise BrokenError(f"{how}: neither an endpoint nor an immediate response")
