"""What vLLM writes: the events of a stream and the body of a whole answer.

The bytes of a token's event are the same for every token of an answer, so they are made once.
"""

from typing import Any

import orjson

from tidegate.local.engines.common import WORD
from tidegate.local.engines.vllm_requests import Job, Prompt


def _event(payload: object) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


class Frames:
    """The events of one choice of a streamed answer."""

    __slots__ = ("_first", "_last", "_sent", "_token")

    def __init__(self, job: Job, index: int, prompt: Prompt, answer_id: str, created: int) -> None:
        def frame(text: str, reason: str | None, role: str | None = None) -> bytes:
            choice: dict[str, Any] = {"index": index}
            if job.chat:
                choice["delta"] = {"role": role, "content": text} if role else {"content": text}
            else:
                choice["text"] = text
            choice |= {"logprobs": None, "finish_reason": reason}
            if not job.chat or reason:
                choice["stop_reason"] = None
            return _event(_head(job, answer_id, created, chunk=True) | {"choices": [choice]})

        # Chat answers open with the role, sent when there is something to say.
        self._first = frame("", None, "assistant") if job.chat else b""
        self._token = frame(WORD, None)
        # The token that ends an answer by itself has no text.
        self._last = frame("" if prompt.ends else WORD, prompt.finish_reason)
        self._sent = 0

    def upto(self, tokens: int, *, done: bool) -> list[bytes]:
        """The events of the tokens that have not been sent yet."""
        new = tokens - self._sent
        if not new:
            return []
        parts = [] if self._sent else [self._first]
        self._sent = tokens
        parts.append(self._token * (new - done))
        if done:
            parts.append(self._last)
        return parts


def usage_frame(job: Job, answer_id: str, created: int) -> bytes:
    """The event that tells the usage: it has no choices."""
    return _event(_head(job, answer_id, created, chunk=True) | {"choices": [], "usage": _usage(job)})


def body(job: Job, answer_id: str, created: int) -> dict[str, Any]:
    """A whole answer."""
    choices = []
    for index, prompt in enumerate(job.prompts):
        text = WORD * (prompt.output_tokens - prompt.ends)
        said = {"message": {"role": "assistant", "content": text}} if job.chat else {"text": text}
        choices.append(
            {
                "index": index,
                **said,
                "logprobs": None,
                "finish_reason": prompt.finish_reason,
                "stop_reason": None,
            }
        )
    return _head(job, answer_id, created, chunk=False) | {"choices": choices, "usage": _usage(job)}


def _head(job: Job, answer_id: str, created: int, *, chunk: bool) -> dict[str, Any]:
    kind = "text_completion"
    if job.chat:
        kind = "chat.completion.chunk" if chunk else "chat.completion"
    return {"id": answer_id, "object": kind, "created": created, "model": job.model}


def _usage(job: Job) -> dict[str, Any]:
    prompt = sum(p.tokens for p in job.prompts)
    output = sum(p.output_tokens for p in job.prompts)
    return {"prompt_tokens": prompt, "total_tokens": prompt + output, "completion_tokens": output}
