"""Asks Triton servers that run and are not Ready what they wait for."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, Final

from tidegate.adapters.triton import readiness
from tidegate.api import names
from tidegate.controller.gather import ModelFacts
from tidegate.controller.pods import by_lane

Object = dict[str, Any]

_AGAIN_S: Final = 15.0
_IN_QUESTION_S: Final = 20.0
"""A replica that runs this long without being Ready is asked."""
_AT_ONCE: Final = 4


class Doctor:
    """Keeps the last answer of each server. Asking runs beside the loop and never holds it."""

    def __init__(self, ask: Callable[[str], Awaitable[str]] = readiness) -> None:
        self._ask = ask
        self._answers: dict[str, tuple[float, str]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def examine(self, models: Iterable[ModelFacts], pods: Iterable[Object], now: float) -> None:
        """Ask those that are in question, a few at a time."""
        lanes = by_lane(pods)
        for model in models:
            if model.obj is None or model.obj.spec.engine.type != "Triton":
                continue
            namespace, name = model.ref.split("/")
            for qos_class in model.classes:
                for pod in lanes.get((namespace, names.bounded(name), qos_class), ()):
                    uid = pod["metadata"]["uid"]
                    asked, _ = self._answers.get(uid, (float("-inf"), ""))
                    if _in_question(pod, now) and now - asked >= _AGAIN_S and len(self._tasks) < _AT_ONCE:
                        self._answers[uid] = (now, self.answer(pod))
                        task = asyncio.create_task(self._one(uid, pod["status"]["podIP"], now))
                        self._tasks.add(task)
                        task.add_done_callback(self._tasks.discard)

    def answer(self, pod: Mapping[str, Any]) -> str:
        """What a pod's server said last, or ""."""
        return self._answers.get(pod["metadata"]["uid"], (0.0, ""))[1]

    async def close(self) -> None:
        """Stop asking."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _one(self, uid: str, host: str, now: float) -> None:
        self._answers[uid] = (now, await self._ask(host))
        if len(self._answers) > 1000:
            self._answers = {u: a for u, a in self._answers.items() if now - a[0] < 600}


def _in_question(pod: Object, now: float) -> bool:
    status = pod.get("status") or {}
    ready = any(
        c.get("type") == "Ready" and c.get("status") == "True" for c in status.get("conditions") or ()
    )
    started = status.get("startTime")
    if ready or not started or not status.get("podIP") or status.get("phase") != "Running":
        return False
    return now - datetime.fromisoformat(started).timestamp() >= _IN_QUESTION_S
