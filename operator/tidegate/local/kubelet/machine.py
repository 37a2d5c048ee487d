"""What the kubelet does with a pod, as a pure state machine.

`observe` takes in what happened, `decide` says what to do next and until when to wait. Neither
does anything itself. Times are seconds of one clock that never goes back.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from tidegate.local.kubelet.model import Container, Pod, Probe, RestartPolicy
from tidegate.local.kubelet.probes import begin, due, record
from tidegate.local.kubelet.state import (
    Action,
    ContainerState,
    Decision,
    Deleted,
    Event,
    Exited,
    Finalize,
    Hook,
    HookDone,
    ImageChanged,
    NotStarted,
    Phase,
    PodState,
    Probed,
    ProbeKind,
    RunHook,
    RunProbe,
    Signal,
    Start,
    Started,
    Stop,
    Termination,
)

BACKOFF_FIRST_S: Final = 1.0
BACKOFF_MAX_S: Final = 30.0
"""The kubelet's 10 s doubling to 300 s, scaled by ten: a local cluster is for watching."""
BACKOFF_RESET_S: Final = 2 * BACKOFF_MAX_S
"""A run this long forgets earlier crashes: twice the longest delay, as the kubelet's 10 min."""
CONFIG_RETRY_S: Final = 5.0
"""Between attempts at what may be created later (a ConfigMap), and until ErrImagePull becomes
ImagePullBackOff."""
HOOK_GRACE_S: Final = 2.0
"""What a container gets after SIGTERM when its preStop hook used up the grace period, as the
kubelet's `minimumGracePeriodInSeconds`."""


# --- what happened -----------------------------------------------------------------------------


def observe(pod: Pod, state: PodState, event: Event, now: float) -> PodState:
    """Take in one event."""
    if isinstance(event, Deleted):
        by = min(now + event.grace_s, float("inf") if state.delete_by_s is None else state.delete_by_s)
        containers = {name: _hasten(cs, by) for name, cs in state.containers.items()}
        return replace(state, delete_by_s=by, containers=containers)
    container = next((c for c in pod.containers if c.name == event.container), None)
    if container is None:
        return state
    after = _observe(pod, container, state.containers[container.name], event, now)
    return replace(state, containers={**state.containers, container.name: after})


def _hasten(cs: ContainerState, by: float) -> ContainerState:
    """A container that is being stopped already gets no more time than its pod."""
    if cs.stop is None:
        return cs
    return replace(cs, stop=replace(cs.stop, deadline_s=min(cs.stop.deadline_s, by)))


def _observe(pod: Pod, spec: Container, cs: ContainerState, event: Event, now: float) -> ContainerState:
    match event:
        case Started():
            cs = _started(spec, cs, event, now)
        case NotStarted():
            cs = _not_started(cs, event, now)
        case Exited():
            cs = _exited(cs, event, now)
        case Probed() if cs.phase is Phase.RUNNING and event.runs == cs.runs:
            cs = _probed(pod, spec, cs, event, now)
        case HookDone() if cs.stop and cs.stop.hook is Hook.RUNNING and event.runs == cs.runs:
            cs = replace(cs, stop=_hook_over(cs.stop, now))
        case ImageChanged() if cs.phase is Phase.WAITING:
            cs = replace(cs, retry_s=now, delay_s=0.0)
        case ImageChanged() if cs.phase is Phase.RUNNING and cs.stop is None:
            cs = replace(cs, stop=Stop(now + pod.grace_s))
    return cs


def _started(spec: Container, cs: ContainerState, event: Started, now: float) -> ContainerState:
    started = spec.startup is None
    return replace(
        cs,
        phase=Phase.RUNNING,
        runs=cs.runs + 1,
        started_s=now,
        container_id=event.container_id,
        started=started,
        ready=started and spec.readiness is None,
        probes={
            ProbeKind.STARTUP: begin(spec.startup, now),
            ProbeKind.READINESS: begin(spec.readiness, now),
            ProbeKind.LIVENESS: begin(spec.liveness, now),
        },
        stop=None,
        before=cs.ended,
        ended=None,
    )


def _not_started(cs: ContainerState, event: NotStarted, now: float) -> ContainerState:
    # The image table is fixed while the kubelet runs, so an unknown image is not tried again.
    retry = float("inf") if event.reason == "ErrImagePull" else now + CONFIG_RETRY_S
    waiting = replace(cs, phase=Phase.WAITING, reason=event.reason, message=event.message)
    return replace(waiting, since_s=now, retry_s=retry)


