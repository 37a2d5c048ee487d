"""Streams: many at once, given up at any point, headers in any order."""

import asyncio

import grpc

from tidegate.conformance.probe import Probe
from tidegate.conformance.rules import BrokenError, Level, rule
from tidegate.conformance.wire import Request, Stream, request_messages, response_headers, split


@rule("stream.parallel", Level.MUST)
async def parallel(probe: Probe) -> None:
    """Many streams at once: each gets an endpoint, and its own body back."""
    bodies = [probe.body(f"number {n} " * (n % 7 + 1)) for n in range(probe.target.parallel)]
    answers = await asyncio.gather(*(probe.ask(probe.request(split(b, 25))) for b in bodies))
    lost = [a for a in answers if a.problem or a.immediate is not None]
    if lost:
        raise BrokenError(f"{len(lost)} of {len(answers)} streams at once got no endpoint: {lost[0].words}")
    for body, answer in zip(bodies, answers, strict=True):
        if answer.body != body and answer.body in bodies:
            raise BrokenError("the body of another stream is sent on")


@rule("stream.aborted", Level.MUST, "ext_proc")
async def aborted(probe: Probe) -> None:
    """A stream that is given up, at whatever point, harms no other."""
    for _ in range(8):
        for cut in range(4):
            async with probe.picker.stream() as stream:
                await _begin(probe, stream, cut)
    for _ in range(4):
        await probe.chosen(probe.request(), "a request after 32 aborted streams")


async def _begin(probe: Probe, stream: Stream, cut: int) -> None:
    messages = list(request_messages(probe.request(split(probe.body(), 20))))
    try:
        if cut == 3:
            await stream.ask(probe.request())
            await stream.send([response_headers(200)])
        else:
            await stream.send(messages[: (0, 1, 3)[cut]])
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        return  # it was ended from the other side


@rule("stream.headers", Level.MUST, "ext_proc")
async def headers(probe: Probe) -> None:
    """The order of headers is of no account, nor their number."""
    plain = probe.request()
    more = [(f"x-conformance-{n}", "v" * 50) for n in range(60)]
    shuffles = {"in reverse": [*reversed(plain.headers)], "with sixty more before": [*more, *plain.headers]}
    for how, pairs in shuffles.items():
        await probe.chosen(Request(pairs, plain.body), f"headers {how}")


@rule("stream.values", Level.SHOULD, "ext_proc")
async def values(probe: Probe) -> None:
    """Header values are read from `value` as from `raw_value`: Envoy can be set to send either."""
    await probe.chosen(probe.request(in_value=True), "headers in `value`")


@rule("stream.repeated", Level.MUST, "ext_proc")
async def repeated(probe: Probe) -> None:
    """A header that comes twice does not break the stream."""
    plain = probe.request()
    twice = [*plain.headers, ("x-twice", "one"), ("x-twice", "two"), ("accept", "*/*"), ("accept", "a/b")]
    await probe.chosen(Request(twice, plain.body), "a header that comes twice")


@rule("stream.closes", Level.SHOULD, "ext_proc")
async def closes(probe: Probe) -> None:
    """A stream that the proxy ends after the response's headers is ended with the status OK."""
    async with probe.picker.stream() as stream:
        answer = await stream.ask(probe.request())
        if answer.problem:
            raise BrokenError(answer.problem)
        answer = await stream.response([response_headers(200, end=True)], 1)
        problem = answer.problem or await stream.finish()
        if problem:
            raise BrokenError(problem)
