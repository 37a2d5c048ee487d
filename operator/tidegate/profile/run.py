"""Runs the experiments against one engine, within a bound of time, and fits what they tell."""

import asyncio
import random
import string
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

import aiohttp

from tidegate.core.stepfit import FitError, Fitted, Sample, fit_steps
from tidegate.core.steptime import Residual
from tidegate.profile import reduce
from tidegate.profile.client import Answer, Client, EngineError
from tidegate.profile.design import Decode, Limits, Mixed, Prefill, Trial, decode_tokens, trials

ROUNDS: Final = 8
"""The same experiments so often, when there is time: repetition tells noise from the model."""
_MODEL_LEN: Final = 2048
"""Taken for the longest request when the engine does not tell it."""
_PINGS: Final = 15
_FAILURES: Final = 3
"""An engine that fails so often in a row is left alone."""
_APART: Final = 2
"""Once may be chance."""
_STEP_S: Final = 0.02
"""A guess of the step time until one has been measured."""

_POOR: Final = 0.1
"""The median error of a fit that should not be relied on."""

Point = tuple[Trial, tuple[int, ...]]
"""What repeats of one measurement share: the experiment, and the chunks of the prompt in it."""

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """What to profile, and how far to go. `seconds` bounds the whole; `chunk` is the engine's."""

    url: str
    model: str
    chunk: int = 2048
    streams: int = 32
    seconds: float = 60.0
    token: str | None = None


@dataclass(slots=True)
class Profile:
    """What was found. `notes` are remarks for people; times are in seconds.

    `samples` are those that were fitted; `left_out` were slower repeats of the same. `spread` is how
    much longer the slowest repeat of an experiment took than the fastest, as `reduce.apart` says it.
    """

    model: str
    fitted: Fitted
    samples: list[Sample]
    round_trip_s: float
    took_s: float
    rounds: float
    notes: list[str]
    left_out: int = 0
    spread: float = 0.0


async def profile(settings: Settings, tell: Tell) -> Profile:
    """Measure and fit. `tell` gets a line of progress for each experiment.

    Raises:
        EngineError: the engine does not answer, does not serve the model, or fails again and again.
        FitError: there was time for too few experiments.
        ValueError: the settings leave nothing to measure.
    """
    # A trial's streams all need their connection at once.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    async with aiohttp.ClientSession(
        f"{settings.url.rstrip('/').removesuffix('/v1')}/",
        connector=connector,
        timeout=timeout,
        read_bufsize=2**18,
    ) as session:
        runner = _Runner(settings, Client(session, settings.model, settings.token), tell)
        return await runner.run()


