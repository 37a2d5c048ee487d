"""`status` of a pod: written from the machine's state, and read back after a restart (pure)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from tidegate.local.kubelet import machine
from tidegate.local.kubelet.clock import parse, rfc3339
from tidegate.local.kubelet.model import Container, Object, Pod
from tidegate.local.kubelet.state import ContainerState, Phase, PodState, Rejection, Termination

KILLED_WITH_KUBELET: Final = "the kubelet was stopped, and the processes of its pods with it"


def render(
    pod: Pod, state: PodState, *, pod_ip: str, host_ip: str, previous: Sequence[Object], now: float
) -> dict[str, Any]:
    """Write the part of the status that the kubelet owns.

    `previous` are the conditions as they were, whose transition times are kept where nothing
    changed. Conditions of other writers are left out: the patch merges by type.
    """
    status: dict[str, Any] = {
        "phase": phase(pod, state),
        "hostIP": host_ip,
        "hostIPs": [{"ip": host_ip}],
        "startTime": rfc3339(state.admitted_s),
    }
    if state.rejection:
        return status | {"reason": state.rejection.reason, "message": state.rejection.message}
    status |= {"podIP": pod_ip, "podIPs": [{"ip": pod_ip}]}
    status["conditions"] = _conditions(pod, state, previous, now)
    status["containerStatuses"] = [_container(c, state.containers[c.name]) for c in pod.main]
    if pod.inits:
        status["initContainerStatuses"] = [_container(c, state.containers[c.name]) for c in pod.inits]
    return status


def phase(pod: Pod, state: PodState) -> str:
    """Pending, Running, Succeeded or Failed."""
    if state.rejection:
        return "Failed"
    mains = [state.containers[c.name] for c in pod.main]
    if machine.over(pod, state) and (state.finalized or not machine.active(state)):
        ended = [c.ended for c in mains]
        return "Succeeded" if all(e and e.exit_code == 0 for e in ended) else "Failed"
    return "Running" if any(c.runs for c in mains) else "Pending"


def _conditions(pod: Pod, state: PodState, previous: Sequence[Object], now: float) -> list[dict[str, Any]]:
    unready = [c.name for c in pod.main if not state.containers[c.name].ready]
    ended = phase(pod, state) == "Succeeded"
    reason, message = "", ""
    if ended:
        reason = "PodCompleted"
    elif unready:
        reason = "ContainersNotReady"
        message = f"containers with unready status: [{' '.join(unready)}]"
    waiting = [c.name for c in pod.inits if not _init_done(state.containers[c.name])]
    incomplete = ("ContainersNotInitialized", f"containers with incomplete status: [{' '.join(waiting)}]")
    wanted = [
        ("PodScheduled", True, "", ""),
        ("PodReadyToStartContainers", not ended, "", ""),
        ("Initialized", not waiting, *(incomplete if waiting else ("", ""))),
        ("ContainersReady", not unready, reason, message),
        ("Ready", not unready, reason, message),
    ]
    before = {c["type"]: c for c in previous}
    conditions = []
    for kind, value, why, text in wanted:
        status = "True" if value else "False"
        old = before.get(kind, {})
        same = old.get("status") == status and old.get("lastTransitionTime")
        condition = {"type": kind, "status": status, "lastTransitionTime": same and old["lastTransitionTime"]}
        condition["lastTransitionTime"] = condition["lastTransitionTime"] or rfc3339(now)
        conditions.append(condition | {"reason": why, "message": text})
    return conditions


def _init_done(cs: ContainerState) -> bool:
    return cs.ended is not None and cs.phase is Phase.EXITED and cs.ended.exit_code == 0


def _container(spec: Container, cs: ContainerState) -> dict[str, Any]:
    current: dict[str, Any]
    last: Termination | None
    match cs.phase:
        case Phase.RUNNING:
            current, last = {"running": {"startedAt": rfc3339(cs.started_s)}}, cs.before
        case Phase.EXITED:
            current, last = _terminated(cs.ended), cs.before
        case _:
            waiting = {"reason": cs.reason} | ({"message": cs.message} if cs.message else {})
            current, last = {"waiting": waiting}, cs.ended
    status = {
        "name": spec.name,
        "image": spec.image,
        "imageID": "",
        "ready": cs.ready or (spec.init and _init_done(cs)),
        "started": cs.started,
        "restartCount": max(cs.runs - 1, 0),
        "state": current,
        "lastState": _terminated(last),
    }
    if cs.container_id:
        status["containerID"] = cs.container_id
    return status


def _terminated(ended: Termination | None) -> dict[str, Any]:
    if ended is None:
        return {}
    terminated: dict[str, Any] = {
        "exitCode": ended.exit_code,
        "reason": ended.reason,
        "startedAt": rfc3339(ended.started_s),
        "finishedAt": rfc3339(ended.finished_s),
    }
    if ended.exit_code > 128 and ended.reason == "Error":
        terminated["signal"] = ended.exit_code - 128
    if ended.message:
        terminated["message"] = ended.message
    if ended.container_id:
        terminated["containerID"] = ended.container_id
    return {"terminated": terminated}


# --- after a restart of the kubelet ------------------------------------------------------------


def restore(pod: Pod, status: Object, now: float) -> PodState:
    """State of a pod as its status tells, when none of its processes lives any more."""
    known = {
        s["name"]: s
        for s in (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ()))
    }
    containers = {c.name: _restore(known.get(c.name) or {}, now) for c in pod.containers}
    rejection = None
    if status.get("phase") == "Failed" and not known:
        rejection = Rejection(status.get("reason") or "Failed", status.get("message") or "")
    admitted = parse(status.get("startTime")) or now
    return PodState(containers=containers, admitted_s=admitted, rejection=rejection)


def _restore(status: Object, now: float) -> ContainerState:
    state: Mapping[str, Any] = status.get("state") or {}
    last = _ended((status.get("lastState") or {}).get("terminated"))
    runs = int(status.get("restartCount") or 0)
    container_id = status.get("containerID") or ""
    fresh = ContainerState(since_s=now, container_id=container_id)
    if running := state.get("running"):
        started = parse(running.get("startedAt"))
        killed = Termination(137, "Error", KILLED_WITH_KUBELET, started, now, container_id)
        return replace(fresh, phase=Phase.EXITED, runs=runs + 1, ended=killed, before=last)
    if terminated := state.get("terminated"):
        return replace(fresh, phase=Phase.EXITED, runs=runs + 1, ended=_ended(terminated), before=last)
    return replace(fresh, runs=runs + 1 if last else 0, ended=last)


def _ended(terminated: Object | None) -> Termination | None:
    if not terminated:
        return None
    return Termination(
        exit_code=int(terminated.get("exitCode") or 0),
        reason=terminated.get("reason") or "Error",
        message=terminated.get("message") or "",
        started_s=parse(terminated.get("startedAt")),
        finished_s=parse(terminated.get("finishedAt")),
        container_id=terminated.get("containerID") or "",
    )
