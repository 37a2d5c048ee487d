"""Is the model of the engine right? One request log through vLLM over HTTP and through the model.

    python tests/perf/bench_real_vllm.py --vllm PYTHON     # a real vLLM on a CPU
    python tests/perf/bench_real_vllm.py [--quick]         # the emulated engine: no claim

First vLLM's scheduler itself, without a model, is held against the model's, step by step. PYTHON is the
interpreter of an environment with vLLM in it; $TIDEGATE_VLLM says the same. What to
install: docs/reference/benchmarks.md. The engine is started on the last core, measured by
`tidegate profile`, and given the logs of all seeds, under both policies, with a KV cache that is
too small for what it runs.
"""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx
import schedules
from reallog import BATCH, CHAT, Difference, Load, Result, brief, difference, through_engine
from report import Row, record, row

from support.ports import free_port
from tidegate.core.steptime import LLAMA3_8B_A100
from tidegate.profile.run import Profile, Settings, profile
from tidegate.sim.pipeline import StepTime
from tidegate.sim.types import EngineConfig, Policy

HERE = Path(__file__).resolve().parent
CORES = sorted(os.sched_getaffinity(0))
MODEL = "tiny"
START_S = 600.0
EMULATED_SPEED = 2.0
HTTP_S = 0.002
"""About what the emulated engine takes for a request outside of its steps."""
ENVIRONMENT = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True, slots=True)
class Engine:
    """What is compared: where it comes from (None: emulated), its settings, and the load for it."""

    python: str | None
    config: EngineConfig
    load: Load
    profile_s: float

    def command(self, policy: Policy, port: int, model: Path) -> list[str]:
        """The engine's command line."""
        config = self.config
        module = (
            "tidegate.local.engines.vllm" if self.python is None else "vllm.entrypoints.openai.api_server"
        )
        flags = {
            "host": "127.0.0.1",
            "port": port,
            "model": model,
            "served-model-name": MODEL,
            "scheduling-policy": policy.value,
            "max-num-batched-tokens": config.max_num_batched_tokens,
            "max-num-seqs": config.max_num_seqs,
            "block-size": config.block_size,
            "num-gpu-blocks-override": config.num_blocks,
            "max-model-len": 4096,
        }
        line = [self.python or sys.executable, "-m", module]
        for name, value in flags.items():
            line += [f"--{name}", str(value)]
        return [*line, "--no-enable-prefix-caching"]

    @contextmanager
    def running(self, policy: Policy, folder: Path) -> Iterator[str]:
        """Start it, wait until it answers, give its URL, end it."""
        port, log = free_port(), folder / f"{policy.value}.log"
        env = os.environ | (ENVIRONMENT if self.python else {"TIDEGATE_EMULATOR_SPEED": str(EMULATED_SPEED)})
        with log.open("wb") as file:
            # What it starts stays where it was started: the engine on the last core, its clients elsewhere.
            os.sched_setaffinity(0, CORES[-1:])
            process = subprocess.Popen(
                self.command(policy, port, folder / "model"),
                env=env,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            os.sched_setaffinity(0, CORES[:-1] or CORES)
            try:
                _wait_for(process, f"http://127.0.0.1:{port}", log)
                yield f"http://127.0.0.1:{port}"
            finally:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()


# vLLM on a CPU runs one step after the other. 400 blocks hold 12,768 tokens: enough for nearly all
# experiments of a profile, not enough for 32 requests of the load.
REAL = EngineConfig(
    max_num_seqs=32, max_num_batched_tokens=512, block_size=32, num_blocks=400, async_scheduling=False
)
EMULATED = EngineConfig(max_num_seqs=32, max_num_batched_tokens=512, block_size=32, num_blocks=620)


def main() -> None:
    """Run what there is, print and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm", default=os.environ.get("TIDEGATE_VLLM"), help="a Python that has vLLM")
    parser.add_argument("--quick", action="store_true", help="a short log and the emulated engine: no claim")
    parser.add_argument("--seeds", type=int, default=3, help="logs (default 3)")
    parser.add_argument("--profile-seconds", type=float, default=90.0, help="of each engine (default 90)")
    options = parser.parse_args()
    # So that the engine is ended with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    load = Load()
    if options.quick or not options.vllm:
        print(
            "the emulated engine, no claim; a real one: --vllm, see docs/reference/benchmarks.md", flush=True
        )
        engine = Engine(None, EMULATED, brief(load, 0.1 if options.quick else 0.5), 0.0)
    else:
        engine = Engine(options.vllm, REAL, load, options.profile_seconds)
    seeds = range(1, 2 if options.quick else options.seeds + 1)
    with tempfile.TemporaryDirectory(prefix="tidegate-vllm-") as folder:
        if engine.python:
            model = str(Path(folder) / "model")
            subprocess.run([engine.python, str(HERE / "tiny_llama.py"), model], check=True)
        rounds = 1 if options.quick else 20
        rows = [
            r for c in (False, True) for r in scheduled(engine, Path(folder) / "model", rounds, caching=c)
        ]
        rows += [r for policy in Policy for r in asyncio.run(compare(engine, policy, seeds, Path(folder)))]
    record("real_vllm", rows)


def scheduled(engine: Engine, model: Path, rounds: int, *, caching: bool) -> list[Row]:
    """The model's schedules of random requests, held against those of vLLM's own scheduler."""
    asked = list(schedules.cases(rounds, seed=1, caching=caching))
    what = "with a prefix cache" if caching else "schedules"
    ours = [schedules.by_model(case) for case in asked]
    steps = sum(len(turn["launched"]) for turns, _ in ours for turn in turns)
    rows = [
        row(f"{what}: steps", [float(steps)], "steps"),
        row(f"{what}: preemptions", [float(sum(counters.preemptions for _, counters in ours))], "in all"),
    ]
    if caching:
        hits, queries = (sum(getattr(c, f"cache_{n}") for _, c in ours) for n in ("hits", "queries"))
        rows.append(row(f"{what}: found of prompt tokens", [hits / queries], ""))
    if engine.python:
        theirs = schedules.by_vllm(engine.python, model, asked)
        differ = sum(turns != other for (turns, _), other in zip(ours, theirs, strict=True))
        rows.append(row(f"{what}: of {len(asked)} differ", [float(differ)], "schedules", at_most=0))
    return rows


async def compare(engine: Engine, policy: Policy, seeds: range, folder: Path) -> list[Row]:
    """Both sides of each seed's log, and the rows of what differs."""
    found: list[Difference] = []
    rows: list[Row] = []
    with engine.running(policy, folder) as url:
        step_time, request_s = await fitted(engine, url, policy, rows)
        for seed in seeds:
            log = engine.load.log(seed)
            real = await through_engine(url, MODEL, log, priorities=policy is Policy.PRIORITY)
            config = engine.config.with_policy(policy)
            found.append(difference(config, log, real, step_time, request_s))
            print(f"{policy.value}, seed {seed}: {_told(real)}", flush=True)
    return rows + table(policy, found, claims=engine.python is not None)


async def fitted(engine: Engine, url: str, policy: Policy, rows: list[Row]) -> tuple[StepTime, float]:
    """The step time, and what a request takes outside of steps; of a real engine, by measuring it."""
    if engine.python is None:
        return (lambda *step: LLAMA3_8B_A100.seconds(*step) / EMULATED_SPEED), HTTP_S
    config = engine.config
    settings = Settings(url, MODEL, config.max_num_batched_tokens, config.max_num_seqs, engine.profile_s)
    found: Profile = await profile(settings, lambda line: print(line, flush=True))
    fit = found.fitted.fit
    print(f"{policy.value}: {fit}\n{found.fitted.request_s:.4f} s a request; {found.notes}", flush=True)
    assert fit.residual is not None
    for name, value in (("median", fit.residual.median), ("90th percentile", fit.residual.p90)):
        rows.append(row(f"{policy.value}: step time, residual, {name}", [100 * value], "%"))
    rows.append(row(f"{policy.value}: step time, repeats apart", [100 * found.spread], "%"))
    return fit.seconds, found.fitted.request_s


def table(policy: Policy, found: list[Difference], *, claims: bool) -> list[Row]:
    """The rows of one policy."""
    name = policy.value
    preempted = [[float(d.preemptions[i]) for d in found] for i in (0, 1)]
    rows = [
        row(f"{name}: pairs that end in the same order", [100 * d.same_order for d in found], "%"),
        row(f"{name}: total time, model by engine", [1 / d.factor for d in found], "×"),
        row(f"{name}: preemptions, model", preempted[0], "a run"),
        row(f"{name}: preemptions, engine", preempted[1], "a run"),
    ]
    for figure in found[0].raw:
        rows.append(row(f"{name}: {figure}, model by engine", [d.raw[figure] for d in found], "×"))
        at_its_speed = [d.figures[figure] for d in found]
        rows.append(row(f"{name}: {figure}, at the engine's total time", at_its_speed, "×", claims=claims))
    return rows


def _told(real: Result) -> str:
    """A line of what the engine did."""
    parts = [f"{real.total_s:.1f} s", f"{real.preemptions} preemptions"]
    for kind in (CHAT, BATCH):
        times = real.ttfts(kind)
        parts.append(f"{kind} TTFT {median(times):.2f} s, at most {times[-1]:.2f} s")
    return ", ".join(parts)


def _wait_for(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait until the engine answers."""
    begin = time.monotonic()
    while time.monotonic() < begin + START_S:
        if process.poll() is not None:
            break
        try:
            if httpx.get(f"{url}/health", timeout=5.0).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    sys.exit(f"the engine did not start:\n{log.read_text()[-4000:]}")


if __name__ == "__main__":
    main()
