"""What an engine is reckoned to be doing: held against the engine model, and against its reports."""

import math

import pytest

from tidegate.core import front
from tidegate.core.forecast import Forecast
from tidegate.core.steptime import LLAMA3_8B_A100
from tidegate.sim.engine import Engine
from tidegate.sim.pipeline import Pipeline
from tidegate.sim.types import EngineConfig, Request

FIT = LLAMA3_8B_A100


def fresh(chunk: int = 2048) -> Forecast:
    return Forecast(FIT, chunk, 0.0)


def served(prompts: list[int], chunk: int) -> tuple[float, float]:
    """When the last of these prompts, sent at once, gets its first token; and steps until then."""
    engine = Engine(EngineConfig(max_num_batched_tokens=chunk, async_scheduling=False))
    pipeline = Pipeline(engine, FIT.seconds)
    for index, prompt in enumerate(prompts):
        engine.add(Request(str(index), prompt, 500), 0.0)
    steps = 0
    while True:
        pipeline.launch(pipeline.next_end or 0.0)
        step, events = pipeline.complete()
        steps += 1
        if any(e.id == str(len(prompts) - 1) and e.nth == 0 for e in events):
            return step.end, steps
        pipeline.launch(step.end)


@pytest.mark.parametrize("chunk", [512, 2048])
@pytest.mark.parametrize("prompt", [100, 1000, 5000])
def test_an_idle_engine_begins_at_once(prompt: int, chunk: int) -> None:
    end_s, _ = served([prompt], chunk)
    assert fresh(chunk).first_token_s(prompt) == pytest.approx(end_s, rel=0.05)


def test_prefill_queues_and_is_worked_off() -> None:
    forecast = fresh()
    assert forecast.backlog_s == 0
    forecast.take(1, 4000, None)
    whole_s = forecast.backlog_s
    assert whole_s == pytest.approx(served([4000], 2048)[0], rel=0.05)
    forecast.advance(whole_s / 2)
    assert forecast.backlog_s == pytest.approx(whole_s / 2)
    assert forecast.turn_at(0.0) == pytest.approx(whole_s)
    assert forecast.first_token_s(1000) > whole_s / 2 + FIT.seconds(1000, 0)
    forecast.advance(whole_s)
    assert forecast.backlog_s == 0
    assert forecast.steps == pytest.approx(2)


def test_a_working_engine_keeps_an_arrival_waiting_for_a_step_and_a_half() -> None:
    forecast = fresh()
    for request in range(20):
        forecast.take(request, 1000, None)
    forecast.advance(forecast.turn_at(0.0))
    step_s = FIT.seconds(0, 20, 20_000)
    waits_s = forecast.first_token_s(500) - forecast.prefill_s(500)
    assert waits_s == pytest.approx(1.5 * step_s, rel=0.1)


def test_what_is_held_grows_and_goes() -> None:
    forecast = fresh()
    forecast.take(1, 1000, None)
    forecast.take(2, 1000, None)
    forecast.advance(10.0)
    made = forecast.steps
    assert made == pytest.approx((10.0 - FIT.seconds(2000, 0)) / FIT.seconds(0, 2, 2400), rel=0.05)
    forecast.give_back(1, 1000 + int(made))
    assert forecast.first_token_s(1) > 0.02
    forecast.give_back(2, 1000 + int(made))
    assert forecast.first_token_s(1) == pytest.approx(FIT.seconds(1, 0)), "idle again"


def test_who_ends_early_shows_that_what_was_before_it_is_done() -> None:
    forecast = fresh()
    for request in range(3):
        forecast.take(request, 8000, None)
    last_s = FIT.seconds(2048, 0)
    forecast.advance(last_s)
    before_s = forecast.backlog_s
    forecast.give_back(1, 8000)
    assert forecast.backlog_s == pytest.approx(before_s / 3, rel=0.15), "only the third is left"


@pytest.mark.parametrize("speed", [0.5, 1.0, 4.0, 20.0])
def test_the_pace_is_learnt_from_the_engines_own_count(speed: float) -> None:
    forecast = fresh()
    for request in range(16):
        forecast.take(request, 200, None)
    generated = 0.0
    for second in range(1, 40):
        forecast.advance(float(second))
        forecast.calibrate(int(generated), second)
        # So many tokens does it make in a second, whatever the forecast believes.
        generated += 16 * speed / FIT.seconds(0, 16, 16 * int(200 + generated / 16))
    assert forecast.speed == pytest.approx(speed, rel=0.1)


def test_one_that_was_refused_proves_nothing_of_those_before_it() -> None:
    forecast = fresh()
    for request in range(20):
        forecast.take(request, 2600, None)
    before_s = forecast.backlog_s
    forecast.take(20, 10, None)
    forecast.advance(0.01)
    forecast.give_back(20, 10, served=False)
    assert forecast.backlog_s == pytest.approx(before_s, rel=0.05)
    forecast.give_back(3, 2600, served=False)
    assert forecast.backlog_s == pytest.approx(before_s * 19 / 20, rel=0.05), "its own prompt is dropped"


def decoding(requests: int = 16) -> Forecast:
    forecast = fresh()
    for request in range(requests):
        forecast.take(request, 200, None)
    forecast.advance(1.0)
    forecast.calibrate(0, 1.0)
    return forecast