def _exited(cs: ContainerState, event: Exited, now: float) -> ContainerState:
    # A program that could not be executed ends before it was seen to start: it counts as a run.
    early = cs.phase is Phase.STARTING
    ended = Termination(
        exit_code=event.exit_code,
        reason=event.reason or ("Completed" if event.exit_code == 0 else "Error"),
        message=event.message,
        started_s=now if early else cs.started_s,
        finished_s=now,
        container_id="" if early else cs.container_id,
    )
    return replace(
        cs,
        phase=Phase.EXITED,
        runs=cs.runs + early,
        before=cs.ended if early else cs.before,
        ended=ended,
        started=False,
        ready=False,
        stop=None,
        probes={},
    )


def _probed(pod: Pod, spec: Container, cs: ContainerState, event: Probed, now: float) -> ContainerState:
    probe = probe_of(spec, event.kind)
    if probe is None or event.kind not in cs.probes:
        return cs
    counted, verdict = record(probe, cs.probes[event.kind], event.ok, now)
    cs = replace(cs, probes={**cs.probes, event.kind: counted})
    match event.kind:
        case ProbeKind.READINESS if verdict is not None:
            return replace(cs, ready=verdict)
        case ProbeKind.STARTUP if verdict and not cs.started:
            # The other probes' delays count from the start: most are due at once.
            late = {kind: replace(p, due_s=max(now, p.due_s)) for kind, p in cs.probes.items()}
            return replace(cs, started=True, ready=spec.readiness is None, probes=late)
        case ProbeKind.STARTUP | ProbeKind.LIVENESS if verdict is False and cs.stop is None:
            grace = pod.grace_s if probe.grace_s is None else probe.grace_s
            return replace(cs, ready=False, stop=Stop(now + grace))
    return cs


def _hook_over(stop: Stop, now: float) -> Stop:
    return replace(stop, hook=Hook.DONE, deadline_s=max(stop.deadline_s, now + HOOK_GRACE_S))


def probe_of(container: Container, kind: ProbeKind) -> Probe | None:
    """One of a container's three probes."""
    probes = {
        ProbeKind.STARTUP: container.startup,
        ProbeKind.READINESS: container.readiness,
        ProbeKind.LIVENESS: container.liveness,
    }
    return probes[kind]


# --- what to do --------------------------------------------------------------------------------

_Step = tuple[ContainerState, tuple[Action, ...], float | None]


def decide(pod: Pod, state: PodState, now: float) -> Decision:
    """Say what to do now: starts, probes, hooks, signals, and the end of the pod."""
    containers = dict(state.containers)
    actions: list[Action] = []
    wakes: list[float] = []
    for spec in pod.containers:
        current = replace(state, containers=containers)
        containers[spec.name], acts, wake = _decide(pod, current, spec, now)
        actions += acts
        if wake is not None:
            wakes.append(wake)
    state = replace(state, containers=containers)
    if state.delete_by_s is not None and not state.finalized and not active(state):
        state = replace(state, finalized=True)
        actions.append(Finalize())
    return Decision(state, tuple(actions), min(wakes, default=None))


def active(state: PodState) -> bool:
    """Whether any container has a process, or is getting one."""
    return any(c.phase in {Phase.STARTING, Phase.RUNNING} for c in state.containers.values())


def over(pod: Pod, state: PodState) -> bool:
    """Whether no container of the pod will ever run again."""
    if state.rejection or state.finalized:
        return True
    if active(state):
        return False
    if state.delete_by_s is not None or _init_failed(pod, state):
        return True
    return all(_finished(pod, state, c) for c in pod.main)


def _decide(pod: Pod, state: PodState, spec: Container, now: float) -> _Step:
    cs = state.containers[spec.name]
    step: Callable[[Pod, PodState, Container, ContainerState, float], _Step]
    match cs.phase:
        case Phase.WAITING:
            step = _decide_waiting
        case Phase.RUNNING:
            step = _decide_running
        case Phase.EXITED:
            step = _decide_exited
        case Phase.STARTING:
            return cs, (), None
    return step(pod, state, spec, cs, now)


def _decide_waiting(pod: Pod, state: PodState, spec: Container, cs: ContainerState, now: float) -> _Step:
    if state.rejection or state.delete_by_s is not None or _init_failed(pod, state):
        return cs, (), None
    if not _turn(pod, state, spec):
        return (replace(cs, reason="PodInitializing") if cs.runs == 0 else cs), (), None
    if now >= cs.retry_s:
        return replace(cs, phase=Phase.STARTING), (Start(spec, cs.runs),), None
    if cs.reason == "ErrImagePull":
        if now >= cs.since_s + CONFIG_RETRY_S:
            return replace(cs, reason="ImagePullBackOff"), (), None
        return cs, (), cs.since_s + CONFIG_RETRY_S
    return cs, (), cs.retry_s if cs.retry_s < float("inf") else None


