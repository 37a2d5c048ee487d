"""The response's side, and which endpoint gave it."""

from tidegate.conformance.answer import Answer
from tidegate.conformance.probe import NOWHERE, Probe
from tidegate.conformance.rules import BrokenError, Level, rule
from tidegate.conformance.wire import Stream, response_body, response_headers, response_trailers, split


@rule("response.headers", Level.MUST, "ext_proc")
async def headers(probe: Probe) -> None:
    """The response's headers are answered, so that the response goes on."""
    for status in (200, 400, 503):
        await _respond(probe, status)


@rule("response.body", Level.MUST)
async def body(probe: Probe) -> None:
    """A streamed response body comes back whole and in order, as it is made, and ends once."""
    sent = [f"data: {n}\n\n".encode() for n in range(20)] + [b"x" * 100_000, b"data: [DONE]\n\n", b""]
    async with probe.picker.stream() as stream:
        await _ask(probe, stream)
        answer = await stream.response([response_headers(200), *response_body(sent)])
        _kind(answer, "response_headers")
        if answer.response_body != b"".join(sent):
            raise BrokenError(f"{len(b''.join(sent))} bytes came, {len(answer.response_body)} are sent on")
        if answer.response_ends.count(True) != 1 or not answer.response_ends[-1]:
            raise BrokenError(f"end_of_stream of the pieces is {answer.response_ends}")


@rule("response.flows", Level.MUST)
async def flows(probe: Probe) -> None:
    """A piece of a response is sent on before the next one comes: tokens are not held back."""
    async with probe.picker.stream() as stream:
        await _ask(probe, stream)
        await stream.response([response_headers(200)], 1)
        for piece in response_body(split(b"data: a token\n\n" * 5, 15))[:-1]:
            answer = await stream.response([piece], 1)
            _kind(answer, "response_body")


@rule("response.trailers", Level.MUST, "ext_proc")
async def trailers(probe: Probe) -> None:
    """The response's trailers are answered."""
    async with probe.picker.stream() as stream:
        await _ask(probe, stream)
        await stream.response([response_headers(200)], 1)
        _kind(await stream.response([response_trailers()], 1), "response_trailers")


@rule("response.served", Level.MUST)
async def served(probe: Probe) -> None:
    """The endpoint that served a request may be told, and is taken in."""
    for one in await probe.known():
        await _respond(probe, 200, one)
    await probe.chosen(probe.request(), "a request after that")


@rule("response.stranger", Level.SHOULD)
async def stranger(probe: Probe) -> None:
    """A served endpoint that was never named, or is no address, is passed over: nothing breaks."""
    for told in (NOWHERE[0], "", "no address", ","):
        await _respond(probe, 200, told)
    await probe.chosen(probe.request(), "a request after that")


async def _respond(probe: Probe, status: int, served: str | None = None) -> None:
    async with probe.picker.stream() as stream:
        await _ask(probe, stream)
        _kind(await stream.response([response_headers(status, served)], 1), "response_headers")


async def _ask(probe: Probe, stream: Stream) -> None:
    answer = await stream.ask(probe.request())
    if answer.problem or answer.immediate is not None:
        raise BrokenError(f"the request before it got {answer.words}")


def _kind(answer: Answer, wanted: str) -> None:
    if wanted not in answer.kinds:
        said = answer.problem or f"came {', '.join(answer.kinds) or 'nothing'}"
        raise BrokenError(f"in place of {wanted} {said}")
