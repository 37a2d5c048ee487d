"""Who had the GPUs over time, arms beside each other. Needs matplotlib (extra `demo`)."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tidegate.sim.cluster.usage import Usage

_IDLE: Final = "#eeeeee"


def gpus(axis: Any, usage: Usage, colours: Mapping[str, str]) -> None:
    """GPUs by class on top of each other: hatched what is borrowed, pale what still starts, grey idle."""
    moments = [*usage.timeline, usage.timeline[-1]._replace(time_s=usage.end_s)]
    times = [m.time_s for m in moments]
    below: Sequence[float] = [0.0] * len(moments)
    for name, colour in colours.items():
        used, lent, starting = (
            [getattr(m, kind).get(name, 0) for m in moments] for kind in ("used", "borrowed", "starting")
        )
        if not any(used):
            continue
        below = _layer(axis, times, below, _less(used, lent, starting), color=colour, label=name)
        # A pod that starts may stand on lent GPUs: it is drawn as starting.
        shown = [min(b, u - s) for b, u, s in zip(lent, used, starting, strict=True)]
        if any(shown):
            below = _layer(
                axis, times, below, shown, facecolor=colour, hatch="///", edgecolor="white",
                label=f"{name}, borrowed",
            )  # fmt: skip
        if any(starting):
            below = _layer(axis, times, below, starting, color=colour, alpha=0.35, label=f"{name}, starting")
    _layer(axis, times, below, [m.idle for m in moments], color=_IDLE, label="idle")
    axis.set_ylim(0, max(below[at] + m.idle for at, m in enumerate(moments)))


def _less(used: Sequence[float], lent: Sequence[float], starting: Sequence[float]) -> list[float]:
    """What is neither drawn as borrowed nor as starting."""
    return [u - s - min(b, u - s) for u, b, s in zip(used, lent, starting, strict=True)]


def _layer(
    axis: Any, times: Sequence[float], below: Sequence[float], height: Sequence[float], **style: Any
) -> list[float]:
    top = [b + h for b, h in zip(below, height, strict=True)]
    axis.fill_between(times, below, top, step="post", lw=0, **style)
    return top
