"""`tidegate demo`: the main job, end to end, on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console


def demo(
    directory: Annotated[Path, typer.Option("--dir", help="Where the cluster keeps its state.")] = Path(
        ".tidegate/demo"
    ),
    out: Annotated[Path, typer.Option(help="Where summary.json, the plots and the report go.")] = Path(
        "out/demo"
    ),
    nodes: Annotated[int, typer.Option(min=1, help="GPU nodes.")] = 4,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs a node.")] = 4,
    calm: Annotated[float, typer.Option(min=1, help="Seconds before the rush.")] = 15.0,
    rush: Annotated[float, typer.Option(min=1, help="Seconds of the rush.")] = 35.0,
    after: Annotated[float, typer.Option(min=1, help="Seconds after the rush.")] = 35.0,
    backlog: Annotated[int, typer.Option(min=1, help="Batch requests outstanding.")] = 256,
    seed: Annotated[int, typer.Option(help="Where in the traces the load begins.")] = 1,
    keep: Annotated[bool, typer.Option("--keep", help="Leave it running at the end, and say where.")] = False,
) -> None:
    """Run one load twice on a local cluster, with QoS and in arrival order, and compare.

    Starts a real control plane, the operator, the schedulers, Envoy and the picker, with emulated
    engines on emulated GPUs; five minutes at most when everything is installed.
    """
    import asyncio

    from tidegate.demo.arms import DemoError
    from tidegate.demo.run import Demo
    from tidegate.demo.settings import Settings
    from tidegate.local.cluster import ClusterError

    settings = Settings(
        directory=directory,
        out=out,
        nodes=nodes,
        gpus_per_node=gpus,
        calm_s=calm,
        rush_s=rush,
        after_s=after,
        outstanding=backlog,
        seed=seed,
        keep=keep,
    )
    try:
        asyncio.run(Demo(settings, _console()).run())
    except (DemoError, ClusterError) as error:
        typer.secho(f"demo: {error}", fg="red", err=True)
        raise typer.Exit(1) from error


def _console() -> "Console":
    """The terminal; where there is none, wide enough that no line of the summary is folded."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=140)