def per_second() -> float:
    return 16 / FIT.seconds(0, 16, 16 * 200)


def test_others_tokens_are_no_pace() -> None:
    forecast = decoding()
    made = 0.0
    for second in range(2, 12):
        made += 5 * per_second()
        forecast.advance(float(second))
        forecast.calibrate(int(made), second, alone=False)
    made += 5 * per_second()
    forecast.advance(12.0)
    forecast.calibrate(int(made), 12.0)
    assert forecast.speed == 1.0
    made += per_second()
    forecast.advance(13.0)
    forecast.calibrate(int(made), 13.0)
    assert forecast.speed == pytest.approx(1.0, rel=0.2)


def test_an_engine_that_hung_is_not_taken_for_slow() -> None:
    forecast = decoding()
    for second in range(2, 20):
        forecast.advance(float(second))
        forecast.calibrate(0, second)
    assert forecast.speed == 1.0


def test_a_pace_that_cannot_be_kept_holds_nobody_back() -> None:
    forecast = fresh()
    forecast.take(1, 300, 0.010)
    forecast.advance(1.0)
    assert math.isinf(forecast.credit_s(1000)), "a step takes 15 ms by itself"
    slow = fresh()
    slow.take(1, 300, 0.016)
    for request in range(2, 60):
        slow.take(request, 2000, None)
    slow.advance(10.0)
    assert math.isinf(slow.credit_s(1000)), "it is far behind already"


def test_only_those_above_are_looked_after() -> None:
    forecast = fresh()
    forecast.take(1, 300, 0.05, priority=10)
    assert forecast.credit_s(1000, above=5) < 0
    assert math.isinf(forecast.credit_s(1000, above=10))


def test_a_counter_that_starts_again_is_no_pace() -> None:
    forecast = fresh()
    forecast.take(1, 100, None)
    for second, count in enumerate([1000, 1060, 3, 65, 127], start=1):
        forecast.advance(float(second))
        forecast.calibrate(count, second)
    assert forecast.speed == pytest.approx(1.0, rel=0.15)


def test_credit_grows_with_every_step_that_is_faster_than_promised() -> None:
    forecast = fresh()
    assert math.isinf(forecast.credit_s(1000)), "nobody was promised anything"
    forecast.take(1, 1000, 0.05)
    cost_s = forecast.prefill_s(1000) - 0.05
    assert forecast.credit_s(1000) == pytest.approx(-cost_s), "nothing is saved up at first"
    clear_at = forecast.turn_at(0.0)
    forecast.advance(clear_at)
    forecast.advance(clear_at + 1.0)
    step_s = FIT.seconds(0, 1, 1030)
    assert forecast.credit_s(1000) == pytest.approx(0.05 / step_s - 1 - cost_s, rel=0.1)
    forecast.take(2, 1000, 0.05)
    assert forecast.credit_s(1000) < 0, "of who came last"
    forecast.give_back(2, 1000)
    assert forecast.credit_s(1000) > 1.0


@pytest.mark.parametrize(
    ("traffic", "expected"),
    [
        pytest.param([], 0, id="nobody"),
        pytest.param([front.Urgent(0.0, 0.1)], 0, id="nobody lately"),
        pytest.param([front.Urgent(0.1, 0.1)], 1, id="one now and then"),
        pytest.param([front.Urgent(2.5, 0.12)], 2, id="one and a spare one"),
        pytest.param([front.Urgent(10.0, 0.12), front.Urgent(10.0, 0.12)], 6, id="two classes add up"),
    ],
)
def test_size_of_the_front(traffic: list[front.Urgent], expected: int) -> None:
    assert front.size(traffic, 0.48) == expected


def test_the_front_is_of_the_highest_lanes_and_stays_what_it_is() -> None:
    low, high = front.Standing("a", 2, lent=False), front.Standing("z", 0, lent=False)
    lent, other = front.Standing("b", 0, lent=True), front.Standing("c", 2, lent=False)
    ordered = ["z", "a", "c", "b"]
    for count in range(5):
        assert front.members(count, [low, high, lent, other]) == set(ordered[:count])
        assert front.members(count, [other, lent, high, low]) == set(ordered[:count])


@pytest.mark.parametrize("late_s", [0.0, 1.3, 5.0])
@pytest.mark.parametrize("speed", [0.7, 1.0, 1.3])
def test_a_count_that_is_heard_late_is_of_when_it_was_given(late_s: float, speed: float) -> None:
    forecast = fresh()
    for request in range(16):
        forecast.take(request, 200, None)
    generated, counts = 0.0, []
    for second in range(1, 120):
        counts.append((float(second), int(generated)))
        generated += 16 * speed / FIT.seconds(0, 16, 16 * int(200 + generated / 16))
        forecast.advance(float(second) + 0.5)
        while counts and counts[0][0] + late_s <= second:
            forecast.calibrate(counts[0][1], counts.pop(0)[0])
        if second > 90:
            assert forecast.speed == pytest.approx(speed, rel=0.1)


def test_a_count_older_than_all_that_is_kept_says_nothing() -> None:
    forecast = decoding()
    for tick in range(200):
        forecast.advance(2.0 + tick)
    forecast.calibrate(1, 3.0)
    forecast.calibrate(1_000_000, 4.0)
    assert forecast.speed == 1.0
