"""Images, environment, addresses, GPUs, logs: the small pure parts of the kubelet."""

from dataclasses import replace
from pathlib import Path

import pytest

from tidegate.local.kubelet.addresses import QUARANTINE_S, Addresses
from tidegate.local.kubelet.clock import Clock
from tidegate.local.kubelet.devices import Devices
from tidegate.local.kubelet.env import EnvError, environment, expand, sources
from tidegate.local.kubelet.images import (
    BadCommandError,
    Command,
    EntryPoint,
    UnknownImageError,
    repository,
    resolve,
    with_overrides,
)
from tidegate.local.kubelet.logs import LogOptions, LogWriter, render
from tidegate.local.kubelet.model import Container, HttpGet, Pod, Probe
from tidegate.local.kubelet.nodes import labels
from tidegate.local.kubelet.probes import begin, due, record
from tidegate.local.kubelet.server import log_options


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("vllm/vllm-openai", "vllm/vllm-openai"),
        ("vllm/vllm-openai:v0.11.0", "vllm/vllm-openai"),
        ("docker.io/vllm/vllm-openai:v0.11.0@sha256:ab", "vllm/vllm-openai"),
        ("docker.io/library/busybox", "busybox"),
        ("busybox:1", "busybox"),
        ("nvcr.io/nvidia/tritonserver:24.10-py3", "nvcr.io/nvidia/tritonserver"),
        ("localhost:5000/a:b", "localhost:5000/a"),
        ("localhost:5000/a", "localhost:5000/a"),
    ],
)
def test_repository(image: str, name: str) -> None:
    assert repository(image) == name


VLLM, TRITON = "tidegate.local.engines.vllm:main", "tidegate.local.engines.triton:main"


@pytest.mark.parametrize(
    ("image", "command", "args", "program"),
    [
        ("vllm/vllm-openai:x", "", "--model m", EntryPoint(VLLM, ("--model", "m"))),
        ("vllm/vllm-openai", "vllm serve m", "--port 1", EntryPoint(VLLM, ("m", "--port", "1"))),
        ("vllm/vllm-openai", "vllm", "serve m", EntryPoint(VLLM, ("m",))),
        (
            "vllm/vllm-openai",
            "python3 -m vllm.entrypoints.openai.api_server",
            "--model m",
            EntryPoint(VLLM, ("--model", "m")),
        ),
        ("nvcr.io/nvidia/tritonserver:1", "", "tritonserver --x", EntryPoint(TRITON, ("--x",))),
        ("nvcr.io/nvidia/tritonserver:1", "tritonserver", "--x", EntryPoint(TRITON, ("--x",))),
        ("tidegate/shell", "echo", "a b", Command(("echo", "a", "b"))),
        ("busybox", "", "-c date", Command(("/bin/sh", "-c", "date"))),
        ("registry.k8s.io/pause:3.10", "", "", Command(("sleep", "infinity"))),
        ("mine", "", "--x", Command(("/bin/mine", "--ip=127.1.1.1", "--x"))),
    ],
)
def test_what_an_image_runs(image: str, command: str, args: str, program: Command | EntryPoint) -> None:
    table = with_overrides(["mine=/bin/mine --ip={podIP}"])
    spec = Container("c", image, tuple(command.split()), tuple(args.split()))
    assert resolve(spec, "127.1.1.1", table) == program


def test_a_real_engine_takes_the_place_of_the_emulated_one() -> None:
    table = with_overrides(["vllm/vllm-openai=/venv/python -m vllm --host {podIP}"])
    spec = Container("c", "vllm/vllm-openai:v1", ("vllm", "serve"), ("m",))
    assert resolve(spec, "127.1.1.1", table) == Command(
        ("/venv/python", "-m", "vllm", "--host", "127.1.1.1", "m")
    )


def test_an_unknown_image_lists_the_known() -> None:
    with pytest.raises(
        UnknownImageError, match=r'"nginx:1" is not known.*known: .*busybox.*vllm/vllm-openai'
    ):
        resolve(Container("c", "nginx:1"), "", with_overrides([]))


