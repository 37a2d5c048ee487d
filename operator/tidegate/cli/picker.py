"""`tidegate picker`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tidegate.cli.options import Format, Host, Kubeconfig, Level, LogFormat, LogLevel, log_to_stderr, path


class ServerChoice(StrEnum):
    """gRPC servers that can answer Envoy."""

    FRAMES = "frames"
    GRPCIO = "grpcio"


class PolicyName(StrEnum):
    """Ways to run the queue."""

    QOS = "qos"
    FIFO = "fifo"


def picker(
    host: Host = "127.0.0.1",
    ext_proc_port: Annotated[int, typer.Option(help="Port of Envoy's external processor.")] = 9002,
    health_port: Annotated[int, typer.Option(help="Port of gRPC health checks.")] = 9003,
    http_port: Annotated[int, typer.Option(help="Port of /metrics, /readyz and /debug/state.")] = 9091,
    measure_port: Annotated[
        int, typer.Option(help="Port of Envoy's access log: what is measured of answers.")
    ] = 9004,
    kubeconfig: Kubeconfig = None,
    policy: Annotated[
        PolicyName, typer.Option(help="qos, or fifo: one queue a model in arrival order, to compare with.")
    ] = PolicyName.QOS,
    trust_class_header: Annotated[
        bool,
        typer.Option(
            "--trust-class-header", help="Believe x-tidegate-qos: a gateway before this one checks callers."
        ),
    ] = False,
    identity: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="File that says where a caller's identity may come from (docs/tasks/identity.md); left out: "
            "bearer tokens that the API server knows.",
        ),
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(min=1024, help="Largest request body.")] = 16 << 20,
    show_endpoint: Annotated[
        bool,
        typer.Option("--show-endpoint", help="Responses name the engine's address: x-tidegate-endpoint."),
    ] = False,
    fallbacks: Annotated[
        int,
        typer.Option(
            min=0,
            max=16,
            help="Further endpoints to name with the first, for a gateway that goes on to them by itself.",
        ),
    ] = 0,
    tls_cert_file: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Certificate (PEM): speak TLS on the ext_proc port."),
    ] = None,
    tls_key_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="The certificate's key (PEM).")
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="How long requests under way may take after SIGTERM.")
    ] = 10.0,
    decision_log: Annotated[
        Path | None,
        typer.Option(
            help="Record what the queue is told and answers in this file, for `tidegate replay`. "
            "One that is there becomes NAME.old."
        ),
    ] = None,
    decision_log_max_bytes: Annotated[
        int, typer.Option(min=1024, help="Size at which recording ends, until the picker starts again.")
    ] = 1 << 30,
    server: Annotated[
        ServerChoice,
        typer.Option(help="What speaks gRPC: frames, our own HTTP/2, or grpcio, the reference, slower."),
    ] = ServerChoice.FRAMES,
    log_level: Level = LogLevel.INFO,
    log_format: Format = LogFormat.TEXT,
) -> None:
    """Run the endpoint picker: Envoy asks it where each request goes, and when."""
    import asyncio

    from tidegate.api.common import InvalidObject
    from tidegate.api.identity import IdentitySources, load
    from tidegate.picker.fronts import ServerName
    from tidegate.picker.server import Options, run

    log_to_stderr(log_level, log_format)
    if (tls_cert_file is None) != (tls_key_file is None):
        raise typer.BadParameter("--tls-cert-file and --tls-key-file go together: give both, or neither")
    try:
        sources = load(identity) if identity is not None else IdentitySources()
    except (InvalidObject, OSError) as error:
        typer.echo(f"tidegate picker: --identity: {error}", err=True)
        raise typer.Exit(2) from error
    options = Options(
        host=host,
        ext_proc_port=ext_proc_port,
        health_port=health_port,
        http_port=http_port,
        measure_port=measure_port,
        kubeconfig=path(kubeconfig),
        qos=policy is PolicyName.QOS,
        trust_class_header=trust_class_header,
        max_body=max_body_bytes,
        show_endpoint=show_endpoint,
        drain_s=drain_seconds,
        fallbacks=fallbacks,
        tls=(tls_cert_file, tls_key_file) if tls_cert_file and tls_key_file else None,
        identity=sources,
        decision_log=decision_log,
        decision_log_max_bytes=decision_log_max_bytes,
        server=ServerName(server.value),
    )
    try:
        asyncio.run(run(options))
    except OSError as error:
        typer.echo(f"tidegate picker: {error}", err=True)
        raise typer.Exit(1) from error
