"""Runs rules against a picker, one after the other, and says what came of each."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum

import grpc

from tidegate.conformance.probe import Probe, Target
from tidegate.conformance.rules import BrokenError, Level, NotRunError, Rule
from tidegate.conformance.wire import Picker, connect


class Verdict(StrEnum):
    """What came of a rule."""

    KEPT = "kept"
    BROKEN = "broken"
    NOT_RUN = "not run"


class UnreachableError(Exception):
    """Nothing listens there, or it does not speak gRPC."""


@dataclass(frozen=True, slots=True)
class Result:
    """One rule's verdict; `message` says why, where it was not kept. `seconds` is how long it took."""

    rule: Rule
    verdict: Verdict
    message: str
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether the picker does not conform because of it."""
        return self.verdict is Verdict.BROKEN and self.rule.level is Level.MUST


@dataclass(frozen=True, slots=True)
class Tls:
    """How to connect: in the clear, or with TLS, trusting these certificates (PEM)."""

    on: bool = False
    ca: bytes | None = None
    server_name: str | None = None


async def run(
    address: str,
    target: Target,
    rules: Sequence[Rule],
    *,
    health: str | None = None,
    tls: Tls = Tls(),
    tell: Callable[[Result], None] = lambda _result: None,
) -> list[Result]:
    """Check every rule; `tell` hears of each as it is done.

    Raises:
        UnreachableError: There is no picker at `address`, or no health service at `health`.
    """
    results: list[Result] = []
    async with _channel(address, tls, target.timeout_s, "the picker") as channel:
        probe = Probe(Picker(channel, target.mode, target.timeout_s), target)
        if health is None:
            for one in rules:
                tell(await _append(results, one, probe))
            return results
        async with _channel(health, tls, target.timeout_s, "health checks (--health)") as checks:
            probe.health = checks
            for one in rules:
                tell(await _append(results, one, probe))
    return results


async def _append(results: list[Result], one: Rule, probe: Probe) -> Result:
    result = await check(one, probe)
    results.append(result)
    return result


async def check(one: Rule, probe: Probe) -> Result:
    """Check one rule. A failure of the check itself is one of the picker: it was never asked for more."""
    began = time.monotonic()
    verdict, message = Verdict.KEPT, ""
    try:
        await one.check(probe)
    except BrokenError as error:
        verdict, message = Verdict.BROKEN, str(error)
    except NotRunError as error:
        verdict, message = Verdict.NOT_RUN, str(error)
    except grpc.aio.AioRpcError as error:
        verdict, message = Verdict.BROKEN, f"the stream failed: {error.code().name} {error.details()!r}"
    return Result(one, verdict, message, time.monotonic() - began)


@asynccontextmanager
async def _channel(address: str, tls: Tls, timeout_s: float, what: str) -> AsyncIterator[grpc.aio.Channel]:
    channel = connect(address, tls=tls.on, ca=tls.ca, server_name=tls.server_name)
    try:
        try:
            await asyncio.wait_for(channel.channel_ready(), timeout_s)
        except TimeoutError as error:
            how = "over TLS" if tls.on else "in the clear (--tls for TLS)"
            raise UnreachableError(
                f"{address}: nothing that speaks gRPC {how} answers for {what} within {timeout_s:g} s"
            ) from error
        yield channel
    finally:
        await channel.close()
