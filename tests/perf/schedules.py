"""Random requests through the model's scheduler and through vLLM's own, turn by turn."""

import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tidegate.sim.engine import Engine
from tidegate.sim.pipeline import Pipeline
from tidegate.sim.types import Counters, EngineConfig, Policy, Request

TURNS = 60
"""In which requests arrive; as many follow as the last ones need."""
LEFT = 1200
BLOCKS = {1: (62, 120), 4: (20, 50), 16: (8, 30)}
"""By block size, so few blocks that every request fits and several often do not."""

Case = dict[str, Any]
Arrival = tuple[str, int, int, int, list[tuple[str, int]], str]
"""As `Request` has it: id, prompt, output, priority, shared parts and the name of the text after them."""
PARTS: tuple[list[tuple[str, int]], ...] = (
    *([], [], [("a", 16)], [("a", 23)]),
    *([("a", 23), ("b", 9)], [("a", 23), ("c", 3)]),
)


def cases(rounds: int, seed: int, *, caching: bool = False) -> Iterator[Case]:
    """Of each policy, synchronous and asynchronous, so many; `caching`: prompts share prefixes."""
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
                    "enable_prefix_caching": caching,
                }
                yield {"settings": settings, "turns": _arrivals(rng, caching=caching)}


def _arrivals(rng: random.Random, *, caching: bool) -> list[list[Arrival]]:
    turns: list[list[Arrival]] = []
    number = 0
    for _ in range(TURNS):
        turns.append([])
        for _ in range(rng.choice([0, 0, 0, 1, 2])):
            sizes = (rng.randint(1, 40), rng.randint(1, 19), rng.randint(-2, 2))
            parts = rng.choice(PARTS) if caching else []
            # Texts come again, so that a prompt may begin with all that an earlier one and its answer said.
            text = rng.choice(["", "t", f"u{number // 9}"]) if caching else ""
            turns[-1].append((f"r{number}", *sizes, parts, text))
            number += 1
    return turns + [[] for _ in range(LEFT)]


def by_model(case: Case) -> tuple[list[dict[str, Any]], Counters]:
    """Turn by turn what is launched and who finished; and what was counted."""
    settings = case["settings"]
    engine = Engine(EngineConfig(**(settings | {"policy": Policy(settings["policy"])})))
    pipeline = Pipeline(engine, lambda *_: 1.0)
    told, arrived = [], 0
    for arrivals in case["turns"]:
        for arrival in arrivals:
            arrived += 1
            name, prompt, output, rank, parts, text = arrival
            request = Request(name, prompt, output, rank, shared=tuple(parts), text=text)
            engine.add(request, float(arrived))
        launched = [step.plan.tokens_by_request for step in pipeline.launch(0.0)]
        events = pipeline.complete()[1] if pipeline.next_end is not None else []
        told.append({"launched": launched, "finished": sorted(e.id for e in events if e.finished)})
    assert engine.unfinished == 0
    return told, engine.counters


def by_vllm(python: str, model: Path, asked: list[Case]) -> list[list[dict[str, Any]]]:
    """The same of vLLM's scheduler, in its own Python."""
    script = str(Path(__file__).with_name("vllm_schedule.py"))
    run = [python, script, str(model)]
    done = subprocess.run(run, input=json.dumps(asked), stdout=subprocess.PIPE, text=True, check=True)
    # What libraries print comes before.
    found: list[list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return found
