"""Entry point of `tidegate` and `kubectl tidegate`.

Each module of this package adds one sub-command; what it needs is imported when it runs, so that
`tidegate --help` and completions stay quick.
"""

import sys

import typer

from tidegate import __version__
from tidegate.cli import (
    conformance,
    controller,
    demo,
    extender,
    gateway,
    load,
    local,
    manifests,
    picker,
    profile,
    replay,
    simulate,
    snapshot,
    top,
)

app = typer.Typer(
    name="tidegate",
    help="Quality of service for GPU LLM pools on Kubernetes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(local.app, name="local")
app.add_typer(manifests.app, name="manifests")
app.add_typer(conformance.app, name="conformance")
app.command("demo")(demo.demo)
app.command("load")(load.load)
app.command("simulate")(simulate.simulate)
app.command("snapshot")(snapshot.snapshot)
app.command("top")(top.top)
app.command("controller")(controller.controller)
app.command("extender")(extender.extender)
app.command("picker")(picker.picker)
app.command("gateway")(gateway.gateway)
app.command("replay")(replay.replay)
app.command("profile")(profile.profile)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Run the command line; Ctrl-C ends it with 130, as a shell expects."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
