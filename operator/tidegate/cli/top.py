"""`tidegate top`: queues, room, headroom, TTFT and attainment by class and model."""

import asyncio
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from tidegate.cli.options import Kubeconfig, path

if TYPE_CHECKING:
    from rich.table import Table

_EVERY_S: Final = 2.0

Row = dict[str, Any]
State = Mapping[str, Any]


class Form(StrEnum):
    """How the figures are written."""

    table = "table"
    json = "json"


def top(
    picker: Annotated[
        list[str] | None,
        typer.Option(
            help="URL of a picker (port 9091); may be repeated. Left out: asked through the API server."
        ),
    ] = None,
    kubeconfig: Kubeconfig = None,
    service: Annotated[
        str, typer.Option(help="Without --picker: NAMESPACE/SERVICE:PORT of the picker.")
    ] = "tidegate-system/tidegate-picker:9091",
    output: Annotated[Form, typer.Option("--output", "-o", help="How to write it.")] = Form.table,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show it again every two seconds, until Ctrl-C.")
    ] = False,
) -> None:
    """Show how every class of every model stands: what waits and runs, what is kept free, what was promised.

    TTFT and TPOT are of the last five minutes, as Envoy measured them; attainment is over the class's
    window, or since the picker started. Through the API server it takes the right to `get`
    services/proxy; of several pickers behind a Service that shows one, so name them with --picker.
    """
    if not picker and not all(service.partition("/")):
        raise typer.BadParameter("must be NAMESPACE/SERVICE:PORT", param_hint="--service")
    try:
        _show(picker or [], path(kubeconfig), service, output, watch=watch)
    except _UnreachableError as error:
        typer.secho(f"top: {error}", fg="red", err=True)
        raise typer.Exit(1) from error


class _UnreachableError(Exception):
    """No picker could be asked; the message says which and why."""


def _show(pickers: list[str], kubeconfig: str | None, service: str, form: Form, *, watch: bool) -> None:
    import orjson
    from rich.console import Console
    from rich.live import Live

    def read() -> list[Row]:
        found = _urls(pickers) if pickers else _proxied(kubeconfig, service)
        return rows(asyncio.run(found))

    if form is Form.json:
        typer.echo(orjson.dumps(read(), option=orjson.OPT_INDENT_2).decode())
    elif not watch:
        Console().print(table(read()))
    else:
        import time

        with Live(table(read()), auto_refresh=False) as live:
            while True:
                time.sleep(_EVERY_S)
                live.update(table(read()), refresh=True)


async def _urls(pickers: list[str]) -> list[State]:
    import httpx

    async with httpx.AsyncClient(timeout=5.0, trust_env=False) as client:
        found = []
        for url in pickers:
            try:
                answer = await client.get(f"{url.rstrip('/')}/debug/state")
                found.append(answer.raise_for_status().json())
            except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
                text = str(error) or type(error).__name__
                raise _UnreachableError(f"{url}: {text}; is --picker its port 9091?") from error
        return found


async def _proxied(kubeconfig: str | None, service: str) -> list[State]:
    from tidegate.adapters.kube import ApiError, Kube

    namespace, _, name = service.partition("/")
    asked = f"/api/v1/namespaces/{namespace}/services/http:{name}/proxy/debug/state"
    try:
        async with await Kube.connect(kubeconfig) as kube:
            return [await kube.request("GET", asked, timeout_s=10.0)]
    except (ApiError, OSError, ValueError) as error:
        raise _UnreachableError(f"service {service}: {error}; name the picker with --picker URL") from error


# ── from states to rows, pure ───────────────────────────────────────────────────────────────────


def rows(states: Sequence[State]) -> list[Row]:
    """One row for each class of a model. Counts of several pickers add up; of their times the worst."""
    found: dict[tuple[str, str, str], Row] = {}
    for state in states:
        for entry in state.get("queues") or ():
            row = _row(found, entry)
            row["waiting"] += entry["waiting"]
            row["oldest_s"] = max(row["oldest_s"], entry["oldest_s"])
        for entry in state.get("in_flight") or ():
            _row(found, entry)["running"] += entry["requests"]
        for entry in state.get("promises") or ():
            _promise(_row(found, entry), entry)
    for state in states:
        for place in state.get("endpoints") or ():
            for key, row in found.items():
                if key[:2] == (place["namespace"], place["model"]):
                    _endpoint(row, place)
    for row in found.values():
        row["replicas"] = len(row["replicas"])
        judged = row["judged"]
        row["attainment"] = row["kept"] / judged if judged else None
    return [found[key] for key in sorted(found)]


def _row(found: dict[tuple[str, str, str], Row], entry: State) -> Row:
    key = (entry["namespace"], entry["model"], entry["qos_class"])
    if key not in found:
        found[key] = dict(zip(("namespace", "model", "qos_class"), key, strict=True)) | {
            "waiting": 0,
            "oldest_s": 0.0,
            "running": 0,
            "headroom": 0,
            "replicas": {},
            "kept": 0,
            "judged": 0,
            "attainment": None,
            "attainment_objective": None,
            **dict.fromkeys(_TIMES),
        }
    return found[key]


_TIMES: Final = ("ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s")


def _promise(row: Row, entry: State) -> None:
    row["kept"] += entry["kept"]
    row["judged"] += entry["judged"]
    row["attainment_objective"] = entry["attainment_objective"]
    for name in _TIMES:
        known = [value for value in (row[name], entry.get(name)) if value is not None]
        row[name] = max(known, default=None)


def _endpoint(row: Row, place: State) -> None:
    """Count a replica once, however many pickers know it, and what they keep free of the class there."""
    if not place["ready"] or place["draining"]:
        return
    kept = int((place.get("keeps_free_from") or {}).get(row["qos_class"], 0))
    before = row["replicas"].get(place["address"], 0)
    row["replicas"][place["address"]] = max(before, kept)
    row["headroom"] += max(0, kept - before)


def table(found: list[Row]) -> "Table":
    """The rows for a terminal."""
    from rich.table import Table

    shown = Table(pad_edge=False, box=None)
    for heading in ("namespace", "model", "class"):
        shown.add_column(heading)
    counts = ("waiting", "oldest", "running", "replicas", "kept free")
    for heading in (*counts, "TTFT p50", "p99", "TPOT p50", "attained"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in found:
        shown.add_row(
            row["namespace"],
            row["model"],
            row["qos_class"],
            str(row["waiting"]),
            _seconds(row["oldest_s"]) if row["waiting"] else "–",
            str(row["running"]),
            str(row["replicas"]),
            str(row["headroom"]),
            *(_seconds(row[name]) for name in _TIMES[:3]),
            _attained(row),
        )
    return shown


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def _attained(row: Row) -> str:
    if row["attainment"] is None:
        return "–"
    style = "red" if row["attainment"] < row["attainment_objective"] else "green"
    # Rounded down: 99.0 % is at least that.
    share, aim = int(row["attainment"] * 1000) / 10, row["attainment_objective"] * 100
    return f"[{style}]{share:.1f} % of {aim:.0f} %[/{style}]"
