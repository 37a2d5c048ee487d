"""What runs in a cluster: for each component its command, environment and readiness. Pure."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tidegate.local.layout import Layout, Settings

SERVICE_NETWORK: Final = "10.0.0.0/16"
SERVICE_ADDRESS: Final = "10.0.0.1"
"""First address of the service network, the `kubernetes` Service's; nothing listens there."""
ISSUER: Final = "https://kubernetes.default.svc.cluster.local"
"""Issuer of service-account tokens: fixed, so that tokens outlive a change of address."""

CONTROLLERS_OFF: Final = (
    "node-ipam-controller",
    "cloud-node-lifecycle-controller",
    # EndpointSlices refuse loopback addresses: these would retry for ever.
    "endpoints-controller",
    "endpointslice-controller",
    "endpointslice-mirroring-controller",
)


@dataclass(frozen=True, slots=True)
class Probe:
    """When a component counts as ready.

    An `http` or `https` URL that answers 200, or `tcp://HOST:PORT` that accepts.
    """

    url: str
    ca: Path | None = None


@dataclass(frozen=True, slots=True)
class Component:
    """One supervised process.

    Components start by `wave`, lowest first, a wave together once the one before is ready, and stop
    the other way round. A `task` runs once and ends; it is ready when it has ended with 0.
    `stop_s` bounds the wait between SIGTERM and SIGKILL.
    """

    name: str
    argv: tuple[str, ...]
    wave: int
    probe: Probe | None = None
    stop_s: float = 5.0
    task: bool = False
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Context:
    """All that commands are made of: paths, the address, a port for each listener, programs."""

    layout: Layout
    settings: Settings
    prefix: str
    address: str
    ports: Mapping[str, int]
    programs: Mapping[str, str]
    python: str = sys.executable

    def url(self, listener: str, scheme: str = "http") -> str:
        """Base URL of a listener."""
        return f"{scheme}://{self.address}:{self.ports[listener]}"

    def pki(self, name: str) -> str:
        """Path of a file of the PKI."""
        return str(self.layout.pki / name)


def _flags(**values: object) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def etcd(c: Context) -> Component:
    """etcd: TLS on both sides, so that other users of the machine cannot write into the cluster."""
    client, peer = c.url("etcd", "https"), c.url("etcd-peer", "https")
    tls = {"cert_file": c.pki("etcd.crt"), "key_file": c.pki("etcd.key"), "trusted_ca_file": c.pki("ca.crt")}
    argv = [
        c.programs["etcd"],
        *_flags(name="local", data_dir=c.layout.data("etcd"), log_level="warn", unsafe_no_fsync="true"),
        *_flags(listen_client_urls=client, advertise_client_urls=client),
        *_flags(listen_peer_urls=peer, initial_advertise_peer_urls=peer, initial_cluster=f"local={peer}"),
        *_flags(**tls, client_cert_auth="true"),
        *_flags(**{f"peer_{name}": path for name, path in tls.items()}, peer_client_cert_auth="true"),
    ]
    return Component("etcd", tuple(argv), wave=0, probe=Probe(c.url("etcd", "tcp")))


def apiserver(c: Context) -> Component:
    """kube-apiserver: RBAC, tokens from a file and of service accounts.

    Asked to stop it waits for every open watch, up to a minute; etcd has the state, so it may be
    killed long before.
    """
    argv = [
        c.programs["kube-apiserver"],
        *_flags(bind_address=c.address, advertise_address=c.address, secure_port=c.ports["api"]),
        *_flags(etcd_servers=c.url("etcd", "https"), etcd_cafile=c.pki("ca.crt")),
        *_flags(etcd_certfile=c.pki("etcd-client.crt"), etcd_keyfile=c.pki("etcd-client.key")),
        *_flags(tls_cert_file=c.pki("apiserver.crt"), tls_private_key_file=c.pki("apiserver.key")),
        *_flags(client_ca_file=c.pki("ca.crt"), token_auth_file=c.pki("tokens.csv")),
        *_flags(authorization_mode="RBAC", allow_privileged="true"),
        *_flags(service_account_key_file=c.pki("sa.pub"), service_account_signing_key_file=c.pki("sa.key")),
        *_flags(service_account_issuer=ISSUER),
        "--service-account-max-token-expiration=87600h",
        *_flags(service_cluster_ip_range=SERVICE_NETWORK, endpoint_reconciler_type="none"),
        *_flags(kubelet_preferred_address_types="InternalIP", kubelet_certificate_authority=c.pki("ca.crt")),
        *_flags(kubelet_client_certificate=c.pki("kubelet-client.crt")),
        *_flags(kubelet_client_key=c.pki("kubelet-client.key")),
    ]
    probe = Probe(c.url("api", "https") + "/readyz", c.layout.pki / "ca.crt")
    return Component("kube-apiserver", tuple(argv), wave=1, probe=probe, stop_s=3.0)


