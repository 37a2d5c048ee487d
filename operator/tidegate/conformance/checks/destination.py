"""How the chosen endpoint is told."""

from tidegate.conformance.answer import DESTINATION, NAMESPACE, bad_endpoint
from tidegate.conformance.probe import NOWHERE, Probe, same_place
from tidegate.conformance.rules import BrokenError, Level, NotRunError, rule


@rule("destination.header", Level.MUST)
async def header(probe: Probe) -> None:
    """The chosen endpoint is set as the request header x-gateway-destination-endpoint."""
    answer = await probe.chosen(probe.request())
    if answer.header is None:
        raise BrokenError(f"no reply sets the header {DESTINATION}; the metadata says {answer.metadata!r}")


@rule("destination.metadata", Level.MUST)
async def metadata(probe: Probe) -> None:
    """The chosen endpoint is set in the dynamic metadata, under envoy.lb, as
    x-gateway-destination-endpoint.
    """
    answer = await probe.chosen(probe.request())
    if answer.metadata is None:
        raise BrokenError(
            f"no dynamic metadata has {NAMESPACE} with {DESTINATION}; the header says {answer.header!r}"
        )


@rule("destination.same", Level.MUST)
async def same(probe: Probe) -> None:
    """Header and metadata never name different endpoints."""
    answer = await probe.chosen(probe.request())
    if None not in (answer.header, answer.metadata) and answer.header != answer.metadata:
        raise BrokenError(f"the header says {answer.header!r}, the metadata {answer.metadata!r}")


@rule("destination.format", Level.MUST)
async def form(probe: Probe) -> None:
    """The value is one `ip:port`, or several with commas between; IPv6 stands in brackets."""
    answer = await probe.chosen(probe.request())
    for value in (answer.header, answer.metadata):
        for part in value.split(",") if value is not None else ():
            if problem := bad_endpoint(part.strip()):
                raise BrokenError(problem)


@rule("destination.once", Level.SHOULD)
async def once(probe: Probe) -> None:
    """No endpoint is named twice in a list: a retry there is none."""
    endpoints = (await probe.chosen(probe.request())).endpoints
    if len(set(endpoints)) < len(endpoints):
        raise BrokenError(f"the list is {', '.join(endpoints)}")


@rule("destination.known", Level.MUST)
async def known(probe: Probe) -> None:
    """Every named endpoint is one of the pool, fallbacks too."""
    if not probe.target.endpoints:
        raise NotRunError("give the pool's endpoints by --endpoint")
    for _ in range(4):
        answer = await probe.chosen(probe.request())
        for one in answer.endpoints:
            if not any(same_place(one, e) for e in probe.target.endpoints):
                raise BrokenError(f"{one} is none of {', '.join(probe.target.endpoints)}")


@rule("destination.forged", Level.MUST)
async def forged(probe: Probe) -> None:
    """A client that sends x-gateway-destination-endpoint by itself does not choose the endpoint."""
    plain = probe.request()
    answer = await probe.ask(type(plain)([*plain.headers, (DESTINATION, NOWHERE[0])], plain.body))
    if answer.problem:
        raise BrokenError(f"a request with the header {DESTINATION}: {answer.problem}")
    if any(same_place(one, NOWHERE[0]) for one in answer.endpoints):
        raise BrokenError(f"it was sent to {NOWHERE[0]}, which is what the client's header said")


@rule("destination.overwrites", Level.SHOULD, "ext_proc")
async def overwrites(probe: Probe) -> None:
    """x-gateway-destination-endpoint replaces what a client sent: appended to, it would begin with the
    client's.
    """
    answer = await probe.chosen(probe.request())
    if answer.header is None:
        raise NotRunError("no reply sets the header")
    if not answer.replaces:
        raise BrokenError("the header is set with an append_action that keeps what was there")
