"""The process kubelet on a real control plane: pods live and die as real processes."""

import asyncio
import os
import signal
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.processes import process_of
from support.wait import PATIENCE_S, eventually
from tidegate.adapters.kube import ApiError, Kube, kinds
from tidegate.local.cluster import NODES, LocalCluster
from tidegate.local.kubelet.clock import rfc3339

Object = dict[str, Any]
SHELL = "tidegate/shell"


@pytest.fixture(scope="module")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A cluster of its own: its kubelet and API server are killed and restarted."""
    with LocalCluster.start(
        tmp_path_factory.mktemp("kubelet"),
        parts=NODES,
        nodes=3,
        gpus_per_node=4,
        engine_env={"FROM_FLAG": "yes"},
    ) as cluster:
        yield cluster


def kubectl(cluster: LocalCluster, *args: str, check: bool = True) -> str:
    """What kubectl prints."""
    return cluster.kubectl(*args, check=check).stdout


def shell(script: str, **fields: Any) -> Object:
    return {"name": "c", "image": SHELL, "command": ["sh", "-c", script], **fields}


async def create(kube: Kube, namespace: str, name: str, *containers: Object, **spec: Any) -> None:
    finalizers = spec.pop("finalizers", [])
    body = {
        "metadata": {"name": name, "namespace": namespace, "finalizers": finalizers},
        "spec": {"containers": list(containers), "terminationGracePeriodSeconds": 5, **spec},
    }
    await kube.create(kinds.POD, body)


async def until(
    kube: Kube, namespace: str, name: str, good: Callable[[Object], Any], within_s: float = PATIENCE_S
) -> Object:
    """Wait until a pod's status is as wanted; fails with what was seen last."""
    return await eventually(
        lambda: kube.get(kinds.POD, name, namespace), until=lambda p: good(p["status"]), within_s=within_s
    )


async def gone(kube: Kube, namespace: str, name: str, within_s: float = PATIENCE_S) -> None:
    async def look() -> Object:
        try:
            return (await kube.get(kinds.POD, name, namespace))["status"]
        except ApiError as error:
            if error.status == 404:
                return {}
            raise

    await eventually(look, until=lambda status: not status, within_s=within_s)


async def holds(look: Callable[[], bool], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not look():
        assert time.monotonic() < deadline, "it takes too long"
        await asyncio.sleep(0.02)


async def seen(needle: str) -> list[int]:
    """Processes with this argument, once there are any: a shell takes a moment to start them."""
    await holds(lambda: bool(alive(needle)), within_s=10)
    return alive(needle)


def running(status: Object) -> bool:
    return "running" in status["containerStatuses"][0]["state"]


def ready(status: Object) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in status["conditions"])


def terminated(status: Object) -> Object | None:
    return status["containerStatuses"][0]["state"].get("terminated")


def waiting(reason: str) -> Callable[[Object], bool]:
    return lambda status: status["containerStatuses"][0]["state"].get("waiting", {}).get("reason") == reason


def restarted(times: int) -> Callable[[Object], bool]:
    return lambda s: s["containerStatuses"][0]["restartCount"] == times and running(s)


