"""`tidegate local`: a cluster on this machine."""

import json
import sys
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from tidegate.local.cluster import LocalCluster
    from tidegate.local.layout import Settings

app = typer.Typer(
    no_args_is_help=True,
    help="A whole cluster on this machine: real control plane, GPU nodes and engines as processes.",
)


class Output(StrEnum):
    """How to print a result."""

    text = "text"
    json = "json"


class Parts(StrEnum):
    """What to run."""

    control_plane = "control-plane"
    nodes = "nodes"
    everything = "everything"


Directory = Annotated[
    Path, typer.Option("--dir", "-d", help="State folder of the cluster.", envvar="TIDEGATE_DIR")
]
Format = Annotated[Output, typer.Option("--output", "-o", help="Output format.")]
DEFAULT_DIR = Path(".tidegate")


def _fail(message: object) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


def _progress(text: str) -> None:
    typer.echo(f"  {text}", err=True)


def _attach(directory: Path) -> "LocalCluster":
    from tidegate.local.cluster import ClusterError, LocalCluster

    try:
        return LocalCluster.attach(directory)
    except ClusterError as error:
        _fail(error)


def _pairs(option: str, values: list[str]) -> dict[str, str]:
    pairs = {}
    for value in values:
        name, separator, rest = value.partition("=")
        if not separator or not name:
            _fail(f"{option} {value}: it must be NAME=VALUE")
        pairs[name] = rest
    return pairs


def _ports(values: list[str]) -> dict[str, int]:
    ports = {}
    for name, value in _pairs("--port", values).items():
        if not value.isdecimal():
            _fail(f"--port {name}={value}: {value!r} is not a port number")
        ports[name] = int(value)
    return ports


@app.command()
def up(
    directory: Directory = DEFAULT_DIR,
    nodes: Annotated[int, typer.Option(help="GPU nodes.")] = 4,
    gpus: Annotated[int, typer.Option(help="GPUs on each node.")] = 4,
    port: Annotated[
        list[str] | None, typer.Option(help="NAME=PORT: a listener that must have this port.")
    ] = None,
    parts: Annotated[
        Parts, typer.Option(help="The control plane only, GPU nodes too, or also Tidegate and the gateway.")
    ] = Parts.everything,
    engine_env: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE: environment of every emulated engine.")
    ] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="NAME=COMMAND: another image and the command it stands for.")
    ] = None,
    foreground: Annotated[bool, typer.Option(help="Stay, and stop the cluster on Ctrl-C.")] = False,
    output: Format = Output.text,
) -> None:
    """Start a cluster, or say that it is up already."""
    from tidegate.local.cluster import CONTROL_PLANE, EVERYTHING, NODES, ClusterError, LocalCluster
    from tidegate.local.layout import Settings
    from tidegate.local.network import DEFAULT_PORTS

    chosen = {Parts.control_plane: CONTROL_PLANE, Parts.nodes: NODES, Parts.everything: EVERYTHING}

    try:
        settings = Settings(
            nodes=nodes,
            gpus_per_node=gpus,
            parts=chosen[parts],
            ports=_ports(port or []),
            engine_env=_pairs("--engine-env", engine_env or []),
            images=_pairs("--image", image or []),
        )
        if unknown := sorted(set(settings.ports) - set(DEFAULT_PORTS)):
            _fail(f"--port {unknown[0]}: no such listener; there are {', '.join(DEFAULT_PORTS)}")
        cluster = LocalCluster(directory.absolute())
        if cluster.is_running():
            _same_or_fail(cluster, settings)
            cluster.wait_up()
            typer.echo(f"already up in {cluster.layout.root}", err=True)
        else:
            began = time.monotonic()
            cluster = LocalCluster.start(directory, settings, keep=not foreground, progress=_progress)
            typer.echo(f"up in {time.monotonic() - began:.1f} s", err=True)
        _print_status(cluster.status(), output)
        if foreground:
            _stay(cluster)
    except (ClusterError, ValueError) as error:
        _fail(error)


def _same_or_fail(cluster: "LocalCluster", asked: "Settings") -> None:
    """Fail when the running cluster was asked to be another one."""
    if different := cluster.settings().difference(asked):
        _fail(
            f"a cluster with other settings ({', '.join(different)}) runs in {cluster.layout.root};"
            f" `tidegate local down --dir {cluster.layout.root}` first, or choose another --dir"
        )


