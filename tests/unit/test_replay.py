"""Replay of a decision log: equal where nothing was changed, and exact about what was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from typer.testing import CliRunner

from support.recorded import recorded
from tidegate.cli.main import app
from tidegate.core.flow import Dispatch, Policy, Refused
from tidegate.sim.replay import LogError, replay

Lines = list[bytes]


def test_a_queue_replayed_answers_as_it_did() -> None:
    lines = recorded()
    result = replay(lines)
    assert result.first is None
    assert (result.different, result.differences, result.cut) == (0, (), None)
    assert result.calls == len(lines) - 1
    assert result.policy == Policy()
    assert all(count > 0 for count in result.decisions.values()), result.decisions
    assert result.compared == sum(result.decisions.values())


def test_every_beginning_of_a_log_is_a_log() -> None:
    lines = recorded()
    for length in range(1, len(lines) + 1):
        result = replay(lines[:length])
        assert (result.calls, result.different) == (length - 1, 0)


# ── something was changed ───────────────────────────────────────────────────────────────────────


def elsewhere(sent: Any) -> Any:
    return [{**sent[0], "address": "10.9.9.9:80"}, *sent[1:]]


def a_moment_later(gone: Any) -> Any:
    (asked, refused), *others = gone
    return [[asked, {**refused, "retry_after_s": refused["retry_after_s"] + 1}], *others]


TAMPERED: dict[str, tuple[str, Callable[[Any], Any], int | None]] = {
    "sent elsewhere": ("dispatch", elsewhere, 0),
    "sent in another order": ("dispatch", lambda sent: sent[::-1], 0),
    "one sent fewer": ("dispatch", lambda sent: sent[:-1], 1),
    "nobody sent": ("dispatch", lambda _sent: [], 0),
    "waited a little less": ("dispatch", lambda sent: [{**sent[0], "waited_s": 1e-9}, *sent[1:]], 0),
    "admitted after all": ("admit", lambda _refused: None, None),
    "another reason": ("admit", lambda refused: {**refused, "reason": "MemoryFull"}, None),
    "told to come back later": ("expire", a_moment_later, 0),
    "not taken back": ("recall", lambda _taken: [], 0),
    "ended where it was not": ("finish", lambda _ended: "Queued", None),
    "never there": ("finish", lambda _ended: None, None),
}


def tamper(lines: Lines, call: str, change: Callable[[Any], Any]) -> int:
    """Change the first answer of a call that says something and is changed by it; returns its line."""
    for index, line in enumerate(lines[1:], 1):
        parsed = orjson.loads(line)
        if parsed["call"] == call and parsed["answer"] and change(parsed["answer"]) != parsed["answer"]:
            parsed["answer"] = change(parsed["answer"])
            lines[index] = orjson.dumps(parsed) + b"\n"
            return index + 1
    raise AssertionError(f"no answer of {call} to change")


@pytest.mark.parametrize(("call", "change", "nth"), TAMPERED.values(), ids=TAMPERED)
def test_a_changed_answer_is_found_and_named(
    call: str, change: Callable[[Any], Any], nth: int | None
) -> None:
    lines = recorded()
    number = tamper(lines, call, change)
    result = replay(lines)
    assert result.different == 1, "the answer only: the queue went on as before"
    assert result.first is not None
    assert (result.first.line, result.first.call, result.first.nth) == (number, call, nth)
    assert result.first.expected != result.first.got


def test_both_answers_are_shown() -> None:
    lines = recorded()
    tamper(lines, "dispatch", elsewhere)
    first = replay(lines).first
    assert first is not None
    assert isinstance(first.expected, Dispatch)
    assert isinstance(first.got, Dispatch)
    assert (first.expected.address, first.got.address) == ("10.9.9.9:80", "10.0.0.1:80")


def test_a_lost_call_is_found_by_what_follows() -> None:
    lines = recorded()
    lost = next(i for i, line in enumerate(lines) if line.startswith(b'{"call":"set_world"'))
    del lines[lost]
    result = replay(lines)
    assert result.first is not None
    assert (result.first.line, result.first.call) == (lost + 3, "admit")  # two reports come before it
    assert isinstance(result.first.got, Refused)
    assert result.first.got.message.startswith("no replica of team-a/chat is ready")
    assert result.different >= len(result.differences) > 1


def test_a_log_that_makes_the_queue_fail_ends_there() -> None:
    """A prompt so long that no float holds its length."""
    lines = recorded()
    number = next(i for i, line in enumerate(lines) if b'"id":2' in line)
    lines[number] = lines[number].replace(b'"prompt_tokens":200', b'"prompt_tokens":1' + b"0" * 400)
    result = replay(lines)
    assert result.first is not None
    assert (result.first.call, result.first.raised, result.different) == ("admit", True, 1)
    assert "OverflowError" in result.first.got
    assert result.calls == result.first.line - 1 < len(lines) - 1


# ── it cannot be read ───────────────────────────────────────────────────────────────────────────


def replaced(number: int, line: bytes) -> Callable[[Lines], Lines]:
    return lambda lines: [*lines[: number - 1], line, *lines[number:]]


BROKEN: dict[str, tuple[Callable[[Lines], Lines], int, str]] = {
    "empty": (lambda _lines: [], 1, "the log is empty"),
    "something else": (lambda _lines: [b"level=info\n"], 1, "this is no decision log"),
    "other JSON": (lambda _lines: [b'{"kind":"Pod"}\n'], 1, "this is no decision log"),
    "first line missing": (lambda lines: lines[1:], 1, "this is no decision log"),
    "a later version": (
        replaced(1, b'{"format":"tidegate-decisions","version":2,"new":1}\n'),
        1,
        "version 2",
    ),
    "no policy": (replaced(1, b'{"format":"tidegate-decisions","version":1}\n'), 1, "policy: Field required"),
    "a line cut in the middle": (lambda lines: [*lines[:4], lines[4][:40], *lines[5:]], 5, "Invalid JSON"),
    "a broken line with an end": (lambda lines: [*lines, b'{"call":"disp\n'], 57, "Invalid JSON"),
    "an empty line": (replaced(6, b"\n"), 6, "Invalid JSON"),
    "an unknown call": (replaced(6, b'{"call":"guess","now":1.0}\n'), 6, "'guess'"),
    "an unknown field": (
        lambda lines: [*lines[:5], lines[5].replace(b'"size":10', b'"size":10,"mood":1'), *lines[6:]],
        6,
        "admit.ask.mood: Unexpected keyword argument",
    ),
    "a missing field": (
        replaced(6, b'{"call":"dispatch","now":1.0}\n'),
        6,
        "dispatch.answer: Field required",
    ),
    "a word for a number": (
        replaced(6, b'{"call":"dispatch","now":"1.0","answer":[]}\n'),
        6,
        "dispatch.now: Input should be a valid number",
    ),
}


@pytest.mark.parametrize(("change", "line", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_log_says_where_and_why(change: Callable[[Lines], Lines], line: int, message: str) -> None:
    with pytest.raises(LogError) as caught:
        replay(change(recorded()))
    assert caught.value.line == line
    assert str(caught.value).startswith(f"line {line}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("kept", [1, 30, -2])
def test_a_last_line_that_a_kill_cut_off_is_left_out(kept: int) -> None:
    lines = recorded()
    result = replay([*lines[:-1], lines[-1][:kept]])
    assert result.cut == len(lines)
    assert (result.calls, result.different) == (len(lines) - 2, 0)


def test_a_last_line_that_lacks_only_its_end_counts() -> None:
    lines = recorded()
    result = replay([*lines[:-1], lines[-1].rstrip()])
    assert (result.calls, result.cut) == (len(lines) - 1, None)


# ── the command ─────────────────────────────────────────────────────────────────────────────────


def run(folder: Path, lines: Lines, *options: str) -> tuple[int, str, str]:
    path = folder / "decisions.jsonl"
    path.write_bytes(b"".join(lines))
    result = CliRunner().invoke(app, ["replay", str(path), *options])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_says_how_many_were_the_same(tmp_path: Path) -> None:
    lines = recorded()
    compared = replay(lines).compared
    code, out, _ = run(tmp_path, lines)
    assert code == 0
    assert out.startswith(f"{compared} decisions in {len(lines) - 1} calls: ")
    assert out.endswith("all answers are the same\n")
    code, out, _ = run(tmp_path, lines, "-o", "json")
    found = orjson.loads(out)
    assert (code, found["same"], found["compared"], found["differences"]) == (0, True, compared, [])


def test_the_command_shows_the_first_differences(tmp_path: Path) -> None:
    lines = recorded()
    number = tamper(lines, "dispatch", elsewhere)
    code, out, _ = run(tmp_path, lines)
    assert code == 1
    assert f"line {number}: dispatch, entry 1 of the answer" in out
    assert '"address":"10.9.9.9:80"' in out
    assert '"address":"10.0.0.1:80"' in out
    code, out, _ = run(tmp_path, lines, "-o", "json")
    [one] = orjson.loads(out)["differences"]
    assert (code, one["line"], one["nth"], one["raised"]) == (1, number, 0, False)


def test_the_command_says_what_is_wrong_with_a_log(tmp_path: Path) -> None:
    lines = recorded()
    code, _, err = run(tmp_path, [*lines[:4], b"?\n", *lines[5:]])
    assert code == 2
    assert "decisions.jsonl: line 5: Invalid JSON" in err
    code, out, _ = run(tmp_path, [*lines, b'{"call":'])
    assert code == 0
    assert f"line {len(lines) + 1}, the last, is cut off" in out