def alive(needle: str) -> list[int]:
    """Processes whose command line has `needle` as an argument, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if needle.encode() in line:
                found.append(int(entry.name))
    return found


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def parent(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


def number() -> str:
    """Seconds of a sleep that no other process sleeps: names it in /proc."""
    number.last += 1  # type: ignore[attr-defined]
    return f"{100_000 + os.getpid()}.{number.last}"  # type: ignore[attr-defined]


number.last = 0  # type: ignore[attr-defined]


async def test_nodes_are_ready_and_say_what_they_have(kube: Kube, control_plane: LocalCluster) -> None:
    nodes, _ = await kube.list(kinds.NODE)
    assert [n["metadata"]["name"] for n in nodes] == ["gpu-node-1", "gpu-node-2", "gpu-node-3"]
    for node in nodes:
        assert node["status"]["allocatable"]["nvidia.com/gpu"] == "4"
        assert node["metadata"]["labels"]["nvidia.com/gpu.product"] == "NVIDIA-A100-SXM4-80GB"
        assert next(c for c in node["status"]["conditions"] if c["type"] == "Ready")["status"] == "True"
        lease = await kube.get(kinds.LEASE, node["metadata"]["name"], "kube-node-lease")
        assert lease["spec"]["holderIdentity"] == node["metadata"]["name"]


async def test_a_deleted_node_comes_back(kube: Kube) -> None:
    await kube.delete(kinds.NODE, "gpu-node-3")
    async with asyncio.timeout(25):
        while True:
            try:
                node = await kube.get(kinds.NODE, "gpu-node-3")
            except ApiError:
                node = {"status": {}}
            if node["status"].get("allocatable", {}).get("nvidia.com/gpu") == "4":
                return
            await asyncio.sleep(0.2)


async def test_a_server_becomes_ready_on_its_own_address(
    kube: Kube, namespace: str, control_plane: LocalCluster
) -> None:
    server = {
        "name": "web",
        "image": SHELL,
        "command": [sys.executable, "-u", "-m", "http.server", "8000", "--bind", "$(POD_IP)"],
        "ports": [{"name": "http", "containerPort": 8000}],
        "startupProbe": {"tcpSocket": {"port": "http"}, "periodSeconds": 1, "failureThreshold": 20},
        "readinessProbe": {"httpGet": {"port": "http", "path": "/"}, "periodSeconds": 1},
    }
    await create(kube, namespace, "web", server)
    pod = await until(kube, namespace, "web", ready)
    address = pod["status"]["podIP"]
    node = int(pod["spec"]["nodeName"].removeprefix("gpu-node-"))
    assert address.startswith("127.")
    assert address.split(".")[2] == str(node)
    assert pod["status"]["podIPs"] == [{"ip": address}]
    assert pod["status"]["phase"] == "Running"
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"http://{address}:8000/")).status_code == 200
    assert 'GET / HTTP/1.1" 200' in kubectl(control_plane, "logs", "-n", namespace, "web")


async def test_environment(kube: Kube, namespace: str, control_plane: LocalCluster) -> None:
    await kube.create(
        kinds.CONFIG_MAP, {"metadata": {"name": "m", "namespace": namespace}, "data": {"k": "from a map"}}
    )
    env = [
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {"name": "MAP", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "k"}}},
        {"name": "BOTH", "value": "$(NODE)+$(MAP)"},
    ]
    container = {
        **shell('echo "$BOTH|$POD_IP|$NVIDIA_VISIBLE_DEVICES|$FROM_FLAG|$0"'),
        "args": ["$(HOSTNAME)"],
        "env": env,
        "resources": {"limits": {"nvidia.com/gpu": "2"}},
    }
    await create(kube, namespace, "env", container, restartPolicy="Never")
    pod = await until(kube, namespace, "env", lambda s: s["phase"] == "Succeeded")
    node, address = pod["spec"]["nodeName"], pod["status"]["podIP"]
    wanted = f"{node}+from a map|{address}|0,1|yes|env\n"
    assert kubectl(control_plane, "logs", "-n", namespace, "env") == wanted
    ended = terminated(pod["status"])
    assert ended is not None
    assert (ended["exitCode"], ended["reason"]) == (0, "Completed")


async def test_a_missing_config_map_is_waited_for(kube: Kube, namespace: str) -> None:
    env = [{"name": "MAP", "valueFrom": {"configMapKeyRef": {"name": "later", "key": "k"}}}]
    await create(kube, namespace, "late", shell("sleep 1000", env=env))
    pod = await until(kube, namespace, "late", waiting("CreateContainerConfigError"))
    assert (
        pod["status"]["containerStatuses"][0]["state"]["waiting"]["message"] == 'configmap "later" not found'
    )
    await kube.create(
        kinds.CONFIG_MAP, {"metadata": {"name": "later", "namespace": namespace}, "data": {"k": "v"}}
    )
    await until(kube, namespace, "late", ready)


async def test_logs_follow_tail_and_previous(kube: Kube, namespace: str, control_plane: LocalCluster) -> None:
    script = "for i in 1 2 3 4 5 6; do echo line $i; sleep 0.3; done"
    await create(kube, namespace, "talk", shell(script), restartPolicy="OnFailure")
    await until(kube, namespace, "talk", running)
    followed = await asyncio.to_thread(kubectl, control_plane, "logs", "-f", "-n", namespace, "talk")
    assert followed.splitlines() == [f"line {i}" for i in range(1, 7)]
    logs = ["logs", "-n", namespace, "talk"]
    assert kubectl(control_plane, *logs, "--tail", "2").splitlines() == ["line 5", "line 6"]
    stamped = kubectl(control_plane, *logs, "--tail", "1", "--timestamps")
    assert stamped.endswith("Z line 6\n")
    missing = kubectl(control_plane, *logs, "--previous", check=False)
    assert "line" not in missing


async def test_sigkill_shows_as_a_restart(kube: Kube, namespace: str, control_plane: LocalCluster) -> None:
    nap = number()
    await create(kube, namespace, "victim", shell(f"echo run of $$$$; exec sleep {nap}"))
    await until(kube, namespace, "victim", ready)
    [pid] = await seen(nap)
    os.kill(pid, signal.SIGKILL)
    pod = await until(kube, namespace, "victim", restarted(1))
    [status] = pod["status"]["containerStatuses"]
    last = status["lastState"]["terminated"]
    assert (last["exitCode"], last["signal"], last["reason"]) == (137, 9, "Error")
    assert last["containerID"] != status["containerID"]
    [again] = await seen(nap)
    logs = ["logs", "-n", namespace, "victim"]
    assert kubectl(control_plane, *logs) == f"run of {again}\n"
    assert kubectl(control_plane, *logs, "--previous") == f"run of {pid}\n"


async def test_crash_loop(kube: Kube, namespace: str) -> None:
    await create(kube, namespace, "crash", shell("echo bye; exit 3"))
    pod = await until(
        kube,
        namespace,
        "crash",
        lambda s: waiting("CrashLoopBackOff")(s) and s["containerStatuses"][0]["restartCount"] >= 2,
    )
    [status] = pod["status"]["containerStatuses"]
    assert status["lastState"]["terminated"]["exitCode"] == 3
    assert "back-off 2s restarting failed container=c" in status["state"]["waiting"]["message"]
    assert pod["status"]["phase"] == "Running"
    await kube.delete(kinds.POD, "crash", namespace)
    await gone(kube, namespace, "crash", within_s=3)


async def test_an_unknown_image_lists_the_known(
    kube: Kube, namespace: str, control_plane: LocalCluster
) -> None:
    await create(kube, namespace, "unknown", {"name": "c", "image": "nginx:1"})
    pod = await until(kube, namespace, "unknown", waiting("ErrImagePull"))
    message = pod["status"]["containerStatuses"][0]["state"]["waiting"]["message"]
    for known in ("nginx:1", "vllm/vllm-openai", "nvcr.io/nvidia/tritonserver", SHELL):
        assert known in message
    assert pod["status"]["phase"] == "Pending"
    log = kubectl(control_plane, "logs", "-n", namespace, "unknown", check=False)
    assert "line" not in log
    patch = {"spec": {"containers": [{"name": "c", "image": "registry.k8s.io/pause:3.10"}]}}
    await kube.request(
        "PATCH",
        kinds.POD.path(namespace, "unknown"),
        body=patch,
        content_type="application/strategic-merge-patch+json",
    )
    await until(kube, namespace, "unknown", ready)
    assert "vllm/vllm-openai" in kubectl(control_plane, "describe", "pod", "-n", namespace, "unknown")


async def test_a_program_that_is_not_there(kube: Kube, namespace: str) -> None:
    container = {"name": "c", "image": SHELL, "command": ["no-such-program"]}
    await create(kube, namespace, "none", container, restartPolicy="Never")
    pod = await until(kube, namespace, "none", lambda s: s["phase"] == "Failed")
    ended = terminated(pod["status"])
    assert ended is not None
    assert (ended["exitCode"], ended["reason"]) == (128, "StartError")
    assert ended["message"] == 'exec: "no-such-program": executable file not found in $PATH'


async def test_init_containers_come_first(kube: Kube, namespace: str, tmp_path: Path) -> None:
    said = tmp_path / "said"
    inits = [shell(f"sleep 0.2; echo {i} >> {said}", name=f"i{i}") for i in (1, 2)]
    main = [shell(f"echo {name} >> {said}; sleep 1000", name=name) for name in "ab"]
    await create(kube, namespace, "inits", *main, initContainers=inits)
    pod = await until(kube, namespace, "inits", ready)
    lines = said.read_text().split()
    assert lines[:2] == ["1", "2"]
    assert sorted(lines[2:]) == ["a", "b"]
    assert all(s["ready"] for s in pod["status"]["initContainerStatuses"])


async def test_liveness_restarts_and_readiness_does_not(kube: Kube, namespace: str, tmp_path: Path) -> None:
    def exec_probe(path: Path) -> Object:
        return {"exec": {"command": ["test", "-e", str(path)]}, "periodSeconds": 1, "failureThreshold": 1}

    fit, live = tmp_path / "fit", tmp_path / "live"
    fit.touch()
    container = shell(
        f"touch {live}; exec sleep 1000",
        readinessProbe=exec_probe(fit),
        livenessProbe={**exec_probe(live), "initialDelaySeconds": 1},
    )
    await create(kube, namespace, "probed", container)
    await until(kube, namespace, "probed", ready)
    fit.unlink()
    pod = await until(kube, namespace, "probed", lambda s: not ready(s))
    assert pod["status"]["containerStatuses"][0]["restartCount"] == 0
    fit.touch()
    await until(kube, namespace, "probed", ready)
    live.unlink()
    await until(kube, namespace, "probed", restarted(1))


async def test_other_writers_conditions_stay(kube: Kube, namespace: str) -> None:
    nap = number()
    await create(kube, namespace, "kept", shell(f"exec sleep {nap}"))
    await until(kube, namespace, "kept", ready)
    condition = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
    condition["lastTransitionTime"] = rfc3339(time.time())  # the controller-manager clears stale ones
    await kube.request(
        "PATCH",
        kinds.POD.path(namespace, "kept", "status"),
        body={"status": {"conditions": [condition]}},
        content_type="application/strategic-merge-patch+json",
    )
    os.kill((await seen(nap))[0], signal.SIGKILL)
    pod = await until(kube, namespace, "kept", restarted(1))
    found = {c["type"]: c for c in pod["status"]["conditions"]}
    assert found["DisruptionTarget"]["reason"] == "PreemptionByScheduler"


async def test_graceful_deletion_runs_the_hook_then_sigterm(
    kube: Kube, namespace: str, tmp_path: Path
) -> None:
    said, nap, escaped = tmp_path / "said", number(), number()
    script = (
        f"trap 'echo term >> {said}; exit 0' TERM; setsid sleep {escaped} & "
        f"sleep {nap} & while true; do sleep 0.1; done"
    )
    hook = {"preStop": {"exec": {"command": ["sh", "-c", f"sleep 0.5; echo hook of $HOSTNAME >> {said}"]}}}
    await create(kube, namespace, "polite", shell(script, lifecycle=hook))
    await until(kube, namespace, "polite", ready)
    assert len(await seen(nap)) == len(await seen(escaped)) == 1
    began = time.monotonic()
    await kube.delete(kinds.POD, "polite", namespace)
    await gone(kube, namespace, "polite")
    assert 0.5 <= time.monotonic() - began < 4
    assert said.read_text() == "hook of polite\nterm\n"
    assert alive(nap) == alive(escaped) == [], "what a container started ends with it, wherever it went"


async def test_the_grace_period_ends_in_sigkill(kube: Kube, namespace: str) -> None:
    nap = number()
    script = f"trap '' TERM; sleep {nap} & while true; do sleep 0.1; done"
    await create(
        kube,
        namespace,
        "stubborn",
        shell(script),
        terminationGracePeriodSeconds=1,
        finalizers=["tidegate.dev/test"],
    )
    await until(kube, namespace, "stubborn", ready)
    await seen(nap)
    began = time.monotonic()
    await kube.delete(kinds.POD, "stubborn", namespace)
    pod = await until(kube, namespace, "stubborn", terminated)
    assert 0.9 <= time.monotonic() - began < 4
    ended = terminated(pod["status"])
    assert ended is not None
    assert (ended["exitCode"], ended["reason"]) == (137, "Error")
    assert alive(nap) == []
    await kube.merge(kinds.POD, "stubborn", {"metadata": {"finalizers": None}}, namespace)
    await gone(kube, namespace, "stubborn")


async def test_forced_deletion_kills_at_once(kube: Kube, namespace: str) -> None:
    nap = number()
    await create(kube, namespace, "forced", shell(f"trap '' TERM; sleep {nap}; true"))
    await until(kube, namespace, "forced", ready)
    await seen(nap)
    await kube.delete(kinds.POD, "forced", namespace, grace_s=0)
    await holds(lambda: not alive(nap), within_s=2)


async def test_gpus_are_never_given_twice(kube: Kube, namespace: str) -> None:
    gpus = {"resources": {"limits": {"nvidia.com/gpu": "3"}}}
    bound = {"nodeName": "gpu-node-2"}
    await create(kube, namespace, "first", shell("sleep 1000", **gpus), **bound)
    await until(kube, namespace, "first", ready)
    await create(kube, namespace, "second", shell("sleep 1000", **gpus), **bound)
    pod = await until(kube, namespace, "second", lambda s: s["phase"] == "Failed")
    assert pod["status"]["reason"] == "OutOfnvidia.com/gpu"
    assert "requested: 3, used: 3, capacity: 4" in pod["status"]["message"]
    for name in ("first", "second"):
        await kube.delete(kinds.POD, name, namespace, grace_s=1)
        await gone(kube, namespace, name)
    await create(kube, namespace, "third", shell("sleep 1000", **gpus), **bound)
    await until(kube, namespace, "third", ready)


async def test_the_emulated_engine_starts_and_restarts(kube: Kube, namespace: str) -> None:
    probe = {"httpGet": {"path": "/health", "port": 8000}, "periodSeconds": 1}
    container = {
        "name": "engine",
        "image": "vllm/vllm-openai:v0.11.0",
        "args": ["--model", "m", "--port", "8000"],
        "startupProbe": {**probe, "failureThreshold": 30},
        "readinessProbe": probe,
    }
    await create(kube, namespace, "engine", container)
    pod = await until(kube, namespace, "engine", ready)
    async with httpx.AsyncClient(base_url=f"http://{pod['status']['podIP']}:8000") as client:
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == "m"
        # What the kernel sends to who writes to a client that has gone; Python takes it as an error.
        os.kill(process_of(pod), signal.SIGPIPE)
        await asyncio.sleep(0.2)
        assert (await client.get("/health")).status_code == 200
    assert (await kube.get(kinds.POD, "engine", namespace))["status"]["containerStatuses"][0][
        "restartCount"
    ] == 0
    await kube.delete(kinds.POD, "engine", namespace)
    await gone(kube, namespace, "engine", within_s=8)


async def test_the_server_refuses_callers_without_a_certificate(
    control_plane: LocalCluster, kube: Kube
) -> None:
    node = await kube.get(kinds.NODE, "gpu-node-1")
    host = node["status"]["addresses"][0]["address"]
    port = node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"]
    pki = control_plane.layout.pki
    trusting = ssl.create_default_context(cafile=str(pki / "ca.crt"))
    async with httpx.AsyncClient(verify=trusting) as client:
        with pytest.raises(httpx.TransportError):
            await client.get(f"https://{host}:{port}/healthz")
    trusting.load_cert_chain(pki / "kubelet-client.crt", pki / "kubelet-client.key")
    async with httpx.AsyncClient(verify=trusting) as client:
        assert (await client.get(f"https://{host}:{port}/healthz")).text == "ok"
        assert (await client.get(f"https://{host}:{port}/pods")).json()["kind"] == "PodList"
        assert (await client.get(f"https://{host}:{port}/containerLogs/a/b/c")).status_code == 404


async def test_engines_outlive_the_template_and_new_ones_start(
    kube: Kube, namespace: str, control_plane: LocalCluster
) -> None:
    nap = number()
    await create(kube, namespace, "stays", shell(f"exec sleep {nap}"))
    await until(kube, namespace, "stays", ready)
    [pid] = await seen(nap)
    template = [
        p for p in alive("tidegate.local.kubelet.template") if parent(p) == control_plane.pid("kubelet")
    ]
    os.kill(min(template), signal.SIGKILL)
    await create(kube, namespace, "new", shell("sleep 1000"))
    await until(kube, namespace, "new", ready)
    assert alive(nap) == [pid]


async def test_nodes_that_are_no_longer_asked_for_go(
    kube: Kube, namespace: str, control_plane: LocalCluster
) -> None:
    await create(kube, namespace, "there", shell("sleep 1000"), nodeName="gpu-node-3")
    await until(kube, namespace, "there", ready)
    await asyncio.to_thread(control_plane.restart, "kubelet", ["--nodes", "2"])
    try:
        await gone(kube, namespace, "there")
        nodes, _ = await kube.list(kinds.NODE)
        assert [n["metadata"]["name"] for n in nodes] == ["gpu-node-1", "gpu-node-2"]
    finally:
        await asyncio.to_thread(control_plane.restart, "kubelet", [])


async def test_pods_outlive_the_api_server_and_their_status_catches_up(
    kube: Kube, namespace: str, control_plane: LocalCluster
) -> None:
    nap = number()
    await create(kube, namespace, "stays", shell(f"exec sleep {nap}"))
    await create(kube, namespace, "ends", shell("sleep 2; exit 7"), restartPolicy="Never")
    for name in ("stays", "ends"):
        await until(kube, namespace, name, running)
    [pid] = await seen(nap)
    os.kill(control_plane.pid("kube-apiserver"), signal.SIGKILL)
    await asyncio.sleep(0.5)
    await asyncio.to_thread(control_plane.wait_ready, "kube-apiserver")
    pod = await until(kube, namespace, "ends", lambda s: s["phase"] == "Failed")
    ended = terminated(pod["status"])
    assert ended is not None
    assert ended["exitCode"] == 7
    assert alive(nap) == [pid]
    stays = await until(kube, namespace, "stays", ready)
    assert stays["status"]["containerStatuses"][0]["restartCount"] == 0


async def test_a_killed_kubelet_takes_its_processes_along_and_starts_them_again(
    kube: Kube, namespace: str, control_plane: LocalCluster
) -> None:
    stays, leaves, child = number(), number(), number()
    await create(kube, namespace, "stays", shell(f"setsid sleep {child} & exec sleep {stays}"))
    await create(kube, namespace, "done", shell("exit 0"), restartPolicy="Never")
    slow = shell(f"trap '' TERM; sleep {leaves} & while true; do sleep 0.1; done")
    await create(kube, namespace, "leaves", slow, terminationGracePeriodSeconds=600)
    for name in ("stays", "leaves"):
        await until(kube, namespace, name, ready)
    await until(kube, namespace, "done", lambda s: s["phase"] == "Succeeded")
    before = await seen(stays) + await seen(child)
    address = (await kube.get(kinds.POD, "stays", namespace))["status"]["podIP"]
    await seen(leaves)
    await kube.delete(kinds.POD, "leaves", namespace)
    os.kill(control_plane.pid("kubelet"), signal.SIGKILL)
    pod = await until(kube, namespace, "stays", restarted(1))
    last = pod["status"]["containerStatuses"][0]["lastState"]["terminated"]
    assert (last["exitCode"], "kubelet" in last["message"]) == (137, True)
    assert pod["status"]["podIP"] == address
    assert not set(before) & set(alive(stays) + alive(child))
    await gone(kube, namespace, "leaves")
    assert alive(leaves) == []
    assert (await kube.get(kinds.POD, "done", namespace))["status"]["phase"] == "Succeeded"


async def test_a_kubelet_that_is_asked_to_stop_leaves_nothing_behind(
    kube: Kube, namespace: str, control_plane: LocalCluster
) -> None:
    nap, child = number(), number()
    await create(kube, namespace, "stays", shell(f"trap '' TERM; setsid sleep {child} & sleep {nap}; true"))
    await until(kube, namespace, "stays", ready)
    before = await seen(nap) + await seen(child)
    pid = control_plane.pid("kubelet")
    os.kill(pid, signal.SIGTERM)
    await holds(lambda: not is_there(pid), within_s=8)
    assert not set(before) & set(alive(nap) + alive(child))
    await asyncio.to_thread(control_plane.wait_ready, "kubelet")
    await until(kube, namespace, "stays", restarted(1))
