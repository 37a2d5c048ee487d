"""What the kubelet needs of a pod, read once from the API object into plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

GPU: Final = "nvidia.com/gpu"
Object = Mapping[str, Any]


class RestartPolicy(StrEnum):
    """`spec.restartPolicy` of a pod."""

    ALWAYS = "Always"
    ON_FAILURE = "OnFailure"
    NEVER = "Never"


@dataclass(frozen=True, slots=True)
class HttpGet:
    """An HTTP GET; `host` empty means the pod's address. 200–399 is success."""

    port: int
    path: str = "/"
    host: str = ""
    scheme: str = "HTTP"
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class TcpSocket:
    """A connection that opens; `host` empty means the pod's address."""

    port: int
    host: str = ""


@dataclass(frozen=True, slots=True)
class Exec:
    """A command beside the container's process; exit code 0 is success."""

    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sleep:
    """A pause, in seconds."""

    seconds: float


Handler = HttpGet | TcpSocket | Exec | Sleep


@dataclass(frozen=True, slots=True)
class Probe:
    """A probe with Kubernetes' defaults. Times are seconds."""

    handler: Handler
    initial_delay_s: float = 0.0
    period_s: float = 10.0
    timeout_s: float = 1.0
    failure_threshold: int = 3
    success_threshold: int = 1
    grace_s: float | None = None


@dataclass(frozen=True, slots=True)
class Container:
    """One container of a pod; `problem` says why it cannot be run here ("" when it can).

    `env` and `env_from` stay raw: they are resolved anew at each start, as the kubelet does.
    """

    name: str
    image: str
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    env: tuple[Object, ...] = ()
    env_from: tuple[Object, ...] = ()
    startup: Probe | None = None
    readiness: Probe | None = None
    liveness: Probe | None = None
    pre_stop: Handler | None = None
    init: bool = False
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod bound to one of our nodes. `containers` has the init containers first, in order."""

    uid: str
    name: str
    namespace: str
    node: str
    containers: tuple[Container, ...]
    restart_policy: RestartPolicy = RestartPolicy.ALWAYS
    grace_s: float = 30.0
    gpus: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    service_account: str = "default"

    @property
    def main(self) -> tuple[Container, ...]:
        """The containers that are no init containers."""
        return tuple(c for c in self.containers if not c.init)

    @property
    def inits(self) -> tuple[Container, ...]:
        """The init containers, in the order in which they run."""
        return tuple(c for c in self.containers if c.init)


class _UnsupportedError(ValueError):
    """A field that this kubelet cannot honour."""


def read_pod(obj: Object) -> Pod:
    """Read a v1 Pod that is bound to a node."""
    meta, spec = obj["metadata"], obj["spec"]
    containers = [_container(c, init=True) for c in spec.get("initContainers") or ()]
    containers += [_container(c, init=False) for c in spec["containers"]]
    return Pod(
        uid=meta["uid"],
        name=meta["name"],
        namespace=meta["namespace"],
        node=spec["nodeName"],
        containers=tuple(containers),
        restart_policy=RestartPolicy(spec.get("restartPolicy") or "Always"),
        grace_s=float(spec.get("terminationGracePeriodSeconds", 30)),
        gpus=_gpus(spec),
        labels=meta.get("labels") or {},
        annotations=meta.get("annotations") or {},
        service_account=spec.get("serviceAccountName") or "default",
    )


def _gpus(spec: Object) -> int:
    """GPUs of the pod: the sum over containers, or the largest init container if that is more."""

    def asked(container: Object) -> int:
        resources = container.get("resources") or {}
        limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
        return int(limits.get(GPU) or requests.get(GPU) or 0)

    together = sum(asked(c) for c in spec["containers"])
    return max([together, *(asked(c) for c in spec.get("initContainers") or ())])


def _container(raw: Object, *, init: bool) -> Container:
    ports = {p["name"]: int(p["containerPort"]) for p in raw.get("ports") or () if p.get("name")}
    lifecycle = raw.get("lifecycle") or {}
    problem = ""
    probes: dict[str, Probe | None] = dict.fromkeys(("startup", "readiness", "liveness"))
    pre_stop: Handler | None = None
    try:
        _check(raw, init=init)
        for name in probes:
            probes[name] = _probe(f"{name}Probe", raw.get(f"{name}Probe"), ports)
        if hook := lifecycle.get("preStop"):
            pre_stop = _handler("lifecycle.preStop", hook, ports)
    except _UnsupportedError as error:
        problem = str(error)
    return Container(
        name=raw["name"],
        image=raw.get("image") or "",
        command=tuple(raw.get("command") or ()),
        args=tuple(raw.get("args") or ()),
        env=tuple(raw.get("env") or ()),
        env_from=tuple(raw.get("envFrom") or ()),
        startup=probes["startup"],
        readiness=probes["readiness"],
        liveness=probes["liveness"],
        pre_stop=pre_stop,
        init=init,
        problem=problem,
    )


def _check(raw: Object, *, init: bool) -> None:
    """Refuse what would be silently left out."""
    if (raw.get("lifecycle") or {}).get("postStart"):
        raise _UnsupportedError("lifecycle.postStart is not supported on a process node: remove it")
    if init and raw.get("restartPolicy"):
        raise _UnsupportedError(
            "restartPolicy on an init container (a sidecar) is not supported on a process node:"
            " make it an ordinary container"
        )


def _probe(where: str, raw: Object | None, ports: Mapping[str, int]) -> Probe | None:
    if not raw:
        return None
    grace = raw.get("terminationGracePeriodSeconds")
    return Probe(
        handler=_handler(where, raw, ports),
        initial_delay_s=float(raw.get("initialDelaySeconds") or 0),
        period_s=float(raw.get("periodSeconds") or 10),
        timeout_s=float(raw.get("timeoutSeconds") or 1),
        failure_threshold=int(raw.get("failureThreshold") or 3),
        success_threshold=int(raw.get("successThreshold") or 1),
        grace_s=None if grace is None else float(grace),
    )


def _handler(where: str, raw: Object, ports: Mapping[str, int]) -> Handler:
    if http := raw.get("httpGet"):
        return HttpGet(
            port=_port(where, http["port"], ports),
            path=http.get("path") or "/",
            host=http.get("host") or "",
            scheme=http.get("scheme") or "HTTP",
            headers=tuple((h["name"], h.get("value") or "") for h in http.get("httpHeaders") or ()),
        )
    if tcp := raw.get("tcpSocket"):
        return TcpSocket(port=_port(where, tcp["port"], ports), host=tcp.get("host") or "")
    if run := raw.get("exec"):
        return Exec(tuple(run.get("command") or ()))
    if sleep := raw.get("sleep"):
        return Sleep(float(sleep.get("seconds") or 0))
    kind = next((k for k in raw if k == "grpc"), "its handler")
    raise _UnsupportedError(
        f"{where}: {kind} is not supported on a process node: use httpGet, tcpSocket or exec"
    )


def _port(where: str, port: int | str, ports: Mapping[str, int]) -> int:
    if isinstance(port, int):
        return port
    if port.isdigit():
        return int(port)
    if port not in ports:
        raise _UnsupportedError(f"{where}: no container port is named {port!r}")
    return ports[port]
