"""Random requests through the model's scheduler and through vLLM's own, turn by turn."""

import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tidegate.sim.engine import Engine
from tidegate.sim.pipeline import Pipeline
from tidegate.sim.types import EngineConfig, Policy, Request

TURNS = 60
"""In which requests arrive; as many follow as the last ones need."""
LEFT = 1200
BLOCKS = {1: (62, 120), 4: (20, 50), 16: (8, 30)}
"""By block size, so few blocks that every request fits and several often do not."""

Case = dict[str, Any]


def cases(rounds: int, seed: int) -> Iterator[Case]:
    """Of each policy, synchronous and asynchronous, so many."""
    rng = random.Random(seed)
    for _ in range(rounds):
        for asynchronous in (False, True):
            for policy in Policy:
                block = rng.choice(list(BLOCKS))
                settings = {
                    "max_num_seqs": rng.choice([1, 3, 8]),
                    "max_num_batched_tokens": rng.choice([16, 32, 64]),
                    "block_size": block,
                    "num_blocks": rng.randint(*BLOCKS[block]),
                    "policy": policy.value,
                    "async_scheduling": asynchronous,
                }
                yield {"settings": settings, "turns": _arrivals(rng)}


def _arrivals(rng: random.Random) -> list[list[tuple[str, int, int, int]]]:
    turns: list[list[tuple[str, int, int, int]]] = []
    number = 0
    for _ in range(TURNS):
        turns.append([])
        for _ in range(rng.choice([0, 0, 0, 1, 2])):
            turns[-1].append((f"r{number}", rng.randint(1, 40), rng.randint(1, 19), rng.randint(-2, 2)))
            number += 1
    return turns + [[] for _ in range(LEFT)]


def by_model(case: Case) -> tuple[list[dict[str, Any]], int]:
    """Turn by turn what is launched and who finished; and the preemptions."""
    settings = case["settings"]
    engine = Engine(EngineConfig(**(settings | {"policy": Policy(settings["policy"])})))
    pipeline = Pipeline(engine, lambda *_: 1.0)
    told, arrived = [], 0
    for arrivals in case["turns"]:
        for arrival in arrivals:
            arrived += 1
            engine.add(Request(*arrival), float(arrived))
        launched = [step.plan.tokens_by_request for step in pipeline.launch(0.0)]
        events = pipeline.complete()[1] if pipeline.next_end is not None else []
        told.append({"launched": launched, "finished": sorted(e.id for e in events if e.finished)})
    assert engine.unfinished == 0
    return told, engine.counters.preemptions


def by_vllm(python: str, model: Path, asked: list[Case]) -> list[list[dict[str, Any]]]:
    """The same of vLLM's scheduler, in its own Python."""
    script = str(Path(__file__).with_name("vllm_schedule.py"))
    run = [python, script, str(model)]
    done = subprocess.run(run, input=json.dumps(asked), stdout=subprocess.PIPE, text=True, check=True)
    # What libraries print comes before.
    found: list[list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return found
