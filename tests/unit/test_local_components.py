"""Commands of the components: what each must be told, and that they fit together."""

from itertools import pairwise
from pathlib import Path

import pytest

from tidegate.local.components import LISTENERS, PROGRAMS, Context, components, scheduler_config
from tidegate.local.layout import CONTROL_PLANE, EVERYTHING, NODES, Layout, Settings
from tidegate.local.network import DEFAULT_PORTS


def context(**settings: object) -> Context:
    return Context(
        layout=Layout(Path("/state")),
        settings=Settings(**settings),  # type: ignore[arg-type]
        prefix="127.33",
        address="127.33.0.1",
        ports=DEFAULT_PORTS,
        programs={name: f"/bin/{name}" for name in set(PROGRAMS.values())},
        python="/bin/python",
    )


def argv(name: str, **settings: object) -> list[str]:
    return next(list(c.argv) for c in components(context(**settings)) if c.name == name)


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        pytest.param(CONTROL_PLANE, {*CONTROL_PLANE, "install"}, id="control plane"),
        pytest.param(NODES, {*NODES, "install"}, id="nodes"),
        pytest.param(EVERYTHING, {*EVERYTHING, "install"}, id="everything"),
    ],
)
def test_parts_choose_what_runs(parts: frozenset[str], names: set[str]) -> None:
    assert {c.name for c in components(context(parts=parts))} == names


def test_what_is_needed_starts_before_what_needs_it() -> None:
    waves = {c.name: c.wave for c in components(context())}
    needs = [
        ("kube-apiserver", "etcd"),
        ("kube-scheduler", "kube-apiserver"),
        ("install", "kube-controller-manager"),
        ("kubelet", "install"),
        ("tidegate-scheduler", "install"),
        ("picker", "install"),
        ("envoy", "picker"),
        ("controller", "picker"),
    ]
    for later, earlier in needs:
        assert waves[earlier] < waves[later], (earlier, later)
    assert [c.wave for c in components(context())] == sorted(waves.values())


def test_every_component_that_listens_is_probed_there() -> None:
    for component in components(context()):
        ports = {f":{DEFAULT_PORTS[name]}" for name in LISTENERS.get(component.name, ())}
        probed = component.probe is not None and any(port in component.probe.url for port in ports)
        assert probed == bool(ports), component.name


def test_every_listener_has_one_owner() -> None:
    owned = [listener for listeners in LISTENERS.values() for listener in listeners]
    assert sorted(owned) == sorted(DEFAULT_PORTS)


@pytest.mark.parametrize(
    ("component", "flags"),
    [
        pytest.param(
            "etcd",
            ["--unsafe-no-fsync=true", "--client-cert-auth=true", "--peer-client-cert-auth=true"],
            id="etcd lets nobody in without a certificate",
        ),
        pytest.param(
            "kube-apiserver",
            [
                "--authorization-mode=RBAC",
                "--bind-address=127.33.0.1",
                "--advertise-address=127.33.0.1",
                "--endpoint-reconciler-type=none",
                "--kubelet-preferred-address-types=InternalIP",
                "--kubelet-certificate-authority=/state/pki/ca.crt",
                "--token-auth-file=/state/pki/tokens.csv",
            ],
            id="apiserver: RBAC, and it checks the kubelet's certificate",
        ),
        pytest.param(
            "kube-controller-manager",
            ["--secure-port=0", "--leader-elect=false", "--use-service-account-credentials=true"],
            id="controller manager without a port",
        ),
        pytest.param(
            "tidegate-scheduler",
            ["--config=/state/config/tidegate-scheduler.yaml", "--secure-port=10269"],
            id="second scheduler on a port of its own",
        ),
    ],
)
def test_flags(component: str, flags: list[str]) -> None:
    assert [flag for flag in flags if flag not in argv(component)] == []


def test_endpoint_controllers_are_off() -> None:
    controllers = next(a for a in argv("kube-controller-manager") if a.startswith("--controllers="))
    assert {
        "-endpoints-controller",
        "-endpointslice-controller",
        "-endpointslice-mirroring-controller",
    } <= set(controllers.removeprefix("--controllers=").split(","))


def test_kubelet_is_told_the_settings() -> None:
    given = argv(
        "kubelet",
        nodes=3,
        gpus_per_node=8,
        engine_env={"B": "2", "A": "1=x"},
        images={"example/vllm:1": "python -m vllm"},
    )
    text = " ".join(given)
    assert "--network 127.33 --nodes 3 --gpus 8 --host 127.33.0.1 --port 10250" in text
    assert text.endswith("--engine-env A=1=x --engine-env B=2 --image example/vllm:1=python -m vllm")


@pytest.mark.parametrize("part", ["controller", "extender", "picker"])
def test_parts_run_under_their_own_account(part: str) -> None:
    given = argv(part)
    assert given[:7] == [
        *("/bin/python", "-P", "-m", "tidegate", part),
        *("--kubeconfig", f"/state/kubeconfigs/tidegate-{part}.kubeconfig"),
    ]


def test_stock_scheduler_is_stock() -> None:
    assert set(scheduler_config(context(), "kube-scheduler")) == {
        *("apiVersion", "kind", "clientConnection", "leaderElection")
    }


def test_tidegate_scheduler_asks_the_extender() -> None:
    config = scheduler_config(context(), "tidegate-scheduler")
    assert config["percentageOfNodesToScore"] == 100
    assert config["extenders"] == [
        {
            "urlPrefix": "http://127.33.0.1:9100",
            "filterVerb": "filter",
            "preemptVerb": "preempt",
            "nodeCacheCapable": True,
            "managedResources": [{"name": "nvidia.com/gpu"}],
            "httpTimeout": "5s",
        }
    ]


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        pytest.param({}, ["--start-time", "2s"], id="nobody says"),
        pytest.param(
            {"engine_env": {"TIDEGATE_EMULATOR_COLD_START": "0.5"}}, ["--start-time", "1.5s"], id="cold start"
        ),
        pytest.param(
            {"engine_env": {"TIDEGATE_EMULATOR_COLD_START": "long"}}, ["--start-time", "2s"], id="unreadable"
        ),
        pytest.param({"extra_args": {"controller": ("--start-time=9s",)}}, [], id="the user says"),
    ],
)
def test_the_controller_knows_how_fast_local_engines_start(
    settings: dict[str, object], flags: list[str]
) -> None:
    command = argv("controller", **settings)
    assert [x for a, b in pairwise([*command, ""]) if a == "--start-time" for x in (a, b)] == flags