@dataclass(slots=True)
class _Runner:
    settings: Settings
    client: Client
    tell: Tell
    started: float = field(default_factory=time.monotonic)
    points: defaultdict[Point, list[Sample]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)
    chars_per_token: float = 4.0
    round_trip_s: float = 0.0
    step_s: float = _STEP_S
    most_streams: int = 0
    apart: Counter[int] = field(default_factory=Counter)
    chunk_votes: list[int] = field(default_factory=list)
    chunk_probes: int = 0
    # Never the same twice: the engine may have cached the prompts of a profile before this one.
    rng: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        self.most_streams = self.settings.streams

    async def run(self) -> Profile:
        """Prepare, measure until the time is over, fit."""
        try:
            async with asyncio.timeout(self.settings.seconds):
                limits = await self._prepare()
        except TimeoutError as error:
            raise EngineError(
                f"no answer to the first requests within {self.settings.seconds:g} s"
            ) from error
        rounds = await self._measure(limits)
        repeats = list(self.points.values())
        samples = [s for r in repeats for s in reduce.undisturbed(r)]
        source = (
            f"tidegate profile, {len(samples)} samples, chunk {limits.chunk}, up to"
            f" {self.most_streams} streams"
        )
        try:
            fitted = fit_steps(samples, name=self.settings.model, source=source)
        except FitError as error:
            raise FitError(f"{error}: give more --seconds") from error
        return Profile(
            self.settings.model,
            fitted,
            samples,
            self.round_trip_s,
            time.monotonic() - self.started,
            rounds,
            self._remarks(fitted.fit.residual),
            sum(map(len, repeats)) - len(samples),
            reduce.apart(repeats),
        )

    async def _prepare(self) -> Limits:
        """Learn the longest request, the round trip, and how many characters make a token; warm up."""
        longest = await self.client.max_model_len()
        if longest is None:
            longest = _MODEL_LEN
            self.notes.append(f"the engine does not tell max_model_len: {longest} was taken")
        limits = Limits(self.settings.chunk, longest, self.settings.streams)
        self.round_trip_s = median([await self.client.round_trip_s() for _ in range(_PINGS)])
        few, many = longest // 8, min(longest // 2, 4096)
        first = await self.client.stream(self._characters(few), 1)
        second = await self.client.stream(self._characters(many), 1)
        more = second.prompt_tokens - first.prompt_tokens
        if more <= 0:
            raise EngineError(
                f"usage does not grow with the prompt: {first.prompt_tokens} tokens for {few} characters,"
                f" {second.prompt_tokens} for {many}"
            )
        self.chars_per_token = (many - few) / more
        await self.client.stream(self._prompt(min(limits.chunk, longest) // 2), 4)
        self.tell(
            f"max_model_len {longest}, chunk {limits.chunk}, {self.chars_per_token:.2f} characters a token,"
            f" round trip {1000 * self.round_trip_s:.1f} ms"
        )
        return limits

    async def _measure(self, limits: Limits) -> float:
        """Run rounds until the time is over; return how many there were, with the part of the last."""
        plan = trials(limits)
        failures = done = 0
        for number, trial in enumerate(plan * ROUNDS):
            if isinstance(trial, Decode | Mixed) and trial.streams > self.most_streams:
                continue
            try:
                async with asyncio.timeout(self.started + self.settings.seconds - time.monotonic()):
                    found = await self._try(trial, limits)
            except TimeoutError:
                break
            except EngineError as error:
                failures += 1
                self.notes.append(f"{trial}: {error}")
                self.tell(self.notes[-1])
                if failures == _FAILURES:
                    raise EngineError(f"{failures} experiments in a row failed; the last: {error}") from error
                continue
            failures = 0
            done = number + 1
            for sample in found:
                self.points[trial, tuple(step.prefill for step in sample.steps)].append(sample)
            self.tell(self._line(done, len(plan) * ROUNDS, trial, found))
        if done < len(plan):
            self.notes.append(f"the time was over after {done} of {len(plan)} experiments: more --seconds")
        return done / len(plan)

    def _line(self, done: int, of: int, trial: Trial, found: list[Sample]) -> str:
        times = ", ".join(f"{1000 * s.seconds:.1f}" for s in found)
        return f"[{done}/{of}, {time.monotonic() - self.started:.0f} s] {trial}: {times or 'nothing'} ms"

    async def _try(self, trial: Trial, limits: Limits) -> list[Sample]:
        if isinstance(trial, Prefill):
            answer = await self.client.stream(self._prompt(trial.tokens), 1)
            sample = reduce.prefill_sample(answer, limits.chunk, self.round_trip_s)
            return [sample] if sample else []
        if isinstance(trial, Decode):
            return await self._decode(trial, limits)
        return await self._mixed(trial, limits)

    async def _decode(self, trial: Decode, limits: Limits) -> list[Sample]:
        tokens = decode_tokens(trial, limits, self.step_s)
        answers = [Answer(0.0) for _ in range(trial.streams)]
        async with _Streams(self.client) as streams:
            for answer in answers:
                streams.start(self._prompt(trial.context), tokens, answer)
            await streams.ended()
        sample = reduce.decode_sample(answers)
        if sample is None:
            self._apart(trial)
            return []
        self.step_s = sample.seconds
        return [sample]

    def _apart(self, trial: Decode | Mixed) -> None:
        """Streams that did not run together: when it happens again, try no more so many."""
        self.apart[trial.streams] += 1
        if self.apart[trial.streams] < _APART:
            return
        self.most_streams = max(1, min(self.most_streams, trial.streams // 2))
        self.notes.append(
            f"{trial.streams} streams of {trial.context} tokens did not decode together: the engine runs"
            " fewer at once, or --chunk is too high"
        )

    async def _mixed(self, trial: Mixed, limits: Limits) -> list[Sample]:
        tokens = decode_tokens(trial, limits, self.step_s)
        answers = [Answer(0.0) for _ in range(trial.streams)]
        # Made before, since tokens that come meanwhile would be noted late.
        prompts = [self._prompt(size) for size in trial.prompts]
        probes = []
        async with _Streams(self.client) as streams:
            for answer in answers:
                streams.start(self._prompt(trial.context), tokens, answer)
            await streams.all_begun(answers)
            for prompt in prompts:
                # A few steps of decodes alone, so that the prompt's own can be told from the one before.
                await asyncio.sleep(3 * self.step_s)
                if streams.some_ended:
                    break
                probes.append(await self.client.stream(prompt, 1))
            await streams.ended()
        if not probes:
            self._apart(trial)
        samples = [s for p in probes if (s := reduce.mixed_sample(answers, p, limits.chunk))]
        self.chunk_votes += [v for p in probes if (v := reduce.wrong_chunk(answers, p, limits.chunk))]
        self.chunk_probes += sum(p.prompt_tokens > limits.chunk for p in probes)
        return samples

    def _remarks(self, residual: Residual | None) -> list[str]:
        """The notes, each once; with one on a poor fit, and one on the chunk when most prompts deny it."""
        remarks = list(dict.fromkeys(self.notes))
        if residual is not None and residual.median > _POOR:
            remarks.append(
                f"half of the samples are off by {residual.median:.0%} or more: the engine or its machine has"
                " other work, or its steps are not of this form"
            )
        if 2 * len(self.chunk_votes) > self.chunk_probes:
            than = "smaller" if sum(self.chunk_votes) < 0 else "larger"
            remarks.append(
                f"prompts were cut into {than} chunks than {self.settings.chunk}: give the engine's"
                " --max-num-batched-tokens as --chunk"
            )
        return remarks

    def _prompt(self, tokens: int) -> str:
        return self._characters(max(1, round(tokens * self.chars_per_token)))

    def _characters(self, count: int) -> str:
        """Random words: no prefix cache has seen them."""
        letters = self.rng.choices(string.ascii_lowercase, k=count)
        for at in range(6, count, 7):
            letters[at] = " "
        return "".join(letters)


class _Streams:
    """Streams of one trial; leaving the context cancels what still runs, and the engine drops it."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._tasks: list[asyncio.Task[Answer]] = []

    async def __aenter__(self) -> "_Streams":
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def start(self, prompt: str, tokens: int, answer: Answer) -> None:
        """Send one request."""
        self._tasks.append(asyncio.create_task(self._client.stream(prompt, tokens, answer)))

    @property
    def some_ended(self) -> bool:
        """Whether a stream is over."""
        return any(task.done() for task in self._tasks)

    async def all_begun(self, answers: list[Answer]) -> None:
        """Wait until each stream has a token, or one has ended."""
        begun: asyncio.Future[Any] = asyncio.gather(*(a.begun.wait() for a in answers))
        tasks: list[asyncio.Future[Any]] = [begun, *self._tasks]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            begun.cancel()

    async def ended(self) -> None:
        """Wait for all. Raises the first EngineError."""
        await asyncio.gather(*self._tasks)
