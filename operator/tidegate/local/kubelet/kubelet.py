"""The kubelet of all nodes: takes in pods bound to them, gives each a place, and runs them."""

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Awaitable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from tidegate.adapters.kube import Kube, Reflector
from tidegate.adapters.kube.kinds import POD
from tidegate.local.kubelet import server, status
from tidegate.local.kubelet.addresses import Addresses
from tidegate.local.kubelet.clock import Clock
from tidegate.local.kubelet.devices import Devices
from tidegate.local.kubelet.events import Recorder
from tidegate.local.kubelet.handlers import Handlers
from tidegate.local.kubelet.images import Image
from tidegate.local.kubelet.model import GPU, Object, read_pod
from tidegate.local.kubelet.nodes import Fleet, Nodes
from tidegate.local.kubelet.processes import Processes
from tidegate.local.kubelet.sessions import kill_strays
from tidegate.local.kubelet.state import PodState, Rejection
from tidegate.local.kubelet.worker import Place, Services, Worker

log = logging.getLogger(__name__)

_STOP_S: Final = 3.0
"""What processes get between SIGTERM and SIGKILL when the kubelet itself stops."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line says. `network` is two octets, as `127.7`."""

    kubeconfig: str
    network: str
    fleet: Fleet
    cert: Path
    key: Path
    client_ca: Path
    state_dir: Path
    images: Mapping[str, Image]
    base_env: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Node:
    devices: Devices
    addresses: Addresses


class Kubelet:
    """All pods of all nodes."""

    def __init__(self, services: Services, fleet: Fleet, network: str) -> None:
        self._services = services
        self._nodes = {
            name: _Node(Devices(fleet.gpus), Addresses(network, index))
            for index, name in enumerate(fleet.names(), start=1)
        }
        self._workers: dict[str, Worker] = {}
        self._names: dict[tuple[str, str], str] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._early: list[tuple[str, Object]] | None = []

    def workers(self) -> Iterable[Worker]:
        """All pods that are known."""
        return self._workers.values()

    def find(self, namespace: str, name: str) -> Worker | None:
        """The pod of this name, if it is ours."""
        return self._workers.get(self._names.get((namespace, name), ""))

    def on_change(self, event: str, obj: Object) -> None:
        """Take in one event of the watch; those of the first listing are kept for `begin`."""
        if obj["spec"].get("nodeName") not in self._nodes:
            return
        if self._early is not None:
            self._early.append((event, obj))
            return
        meta = obj["metadata"]
        key, uid = (meta["namespace"], meta["name"]), meta["uid"]
        before = self._names.get(key)
        if before is not None and (before != uid or event == "DELETED"):
            self._workers[before].removed()
        if event == "DELETED":
            return
        if worker := self._workers.get(uid):
            worker.update(obj)
        else:
            self._admit(obj)

    def begin(self) -> None:
        """Take in what was listed at the start: those admitted before keep their place."""
        early, self._early = self._early or [], None
        early.sort(key=lambda item: (item[1].get("status") or {}).get("startTime") or "~")
        for event, obj in early:
            self.on_change(event, obj)

    async def stop(self) -> None:
        """End all pods' processes, bounded in time. Their objects stay as they are."""
        await asyncio.gather(*(worker.stop(_STOP_S) for worker in self._workers.values()))
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _admit(self, obj: Object) -> None:
        pod = read_pod(obj)
        node, now = self._nodes[pod.node], self._services.clock.now()
        known = obj.get("status") or {}
        state = status.restore(pod, known, now)
        ended = known.get("phase") in {"Succeeded", "Failed"}
        place = Place("")
        if ended:
            state = _never_again(state)
        else:
            gpus = node.devices.take(pod.uid, pod.gpus)
            address = node.addresses.take(now, known.get("podIP") or "") if gpus is not None else None
            if gpus is None:
                refusal = Rejection(f"OutOf{GPU}", node.devices.refusal(pod.gpus))
                state = PodState(containers=state.containers, admitted_s=now, rejection=refusal)
            elif address is None:
                node.devices.release(pod.uid)
                refusal = Rejection("OutOfpods", f"Pod was rejected: no address is free on {pod.node}")
                state = PodState(containers=state.containers, admitted_s=now, rejection=refusal)
            else:
                place = Place(address, gpus)
        worker = Worker(self._services, obj, state, place, lambda: node.devices.release(pod.uid))
        self._workers[pod.uid] = worker
        self._names[pod.namespace, pod.name] = pod.uid
        worker.update(obj)  # it may be on its way out already
        self._tasks[pod.uid] = asyncio.create_task(self._attend(worker, node))

    async def _attend(self, worker: Worker, node: _Node) -> None:
        """Run a pod to its end, then give back what it held."""
        pod = worker.pod
        try:
            await worker.run()
        except Exception:
            log.exception("pod %s/%s: the kubelet failed", pod.namespace, pod.name)
        node.devices.release(pod.uid)
        node.addresses.release(worker.place.ip, self._services.clock.now())
        worker.forget_files()
        del self._workers[pod.uid], self._tasks[pod.uid]
        if self._names.get((pod.namespace, pod.name)) == pod.uid:
            del self._names[pod.namespace, pod.name]