def controller_manager(c: Context) -> Component:
    """kube-controller-manager, without a port of its own."""
    controllers = ",".join(["*", *(f"-{name}" for name in CONTROLLERS_OFF)])
    argv = [
        c.programs["kube-controller-manager"],
        *_flags(kubeconfig=c.layout.kubeconfig_of("kube-controller-manager"), leader_elect="false"),
        *_flags(secure_port=0, controllers=controllers, use_service_account_credentials="true"),
        *_flags(service_account_private_key_file=c.pki("sa.key"), root_ca_file=c.pki("ca.crt")),
        *_flags(kube_api_qps=100, kube_api_burst=200),
    ]
    return Component("kube-controller-manager", tuple(argv), wave=2)


def _scheduler(c: Context, name: str, listener: str) -> Component:
    argv = [
        c.programs["kube-scheduler"],
        *_flags(config=c.layout.config / f"{name}.yaml"),
        *_flags(bind_address=c.address, secure_port=c.ports[listener]),
        *_flags(tls_cert_file=c.pki("scheduler.crt"), tls_private_key_file=c.pki("scheduler.key")),
        *_flags(authentication_kubeconfig=c.layout.kubeconfig_of("kube-scheduler")),
        *_flags(authorization_kubeconfig=c.layout.kubeconfig_of("kube-scheduler")),
        # There is no front proxy, whose CA it would look for, and complain about, every 20 s.
        "--authentication-skip-lookup=true",
    ]
    probe = Probe(c.url(listener, "https") + "/healthz", c.layout.pki / "ca.crt")
    return Component(name, tuple(argv), wave=4 if name == "tidegate-scheduler" else 2, probe=probe)


def scheduler(c: Context) -> Component:
    """The stock scheduler, for pods that name no other."""
    return _scheduler(c, "kube-scheduler", "scheduler")


def tidegate_scheduler(c: Context) -> Component:
    """The same program with one profile, `tidegate-scheduler`, that asks the extender."""
    return _scheduler(c, "tidegate-scheduler", "tidegate-scheduler")


def install(c: Context) -> Component:
    """The task that applies what Tidegate installs and makes the parts' kubeconfigs."""
    argv = (c.python, "-P", "-m", "tidegate.local.install", str(c.layout.root))
    return Component("install", argv, wave=3, task=True)


def kubelet(c: Context) -> Component:
    """The process kubelet: one for all nodes."""
    argv = [
        *(c.python, "-P", "-m", "tidegate.local.kubelet"),
        *("--kubeconfig", str(c.layout.kubeconfig_of("kubelet"))),
        *("--network", c.prefix, "--nodes", str(c.settings.nodes), "--gpus", str(c.settings.gpus_per_node)),
        *("--host", c.address, "--port", str(c.ports["kubelet"])),
        *("--cert", c.pki("kubelet.crt"), "--key", c.pki("kubelet.key"), "--client-ca", c.pki("ca.crt")),
        *("--state-dir", str(c.layout.data("kubelet"))),
    ]
    for name, value in sorted(c.settings.engine_env.items()):
        argv += ["--engine-env", f"{name}={value}"]
    for name, command in sorted(c.settings.images.items()):
        argv += ["--image", f"{name}={command}"]
    return Component("kubelet", tuple(argv), wave=4, probe=Probe(c.url("kubelet", "tcp")), stop_s=15.0)


def _part(c: Context, name: str, *flags: str) -> tuple[str, ...]:
    kubeconfig = c.layout.kubeconfig_of(f"tidegate-{name}")
    command = (c.python, "-P", "-m", "tidegate", name)  # -P: modules are not looked for in the working folder
    return (*command, "--kubeconfig", str(kubeconfig), "--host", c.address, *flags)


def controller(c: Context) -> Component:
    """The operator; one-second periods, since this cluster is for looking at."""
    flags = ["--port", str(c.ports["controller"]), "--picker-url", c.url("picker"), "--period", "1s"]
    if "--start-time" not in " ".join(c.settings.extra_args.get("controller", ())):
        flags += ["--start-time", f"{_start_time_s(c.settings.engine_env):g}s"]
    probe = Probe(c.url("controller") + "/readyz")
    return Component("controller", _part(c, "controller", *flags), wave=5, probe=probe)


