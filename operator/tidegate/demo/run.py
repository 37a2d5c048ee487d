"""The demo: start everything, apply the examples, run the load twice, show both beside each other."""

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial

import httpx
from rich.console import Console
from rich.live import Live

from tidegate.demo import report, summary, view
from tidegate.demo.arms import Arm, DemoError, run_arm
from tidegate.demo.facts import Frame, gather
from tidegate.demo.settings import MODELS, Settings, examples, scenario
from tidegate.local.cluster import LocalCluster

_CALLERS = {
    "interactive": ("chat", "team-a"),
    "standard": ("coder", "team-b"),
    "batch": ("pipeline", "team-b"),
}
"""The ServiceAccount of the examples that each class's load is sent by."""
_TITLES = {"qos": "with QoS", "fifo": "in arrival order"}
_READY_S, _CALM_S = 120.0, 90.0


class Demo:
    """One run of the demo, step by step; `phases` notes how long each step took."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self.settings, self.console = settings, console
        self.phases: dict[str, float] = {}

    async def run(self) -> None:
        """Do it all. Raises DemoError; leaves nothing running unless asked to."""
        with self._phase("start the cluster"):
            cluster = await asyncio.to_thread(self._start)
        try:
            with self._phase("apply the examples"):
                await self._apply(cluster)
            arms = [await self._arm(cluster, name) for name in ("qos", "fifo")]
            with self._phase("write the report"):
                self._report(arms)
            if self.settings.keep:
                await self._keep(cluster)
        finally:
            with self._phase("stop"):
                await asyncio.to_thread(cluster.stop)

    def _start(self) -> LocalCluster:
        """A cluster that remembers nothing of an earlier demo in the same folder."""
        directory = self.settings.directory
        if directory.exists() and not LocalCluster(directory.absolute()).is_running():
            shutil.rmtree(directory)
        return LocalCluster.start(
            self.settings.directory,
            nodes=self.settings.nodes,
            gpus_per_node=self.settings.gpus_per_node,
            engine_env={"TIDEGATE_EMULATOR_COLD_START": str(self.settings.cold_start_s)},
            progress=self._say,
        )

    async def _apply(self, cluster: LocalCluster) -> None:
        self._say(f"kubectl apply -f {examples().name}/")
        await self._kubectl(cluster, "apply", "-f", str(examples()))
        self._say("waiting for the models to be ready")
        wait = f"--timeout={_READY_S:.0f}s"
        await self._kubectl(cluster, "wait", "--for=condition=Ready", "mdep", "--all", "-A", wait)

    async def _arm(self, cluster: LocalCluster, name: str) -> Arm:
        with self._phase(f"prepare {name}"):
            args = ["--policy", name]
            await asyncio.to_thread(partial(cluster.restart, "picker", args=args))
            await self._calm(cluster)
            tokens = {c: await asyncio.to_thread(cluster.token, *who) for c, who in _CALLERS.items()}
        load = scenario(self.settings, tokens)
        urls = {k: cluster.url(k) for k in ("gateway", "controller", "picker")}
        with self._phase(f"run {name}"):
            async with self._shown(_TITLES[name]) as show:
                return await run_arm(name, load, urls, self.settings.out, show)

    async def _calm(self, cluster: LocalCluster) -> None:
        """Wait until no batch replica is left, so that both arms start from the same place."""
        self._say("waiting until the pool is at rest")
        deadline = time.monotonic() + _CALM_S
        used: dict[str, float] = {}
        async with httpx.AsyncClient(timeout=1.0) as client:
            while time.monotonic() < deadline:
                frame = await gather(client, cluster.url("controller"), cluster.url("picker"), 0.0, {})
                used = {c: g.get("used", 0) for c, g in frame.class_gpus.items()}
                if frame.gpus and not used.get("batch") and used.get("interactive", 0) <= 2 * len(MODELS):
                    return
                await asyncio.sleep(0.5)
        raise DemoError(f"the pool did not come to rest within {_CALM_S:.0f} s: GPUs used {used}")

    async def _kubectl(self, cluster: LocalCluster, *args: str) -> str:
        return (await asyncio.to_thread(cluster.kubectl, *args)).stdout

    def _report(self, arms: list[Arm]) -> None:
        out = self.settings.out
        figures = summary.summarise(arms[0], arms[1], self.settings, self.phases)
        (out / "summary.json").write_text(json.dumps(figures, indent=2) + "\n")
        written = report.write(arms, figures, self.settings)
        self.console.print()
        self.console.print(summary.table(figures))
        for sentence in summary.verdict(figures):
            self.console.print(f"  {sentence}", highlight=False)
        self.console.print(f"\nWritten: {out / 'summary.json'}, " + ", ".join(str(p) for p in written))

    async def _keep(self, cluster: LocalCluster) -> None:
        self.console.print("\nStill running, with QoS. Ctrl-C stops it and cleans up.")
        await asyncio.to_thread(partial(cluster.restart, "picker", args=["--policy", "qos"]))
        self.console.print(f"  export KUBECONFIG={cluster.kubeconfig}")
        for name in ("gateway", "controller", "picker"):
            self.console.print(f"  {name:<11}{cluster.url(name)}")
        await asyncio.Event().wait()

    @asynccontextmanager
    async def _shown(self, title: str) -> AsyncIterator[Callable[[Frame], None]]:
        """A live table on a terminal; elsewhere a line every ten seconds."""
        length = self.settings.seconds
        if self.console.is_terminal:
            with Live(console=self.console, refresh_per_second=2) as live:
                yield lambda frame: live.update(view.render(title, frame, length))
            return
        last = -10.0

        def show(frame: Frame) -> None:
            nonlocal last
            if frame.t - last >= 10:
                last = frame.t
                self._say(view.line(title, frame))

        yield show

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.console.print(f"[bold]==>[/bold] {name}", highlight=False)
        started = time.monotonic()
        yield
        self.phases[name] = time.monotonic() - started

    def _say(self, text: str) -> None:
        self.console.print(f"    {text}", highlight=False, markup=False)
