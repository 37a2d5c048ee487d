"""How often a reflector asks again; what it keeps is tested on a real API server."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import pytest

from tidegate.adapters.kube import ApiError, Kube, Reflector, kinds


class Fake:
    """Lists always work; what a watch does is given."""

    def __init__(self, watch: Callable[[], None]) -> None:
        self.lists = self.watches = 0
        self._watch = watch

    async def list(self, *_: Any, **__: Any) -> tuple[list[Any], str]:
        self.lists += 1
        return [], "1"

    async def watch(self, *_: Any, **__: Any) -> AsyncIterator[tuple[str, Any]]:
        self.watches += 1
        self._watch()
        for event in ():
            yield event


def refuse() -> None:
    raise ApiError(403, "Forbidden", "may list and not watch")


def expire() -> None:
    raise ApiError(410, "Expired", "too old")


async def _run(fake: Fake, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await Reflector(cast("Kube", fake), kinds.POD).run()


@pytest.mark.parametrize(
    ("watch", "delays"),
    [
        pytest.param(refuse, ["0.2", "0.5", "1.0"], id="refused each time"),
        pytest.param(expire, ["0.5", "1.0"], id="expired each time: the first is listed again at once"),
    ],
)
async def test_it_asks_ever_less_often_while_listings_work_and_watches_do_not(
    caplog: pytest.LogCaptureFixture, watch: Callable[[], None], delays: list[str]
) -> None:
    with caplog.at_level(logging.WARNING):
        await _run(Fake(watch), 0.9)
    said = [r.getMessage().rsplit("again in ", 1)[1].removesuffix(" s") for r in caplog.records]
    assert said == delays


async def test_a_watch_that_ends_at_once_is_not_asked_for_without_pause() -> None:
    fake = Fake(lambda: None)
    await _run(fake, 0.5)
    assert (fake.lists, fake.watches) == (1, 1)