def _decide_running(_pod: Pod, state: PodState, spec: Container, cs: ContainerState, now: float) -> _Step:
    if state.delete_by_s is not None and cs.stop is None:
        cs = replace(cs, stop=Stop(state.delete_by_s))
    actions: tuple[Action, ...] = ()
    wakes: list[float] = []
    if cs.stop is not None:
        stop, actions, wake = _advance(spec, cs, cs.stop, now)
        cs = replace(cs, stop=stop)
        wakes += [wake] if wake is not None else []
    for kind in _probing(cs):
        probe = probe_of(spec, kind)
        if probe is None:
            continue
        if due(probe, cs.probes[kind], now):
            cs = replace(cs, probes={**cs.probes, kind: replace(cs.probes[kind], running=True)})
            actions += (RunProbe(spec, cs.runs, kind, probe),)
        elif not cs.probes[kind].running:
            wakes.append(cs.probes[kind].due_s)
    return cs, actions, min(wakes, default=None)


def _probing(cs: ContainerState) -> tuple[ProbeKind, ...]:
    """Probes that count now: readiness to the end, so that a draining pod can say it is done."""
    if cs.stop is not None:
        return (ProbeKind.READINESS,) if cs.started and not cs.stop.kill_sent else ()
    return (ProbeKind.READINESS, ProbeKind.LIVENESS) if cs.started else (ProbeKind.STARTUP,)


def _advance(
    spec: Container, cs: ContainerState, stop: Stop, now: float
) -> tuple[Stop, tuple[Action, ...], float | None]:
    """Take a container that is being stopped one step further: preStop, SIGTERM, SIGKILL."""
    actions: list[Action] = []
    if stop.hook is Hook.DUE:
        if spec.pre_stop is not None and stop.deadline_s > now:
            stop = replace(stop, hook=Hook.RUNNING)
            actions.append(RunHook(spec, cs.runs, stop.deadline_s - now))
        else:
            stop = replace(stop, hook=Hook.DONE)
    if stop.hook is Hook.RUNNING and now >= stop.deadline_s:
        stop = _hook_over(stop, now)
    if stop.hook is Hook.DONE and not stop.term_sent and now < stop.deadline_s:
        stop = replace(stop, term_sent=True)
        actions.append(Signal(spec.name, kill=False))
    if now >= stop.deadline_s and not stop.kill_sent:
        stop = replace(stop, kill_sent=True)
        actions.append(Signal(spec.name, kill=True))
    return stop, tuple(actions), None if stop.kill_sent else stop.deadline_s


def _decide_exited(pod: Pod, state: PodState, spec: Container, cs: ContainerState, now: float) -> _Step:
    kept_down = state.rejection is not None or state.delete_by_s is not None
    if kept_down or cs.ended is None or not _restarts(pod, spec, cs):
        return cs, (), None
    ran_s = cs.ended.finished_s - cs.ended.started_s
    # The first restart is immediate, as the kubelet's; a delay follows each quick crash after it.
    if cs.runs <= 1 or ran_s >= BACKOFF_RESET_S:
        delay, started_again = 0.0, now
    else:
        delay = min(max(cs.delay_s * 2, BACKOFF_FIRST_S), BACKOFF_MAX_S)
        started_again = cs.ended.finished_s + delay
    waiting = replace(
        cs,
        phase=Phase.WAITING,
        delay_s=delay,
        retry_s=started_again,
        since_s=now,
        reason="CrashLoopBackOff",
        message=f"back-off {delay:g}s restarting failed container={spec.name}"
        f" pod={pod.name}_{pod.namespace}({pod.uid})",
    )
    if now >= started_again:
        return _decide_waiting(pod, state, spec, waiting, now)
    return waiting, (), started_again


def _restarts(pod: Pod, spec: Container, cs: ContainerState) -> bool:
    failed = cs.ended is not None and cs.ended.exit_code != 0
    if spec.init:
        return failed and pod.restart_policy is not RestartPolicy.NEVER
    if pod.restart_policy is RestartPolicy.ALWAYS:
        return True
    return failed and pod.restart_policy is RestartPolicy.ON_FAILURE


def _turn(pod: Pod, state: PodState, spec: Container) -> bool:
    """Whether every init container before this one has completed."""
    for other in pod.inits:
        if other.name == spec.name:
            return True
        if not _completed(state.containers[other.name]):
            return False
    return True


def _completed(cs: ContainerState) -> bool:
    return cs.phase is Phase.EXITED and cs.ended is not None and cs.ended.exit_code == 0


def _finished(pod: Pod, state: PodState, spec: Container) -> bool:
    cs = state.containers[spec.name]
    return cs.phase is Phase.EXITED and not _restarts(pod, spec, cs)


def _init_failed(pod: Pod, state: PodState) -> bool:
    """Whether an init container failed for good, so that the pod never runs."""
    return any(_finished(pod, state, c) and not _completed(state.containers[c.name]) for c in pod.inits)