def _never_again(state: PodState) -> PodState:
    """A pod that ended before is not run, whatever its restart policy says."""
    rejection = state.rejection or Rejection("Ended", "the pod ended before")
    return PodState(state.containers, state.admitted_s, rejection=rejection)


async def run(settings: Settings, stop: asyncio.Event) -> None:
    """Run until `stop` is set. Raises OSError when the port is taken."""
    clock = Clock()
    marker = {"TIDEGATE_KUBELET": str(settings.state_dir)}
    if strays := kill_strays(str(settings.state_dir)):
        log.warning("killed %d processes that an earlier kubelet left behind", strays)
    targets = {image.target.partition(":")[0] for image in settings.images.values() if image.target}
    processes = Processes(sorted(targets))
    async with contextlib.AsyncExitStack() as stack:
        processes.open()
        stack.callback(processes.close)
        kube = await stack.enter_async_context(await Kube.connect(settings.kubeconfig))
        handlers = Handlers(processes)
        stack.push_async_callback(handlers.close)
        recorder = Recorder(kube, clock)
        stack.push_async_callback(recorder.close)
        services = Services(
            kube=kube,
            processes=processes,
            handlers=handlers,
            recorder=recorder,
            clock=clock,
            images=settings.images,
            base_env={**settings.base_env, **marker},
            host_ip=settings.fleet.host,
            state_dir=settings.state_dir,
        )
        kubelet = Kubelet(services, settings.fleet, settings.network)
        stack.push_async_callback(kubelet.stop)
        reflector = Reflector(kube, POD, on_change=kubelet.on_change)
        nodes = Nodes(kube, settings.fleet, clock.now)
        for work in (reflector.run(), nodes.run()):
            stack.push_async_callback(_cancel, asyncio.create_task(work))
        if await _first(stop.wait(), asyncio.gather(reflector.synced.wait(), nodes.written.wait())):
            return
        _remove_old_logs(settings.state_dir, reflector.objects.values())
        kubelet.begin()
        # The port opens last: whoever waits for it finds the nodes there and Ready.
        await _serve(stack, settings, kubelet, clock)
        log.info("%d nodes, %d pods", settings.fleet.count, len(list(kubelet.workers())))
        await stop.wait()


async def _first(stopped: Awaitable[Any], other: Awaitable[Any]) -> bool:
    """Wait for either; returns whether it was `stopped`. The one that is late is cancelled."""
    tasks = [asyncio.ensure_future(stopped), asyncio.ensure_future(other)]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    was_stopped = tasks[0].done()
    for task in tasks:
        task.cancel()
    return was_stopped


async def _serve(
    stack: contextlib.AsyncExitStack, settings: Settings, kubelet: Kubelet, clock: Clock
) -> None:
    app = server.application(kubelet.find, kubelet.workers, clock)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    context = server.tls(settings.cert, settings.key, settings.client_ca)
    fleet = settings.fleet
    await web.TCPSite(runner, fleet.host, fleet.port, ssl_context=context, reuse_address=True).start()


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _remove_old_logs(state_dir: Path, pods: Iterable[Object]) -> None:
    """Remove the logs of pods that were deleted while no kubelet ran."""
    alive = {pod["metadata"]["uid"] for pod in pods}
    for folder in _folders(state_dir / "pods"):
        if folder.name not in alive:
            shutil.rmtree(folder, ignore_errors=True)


def _folders(parent: Path) -> Iterator[Path]:
    if parent.is_dir():
        yield from (path for path in parent.iterdir() if path.is_dir())
