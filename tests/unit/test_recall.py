"""Patient requests are taken back from where a burst of people is served too slowly beside them."""

import asyncio
import itertools
from dataclasses import replace
from typing import Any

import pytest
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from support.ext_proc import request_body, request_headers, response_headers
from tidegate.core.flow import Ask, Endpoint, Flow, Model, Policy
from tidegate.core.flowtypes import Pack
from tidegate.core.load import EngineReport, Rate
from tidegate.core.recall import Held, chosen
from tidegate.core.types import Objectives, QoSClass, Reclaim, TenantFrom, Tenants
from tidegate.facts.endpoints import ServedModel, World
from tidegate.picker.desk import Desk
from tidegate.picker.identity import Identity
from tidegate.picker.service import RecalledError, Service, Settings

M = ("ns", "m")
CLASSES = {
    "chat": QoSClass("chat", 100, objectives=Objectives(ttft_s=1.0, tpot_s=0.05)),
    "batch": QoSClass("batch", 0, reclaim=Reclaim.ALWAYS, queue_max_wait_s=3600),
    "steady": QoSClass("steady", 0, queue_max_wait_s=3600),
}
HELD = [Held(1, 3000), Held(2, 1000), Held(3, 2000), Held(4, 1000)]


def a_tenth_each(fewer: int, _tokens: int) -> float:
    return 0.1 * (4 - fewer)


@pytest.mark.parametrize(
    ("target_s", "ids"), [(0.4, []), (0.35, [2]), (0.25, [2, 4]), (0.1, [2, 4, 3]), (0.0, [2, 4, 3, 1])]
)
def test_what_loses_the_least_is_taken_first_and_no_more_than_needed(target_s: float, ids: list[int]) -> None:
    assert chosen(HELD, a_tenth_each, target_s, target_s) == ids


def test_of_a_context_that_weighs_the_step_s_time_follows_it() -> None:
    assert chosen(HELD, lambda _, tokens: 7000 - tokens, 5500, 5500) == [2, 4]


def test_nobody_is_thrown_away_for_nothing() -> None:
    assert chosen(HELD, lambda fewer, _: 1.0 - 0.1 * fewer, 0.3, 0.5) == []
    assert chosen(HELD, lambda fewer, _: 1.0 - 0.1 * fewer, 0.3, 0.7) == [2, 4, 3, 1]


class Stage:
    """Three replicas filled with batch while nobody urgent is about; then twenty chats a second."""

    def __init__(
        self, qos_class: str = "batch", *, streamed: bool = False, again: bool = True, **pack: Any
    ) -> None:
        self.ids = itertools.count(1)
        self.flow = Flow(Policy(pack=Pack(**pack)))
        places = [Endpoint(f"r{i}", M, "batch", 256) for i in range(3)]
        self.flow.set_world(CLASSES, {M: Model(M, tuple(CLASSES))}, places, 0.0)
        for place in places:
            self.flow.report(place.address, EngineReport(0.0, 0, 0, 0.0, 400_000), 0, 0)
        self.now = 100.0
        self.sent: dict[int, str] = {}
        for _ in range(360):
            self.come(qos_class, 2500, streamed=streamed, recallable=again)
        self.now = 200.0
        self.dispatch()
        assert len(self.sent) == 360

    def come(self, qos_class: str, prompt: int, **more: Any) -> int:
        ask = Ask(next(self.ids), M, qos_class, prompt, 200, **more)
        assert self.flow.admit(ask, self.now) is None
        self.dispatch()
        return ask.id

    def dispatch(self) -> None:
        self.sent |= {d.ask.id: d.address for d in self.flow.dispatch(self.now)}

    def burst(self) -> list[tuple[int, str]]:
        """Who is taken back in two seconds, and from where."""
        taken = []
        for _ in range(40):
            self.now += 0.05
            self.come("chat", 500, streamed=True)
            found = [(ask.id, address) for ask, address in self.flow.recall(self.now)]
            assert not self.flow.recall(self.now), "each is named once, and counted as gone"
            for number, _ in found:
                self.flow.finish(number, self.now, whole=False)
            taken += found
        return taken