def test_an_engine_image_cannot_run_a_shell() -> None:
    spec = Container("c", "vllm/vllm-openai", ("/bin/sh", "-c", "vllm serve"))
    with pytest.raises(BadCommandError, match=r"leave `command` out, or begin it with `vllm serve`"):
        resolve(spec, "", with_overrides([]))


@pytest.mark.parametrize("text", ["vllm", "=x", "a=", "a= "])
def test_a_bad_override_names_the_flag(text: str) -> None:
    with pytest.raises(ValueError, match="--image"):
        with_overrides([text])


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("$(A)-$(B)", "1-2"),
        ("$(NONE)", "$(NONE)"),
        ("$$(A)", "$(A)"),
        ("$$$(A)", "$1"),
        ("$A $", "$A $"),
        ("$(A", "$(A"),
        ("${A}", "${A}"),
    ],
)
def test_expansion(text: str, expanded: str) -> None:
    assert expand(text, {"A": "1", "B": "2"}) == expanded


POD = Pod("u", "p", "ns", "gpu-node-1", (), labels={"app": "x"}, annotations={"tidegate.dev/slots": "16"})


def env_of(*items: dict, env_from: tuple[dict, ...] = (), data: dict | None = None) -> dict[str, str]:
    spec = Container("c", "i", env=items, env_from=env_from)
    base = {"POD_IP": "127.7.1.1"}
    return environment(POD, spec, pod_ip="127.7.1.1", host_ip="127.7.0.1", base=base, data=data or {})


def field(path: str) -> dict:
    return {"name": "V", "valueFrom": {"fieldRef": {"fieldPath": path}}}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("metadata.name", "p"),
        ("metadata.namespace", "ns"),
        ("metadata.labels['app']", "x"),
        ("metadata.labels['none']", ""),
        ("metadata.annotations['tidegate.dev/slots']", "16"),
        ("status.podIP", "127.7.1.1"),
        ("status.hostIP", "127.7.0.1"),
        ("spec.nodeName", "gpu-node-1"),
    ],
)
def test_fields(path: str, value: str) -> None:
    assert env_of(field(path))["V"] == value


def test_variables_refer_to_earlier_ones_and_the_pods_address_is_always_there() -> None:
    env = env_of({"name": "A", "value": "$(POD_IP):$(B)"}, {"name": "B", "value": "$(A)!"}, {"name": "N"})
    assert env == {"POD_IP": "127.7.1.1", "A": "127.7.1.1:$(B)", "B": "127.7.1.1:$(B)!", "N": ""}


REF = {"name": "V", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}
OPTIONAL = {"name": "V", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "k", "optional": True}}}


def test_config_maps_and_secrets() -> None:
    data = {("Secret", "s"): {"k": "v"}, ("ConfigMap", "m"): {"A": "1"}}
    env = env_of(REF, env_from=({"prefix": "P_", "configMapRef": {"name": "m"}},), data=data)
    assert (env["V"], env["P_A"]) == ("v", "1")
    assert "V" not in env_of(OPTIONAL, data={("ConfigMap", "m"): None})
    assert sources(Container("c", "i", env=(REF, OPTIONAL))) == {("Secret", "s"), ("ConfigMap", "m")}


@pytest.mark.parametrize(
    ("item", "data", "message"),
    [
        (REF, {("Secret", "s"): None}, 'secret "s" not found'),
        (REF, {("Secret", "s"): {}}, "couldn't find key k in Secret ns/s"),
        (field("spec.what"), {}, "fieldPath 'spec.what' is not supported"),
        (
            {"name": "V", "valueFrom": {"resourceFieldRef": {}}},
            {},
            "valueFrom.resourceFieldRef is not supported",
        ),
    ],
)
def test_an_environment_that_cannot_be_made(item: dict, data: dict, message: str) -> None:
    with pytest.raises(EnvError, match=message):
        env_of(item, data=data)


def test_addresses_rest_before_they_are_used_again() -> None:
    addresses = Addresses("127.7", 2)
    assert [addresses.take(0.0) for _ in range(2)] == ["127.7.2.1", "127.7.2.2"]
    addresses.release("127.7.2.1", 0.0)
    rest = [addresses.take(1.0) for _ in range(252)]
    assert "127.7.2.1" not in rest
    assert addresses.take(1.0) is None
    assert addresses.take(QUARANTINE_S) == "127.7.2.1"


