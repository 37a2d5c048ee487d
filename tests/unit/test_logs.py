"""Log lines: one form for every part."""

import json
import logging
import re
from collections.abc import Iterator

import pytest

from tidegate.adapters.logs import configure


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """The root logger as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.handlers.clear()  # configure() closes what it finds, and these are pytest's
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_text_says_when_how_grave_and_who(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info")
    logging.getLogger("tidegate.x").warning("no %s", "room")
    line = capsys.readouterr().err
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z warning tidegate\.x: no room\n", line)


def test_json_is_one_object_a_line_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info", json_lines=True)
    try:
        int("two\nlines")
    except ValueError:
        logging.getLogger("tidegate.x").exception("failed")
    (line,) = capsys.readouterr().err.splitlines()
    read = json.loads(line)
    assert (read["level"], read["logger"], read["message"]) == ("error", "tidegate.x", "failed")
    assert "ValueError: invalid literal" in read["exception"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", read["time"])


@pytest.mark.parametrize(
    ("level", "logger", "said", "shown"),
    [
        pytest.param("info", "tidegate", logging.DEBUG, False, id="below the level"),
        pytest.param("debug", "tidegate", logging.DEBUG, True, id="at the level"),
        pytest.param("debug", "kopf.objects", logging.INFO, False, id="a library's remark"),
        pytest.param("info", "aiohttp.server", logging.WARNING, True, id="a library's warning"),
        pytest.param("error", "aiohttp.server", logging.WARNING, False, id="below a high level"),
    ],
)
def test_what_is_shown(
    capsys: pytest.CaptureFixture[str], level: str, logger: str, said: int, shown: bool
) -> None:
    configure(level)
    logging.getLogger(logger).log(said, "text")
    assert bool(capsys.readouterr().err) is shown


def test_kopf_does_not_remark_on_signals_that_are_not_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info")
    kopf = logging.getLogger("kopf._core.reactor.running")
    kopf.warning("OS signals are ignored: running not in the main thread.")
    kopf.warning("something else")
    assert capsys.readouterr().err.count("\n") == 1


def test_a_level_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="'loud' is none of debug, info, warning, error"):
        configure("loud")
