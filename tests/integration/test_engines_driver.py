"""The real-time driver against the same model in virtual time."""

import asyncio

import pytest

from tidegate.local.engines.driver import EngineDriver, Generation, Signal
from tidegate.sim.drive import Arrival, drive
from tidegate.sim.types import EngineConfig, Policy, Request

REQUESTS = [
    Request("a", 100, 40, 5),
    Request("b", 300, 90, 5),
    Request("c", 40, 12, 9),
    Request("d", 500, 12, 1),
    Request("e", 60, 50, 5),
    Request("f", 16, 20, 0),
    Request("g", 90, 25, 1),
]


async def play(driver: EngineDriver, requests: list[Request]) -> dict[str, Generation]:
    """Submit all at once and wait for the last; the answers in the order in which they ended."""
    ended: dict[str, Generation] = {}

    async def one(request: Request) -> None:
        signal = Signal()
        generation = Generation(request, signal, each_token=False, finish_reason="length")
        driver.submit(generation)
        await signal.wait()
        ended[request.id] = generation

    await asyncio.gather(*(one(r) for r in requests))
    return ended


@pytest.mark.parametrize("policy", Policy)
@pytest.mark.parametrize("blocks", [2000, 39], ids=["plenty of memory", "preemption"])
async def test_same_order_same_counts_same_times(policy, blocks):
    config = EngineConfig(max_num_seqs=3, max_num_batched_tokens=256, num_blocks=blocks, policy=policy)
    run = drive(config, [Arrival(i * 1e-9, r) for i, r in enumerate(REQUESTS)], speed=4.0)
    driver = EngineDriver(config, speed=4.0)
    start = asyncio.get_running_loop().time()
    ended = await play(driver, REQUESTS)
    assert list(ended) == run.finish_order
    assert driver.engine.counters == run.counters
    assert (run.counters.preemptions > 0) is (blocks == 39)
    for name, generation in ended.items():
        # Never early; how late is up to the machine, but lateness does not add up.
        assert generation.last - start >= run.outcomes[name].finish_s - 0.001


async def test_lateness_does_not_add_up():
    """A loop that is blocked for a while catches up with the schedule."""
    driver = EngineDriver(EngineConfig(), speed=1.0)
    loop = asyncio.get_running_loop()
    start = loop.time()
    finish = drive(EngineConfig(), [Arrival(0.0, Request("a", 100, 60))]).outcomes["a"].finish_s
    # Blocked for less than the answer takes: once it is over, the last token comes when it is due.
    loop.call_later(0.1, _block, finish * 0.6)
    ended = await play(driver, [Request("a", 100, 60)])
    late = ended["a"].last - start - finish
    assert -0.001 <= late < finish * 0.5
    assert driver.stats.lag.total > finish * 0.3, "but it is told"


def _block(seconds: float) -> None:
    """Hold up the event loop, as a busy machine would."""
    import time

    time.sleep(seconds)


async def test_abort_wakes_nobody_and_leaves_nothing():
    driver = EngineDriver(EngineConfig(max_num_seqs=1))
    first, second = (
        Generation(Request(n, 10, 500), Signal(), each_token=True, finish_reason="length") for n in "ab"
    )
    driver.submit(first)
    driver.submit(second)
    await first.signal.wait()
    driver.abort(first)
    driver.abort(first)
    assert driver.stats.finished["abort"] == 1
    await second.signal.wait()
    driver.abort(second)
    await asyncio.wait_for(driver.idle(), 1.0)
    assert driver.engine.kv_usage == 0.0
    assert first.done is second.done is False
    driver.close()
