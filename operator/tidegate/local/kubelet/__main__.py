"""Command line: `python -m tidegate.local.kubelet --help`."""

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path

from tidegate.adapters.logs import configure
from tidegate.local.kubelet import images
from tidegate.local.kubelet.kubelet import Settings, run
from tidegate.local.kubelet.nodes import Fleet

_INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR")
"""Of the kubelet's own environment, what programs cannot do without."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tidegate.local.kubelet",
        description="Plays the kubelet for all GPU nodes of a local cluster: pods become processes.",
    )
    add = parser.add_argument
    add("--kubeconfig", required=True, help="how to reach the API server")
    add("--network", required=True, help="first two octets of the pods' addresses, e.g. 127.7")
    add("--nodes", type=int, default=4, help="number of nodes (default 4)")
    add("--gpus", type=int, default=4, help="GPUs of each node (default 4)")
    add("--host", required=True, help="address to serve on, also the nodes' InternalIP")
    add("--port", type=int, default=10250, help="port to serve on (default 10250)")
    add("--cert", type=Path, required=True, help="certificate of the HTTPS server")
    add("--key", type=Path, required=True, help="its key")
    add("--client-ca", type=Path, required=True, help="CA of the clients that may ask")
    add("--state-dir", type=Path, required=True, help="folder for logs")
    add("--engine-env", action="append", default=[], metavar="K=V", help="environment of every container")
    add("--image", action="append", default=[], metavar="NAME=COMMAND", help="a program for an image")
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    return parser


def _settings(args: argparse.Namespace) -> Settings:
    """Check what argparse cannot. Raises ValueError naming the flag."""
    octets = args.network.split(".")
    if len(octets) != 2 or not all(o.isdigit() and int(o) < 256 for o in octets):
        raise ValueError(f"--network {args.network!r}: write the first two octets, e.g. 127.7")
    for flag, value, most in (("--nodes", args.nodes, 254), ("--gpus", args.gpus, 1024)):
        if not 0 <= value <= most:
            raise ValueError(f"{flag} {value}: must be 0 to {most}")
    env = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    for text in args.engine_env:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ValueError(f"--engine-env {text!r}: write NAME=VALUE")
        env[name] = value
    return Settings(
        kubeconfig=args.kubeconfig,
        network=args.network,
        fleet=Fleet(args.nodes, args.gpus, args.host, args.port),
        cert=args.cert,
        key=args.key,
        client_ca=args.client_ca,
        state_dir=args.state_dir.resolve(),
        images=images.with_overrides(args.image),
        base_env=env,
    )


async def _main(settings: Settings) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await run(settings, stop)


def main(argv: list[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        configure(args.log_level)
        settings = _settings(args)
        settings.state_dir.mkdir(parents=True, exist_ok=True)
        asyncio.run(_main(settings))
    except (ValueError, OSError) as error:
        print(f"kubelet: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
