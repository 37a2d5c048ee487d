"""Where the files of a cluster lie, and what it was asked to be."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Self

CONTROL_PLANE: Final = frozenset({"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"})
NODES: Final = CONTROL_PLANE | {"kubelet"}
EVERYTHING: Final = NODES | {"tidegate-scheduler", "controller", "extender", "picker", "envoy"}
"""What may run in a cluster; any set that holds the control plane may be chosen."""


LOG_BYTES: Final = 10 * 1024 * 1024
"""A log that has grown beyond this is set aside when its program is started again."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths below the state folder of one cluster."""

    root: Path

    @property
    def state(self) -> Path:
        """What runs now: pids, ports, URLs; written by the supervisor."""
        return self.root / "state.json"

    @property
    def settings(self) -> Path:
        """What was asked for; read by the supervisor."""
        return self.root / "cluster.json"

    @property
    def lock(self) -> Path:
        """Held by the supervisor while it lives."""
        return self.root / "lock"

    @property
    def socket(self) -> Path:
        """The supervisor's control socket."""
        return self.root / "control.sock"

    @property
    def logs(self) -> Path:
        """Folder of NAME.log."""
        return self.root / "logs"

    @property
    def pki(self) -> Path:
        """Folder of keys and certificates."""
        return self.root / "pki"

    @property
    def config(self) -> Path:
        """Folder of generated configuration files."""
        return self.root / "config"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.root / "kubeconfig"

    def log(self, component: str) -> Path:
        """A component's log file."""
        return self.logs / f"{component}.log"

    def data(self, component: str) -> Path:
        """A component's own data folder."""
        return self.root / "data" / component

    def kubeconfig_of(self, user: str) -> Path:
        """Kubeconfig of a user who is not the administrator, such as `tidegate-picker`."""
        return self.root / "kubeconfigs" / f"{user}.kubeconfig"


@dataclass(frozen=True, slots=True)
class Settings:
    """What a cluster is asked to be.

    `ports` are those asked for explicitly, by listener (`network.DEFAULT_PORTS`). `engine_env` is
    environment for every emulated engine, `images` further image names and their commands,
    `extra_args` arguments appended to a component's command.
    """

    nodes: int = 4
    gpus_per_node: int = 4
    parts: frozenset[str] = EVERYTHING
    ports: Mapping[str, int] = field(default_factory=dict)
    engine_env: Mapping[str, str] = field(default_factory=dict)
    images: Mapping[str, str] = field(default_factory=dict)
    extra_args: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= 64:
            raise ValueError(f"nodes is {self.nodes}; a process kubelet keeps 1 to 64")
        if not 0 <= self.gpus_per_node <= 16:
            raise ValueError(f"GPUs per node is {self.gpus_per_node}; it must be 0 to 16")
        if missing := sorted({"etcd", "kube-apiserver"} - self.parts):
            raise ValueError(f"parts lacks {', '.join(missing)}, without which nothing runs")
        for name in (*self.parts, *self.extra_args):
            if name not in EVERYTHING:
                raise ValueError(f"no component is named {name!r}; there are {', '.join(sorted(EVERYTHING))}")

    def to_json(self) -> dict[str, Any]:
        """A JSON value that `from_json` reads back."""
        return asdict(self) | {"parts": sorted(self.parts)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        extra = {name: tuple(args) for name, args in value["extra_args"].items()}
        return cls(**{**value, "parts": frozenset(value["parts"]), "extra_args": extra})

    def difference(self, other: "Settings") -> list[str]:
        """Names of the settings in which two clusters differ."""
        mine, others = json.loads(json.dumps(self.to_json())), json.loads(json.dumps(other.to_json()))
        return sorted(name for name in mine if mine[name] != others[name])


def set_aside(log: Path, limit: int = LOG_BYTES) -> None:
    """Rename a log above `limit` bytes to NAME.log.old, in place of the last such one."""
    if log.exists() and log.stat().st_size > limit:
        log.replace(log.with_name(f"{log.name}.old"))
