"""A short life of a recorded queue, in which everything happens at least once."""

from dataclasses import replace
from pathlib import Path

from tidegate.core.flow import Ask, Endpoint, Model, Policy
from tidegate.core.load import EngineReport
from tidegate.core.types import Objectives, QoSClass, Reclaim
from tidegate.picker.decisionlog import DecisionLog, RecordedFlow

KEY = ("team-a", "chat")
CLASSES = {
    "high": QoSClass("high", 100, objectives=Objectives(ttft_s=1.0), queue_max_wait_s=5.0),
    # A sum that decimals do not hit exactly: the log must bring back every bit.
    "low": QoSClass("low", 0, queue_max_requests=2, queue_max_wait_s=0.1 + 0.2),
}


def ask(number: int, qos_class: str = "low", *, streamed: bool = False) -> Ask:
    return Ask(number, KEY, qos_class, 100 * number, 50, size=10, streamed=streamed)


def decision_log() -> DecisionLog:
    """One that is never started, so that what it is told stays in memory."""
    return DecisionLog(Path("/nowhere"), Policy())


def live(decisions: DecisionLog) -> None:
    """Two slots for eight requests: of those that wait, one is refused, one leaves, others wait too long."""
    flow = RecordedFlow(Policy(), decisions)
    places = [Endpoint("10.0.0.1:80", KEY, "high", 1), Endpoint("10.0.0.2:80", KEY, "low", 1, lent=True)]
    flow.set_world(CLASSES, {KEY: Model(KEY, ("high", "low"))}, iter(places), 0.1)
    for place in places:
        flow.report(place.address, EngineReport(0.2, 0, 0, 0.0, 65_536), *flow.held(place.address))

    def pump(now: float) -> None:
        flow.expire(now)
        flow.dispatch(now)
        flow.recall(now)

    for number, qos_class in ((1, "high"), (2, "low"), (3, "low"), (4, "low")):
        flow.admit(ask(number, qos_class), 1.0)
    pump(1.0)
    flow.admit(ask(5, "high", streamed=True), 1.1)
    for number, qos_class in ((6, "high"), (7, "high"), (8, "low")):
        flow.admit(ask(number, qos_class), 1.2)
    pump(1.7)
    flow.finish(7, 1.8, whole=False)
    flow.measured(1, 90, 30)
    flow.finish(1, 2.0)
    flow.measured(1, 90, 30)
    flow.finish(2, 2.0, whole=False)
    pump(2.1)
    flow.finish(5, 2.2, whole=False)
    flow.finish(6, 2.3)
    flow.finish(99, 2.4)
    pump(2.5)
    # Beside a person who was promised 50 tokens a second batch is too slow, and is taken back.
    paced = {
        "high": replace(CLASSES["high"], objectives=Objectives(ttft_s=1.0, tpot_s=0.02)),
        "low": replace(CLASSES["low"], reclaim=Reclaim.ALWAYS),
    }
    place = Endpoint("10.0.0.3:80", KEY, "low", 32)
    flow.set_world(paced, {KEY: Model(KEY, ("high", "low"))}, [place], 20.0)
    flow.report(place.address, EngineReport(20.0, 0, 0, 0.0, 65_536), *flow.held(place.address))
    flow.admit(replace(ask(9), recallable=True), 20.0)
    pump(20.0)
    for number in range(10, 22):
        flow.admit(replace(ask(number, "high"), prompt_tokens=100), 20.1)
    pump(20.1)
    pump(20.2)


def recorded() -> list[bytes]:
    """The lines of `live`."""
    decisions = decision_log()
    live(decisions)
    return decisions.take().splitlines(keepends=True)
