"""The engine container of a replica: vLLM or Triton, its arguments, probes and mounts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tidegate.api import names
from tidegate.api.engine import METRICS_PORTS
from tidegate.api.modeldeployment import ModelDeployment

Object = dict[str, Any]

CONTAINER: Final = "engine"
DEFAULT_SLOTS: Final = 256
DEFAULT_STEP_TOKENS: Final = 2048
"""vLLM's own default of --max-num-seqs for its server on most GPUs (vllm/engine/arg_utils.py)."""
STARTUP_LIMIT_S: Final = 1800
"""Longest start before kubelet gives up. 40–100 s are usual; 30 minutes allow a first download."""
_MODELS: Final = "/models"

SECURITY_CONTEXT: Final[Object] = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "capabilities": {"drop": ["ALL"]},
}


class RenderError(ValueError):
    """A valid object that cannot be turned into children. The message names the field and the fix."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where the engine reads the weights, and the volume that they come on, if any."""

    path: str
    volume: Object | None = None


def source(model: ModelDeployment) -> Source:
    """Read spec.model.uri. Raises RenderError where the engine cannot read it."""
    scheme, _, rest = (model.spec.model.uri or "").partition("://")
    if scheme == "hf":
        if model.spec.engine.type == "Triton":
            raise RenderError(
                "spec.model.uri: Triton reads a model repository and not hf://; use pvc://, s3://, gs:// or oci://"
            )
        return Source(rest)
    if scheme == "pvc":
        claim, _, path = rest.partition("/")
        volume = {"name": "models", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
        return Source(f"{_MODELS}/{path}".rstrip("/"), volume)
    if scheme == "oci":
        return Source(_MODELS, {"name": "models", "image": {"reference": rest}})
    if scheme in ("s3", "gs"):
        return Source(f"{scheme}://{rest}")
    raise RenderError("spec.model.uri must be set unless spec.engine.type is External")


def slots(model: ModelDeployment) -> int:
    """How many requests a replica runs at once: --max-num-seqs of its arguments, else vLLM's default."""
    return _count(model, "--max-num-seqs", DEFAULT_SLOTS)


def step_tokens(model: ModelDeployment) -> int:
    """The most tokens that a step computes: --max-num-batched-tokens, else vLLM's default."""
    return _count(model, "--max-num-batched-tokens", DEFAULT_STEP_TOKENS)


def _count(model: ModelDeployment, flag: str, default: int) -> int:
    value = _values(model.spec.engine.args or ()).get(flag, "")
    return int(value) if value.isdecimal() and int(value) > 0 else default


def http_port(model: ModelDeployment) -> int:
    """The port that a replica serves on: its arguments', else its engine's own."""
    engine = model.spec.engine
    flag = "--port" if engine.type == "vLLM" else "--http-port"
    return _port(_values(_arguments(model)), flag, engine.port)


def container(model: ModelDeployment, gpu_resource: str, grace_s: int) -> Object:
    """The container `engine` of one replica."""
    engine = model.spec.engine
    args = _arguments(model)
    values = _values(args)
    ports = [{"name": names.ENGINE_PORT_NAME, "containerPort": http_port(model)}]
    if METRICS_PORTS[engine.type] != engine.port:
        metrics = _port(values, "--metrics-port", METRICS_PORTS[engine.type])
        ports.append({"name": "metrics", "containerPort": metrics})
    mounts: list[Object] = [{"name": "tmp", "mountPath": "/tmp"}, {"name": "shm", "mountPath": "/dev/shm"}]  # noqa: S108
    if source(model).volume:
        mounts.append({"name": "models", "mountPath": _MODELS, "readOnly": True})
    result: Object = {
        "name": CONTAINER,
        "image": engine.effective_image,
        "imagePullPolicy": _pull_policy(engine.effective_image),
        "args": args,
        "env": _environment(model),
        "ports": ports,
        "resources": _resources(model, gpu_resource),
        "securityContext": SECURITY_CONTEXT,
        "volumeMounts": mounts,
        **_probes(
            "/health" if engine.type == "vLLM" else "/v2/health/ready",
            "/health" if engine.type == "vLLM" else "/v2/health/live",
        ),
    }
    if engine.type == "Triton":
        result["command"] = ["tritonserver"]
    if secret := model.spec.model.secret_ref:
        result["envFrom"] = [{"secretRef": {"name": secret.name}}]
    if grace_s > 2:  # endpoints take a moment to hear that this replica goes; then SIGTERM drains it
        result["lifecycle"] = {"preStop": {"sleep": {"seconds": 1 if grace_s < 10 else 2}}}
    return result


def _pull_policy(image: str) -> str:
    """Kubernetes' own default, written out: left to it, a hand's change of the image would leave a trace."""
    name = image.rsplit("/", 1)[-1]
    tag = name.partition(":")[2]
    return "IfNotPresent" if "@" in name or tag not in ("", "latest") else "Always"


def volumes(model: ModelDeployment) -> list[Object]:
    """Writable places for a read-only root, shared memory for NCCL, and the weights."""
    found: list[Object] = [{"name": "tmp", "emptyDir": {}}, {"name": "shm", "emptyDir": {"medium": "Memory"}}]
    weights = source(model).volume
    return [*found, weights] if weights else found


def merge_arguments(ours: Sequence[tuple[str, ...]], theirs: Sequence[str]) -> list[str]:
    """Our arguments, less those that a user's own name again, then the user's in their order."""
    named = {arg.split("=", 1)[0] for arg in theirs if arg.startswith("--")}
    return [part for group in ours if group[0] not in named for part in group] + list(theirs)


def _arguments(model: ModelDeployment) -> list[str]:
    build = _vllm if model.spec.engine.type == "vLLM" else _triton
    return merge_arguments(build(model), model.spec.engine.args or ())


def _vllm(model: ModelDeployment) -> list[tuple[str, ...]]:
    """https://docs.vllm.ai/en/latest/cli/serve.html."""
    spec, path = model.spec, source(model).path
    ours: list[tuple[str, ...]] = [
        ("--model", path),
        ("--served-model-name", spec.model.name, *spec.model.aliases),
        ("--port", "8000"),
        ("--tensor-parallel-size", str(spec.parallelism.tensor)),
        ("--pipeline-parallel-size", str(spec.parallelism.pipeline)),
        ("--scheduling-policy", "priority"),
    ]
    if spec.parallelism.data > 1:
        ours.append(("--data-parallel-size", str(spec.parallelism.data)))
    if "://" in path:  # object stores are read by vLLM's streaming loader
        ours.append(("--load-format", "runai_streamer"))
    if spec.model.revision:
        ours.append(("--revision", spec.model.revision))
    if spec.model.adapters:
        pairs = (f"{a.name}={a.uri.removeprefix('hf://')}" for a in spec.model.adapters)
        ours += [("--enable-lora",), ("--lora-modules", *pairs)]
    return ours


def _triton(model: ModelDeployment) -> list[tuple[str, ...]]:
    """`tritonserver --help`; priority levels are the model configuration's."""
    return [
        (f"--model-repository={source(model).path}",),
        ("--http-port=8000",),
        ("--grpc-port=8001",),
        ("--metrics-port=8002",),
    ]


def _environment(model: ModelDeployment) -> list[Object]:
    theirs = [e.to_json() for e in model.spec.engine.env or ()]
    # The root is read-only: what engines cache below the home directory goes to the emptyDir.
    ours = {"name": "HOME", "value": "/tmp"}  # noqa: S108
    return theirs if any(e["name"] == "HOME" for e in theirs) else [ours, *theirs]


def _resources(model: ModelDeployment, gpu_resource: str) -> Object:
    given = model.spec.engine.resources
    gpus = str(model.gpus_per_replica)
    sides = {"requests": given.requests if given else {}, "limits": given.limits if given else {}}
    return {
        side: {**{k: str(v) for k, v in values.items()}, gpu_resource: gpus} for side, values in sides.items()
    }


def _probes(ready: str, live: str) -> Object:
    """Startup is looked at every second, so that a fast start is not rounded up to ten."""
    port = names.ENGINE_PORT_NAME
    return {
        "startupProbe": {
            "httpGet": {"path": ready, "port": port},
            "periodSeconds": 1,
            "timeoutSeconds": 2,
            "failureThreshold": STARTUP_LIMIT_S,
        },
        "readinessProbe": {
            "httpGet": {"path": ready, "port": port},
            "periodSeconds": 2,
            "timeoutSeconds": 2,
            "failureThreshold": 3,
        },
        # A long prefill can hold the server's loop for seconds: slow is not dead.
        "livenessProbe": {
            "httpGet": {"path": live, "port": port},
            "periodSeconds": 10,
            "timeoutSeconds": 5,
            "failureThreshold": 6,
        },
    }


def _values(args: Iterable[str]) -> dict[str, str]:
    """`--flag value` and `--flag=value` as a mapping; the last of a flag counts."""
    found: dict[str, str] = {}
    flag = ""
    for arg in args:
        if arg.startswith("--"):
            flag, equals, value = arg.partition("=")
            found[flag] = value if equals else ""
        elif flag and not found[flag]:
            found[flag] = arg
    return found


def _port(values: dict[str, str], flag: str, default: int) -> int:
    given = values.get(flag, "")
    return int(given) if given.isdecimal() else default
