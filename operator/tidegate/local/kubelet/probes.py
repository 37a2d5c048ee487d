"""Probe counting (pure): when a probe is due, and when its results turn into a verdict."""

from dataclasses import dataclass, replace

from tidegate.local.kubelet.model import Probe


@dataclass(frozen=True, slots=True)
class ProbeState:
    """Where one probe of one run of a container stands. `due_s` is when it runs next."""

    due_s: float = 0.0
    running: bool = False
    successes: int = 0
    failures: int = 0


def begin(probe: Probe | None, since_s: float) -> ProbeState:
    """State of a probe whose container started, or whose startup probe passed, at `since_s`."""
    return ProbeState(due_s=since_s + (probe.initial_delay_s if probe else 0.0))


def due(probe: Probe | None, state: ProbeState, now: float) -> bool:
    """Whether the probe is to be run now; one at a time."""
    return probe is not None and not state.running and now >= state.due_s


def record(probe: Probe, state: ProbeState, ok: bool, now: float) -> tuple[ProbeState, bool | None]:
    """Count a result; returns the verdict, None while a threshold is not reached.

    A success forgets earlier failures and the other way round. The next run is a period after
    the last was due, or now when that has passed already.
    """
    successes, failures = (state.successes + 1, 0) if ok else (0, state.failures + 1)
    after = replace(
        state,
        running=False,
        due_s=max(state.due_s + probe.period_s, now),
        successes=successes,
        failures=failures,
    )
    if successes >= probe.success_threshold:
        return after, True
    if failures >= probe.failure_threshold:
        return after, False
    return after, None
