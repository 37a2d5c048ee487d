"""When requests must be sent: what was promised, and how long such requests were seen to take."""

import math
from typing import Final

from tidegate.core import promises
from tidegate.core.flowtypes import Ask
from tidegate.core.line import LineKey
from tidegate.core.load import Mean
from tidegate.core.room import Room
from tidegate.core.types import Objectives

_NOTHING: Final = Objectives()


class Deadlines:
    """By model and class. Every method that needs the time is given it, in seconds."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._paces: dict[LineKey, Mean] = {}

    def __len__(self) -> int:
        return len(self._paces)

    def send_by(self, ask: Ask, now: float) -> float:
        """When a request that comes now must be sent to be in time; infinite where nothing is promised."""
        if not self._room.policy.qos:
            return math.inf
        pace = self._paces.get((ask.model, ask.qos_class))
        return promises.send_by(
            self.promised(ask),
            self._room.policy.fit,
            ask.prompt_tokens,
            ask.output_tokens,
            now,
            pace.value(1.0) if pace else 1.0,
        )

    def learn(self, ask: Ask, took_s: float) -> None:
        """A request was served, from when it was sent until its end."""
        if self._room.policy.qos and self.promised(ask).completion_s is not None:
            expected_s = promises.work_s(self._room.policy.fit, ask.prompt_tokens, ask.output_tokens)
            self._paces.setdefault((ask.model, ask.qos_class), Mean(0.1)).add(took_s / expected_s)

    def forget(self, key: LineKey) -> None:
        """The model is gone."""
        self._paces.pop(key, None)

    def promised(self, ask: Ask) -> Objectives:
        """What a request is promised: its model's own objectives, else its class's."""
        model, known = self._room.models.get(ask.model), self._room.classes.get(ask.qos_class)
        own = model.objectives.get(ask.qos_class) if model else None
        return own or (known.objectives if known else _NOTHING)
