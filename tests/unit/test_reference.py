"""The generated reference pages: committed as generated, and complete."""

import re
from pathlib import Path

import pytest
import typer

from tidegate.cli import reference

ROOT = Path(__file__).parents[2]
PAGES = reference.pages()


@pytest.mark.parametrize("path", sorted(PAGES))
def test_committed_pages_are_as_generated(path: str) -> None:
    assert (ROOT / path).read_text() == PAGES[path], "run `tidegate manifests write`"


@pytest.mark.parametrize(
    "line",
    [
        "| `--dir`, `-d` | path | `.tidegate` | State folder of the cluster. Also $TIDEGATE_DIR. |",
        "| `SCENARIO` | path | required | Scenario as YAML or JSON. |",
        "| `--delete` | flag |  | Remove the state folder too. |",
        "| `--progress`, `--no-progress` | flag | on | A JSON line a second on standard error. |",
    ],
)
def test_an_option_is_shown_as_it_is_typed(line: str) -> None:
    assert line in PAGES["docs/reference/cli.md"].splitlines()


def test_every_command_is_there() -> None:
    from tidegate.cli.main import app

    found = re.findall("^## tidegate (.+)$", PAGES["docs/reference/cli.md"], re.MULTILINE)
    groups = [g.typer_instance for g in app.registered_groups if g.typer_instance]
    assert len(found) == sum(len(a.registered_commands) for a in (app, *groups))


def test_a_hidden_command_is_left_out() -> None:
    app = typer.Typer()
    app.command("seen")(lambda: None)
    app.command("unseen", hidden=True)(lambda: None)
    assert "## tidegate seen" in reference.cli_page(app)
    assert "unseen" not in reference.cli_page(app)


@pytest.mark.parametrize(
    "metric",
    [
        "tidegate_requests_total",
        "tidegate_queue_requests",
        "tidegate_borrows_total",
        "tidegate_extender_stale",
    ],
)
def test_metrics_of_every_server_are_there(metric: str) -> None:
    assert f"| `{metric}` |" in PAGES["docs/reference/metrics.md"]