def test_people_who_come_in_a_burst_get_their_pace() -> None:
    stage = Stage()
    taken = stage.burst()
    ids = [number for number, _ in taken]
    assert len(ids) == len(set(ids)) > 60
    assert all(stage.sent[number] == address for number, address in taken)
    loads = stage.flow._room.loads.values()
    beside = [load.forecast.decode_step_s() for load in loads if load.patient < load.requests]
    assert max(beside) <= 0.55 * 0.05
    assert sum(load.patient for load in loads) > 30, "no more is taken than the pace needs"


@pytest.mark.parametrize(
    "more",
    [{"qos_class": "steady"}, {"streamed": True}, {"again": False}, {"recall": False}, {"front": False}],
    ids=["reclaim is not Always", "streamed", "does not come again", "turned off", "no front"],
)
def test_what_is_not_taken_back(more: dict[str, Any]) -> None:
    assert Stage(**more).burst() == []


def test_steady_traffic_takes_nobody_back_however_slow() -> None:
    stage = Stage()
    for _ in range(200):
        stage.now += 0.5
        stage.come("chat", 500, streamed=True)
        assert stage.flow.recall(stage.now) == []


def test_who_could_not_be_aborted_is_named_again_later() -> None:
    stage = Stage()
    first = []
    while not first:
        stage.now += 0.05
        stage.come("chat", 500, streamed=True)
        first = stage.flow.recall(stage.now)
    assert stage.flow.recall(stage.now + 0.5) == []
    stage.now += 1.1
    stage.come("chat", 500, streamed=True)
    assert {a.id for a, _ in first} & {a.id for a, _ in stage.flow.recall(stage.now)}


def test_who_comes_again_is_not_refused_by_a_full_queue_and_is_charged_once() -> None:
    shared = replace(CLASSES["batch"], queue_max_requests=1, tenants=Tenants(TenantFrom.HEADER, "x-t"))
    flow = Flow()
    flow.set_world({"batch": shared}, {M: Model(M, ("batch",))}, [Endpoint("r0", M, "batch", 1)], 0.0)
    flow.report("r0", EngineReport(0.0, 0, 0, 0.0, 400_000), 0, 0)
    mine = Ask(1, M, "batch", 1000, 100, tenant="t", recallable=True)
    assert flow.admit(mine, 1.0) is None
    assert flow.dispatch(1.0)
    assert flow.admit(Ask(2, M, "batch", 1000, 100, tenant="t"), 1.1) is None
    line = flow._lines[flow._line_key(mine)]
    before = line.tenants["t"].served
    flow._room.running[1].recalled_s = 1.5
    flow.finish(1, 1.6, whole=False)
    assert line.tenants["t"].served == max(line.tenants["t"].floor, before - (1000 + 2 * 100))
    assert flow.admit(Ask(3, M, "batch", 10, 10, tenant="t"), 1.7) is not None
    assert flow.admit(replace(mine, id=4, again=True), 1.7) is None


def test_nobody_is_taken_back_while_nobody_urgent_is_there() -> None:
    stage = Stage()
    assert stage.flow.recall(stage.now) == []


def test_a_burst_is_believed_at_once_and_chance_is_not() -> None:
    rate = Rate(2.0)
    for n in range(20):
        rate.add(n * 0.5)
    assert rate.value(9.5) == pytest.approx(2.0, rel=0.15)
    assert rate.deviation(9.5) == pytest.approx((rate.value(9.5) / 4) ** 0.5)
    rate.raise_to(1.0, 9.5)
    assert rate.value(9.5) > 1.5
    rate.raise_to(8.0, 9.5)
    assert rate.value(9.5) == 8.0