def _stay(cluster: "LocalCluster") -> None:
    try:
        typer.echo("Ctrl-C stops the cluster", err=True)
        while cluster.is_running():
            time.sleep(0.5)
    except KeyboardInterrupt:
        typer.echo("stopping", err=True)
    finally:
        cluster.stop()


@app.command()
def down(
    directory: Directory = DEFAULT_DIR,
    delete: Annotated[bool, typer.Option("--delete", help="Remove the state folder too.")] = False,
) -> None:
    """Stop a cluster and all that it started; what it stored stays for the next `up`."""
    import shutil

    from tidegate.local.cluster import LocalCluster

    cluster = LocalCluster(directory.absolute())
    was_up = cluster.is_running()
    cluster.stop()
    typer.echo(f"stopped {cluster.layout.root}" if was_up else f"no cluster runs in {cluster.layout.root}")
    if delete and cluster.layout.settings.exists():  # only a folder that is a cluster's
        shutil.rmtree(cluster.layout.root)
        typer.echo(f"removed {cluster.layout.root}")


@app.command()
def status(directory: Directory = DEFAULT_DIR, output: Format = Output.text) -> None:
    """Say what runs, where, and how often it was restarted. Exit code 1 when nothing does."""
    from tidegate.local.cluster import ClusterError

    try:
        _print_status(_attach(directory).status(), output)
    except ClusterError as error:
        _fail(error)


def _print_status(state: dict[str, Any], output: Output) -> None:
    if output is Output.json:
        typer.echo(json.dumps(state, indent=2))
        return
    rows = [("COMPONENT", "STATE", "PID", "RESTARTS")]
    rows += [
        (name, unit["state"], str(unit["pid"] or "-"), str(unit["restarts"]))
        for name, unit in state["components"].items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    typer.echo(f"\n{'phase':<12}{state['phase']}\n{'network':<12}{state['network']}")
    for name, url in state["urls"].items():
        typer.echo(f"{name:<12}{url}")
    typer.echo(f"\nexport KUBECONFIG={state['kubeconfig']}")


@app.command()
def logs(
    component: Annotated[
        str, typer.Argument(help="A component of `tidegate local status`, or `supervisor`.")
    ],
    directory: Directory = DEFAULT_DIR,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines arrive.")] = False,
    tail: Annotated[int, typer.Option(help="How many of the last lines; -1 for all.", min=-1)] = -1,
) -> None:
    """Print a component's log; it is there after `down` too."""
    from tidegate.local.layout import Layout

    layout = Layout(directory.absolute())
    path = layout.log(component)
    if not path.exists():
        there = ", ".join(sorted(file.stem for file in layout.logs.glob("*.log"))) or "none"
        _fail(f"no log of {component!r} in {layout.logs}; there are: {there}")
    for text in _read_log(path, tail=tail, follow=follow):
        sys.stdout.write(text)
        sys.stdout.flush()


def _read_log(path: Path, *, tail: int, follow: bool) -> Iterator[str]:
    with path.open(errors="replace") as file:
        lines = file.readlines()
        yield "".join(lines if tail < 0 else lines[len(lines) - min(tail, len(lines)) :])
        while follow:
            if text := file.read():
                yield text
            else:
                time.sleep(0.2)


@app.command()
def restart(
    component: Annotated[str, typer.Argument(help="A component of `tidegate local status`.")],
    directory: Directory = DEFAULT_DIR,
) -> None:
    """Restart one component and wait until it is ready again."""
    from tidegate.local.cluster import ClusterError

    try:
        _attach(directory).restart(component)
    except ClusterError as error:
        _fail(error)
    typer.echo(f"{component} restarted")


@app.command()
def kubeconfig(
    directory: Directory = DEFAULT_DIR,
    export: Annotated[bool, typer.Option(help="Print a line for a shell to evaluate.")] = False,
) -> None:
    """Print the path of the administrator's kubeconfig."""
    path = _attach(directory).kubeconfig
    typer.echo(f"export KUBECONFIG={path}" if export else str(path))


@app.command()
def build() -> None:
    """Find the control plane's programs, or build them now rather than at the first `up`."""
    from tidegate.local.binaries import BinaryError, find_all
    from tidegate.local.components import PROGRAMS

    try:
        found = find_all(sorted(set(PROGRAMS.values())), _progress)
    except BinaryError as error:
        _fail(error)
    for name, path in sorted(found.items()):
        typer.echo(f"{name:<25}{path}")