def test_a_pod_keeps_its_address_over_a_restart_of_the_kubelet() -> None:
    addresses = Addresses("127.7", 1)
    assert addresses.take(0.0, "127.7.1.9") == "127.7.1.9"
    assert addresses.take(0.0, "127.7.1.9") == "127.7.1.1", "held by another: any free one"
    assert addresses.take(0.0, "127.8.1.1") == "127.7.1.2", "of another network: any free one"


def test_gpus_are_given_whole_or_not_at_all() -> None:
    devices = Devices(4)
    assert devices.take("a", 2) == (0, 1)
    assert devices.take("b", 1) == (2,)
    assert devices.take("c", 2) is None
    assert devices.refusal(2).endswith("nvidia.com/gpu, requested: 2, used: 3, capacity: 4")
    devices.release("a")
    assert devices.take("c", 2) == (0, 1)
    assert devices.take("d", 0) == ()


def test_probe_results_are_counted_in_a_row() -> None:
    probe = Probe(HttpGet(1), period_s=1, failure_threshold=3, success_threshold=1)
    state, verdicts = begin(replace(probe, initial_delay_s=5), 10.0), []
    assert not due(probe, state, 14.9)
    assert due(probe, state, 15.0)
    for ok in (False, False, True, False, False, False):
        state, verdict = record(probe, state, ok, state.due_s)
        verdicts.append(verdict)
    assert verdicts == [None, None, True, None, None, False]


def test_nodes_of_a_rack_and_zone() -> None:
    seen = [
        (n["tidegate.dev/rack"], n["topology.kubernetes.io/zone"], n["tidegate.dev/nvlink-domain"])
        for n in (labels(f"gpu-node-{i}", i, 4) for i in (1, 2, 3, 5))
    ]
    assert seen == [
        ("rack-1", "local-1", "nvlink-1"),
        ("rack-1", "local-1", "nvlink-2"),
        ("rack-2", "local-1", "nvlink-3"),
        ("rack-3", "local-2", "nvlink-5"),
    ]


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1]


def test_log_lines_are_whole_and_long_ones_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "c" / "0.log"
    writer = LogWriter(path, Clock())
    for data in (b"one\ntw", b"o\n\n", b"x" * 40_000, b"y\nend"):
        writer.feed(data)
    writer.close()
    assert render(lines(path), LogOptions()) == b"one\ntwo\n\n" + b"x" * 40_000 + b"y\nend"
    assert max(map(len, lines(path))) < 17_000


def test_a_log_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    writer = LogWriter(path, Clock(), max_bytes=1_000)
    for i in range(200):
        writer.feed(b"line %d\n" % i)
    writer.close()
    assert path.stat().st_size <= 1_000
    assert (tmp_path / "0.log.old").stat().st_size <= 1_000
    kept = lines(tmp_path / "0.log.old") + lines(path)
    assert kept[-1].endswith(b"line 199")
    assert len(list(tmp_path.iterdir())) == 2


STORED = [b"2026-11-22T10:00:0%d.000000Z F line %d" % (i, i) for i in range(5)]


@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ({}, b"line 0\nline 1\nline 2\nline 3\nline 4\n"),
        ({"tailLines": "2"}, b"line 3\nline 4\n"),
        ({"tailLines": "0"}, b""),
        ({"limitBytes": "9"}, b"line 0\nli"),
        ({"sinceTime": "2026-11-22T10:00:03Z"}, b"line 3\nline 4\n"),
        ({"sinceSeconds": "2"}, b"line 4\n"),
        ({"timestamps": "true", "tailLines": "1"}, b"2026-11-22T10:00:04.000000Z line 4\n"),
    ],
)
def test_log_options(query: dict[str, str], shown: bytes) -> None:
    now = 1795341605.5  # 10:00:05.5
    assert render(STORED, log_options(query, now)) == shown


def test_a_bad_log_option_is_named() -> None:
    with pytest.raises(ValueError, match="tailLines is '-1'"):
        log_options({"tailLines": "-1"}, 0.0)
