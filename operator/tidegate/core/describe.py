"""Queues and endpoints as JSON values, for people and for metrics. Times are seconds."""

from collections.abc import Mapping
from typing import Any

from tidegate.core.floors import Floors
from tidegate.core.line import Line, LineKey
from tidegate.core.room import Room


def queues(lines: Mapping[LineKey, Line], floors: Floors, now: float) -> list[dict[str, Any]]:
    """Who waits, by model and class."""
    found = []
    for key, line in sorted(lines.items()):
        (namespace, model), qos_class = key
        owed_s = floors.seconds(key, now)
        row = {
            "namespace": namespace,
            "model": model,
            "qos_class": qos_class or "*",
            **line.describe(now),
            "owed_gpu_s": None if owed_s is None else round(owed_s, 3),
        }
        found.append(row)
    return found


def endpoints(room: Room, now: float) -> list[dict[str, Any]]:
    """What every endpoint carries, what it keeps free from whom, and whether it is in the front."""
    turns = {model: room.turn(model, now) for model in room.models}
    names = {rank: name for name, rank in room.ranks.items()}
    found = []
    for address, load in sorted(room.loads.items()):
        turn = turns.get(load.model)
        keep = turn.keep if turn else {}
        described = load.describe(now, room.policy.report_stale_s)
        described["keeps_free_from"] = {names[r]: by.get(address, (0, 0))[0] for r, by in keep.items()}
        described["front"] = bool(turn and address in turn.front)
        found.append(described)
    return found
