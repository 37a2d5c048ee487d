"""Refusals: how a request that is dropped is answered."""

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Final

from tidegate.conformance.answer import Answer
from tidegate.conformance.probe import Probe
from tidegate.conformance.rules import BrokenError, Level, NotRunError, rule

_PATIENCE: Final = 0.9
"""Of the time limit: what waits for its turn is let go before its own time is over."""


@rule("refusal.shed", Level.MUST)
async def shed(probe: Probe) -> None:
    """A request that is dropped under load is an immediate 429."""
    refused = await _overload(probe)
    wrong = [a for a in refused if a.immediate != 429]
    if wrong:
        raise BrokenError(f"under load came {wrong[0].words}, not an immediate response 429")


@rule("refusal.retry", Level.SHOULD, "HTTP")
async def retry(probe: Probe) -> None:
    """A 429 says when to come back, by Retry-After."""
    for answer in await _overload(probe):
        after = answer.immediate_headers.get("retry-after", "")
        if not after.isdecimal():
            raise BrokenError(f"Retry-After is {after!r}")


async def _overload(probe: Probe) -> list[Answer]:
    """Hold requests open, as a slow engine would, until some are refused."""
    most = probe.target.overload
    if not most:
        raise NotRunError("say by --overload how many requests at once the picker cannot take")
    async with contextlib.AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(probe.picker.stream()) for _ in range(most)]
        waiting = {asyncio.ensure_future(s.ask(probe.request())) for s in streams}
        refused = await _first_refused(waiting, probe.target.timeout_s * _PATIENCE)
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    if not refused:
        raise NotRunError(f"{most} requests at once were all taken; give a larger --overload")
    return refused


async def _first_refused(asked: Iterable[asyncio.Future[Answer]], patience_s: float) -> list[Answer]:
    """The first that are refused; those that wait for their turn say nothing."""
    clock, waiting = asyncio.get_running_loop().time, set(asked)
    until = clock() + patience_s
    while waiting and clock() < until:
        done, waiting = await asyncio.wait(
            waiting, timeout=until - clock(), return_when=asyncio.FIRST_COMPLETED
        )
        if refused := [a for a in (d.result() for d in done) if a.immediate is not None or a.problem]:
            return refused
    return []
