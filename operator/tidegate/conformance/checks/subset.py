"""The hint that narrows what may be chosen."""

from collections.abc import Iterable

from tidegate.conformance.answer import Answer
from tidegate.conformance.probe import NOWHERE, Probe, same_place
from tidegate.conformance.rules import BrokenError, Level, NotRunError, rule
from tidegate.conformance.wire import SUBSET_KEY, SUBSET_NAMESPACE


@rule("subset.only", Level.MUST)
async def only(probe: Probe) -> None:
    """With a hint that names one endpoint, that one is chosen and no other."""
    for one in await probe.known():
        for _ in range(3):
            _within(await probe.chosen(probe.hinted([one]), f"a hint of [{one}]"), [one])


@rule("subset.fallbacks", Level.MUST)
async def fallbacks(probe: Probe) -> None:
    """Every endpoint of the list is in the hint, not the first alone."""
    known = await probe.known()
    if len(known) < 2:
        raise NotRunError("two endpoints are needed; give them by --endpoint")
    some = known[: max(1, len(known) - 1)]
    for _ in range(3):
        _within(await probe.chosen(probe.hinted(some), f"a hint of {some}"), some)


@rule("subset.mixed", Level.MUST)
async def mixed(probe: Probe) -> None:
    """Of a hint that names strangers too, an endpoint of the pool is chosen."""
    one = (await probe.known())[0]
    _within(await probe.chosen(probe.hinted([*NOWHERE, one]), f"a hint of strangers and {one}"), [one])


@rule("subset.strangers", Level.MUST)
async def strangers(probe: Probe) -> None:
    """A hint that names no endpoint of the pool is an immediate 503."""
    await probe.refused(probe.hinted(list(NOWHERE)), 503, f"a hint of {', '.join(NOWHERE)}")


@rule("subset.empty", Level.MUST)
async def empty(probe: Probe) -> None:
    """An empty hint is an immediate 503: nothing may be chosen."""
    await probe.refused(probe.hinted([]), 503, "an empty hint")


@rule("subset.absent", Level.MUST)
async def absent(probe: Probe) -> None:
    """envoy.lb.subset_hint without x-gateway-destination-endpoint-subset narrows nothing."""
    hints = {SUBSET_NAMESPACE: {"another-key": [NOWHERE[0]]}, "envoy.lb": {SUBSET_KEY: [NOWHERE[0]]}}
    await probe.chosen(probe.request(metadata=hints), f"metadata without {SUBSET_KEY} in its namespace")


@rule("subset.text", Level.SHOULD)
async def text(probe: Probe) -> None:
    """A hint given as one text with commas is understood like a list: some proxies write it so."""
    one = (await probe.known())[0]
    hint = f"{NOWHERE[0]}, {one}"
    _within(await probe.chosen(probe.hinted(hint), f"the hint {hint!r}"), [one])
    await probe.refused(probe.hinted(NOWHERE[0]), 503, f"the hint {NOWHERE[0]!r}")


@rule("subset.malformed", Level.SHOULD)
async def malformed(probe: Probe) -> None:
    """A hint that cannot be read is an immediate 503: what may be chosen is not known, and not everything."""
    for hint in (7.0, {"ip": "port"}, [7.0, None], ["", "no address"]):
        await probe.refused(probe.hinted(hint), 503, f"the hint {hint!r}")


@rule("subset.header", Level.SHOULD)
async def header(probe: Probe) -> None:
    """A request header x-gateway-destination-endpoint-subset is a client's word, and narrows nothing."""
    plain = probe.request()
    forged = type(plain)([*plain.headers, (SUBSET_KEY, NOWHERE[0])], plain.body)
    await probe.chosen(forged, f"a request with the header {SUBSET_KEY}")


def _within(answer: Answer, allowed: Iterable[str]) -> None:
    allowed = list(allowed)
    strange = [one for one in answer.endpoints if not any(same_place(one, a) for a in allowed)]
    if strange:
        raise BrokenError(f"a hint of {', '.join(allowed)} got {', '.join(answer.endpoints)}")
