"""Reads a live cluster for `sim.snapshot`: its objects and pods, and what pickers and controller say."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from tidegate.adapters.kube import ApiError, Kind, Kube, kinds
from tidegate.adapters.metrics import MetricsError, Sample, TextSource
from tidegate.api.common import InvalidObject, KubeObject
from tidegate.api.gpupool import GPUPool
from tidegate.api.modeldeployment import ModelDeployment
from tidegate.api.names import LABEL_MODEL
from tidegate.api.qosclass import QoSClass
from tidegate.sim.snapshot import LaneName, Seen, Traffic, together, traffic

_TIMEOUT_S: Final = 5.0


class ClusterError(Exception):
    """The cluster cannot be read at all; the message says why and what to do."""


@dataclass(slots=True)
class Survey:
    """Asks everybody once. `problems` collects what could not be had, in sentences."""

    pickers: Sequence[str] = ()
    controller: str | None = None
    window_s: float = 10.0
    say: Callable[[str], None] = lambda _text: None
    problems: list[str] = field(default_factory=list)

    async def run(self, kubeconfig: str | None) -> Seen:
        """Read it all. Raises ClusterError when the API server cannot be read."""
        async with await _connect(kubeconfig) as kube:
            classes = await self._read(kube, kinds.QOS_CLASS, QoSClass, needed=True)
            models = await self._read(kube, kinds.MODEL_DEPLOYMENT, ModelDeployment, needed=True)
            pools = await self._read(kube, kinds.GPU_POOL, GPUPool)
            pods = await self._pods(kube, models)
            nodes = await self._nodes(kube)
        async with httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False) as client:
            seen = await self._traffic(client)
            kv_tokens = await self._kv_tokens(client)
            idle = await self._idle(client)
        return Seen(classes, models, pools, pods, seen, kv_tokens, idle, self.window_s, nodes)

    async def _read(self, kube: Kube, kind: Kind, model: type[Any], *, needed: bool = False) -> list[Any]:
        """All objects of a kind that can be understood."""
        try:
            items, _ = await kube.list(kind)
        except ApiError as error:
            if needed:
                raise ClusterError(f"{kind.plural} cannot be listed: {error}") from error
            self.problems.append(f"{kind.plural} cannot be listed: {error}")
            return []
        result: list[KubeObject] = []
        for item in items:
            try:
                result.append(model.from_object(item))
            except InvalidObject as error:
                self.problems.append(f"{kind.name} {item['metadata']['name']} is left out: {error}")
        return result

    async def _pods(self, kube: Kube, models: Sequence[ModelDeployment]) -> list[dict[str, Any]] | None:
        """Pods of all models; None when some could not be listed."""
        # Pods of External engines carry whatever labels their makers chose.
        foreign = {m.metadata.namespace or "default" for m in models if m.spec.engine.external}
        try:
            listed = [await kube.list(kinds.POD, labels=LABEL_MODEL)]
            listed += [await kube.list(kinds.POD, namespace) for namespace in sorted(foreign)]
        except ApiError as error:
            self.problems.append(f"pods cannot be listed: {error}")
            return None
        return list({pod["metadata"]["uid"]: pod for items, _ in listed for pod in items}.values())

    async def _nodes(self, kube: Kube) -> list[dict[str, Any]] | None:
        """All nodes; None when they could not be listed."""
        try:
            return (await kube.list(kinds.NODE))[0]
        except ApiError as error:
            self.problems.append(f"nodes cannot be listed: {error}")
            return None

    async def _traffic(self, client: httpx.AsyncClient) -> dict[LaneName, Traffic] | None:
        """Arrivals over all pickers; None when none of them answered twice."""
        if not self.pickers:
            self.problems.append("no --picker was given: arrivals and lengths are assumed")
            return None
        loop = asyncio.get_running_loop()
        before = await asyncio.gather(*(self._scrape(client, url) for url in self.pickers))
        if all(samples is None for samples in before):
            return None
        began = loop.time()
        self.say(f"counting arrivals for {self.window_s:g} s")
        await asyncio.sleep(self.window_s)
        span_s = loop.time() - began
        answered = [url for url, samples in zip(self.pickers, before, strict=True) if samples is not None]
        after = await asyncio.gather(*(self._scrape(client, url) for url in answered))
        firsts = [samples for samples in before if samples is not None]
        seen = [
            traffic(first, second, span_s)
            for first, second in zip(firsts, after, strict=True)
            if second is not None
        ]
        return together(seen) if seen else None

    async def _scrape(self, client: httpx.AsyncClient, url: str) -> list[Sample] | None:
        try:
            return await TextSource(url, client, "tidegate_").read()
        except MetricsError as error:
            self.problems.append(f"picker {error}")
            return None

    async def _kv_tokens(self, client: httpx.AsyncClient) -> dict[str, int]:
        """What engines told the pickers of their KV caches, by address."""
        found: dict[str, int] = {}
        for url in self.pickers:
            base = url.rstrip("/").removesuffix("/metrics")
            try:
                answer = await client.get(f"{base}/debug/state")
                answer.raise_for_status()
                endpoints = answer.json()["endpoints"]
                found |= {e["address"]: int(e["kv_tokens"]) for e in endpoints if e.get("kv_tokens")}
            except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
                self.problems.append(f"picker {base}/debug/state: {str(error) or type(error).__name__}")
        return found

    async def _idle(self, client: httpx.AsyncClient) -> dict[str, float]:
        """Idle GPUs by pool, as the controller counts them."""
        if self.controller is None:
            return {}
        try:
            samples = await TextSource(self.controller, client, "tidegate_pool_gpus").read()
        except MetricsError as error:
            self.problems.append(f"controller {error}")
            return {}
        return {s.labels["pool"]: s.value for s in samples if s.labels.get("state") == "idle"}


async def _connect(kubeconfig: str | None) -> Kube:
    from kubernetes.aio.config.config_exception import ConfigException

    try:
        return await Kube.connect(kubeconfig)
    except (ConfigException, OSError) as error:
        where = f"--kubeconfig {kubeconfig}" if kubeconfig else "no --kubeconfig, and not inside a cluster"
        raise ClusterError(
            f"no API server to read ({where}): {error}. Give --kubeconfig FILE or set KUBECONFIG"
        ) from error
