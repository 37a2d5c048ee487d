"""When a request must be sent to be in time, and how much of a GPU it takes, by the step-time model."""

import math
from typing import Final

from tidegate.core.steptime import StepFit
from tidegate.core.types import Objectives

_CHUNK: Final = 2048
"""Prompt tokens of a step: vLLM's default on an A100, and within what the fits were trained on."""
_BATCH: Final = 32
"""Requests among which a step of decodes is shared out. A yardstick, the same for all classes."""


def prefill_s(fit: StepFit, prompt_tokens: int) -> float:
    """How long an idle engine reads a prompt, seconds; an empty one takes a step as well."""
    prompt_tokens = max(1, prompt_tokens)
    whole, rest = divmod(prompt_tokens, _CHUNK)
    seconds = whole * fit.seconds(_CHUNK, 0) if whole else 0.0
    return seconds + (fit.seconds(rest, 0) if rest else 0.0)


def work_s(fit: StepFit, prompt_tokens: int, output_tokens: int) -> float:
    """How long a request takes an idle engine from its first prompt token to its last output token."""
    step_s = fit.seconds(0, 1, prompt_tokens + output_tokens // 2)
    return prefill_s(fit, prompt_tokens) + max(0, output_tokens - 1) * step_s


def gpu_s(fit: StepFit, prompt_tokens: int, output_tokens: int) -> float:
    """GPU time of a request: its prompt in whole chunks, its decodes as a part of steps of 32.

    An empty prompt counts as a token, so that no request takes no time.
    """
    prompt = max(1, prompt_tokens) / _CHUNK * fit.seconds(_CHUNK, 0)
    context = _BATCH * (prompt_tokens + output_tokens // 2)
    return prompt + output_tokens / _BATCH * fit.seconds(0, _BATCH, context)


def first_token_due(promised: Objectives, prompt_tokens: int, since: float) -> float:
    """When the first token is due; infinite where it was not promised."""
    if promised.ttft_s is None:
        return math.inf
    return since + promised.ttft_s + promised.per_thousand_prompt_tokens_s * prompt_tokens / 1000


def send_by(
    promised: Objectives, fit: StepFit, prompt_tokens: int, output_tokens: int, since: float, pace: float
) -> float:
    """When a request that came at `since` must be sent at the latest, by the first of its deadlines.

    `pace` is how many times as long as `work_s` such requests were seen to take. A first token is
    reckoned to take no longer than on an idle engine: nobody is given up on a guess. Infinite where
    nothing is promised.
    """
    prompt_s = prefill_s(fit, prompt_tokens) * min(1.0, pace)
    first_s = first_token_due(promised, prompt_tokens, since) - prompt_s
    if promised.completion_s is None:
        return first_s
    return min(first_s, since + promised.completion_s - work_s(fit, prompt_tokens, output_tokens) * pace)
