"""`tidegate gateway`: Envoy's configuration, as files."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tidegate.cli.options import Format, Host, Level, LogFormat, LogLevel, log_to_stderr

if TYPE_CHECKING:
    from tidegate.api.identity import IdentitySources
    from tidegate.render.envoy_auth import GatewayAuth


def gateway(
    out: Annotated[
        Path,
        typer.Option(help="Folder for envoy.json and the filters' files; Envoy must see it as this path."),
    ],
    identity: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="File that says where a caller's identity comes from."
        ),
    ] = None,
    host: Host = "0.0.0.0",  # noqa: S104 -- what clients reach
    port: Annotated[int, typer.Option(help="Port for clients.")] = 8080,
    admin_port: Annotated[int, typer.Option(help="Port of Envoy's admin interface, on loopback.")] = 9901,
    picker: Annotated[str, typer.Option(help="HOST:PORT of the picker's ext_proc.")] = "127.0.0.1:9002",
    measure_port: Annotated[
        int | None,
        typer.Option(help="The picker's --measure-port, such as 9004. Left out: answers are not measured."),
    ] = None,
    access_log: Annotated[
        str | None, typer.Option(help="File for the access log, such as /dev/stderr.")
    ] = None,
    watch: Annotated[
        float,
        typer.Option(min=0, help="Look every so many seconds whether keys have changed; 0: write once."),
    ] = 0.0,
    log_level: Level = LogLevel.INFO,
    log_format: Format = LogFormat.TEXT,
) -> None:
    """Write Envoy's configuration, with JWTs and API keys checked as --identity says.

    With --watch it goes on, and writes changed API keys and key sets of files for Envoy to take up
    without a restart. What changes in --identity itself wants a new start of both.
    """
    import json

    from tidegate.adapters.gatewayfiles import write_files
    from tidegate.api.common import InvalidObject
    from tidegate.api.identity import IdentitySources, load
    from tidegate.render.envoy import bootstrap

    log_to_stderr(log_level, log_format)
    picker_host, _, picker_port = picker.rpartition(":")
    if not picker_host or not picker_port.isdecimal():
        typer.echo(f"tidegate gateway: --picker must be HOST:PORT, not {picker!r}", err=True)
        raise typer.Exit(2)
    try:
        sources = load(identity) if identity is not None else IdentitySources()
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = str(out.resolve())
        auth = _auth(sources, folder)
        config = bootstrap(
            listen_host=host,
            listen_port=port,
            admin_port=admin_port,
            picker_host=picker_host.strip("[]"),
            picker_port=int(picker_port),
            access_log=access_log,
            auth=auth,
            measure_port=measure_port,
        )
        written = write_files(out, {**auth.files(), "envoy.json": json.dumps(config, indent=1)})
    except (InvalidObject, OSError) as error:
        typer.echo(f"tidegate gateway: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"wrote {', '.join(written) or 'nothing: all is as it was'} in {folder}", err=True)
    if watch:
        _follow(out, auth, watch)


def _auth(sources: "IdentitySources", folder: str | None) -> "GatewayAuth":
    from tidegate.adapters.gatewayfiles import read_secrets
    from tidegate.render.envoy_auth import GatewayAuth

    found = read_secrets(sources)
    return GatewayAuth(sources, found.keys, found.jwks, folder)


def _follow(out: Path, auth: "GatewayAuth", period_s: float) -> None:
    """Write what changes, until stopped. What cannot be read leaves the last good files in place."""
    import logging
    import time

    from tidegate.adapters.gatewayfiles import write_files
    from tidegate.api.common import InvalidObject

    log, trouble = logging.getLogger("tidegate.gateway"), ""
    while True:
        time.sleep(period_s)
        try:
            written = write_files(out, _auth(auth.sources, auth.folder).files())
            problem = ""
        except (InvalidObject, OSError) as error:
            written, problem = [], str(error)
        if written:
            log.info("changed: %s", ", ".join(written))
        if problem and problem != trouble:
            log.error("the files stay as they are: %s", problem)
        trouble = problem
