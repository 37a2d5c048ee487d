"""Pod status: written, and read back after a restart of the kubelet."""

import pytest

from tidegate.local.kubelet.clock import parse, rfc3339
from tidegate.local.kubelet.model import Container, Pod, RestartPolicy, read_pod
from tidegate.local.kubelet.state import ContainerState, Phase, PodState, Rejection, Termination
from tidegate.local.kubelet.status import KILLED_WITH_KUBELET, render, restore

NOW = 1_700_000_000.0
POD = Pod("u", "p", "ns", "gpu-node-1", (Container("c", "img:1"),))
RUNNING = ContainerState(
    Phase.RUNNING, runs=1, started_s=NOW, started=True, ready=True, container_id="process://x"
)


def write(
    pod: Pod, cs: ContainerState, previous: list[dict[str, str]] | None = None, now: float = NOW
) -> dict:
    state = PodState({c.name: cs for c in pod.containers}, admitted_s=NOW)
    return render(pod, state, pod_ip="127.7.1.1", host_ip="127.7.0.1", previous=previous or [], now=now)


def condition(status: dict, kind: str) -> dict:
    return next(c for c in status["conditions"] if c["type"] == kind)


def test_a_ready_pod() -> None:
    status = write(POD, RUNNING)
    assert (status["phase"], status["podIP"], status["hostIP"]) == ("Running", "127.7.1.1", "127.7.0.1")
    assert status["podIPs"] == [{"ip": "127.7.1.1"}]
    assert {c["type"]: c["status"] for c in status["conditions"]} == {
        "PodScheduled": "True",
        "PodReadyToStartContainers": "True",
        "Initialized": "True",
        "ContainersReady": "True",
        "Ready": "True",
    }
    [container] = status["containerStatuses"]
    assert container["state"] == {"running": {"startedAt": rfc3339(NOW)}}
    assert (container["restartCount"], container["lastState"]) == (0, {})


def test_transition_times_move_only_with_the_status() -> None:
    ready = write(POD, RUNNING)["conditions"]
    same = write(POD, RUNNING, ready, NOW + 60)
    assert same["conditions"] == ready
    unready = write(POD, ContainerState(Phase.RUNNING, runs=1, started_s=NOW), ready, NOW + 60)
    assert condition(unready, "Ready")["lastTransitionTime"] == rfc3339(NOW + 60)
    assert condition(unready, "Ready")["reason"] == "ContainersNotReady"
    assert condition(unready, "Ready")["message"] == "containers with unready status: [c]"
    assert condition(unready, "Initialized")["lastTransitionTime"] == rfc3339(NOW)


def test_conditions_of_others_are_left_to_the_merge() -> None:
    others = [{"type": "DisruptionTarget", "status": "True", "lastTransitionTime": rfc3339(NOW)}]
    assert "DisruptionTarget" not in {c["type"] for c in write(POD, RUNNING, others)["conditions"]}


def test_back_off_shows_the_last_end() -> None:
    ended = Termination(137, "Error", "", NOW, NOW + 1, "process://x")
    cs = ContainerState(Phase.WAITING, runs=3, reason="CrashLoopBackOff", message="back-off", ended=ended)
    [container] = write(POD, cs)["containerStatuses"]
    assert container["state"] == {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}}
    assert container["restartCount"] == 2
    last = container["lastState"]["terminated"]
    assert (last["exitCode"], last["signal"], last["reason"]) == (137, 9, "Error")


def test_a_rejected_pod_says_why() -> None:
    state = PodState({"c": ContainerState()}, NOW, rejection=Rejection("OutOfnvidia.com/gpu", "too many"))
    status = render(POD, state, pod_ip="", host_ip="h", previous=[], now=NOW)
    assert (status["phase"], status["reason"], status["message"]) == (
        "Failed",
        "OutOfnvidia.com/gpu",
        "too many",
    )
    back = restore(POD, status, NOW + 5)
    assert back.rejection == state.rejection


def test_a_completed_pod() -> None:
    pod = Pod("u", "p", "ns", "n", POD.containers, RestartPolicy.NEVER)
    cs = ContainerState(Phase.EXITED, runs=1, ended=Termination(0, "Completed", "", NOW, NOW, ""))
    status = write(pod, cs)
    assert status["phase"] == "Succeeded"
    assert condition(status, "Ready")["reason"] == "PodCompleted"


def test_what_ran_when_the_kubelet_died_was_killed() -> None:
    state = restore(POD, write(POD, RUNNING), NOW + 60)
    cs = state.containers["c"]
    assert (cs.phase, cs.runs) == (Phase.EXITED, 1)
    assert cs.ended == Termination(137, "Error", KILLED_WITH_KUBELET, NOW, NOW + 60, "process://x")
    assert state.admitted_s == NOW


EXIT = Termination(3, "Error", "m", NOW, NOW + 1, "process://x")


@pytest.mark.parametrize(
    ("before", "runs", "ended"),
    [
        (ContainerState(), 0, None),
        (ContainerState(Phase.WAITING, runs=2, reason="CrashLoopBackOff", ended=EXIT), 2, EXIT),
        (ContainerState(Phase.EXITED, runs=4, ended=EXIT, before=EXIT), 4, EXIT),
    ],
    ids=["never started", "in back-off", "ended"],
)
def test_read_back(before: ContainerState, runs: int, ended: Termination | None) -> None:
    pod = Pod("u", "p", "ns", "n", POD.containers, RestartPolicy.NEVER)
    cs = restore(pod, write(pod, before), NOW).containers["c"]
    assert (cs.runs, cs.ended) == (runs, ended)


def test_times_are_read_as_they_are_written() -> None:
    assert parse(rfc3339(NOW)) == NOW
    assert parse("2026-11-22T19:52:45.123456Z") == pytest.approx(1795377165.123456)
    assert parse(None) == 0.0


def container(**fields: object) -> dict:
    return {"name": "c", "image": "i", "ports": [{"name": "http", "containerPort": 8000}], **fields}


def raw(*containers: dict, **spec: object) -> dict:
    meta = {"uid": "u", "name": "p", "namespace": "ns"}
    return {"metadata": meta, "spec": {"nodeName": "n", "containers": list(containers), **spec}}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"readinessProbe": {"httpGet": {"port": "http"}}}, ""),
        (
            {"readinessProbe": {"httpGet": {"port": "web"}}},
            "readinessProbe: no container port is named 'web'",
        ),
        ({"livenessProbe": {"grpc": {"port": 1}}}, "livenessProbe: grpc is not supported"),
        (
            {"lifecycle": {"postStart": {"exec": {"command": ["true"]}}}},
            "lifecycle.postStart is not supported",
        ),
        ({"lifecycle": {"preStop": {"sleep": {"seconds": 3}}}}, ""),
    ],
)
def test_what_cannot_be_honoured_is_said(fields: dict, problem: str) -> None:
    [read] = read_pod(raw(container(**fields))).containers
    assert read.problem.startswith(problem) if problem else read.problem == ""


def test_gpus_are_summed_and_init_containers_count_by_their_largest() -> None:
    def gpus(count: int) -> dict:
        return container(resources={"limits": {"nvidia.com/gpu": str(count)}})

    assert read_pod(raw(gpus(1), gpus(2))).gpus == 3
    assert read_pod(raw(gpus(1), initContainers=[gpus(4)])).gpus == 4
    assert read_pod(raw(container())).gpus == 0


def test_sidecars_are_refused_by_name() -> None:
    read = read_pod(raw(container(), initContainers=[container(restartPolicy="Always")]))
    assert "sidecar" in read.inits[0].problem
