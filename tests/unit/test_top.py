"""`tidegate top`: rows from what pickers say, a table, JSON, and clear words where nobody answers."""

import io
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from support.ports import free_port
from tidegate.cli.main import app
from tidegate.cli.top import rows, table


def promise(kept: int, judged: int, **times: Any) -> dict[str, Any]:
    named = {"namespace": "ns", "model": "m", "qos_class": "high"}
    return named | {"kept": kept, "judged": judged, "attainment_objective": 0.99, **times}


def state(waiting: int = 2, kept: int = 3, promises: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    names = {"namespace": "ns", "model": "m"}
    queue = names | {"qos_class": "low", "waiting": waiting, "oldest_s": float(waiting)}
    place = names | {"lane": "high", "ready": True, "draining": False}
    return {
        "queues": [queue, queue | {"qos_class": "high", "waiting": 0, "oldest_s": 0.0}],
        "in_flight": [names | {"qos_class": "high", "requests": 4}],
        "endpoints": [
            place | {"address": "a:1", "keeps_free_from": {"low": kept}},
            place | {"address": "b:1", "keeps_free_from": {}},
            place | {"address": "c:1", "ready": False, "keeps_free_from": {"low": 9}},
        ],
        "promises": list(promises),
    }


def test_one_picker() -> None:
    high, low = rows([state(promises=(promise(98, 100, ttft_p50_s=0.2, ttft_p99_s=None),))])
    assert (high["qos_class"], high["running"], high["waiting"], high["headroom"]) == ("high", 4, 0, 0)
    assert (high["attainment"], high["ttft_p50_s"], high["ttft_p99_s"]) == (0.98, 0.2, None)
    assert (low["waiting"], low["oldest_s"], low["headroom"], low["replicas"]) == (2, 2.0, 3, 2)
    assert low["attainment"] is None


def test_counts_of_pickers_add_up_and_replicas_do_not() -> None:
    first = state(waiting=2, kept=3, promises=(promise(90, 100, ttft_p99_s=0.5),))
    other = state(waiting=5, kept=4, promises=(promise(300, 300, ttft_p99_s=0.9),))
    high, low = rows([first, other])
    assert (low["waiting"], low["oldest_s"], low["replicas"], low["headroom"]) == (7, 5.0, 2, 4)
    assert (high["running"], high["attainment"], high["ttft_p99_s"]) == (8, 0.975, 0.9)


def test_a_class_is_shown_by_its_promises_alone_and_nothing_as_nothing() -> None:
    assert rows([{}]) == []
    [row] = rows([{"promises": [promise(1, 1)]}])
    assert (row["attainment"], row["waiting"], row["replicas"]) == (1.0, 0, 0)


def test_the_table_says_it_all() -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(rows([state(promises=(promise(9899, 10_000, ttft_p50_s=0.21, ttft_p99_s=1.44),))])))
    lines = console.export_text().splitlines()
    assert lines[0].split()[:6] == ["namespace", "model", "class", "waiting", "oldest", "running"]
    # Not rounded up to what was promised.
    assert " ".join(lines[1].split()) == "ns m high 0 – 4 2 0 210 ms 1.4 s – 98.9 % of 99 %"
    assert lines[2].split()[:5] == ["ns", "m", "low", "2", "2.0"]


def test_nobody_answers() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    done = CliRunner().invoke(app, ["top", "--picker", url])
    assert done.exit_code == 1
    assert url in done.stderr
    assert "9091" in done.stderr


@pytest.mark.parametrize("service", ["picker:9091", "/picker", "ns/"])
def test_a_service_that_is_none(service: str) -> None:
    done = CliRunner().invoke(app, ["top", "--service", service])
    assert done.exit_code == 2
    assert "NAMESPACE/SERVICE:PORT" in done.stderr


async def test_a_picker_s_own_state_is_read() -> None:
    """What the server writes is what is read here."""
    import orjson

    from tidegate.core.flow import Flow
    from tidegate.picker.server import Options, Picker

    picker = Picker(Options(), None)  # type: ignore[arg-type]
    assert isinstance(picker.desk.flow, Flow)
    picker.cluster = type("Cluster", (), {"connected": True})()  # type: ignore[assignment]
    answer = await picker._state(None)  # type: ignore[arg-type]
    found = orjson.loads(answer.body)
    assert {"queues", "endpoints", "promises", "in_flight"} <= found.keys()
    assert rows([found]) == []
