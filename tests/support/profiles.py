"""Samples as a profile takes them, from a step time that is known."""

import random
from collections.abc import Iterator

from tidegate.core.stepfit import Sample, Step
from tidegate.core.steptime import Branch, StepFit

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
