"""Samples as a profile takes them, from a step time that is known."""

import random
from collections.abc import Iterator

from tidegate.core.stepfit import Sample, Step
from tidegate.core.steptime import LLAMA3_8B_A100, Branch, StepFit
from tidegate.profile.client import Answer
from tidegate.sim.engine import Engine
from tidegate.sim.pipeline import Pipeline
from tidegate.sim.types import EngineConfig, Request

CHUNK = 2048


def line(branch: Branch) -> StepFit:
    """A truth of one line."""
    return StepFit("truth", "a test", branch, branch, 512, 0.0, 10**6)


def design(
    truth: StepFit,
    *,
    request_s: float = 0.0,
    noise: float = 0.0,
    rng: random.Random | None = None,
    rounds: int = 1,
) -> list[Sample]:
    """Prompts alone, decodes alone and both together; `noise` is relative, normal."""
    rng = rng or random.Random(0)
    samples = []
    for steps, requests in [*_steps()] * rounds:
        seconds = sum(truth.seconds(*s) for s in steps) + request_s * requests
        samples.append(Sample(steps, seconds * (1 + rng.gauss(0, noise)), requests))
    return samples


def _steps() -> Iterator[tuple[tuple[Step, ...], int]]:
    for prompt in (32, 64, 128, 256, 480, 700, 1024, 1536, 1990, 3000, 5000):
        yield tuple(Step(min(CHUNK, prompt - at), 0, 0, at) for at in range(0, prompt, CHUNK)), 1
    for streams, context in (
        (1, 64),
        (2, 64),
        (4, 64),
        (8, 64),
        (16, 64),
        (32, 64),
        (1, 6144),
        (8, 2048),
        (32, 512),
    ):
        yield (Step(0, streams, streams * context),), 0
    for streams, context in ((2, 64), (8, 64), (32, 64), (8, 2048)):
        for prompt in (64, 128, 256, 512, 1024, 1800):
            yield (Step(prompt, streams, streams * context),), 0
        room = CHUNK - streams
        for at in range(0, 5000, room):
            yield (Step(min(room, 5000 - at), streams, streams * context, at),), 0


def answers(requests: list[tuple[float, int, int]], chunk: int = CHUNK, jitter: float = 0.0) -> list[Answer]:
    """What a client sees of requests (sent, prompt tokens, output tokens) to the modelled engine.

    `jitter` is the mean delay of a token on its way, seconds, exponential.
    """
    rng = random.Random(1)
    engine = Engine(EngineConfig(max_num_batched_tokens=chunk))
    pipeline = Pipeline(engine, LLAMA3_8B_A100.seconds)
    seen = [Answer(sent, prompt_tokens=prompt) for sent, prompt, _ in requests]
    todo = sorted((sent, i) for i, (sent, _, _) in enumerate(requests))
    while todo or engine.unfinished:
        end = pipeline.next_end
        now = todo[0][0] if end is None else end
        while todo and todo[0][0] <= now:
            _, i = todo.pop(0)
            engine.add(Request(str(i), *requests[i][1:]), now)
        if end is not None:
            for event in pipeline.complete()[1]:
                late = rng.expovariate(1 / jitter) if jitter else 0.0
                seen[int(event.id)].arrivals.append(now + late)
        pipeline.launch(now)
    for answer in seen:
        answer.arrivals.sort()
    return seen
