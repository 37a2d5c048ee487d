"""The picker's decision log: whole, in order, bounded, and never in the way of a request."""

import logging
from pathlib import Path

import pytest

from support.recorded import KEY, ask, live, recorded
from tidegate.adapters.decisions import DispatchCall, ReportCall, SetWorldCall, decode, encode
from tidegate.core.flow import Ask, Endpoint, Flow, Model, Policy
from tidegate.core.load import EngineReport
from tidegate.picker.decisionlog import DecisionLog, RecordedFlow, Stop
from tidegate.picker.server import Options, Picker
from tidegate.sim.replay import replay


class Nobody:
    """An API server that is never asked."""


def given_up(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def read(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_everything_is_in_the_file_once_it_is_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "decisions.jsonl"
    decisions = DecisionLog(path, Policy())
    decisions.start()
    live(decisions)
    decisions.close()
    assert read(path) == recorded()
    assert not given_up(caplog)


def test_the_log_of_the_picker_before_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    for policy in (Policy(qos=True), Policy(qos=False)):
        decisions = DecisionLog(path, policy)
        decisions.start()
        decisions.close()
    assert replay(read(tmp_path / "decisions.jsonl.old")).policy.qos is True
    assert replay(read(path)).policy.qos is False


def test_what_comes_after_the_end_is_not_kept(tmp_path: Path) -> None:
    decisions = DecisionLog(tmp_path / "decisions.jsonl", Policy())
    decisions.start()
    decisions.close()
    live(decisions)
    assert decisions.take() == b""


@pytest.mark.parametrize(
    ("path", "words"),
    [("/dev/full", "No space left"), ("/nowhere/decisions.jsonl", "No such file")],
    ids=["disk full", "no such folder"],
)
def test_a_disk_that_fails_ends_the_recording_and_nothing_else(
    path: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    stops: list[Stop] = []
    decisions = DecisionLog(Path(path), Policy(), stops.append)
    live(decisions)
    decisions.start()
    decisions.close()
    live(decisions)  # asserts nothing by itself: it serves as before
    assert stops == [Stop.DISK]
    [line] = given_up(caplog)
    assert line.startswith(f"{path}: decisions are not recorded any more: ")
    assert words in line
    assert decisions.take() == b"", "what nobody can write is not kept"


@pytest.mark.parametrize("most", [1024, 3000, 4000])
def test_a_log_that_reached_its_bound_is_whole_up_to_there(
    tmp_path: Path, most: int, caplog: pytest.LogCaptureFixture
) -> None:
    path, stops = tmp_path / "decisions.jsonl", list[Stop]()
    decisions = DecisionLog(path, Policy(), stops.append, max_bytes=most)
    decisions.start()
    live(decisions)
    decisions.close()
    assert stops == [Stop.FULL]
    assert path.stat().st_size <= most
    lines = read(path)
    assert lines == recorded()[: len(lines)]
    assert replay(lines).different == 0
    [line] = given_up(caplog)
    assert f"{most} bytes" in line


def test_what_waits_for_a_disk_that_stands_still_is_bounded() -> None:
    stops: list[Stop] = []
    decisions = DecisionLog(Path("/nowhere"), Policy(), stops.append)  # not started: nothing is written
    many = tuple(Endpoint(f"10.0.{i // 256}.{i % 256}:8000", KEY, "low", 4) for i in range(10_000))
    world = SetWorldCall(0.0, (), (), many)
    for _ in range(40):
        decisions.add(world)
    assert stops == [Stop.BEHIND]
    kept = decisions.take()
    assert 16 << 20 < len(kept) <= 32 << 20
    assert kept.count(b"\n") < 41
    decisions.add(DispatchCall(0.0, ()))
    assert decisions.take() == b"", "there would be a gap before it"


def test_recording_ends_where_the_queue_raised(caplog: pytest.LogCaptureFixture) -> None:
    stops: list[Stop] = []
    decisions = DecisionLog(Path("/nowhere"), Policy(), stops.append)
    flow = RecordedFlow(Policy(), decisions)
    flow.set_world({}, {KEY: Model(KEY, ("low",))}, [Endpoint("a:1", KEY, "low", 1)], 0.0)
    with pytest.raises(AttributeError):
        flow.admit(None, 0.0)
    flow.dispatch(1.0)
    assert stops == [Stop.RAISED]
    assert [decode(line).call for line in decisions.take().splitlines()[1:]] == ["set_world"]
    [line] = given_up(caplog)
    assert "AttributeError" in line


def test_a_call_that_cannot_be_written_is_answered_all_the_same() -> None:
    stops: list[Stop] = []
    flow = RecordedFlow(Policy(), DecisionLog(Path("/nowhere"), Policy(), stops.append))
    flow.set_world({}, {KEY: Model(KEY, ("low",))}, (), 0.0)
    refused = flow.admit(Ask(1 << 70, KEY, "low", 1, 1), 0.0)
    assert refused is not None
    assert stops == [Stop.UNWRITABLE]


def test_an_answer_is_handed_on_as_it_is() -> None:
    flow = RecordedFlow(Policy(), DecisionLog(Path("/nowhere"), Policy()))
    flow.set_world({}, {KEY: Model(KEY, ("low",))}, [Endpoint("a:1", KEY, "low", 1)], 0.0)
    flow.report("a:1", EngineReport(0.0, 0, 0), 0, 0)
    refused = flow.admit(ask(1), 0.0)
    assert refused is not None
    assert "0 of 0 low requests wait" in refused.message, "a class that there is not has no queue"
    assert flow.dispatch(0.0) == []
    assert flow.finish(1, 0.0) is None


def test_the_picker_counts_a_recording_that_ended(caplog: pytest.LogCaptureFixture) -> None:
    picker = Picker(Options(decision_log=Path("/dev/full")), Nobody())
    assert isinstance(picker.desk.flow, RecordedFlow)
    assert picker.decisions is not None
    picker.decisions.start()
    picker.decisions.close()
    assert b'tidegate_decision_log_stops_total{reason="disk"} 1.0' in picker.desk.metrics.text()
    assert len(given_up(caplog)) == 1


def test_a_picker_without_a_log_has_the_queue_itself() -> None:
    picker = Picker(Options(qos=False), Nobody())
    assert type(picker.desk.flow) is Flow
    assert picker.decisions is None
    assert picker.desk.flow.policy == Policy(qos=False)


def test_nothing_but_core_values_is_in_a_line() -> None:
    """Neither who asked nor what: a request is its number, its class and its size."""
    line = encode(ReportCall("a:1", EngineReport(0.5, 1, 2), 3, 4))
    assert line == (
        b'{"call":"report","address":"a:1","report":{"time_s":0.5,"running":1,"waiting":2,'
        b'"kv_usage":null,"kv_tokens":null,"generated_tokens":null,"adapters":[]},"own_before":3,"own_tokens_before":4,"answer":null}\n'
    )