def _start_time_s(engine_env: Mapping[str, str]) -> float:
    """Seconds that a local replica takes to start: the emulator's own, and one for what is around it."""
    try:
        return float(engine_env["TIDEGATE_EMULATOR_COLD_START"]) + 1.0
    except (KeyError, ValueError):
        return 2.0


def extender(c: Context) -> Component:
    """The scheduler's extender."""
    argv = _part(c, "extender", "--port", str(c.ports["extender"]))
    return Component("extender", argv, wave=4, probe=Probe(c.url("extender") + "/readyz"))


def picker(c: Context) -> Component:
    """Envoy's external processor."""
    argv = _part(
        c,
        "picker",
        *("--ext-proc-port", str(c.ports["picker-ext-proc"])),
        *("--health-port", str(c.ports["picker-health"])),
        *("--http-port", str(c.ports["picker"])),
        *("--measure-port", str(c.ports["picker-measure"])),
    )
    # It lets requests under way end for 10 s after SIGTERM.
    return Component("picker", argv, wave=4, probe=Probe(c.url("picker") + "/readyz"), stop_s=12.0)


def envoy(c: Context) -> Component:
    """Envoy, with one worker: the machine has other things to do."""
    argv = [
        *(c.programs["envoy"], "--config-path", str(c.layout.config / "envoy.json")),
        *("--disable-hot-restart", "--concurrency", "1", "--log-level", "warning"),
    ]
    return Component("envoy", tuple(argv), wave=5, probe=Probe(c.url("envoy-admin") + "/ready"))


_BUILDERS: Final[Mapping[str, Callable[[Context], Component]]] = {
    "etcd": etcd,
    "kube-apiserver": apiserver,
    "kube-controller-manager": controller_manager,
    "kube-scheduler": scheduler,
    "kubelet": kubelet,
    "extender": extender,
    "tidegate-scheduler": tidegate_scheduler,
    "controller": controller,
    "picker": picker,
    "envoy": envoy,
}

LISTENERS: Final[Mapping[str, tuple[str, ...]]] = {
    "etcd": ("etcd", "etcd-peer"),
    "kube-apiserver": ("api",),
    "kube-scheduler": ("scheduler",),
    "tidegate-scheduler": ("tidegate-scheduler",),
    "kubelet": ("kubelet",),
    "controller": ("controller",),
    "extender": ("extender",),
    "picker": ("picker", "picker-ext-proc", "picker-health", "picker-measure"),
    "envoy": ("gateway", "envoy-admin"),
}
"""Which listeners of `network.DEFAULT_PORTS` a component has."""

PROGRAMS: Final[Mapping[str, str]] = {
    "etcd": "etcd",
    "kube-apiserver": "kube-apiserver",
    "kube-controller-manager": "kube-controller-manager",
    "kube-scheduler": "kube-scheduler",
    "tidegate-scheduler": "kube-scheduler",
    "envoy": "envoy",
}
"""Which program that is not Python a component runs."""


def components(context: Context) -> list[Component]:
    """The components of a cluster in the order in which they start."""
    chosen = [build(context) for name, build in _BUILDERS.items() if name in context.settings.parts]
    return sorted([*chosen, install(context)], key=lambda component: component.wave)


def scheduler_config(context: Context, name: str) -> dict[str, object]:
    """KubeSchedulerConfiguration of `kube-scheduler` or `tidegate-scheduler`."""
    config: dict[str, object] = {
        "apiVersion": "kubescheduler.config.k8s.io/v1",
        "kind": "KubeSchedulerConfiguration",
        "clientConnection": {
            "kubeconfig": str(context.layout.kubeconfig_of("kube-scheduler")),
            "qps": 200,
            "burst": 400,
        },
        "leaderElection": {"leaderElect": False},
    }
    if name == "kube-scheduler":
        return config
    packing = {
        "name": "NodeResourcesFit",
        "args": {
            "scoringStrategy": {
                "type": "MostAllocated",
                "resources": [{"name": "nvidia.com/gpu", "weight": 1}],
            }
        },
    }
    extender_config = {
        "urlPrefix": context.url("extender"),
        "filterVerb": "filter",
        "preemptVerb": "preempt",
        "nodeCacheCapable": True,
        "managedResources": [{"name": "nvidia.com/gpu"}],
        "httpTimeout": "5s",
    }
    return config | {
        # A pod is tried again soon: what it waits for changes within seconds here.
        "podInitialBackoffSeconds": 1,
        "podMaxBackoffSeconds": 3,
        "percentageOfNodesToScore": 100,
        "profiles": [{"schedulerName": "tidegate-scheduler", "pluginConfig": [packing]}],
        "extenders": [extender_config],
    }
