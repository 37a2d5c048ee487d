"""From times of tokens to samples of step time. Pure.

A step gives each request in it one token, so while streams decode, the gaps between the tokens of
each stream are the times of the steps. A prompt's first token comes with its last chunk: the steps
before it, as many as it has chunks, are those that computed it.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from statistics import median
from typing import Final

from tidegate.core.stepfit import Sample, Step
from tidegate.profile.client import Answer

_LEAST_GAPS: Final = 4
_LEAST_SHARE: Final = 0.5
"""A step is not shorter for having a chunk in it: below this share of a plain one it was misread."""
_AROUND: Final = 3
"""Tokens that tell one moment. As many plain steps lie between two prompts of a mixed trial."""
_NEAR: Final = 20
"""Tokens on either side that tell what a plain step takes: contexts grow."""
_PLAIN: Final = 1.5
"""A step of up to this many plain ones may be one: an engine's steps are not all alike."""


def chunks(tokens: int, room: int) -> list[tuple[int, int]]:
    """How a prompt is cut when `room` tokens of it fit a step: (tokens, tokens before them) each."""
    return [(min(room, tokens - at), at) for at in range(0, tokens, room)]


def prefill_sample(answer: Answer, chunk: int, round_trip_s: float) -> Sample | None:
    """The time to first token of a prompt that was alone, less the round trip. None if that is nothing."""
    seconds = answer.ttft_s - round_trip_s
    if seconds <= 0:
        return None
    return Sample(
        tuple(Step(tokens, 0, 0, before) for tokens, before in chunks(answer.prompt_tokens, chunk)),
        seconds,
        requests=1,
    )


def decode_sample(answers: Sequence[Answer]) -> Sample | None:
    """The step in which all streams decode. None when they hardly did so together."""
    begin = max(a.arrivals[0] for a in answers)
    end = min(a.arrivals[-1] for a in answers)
    slopes, context = [], 0.0
    for answer in answers:
        inside = [i for i, t in enumerate(answer.arrivals) if begin < t <= end and i > 0]
        if len(inside) <= _LEAST_GAPS:
            return None
        # Token i was computed on the prompt and the i - 1 tokens before it.
        context += answer.prompt_tokens + (inside[0] + 1 + inside[-1]) / 2 - 1
        slopes.append(slope(answer.arrivals[inside[0] : inside[-1] + 1]))
    seconds = median(slopes)
    return Sample((Step(0, len(answers), round(context)),), seconds) if seconds > 0 else None


def undisturbed(repeats: Sequence[Sample]) -> list[Sample]:
    """The faster half of an experiment's repeats, the middle one included.

    Whatever else a machine does only ever adds time, so what is slower tells of the machine. Not the
    fastest alone: a late packet can make a step look short.
    """
    return sorted(repeats, key=lambda s: s.seconds)[: (len(repeats) + 1) // 2]


def apart(repeats: Sequence[Sequence[Sample]]) -> float:
    """How much longer than an experiment's fastest repeat its slowest took: their median, 0.3 is 30%."""
    found = [max(s.seconds for s in r) / min(s.seconds for s in r) - 1.0 for r in repeats if len(r) > 1]
    return median(found) if found else 0.0


def slope(times: Sequence[float]) -> float:
    """Seconds a step: the median over all pairs (Theil and Sen), which neither jitter nor a stall moves."""
    return median((b - a) / (j - i) for (i, a), (j, b) in combinations(enumerate(times), 2))


def mixed_sample(streams: Sequence[Answer], probe: Answer, chunk: int) -> Sample | None:
    """The steps in which the chunks of the probe's prompt shared a step with the streams.

    None when the streams had not all begun, or some had ended, or no step of theirs was that long.
    """
    parts = chunks(probe.prompt_tokens, chunk - len(streams))
    lasts = _step_of(streams, probe.arrivals[0], len(parts))
    if lasts is None:
        return None
    plain = plain_step_s(streams, lasts)
    seconds = {by: _between(streams, [last + by for last in lasts], len(parts), plain) for by in (0, -1, 1)}
    # The probe's token may have come late, or theirs: the chunks are where the long steps are.
    by = max(seconds, key=lambda by: seconds[by])
    by = by if seconds[by] > seconds[0] + plain else 0
    if seconds[by] < _LEAST_SHARE * plain:
        return None
    steps = []
    for number, (tokens, before) in enumerate(parts):
        context = sum(
            a.prompt_tokens + last + by + number - len(parts) for a, last in zip(streams, lasts, strict=True)
        )
        steps.append(Step(tokens, len(streams), context, before))
    return Sample(tuple(steps), seconds[by])


def plain_step_s(streams: Sequence[Answer], lasts: Sequence[int]) -> float:
    """The usual time of a step of the streams alone, around tokens `lasts`."""
    found = []
    for answer, last in zip(streams, lasts, strict=True):
        times = answer.arrivals[max(0, last - _NEAR) : last + _NEAR]
        # Over two steps: tokens may come in pairs.
        found.append(median((b - a) / 2 for a, b in zip(times, times[2:], strict=False)))
    return median(found)


def _between(streams: Sequence[Answer], lasts: Sequence[int], steps: int, plain: float) -> float:
    """Seconds from `steps` tokens before token `lasts` to it: the median of the streams.

    Either end is the median of three tokens, moved to it by plain steps, so that no single packet
    that was late makes a step long or short. Minus infinity where there are no such tokens.
    """
    spans = []
    for answer, last in zip(streams, lasts, strict=True):
        first, times = last - steps, answer.arrivals
        if first < _AROUND or last + _AROUND > len(times):
            return -math.inf
        begin = median(times[first - i] + i * plain for i in range(_AROUND))
        end = median(times[last + i] - i * plain for i in range(_AROUND))
        spans.append(end - begin)
    return median(spans)


def _gap(streams: Sequence[Answer], lasts: Sequence[int], back: int) -> float:
    """The step `back` steps before the one after token `lasts`: the median of its gaps."""
    ends = [last - back + 1 for last in lasts]
    return median(s.arrivals[at] - s.arrivals[at - 1] for s, at in zip(streams, ends, strict=True))


def wrong_chunk(streams: Sequence[Answer], probe: Answer, chunk: int) -> int:
    """Whether the engine's chunk is not what was said: -1 when it is smaller, 1 when larger, else 0.

    Told by a prompt of several chunks: the step before its first chunk is a plain one, the first is not.
    """
    count = len(chunks(probe.prompt_tokens, chunk - len(streams)))
    lasts = _step_of(streams, probe.arrivals[0], count + 1)
    if count < 2 or lasts is None:
        return 0
    plain = plain_step_s(streams, lasts)
    before, first = _gap(streams, lasts, count + 1), _gap(streams, lasts, count)
    if first < _PLAIN * plain:
        return 1
    return -1 if before > max((plain + first) / 2, _PLAIN * plain) else 0


def _step_of(streams: Sequence[Answer], moment: float, steps: int) -> list[int] | None:
    """Which token of each stream came with a moment, when `steps` gaps lie before it."""
    found = []
    for answer in streams:
        nearest = min(range(len(answer.arrivals)), key=lambda i: abs(answer.arrivals[i] - moment))
        if nearest - steps < 1 or nearest == len(answer.arrivals) - 1:
            return None
        found.append(nearest)
    return found