# ── in the picker ───────────────────────────────────────────────────────────────────────────────

SERVED = ServedModel(M, ("m",), ("batch",), "OpenAI", "vLLM")
WORLD = World(
    {"batch": CLASSES["batch"]},
    {M: SERVED},
    {"m": M},
    (Endpoint("a:1", M, "batch", 4),),
    {M: Model(M, ("batch",), startable=False)},
)


class Recalls(Flow):
    """Takes back whatever runs, once it is told to."""

    on = False

    def recall(self, now: float) -> list[tuple[Ask, str]]:
        del now
        return [(r.ask, r.address) for r in self._room.running.values() if r.ask.recallable and self.on]


class NobodyToAsk:
    async def create(self, kind: Any, obj: Any) -> dict[str, Any]:
        raise AssertionError("the gateway is trusted")


async def recalled(
    attempt: str, *, answered: bool = False, size: int = 10
) -> tuple[Desk, BaseException | None]:
    """A request that runs is taken back; returns how its exchange ended."""
    flow = Recalls()
    desk = Desk(flow, clock=lambda: 0.0)
    desk.set_world(WORLD)
    desk.report("a:1", EngineReport(0.0, 0, 0), (0, 0))
    service = Service(desk, Identity(NobodyToAsk(), desk.clock), Settings(trust_class_header=True))
    messages: asyncio.Queue[pb.ProcessingRequest | None] = asyncio.Queue()
    body = b'{"model":"m","prompt":"%s"}' % (b"x" * size)
    counted = {"x_envoy_attempt_count": attempt, "x_tidegate_retries": "1"} if attempt else {}
    if attempt == "another's":
        counted = {"x_envoy_attempt_count": "1"}
    for message in [
        request_headers(**counted),
        *request_body([body]),
    ]:
        messages.put_nowait(message)

    async def write(_reply: pb.ProcessingResponse) -> None:
        pass

    serving = asyncio.create_task(service.serve(messages.get, write))
    await asyncio.sleep(0.01)
    assert flow.held("a:1")[0] == 1
    if answered:
        messages.put_nowait(response_headers())
        await asyncio.sleep(0.01)
    flow.on = True
    desk.pump()
    await asyncio.sleep(0.01)
    if not serving.done():
        messages.put_nowait(None)
    (found,) = await asyncio.gather(serving, return_exceptions=True)
    assert flow.held("a:1")[0] == 0
    return desk, found


@pytest.mark.parametrize(
    ("attempt", "more", "taken"),
    [
        ("1", {}, True),
        ("2", {}, True),
        ("3", {}, False),
        ("", {}, False),
        ("x", {}, False),
        ("another's", {}, False),
        ("1", {"answered": True}, False),
        ("1", {"size": 1 << 20}, False),
    ],
    ids=[
        "first",
        "second",
        "often enough",
        "no retries",
        "no number",
        "another gateway's count",
        "answer begun",
        "body not kept",
    ],
)
def test_an_exchange_is_ended_only_where_envoy_asks_again(
    attempt: str, more: dict[str, Any], taken: bool
) -> None:
    desk, found = asyncio.run(recalled(attempt, **more))
    assert isinstance(found, RecalledError) is taken
    text = desk.metrics.text().decode()
    assert ('outcome="recalled",qos_class="batch"} 1.0' in text) is taken
    assert ('tidegate_recalls_total{model="m",namespace="ns",qos_class="batch"} 1.0' in text) is taken


def test_who_is_cancelled_otherwise_stays_cancelled() -> None:
    async def main() -> None:
        desk = Desk(Flow(), clock=lambda: 0.0)
        service = Service(desk, Identity(NobodyToAsk(), desk.clock), Settings(trust_class_header=True))

        async def never() -> None:
            await asyncio.Event().wait()

        serving = asyncio.create_task(service.serve(never, never))
        await asyncio.sleep(0)
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving

    asyncio.run(main())
