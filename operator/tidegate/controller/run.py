"""Starts the controller's parts, and stops them in order."""

import asyncio
import logging
import signal
from dataclasses import dataclass, field

from aiohttp import web

from tidegate.adapters.kube import Kube
from tidegate.controller.loop import Controller, Options
from tidegate.controller.server import application

log = logging.getLogger(__name__)


class StartError(Exception):
    """The controller cannot start; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Serving:
    """Where the controller answers, and how it works."""

    host: str = "127.0.0.1"
    port: int = 9090
    options: Options = field(default_factory=Options)


async def run(serving: Serving) -> None:
    """Serve and work until SIGTERM or SIGINT. Raises StartError."""
    kube = await _connect(serving.options.kubeconfig)
    async with kube:
        controller = Controller(kube, serving.options)
        loop = asyncio.get_running_loop()
        for sent in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sent, controller.stopping.set)
        app = application(
            controller.telemetry.registry, controller.reporter.decisions, controller.healthy, controller.ready
        )
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        try:
            try:
                await web.TCPSite(runner, serving.host, serving.port).start()
            except OSError as error:
                raise StartError(
                    f"--port {serving.port} on {serving.host}: {error.strerror or error}"
                ) from error
            log.info("controller at http://%s:%d, API server %s", serving.host, serving.port, kube.host)
            await controller.run()
            log.info("stopped")
        finally:
            await runner.cleanup()


async def _connect(kubeconfig: str | None) -> Kube:
    from kubernetes.aio.config.config_exception import ConfigException

    try:
        return await Kube.connect(kubeconfig)
    except (ConfigException, OSError) as error:
        where = f"--kubeconfig {kubeconfig}" if kubeconfig else "no --kubeconfig, and not inside a cluster"
        raise StartError(
            f"no API server to work with ({where}): {error}. Give --kubeconfig FILE or set KUBECONFIG"
        ) from error
