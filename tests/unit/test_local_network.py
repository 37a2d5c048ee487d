"""Addresses and ports."""

import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import pytest

from tidegate.local import network
from tidegate.local.network import DEFAULT_PORTS, Network, NetworkError, choose_ports

ADDRESS = "127.251.0.1"  # outside the networks that clusters take


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at ADDRESS where somebody listens."""
    with socket.create_server((ADDRESS, 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def scope() -> str:
    """Networks that no cluster takes."""
    return f"test-{uuid.uuid4().hex}"


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens anywhere, whatever the machine that tests run on is used for."""
    monkeypatch.setattr(network, "is_free", lambda _address, _port: True)


def test_two_clusters_have_two_networks(scope: str) -> None:
    with Network.take(scope=scope) as first, Network.take(scope=scope) as second:
        assert (first.prefix, first.address) == ("127.10", "127.10.0.1")
        assert second.prefix == "127.11"


def test_a_network_given_back_is_free(scope: str) -> None:
    first = Network.take(scope=scope)
    first.release()
    first.release()
    with Network.take(scope=scope) as again:
        assert again.number == first.number


@pytest.mark.parametrize(
    ("preferred", "number"),
    [
        pytest.param(77, 77, id="free"),
        pytest.param(10, 11, id="taken"),
        pytest.param(3, 11, id="not one of ours"),
        pytest.param(None, 11, id="none"),
    ],
)
def test_the_preferred_network(scope: str, preferred: int | None, number: int) -> None:
    with Network.take(scope=scope), Network.take(preferred, scope=scope) as net:
        assert net.number == number


def test_no_network_left(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "LAST", network.FIRST)
    with Network.take(scope=scope), pytest.raises(NetworkError, match="tidegate local down"):
        Network.take(scope=scope)


@pytest.mark.usefixtures("quiet")
def test_ports_are_the_defaults() -> None:
    assert choose_ports(ADDRESS, {}) == DEFAULT_PORTS


def test_a_default_that_is_taken_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "is_free", lambda _address, port: port != DEFAULT_PORTS["gateway"])
    ports = choose_ports(ADDRESS, {})
    assert ports.pop("gateway") not in DEFAULT_PORTS.values()
    assert ports == {name: port for name, port in DEFAULT_PORTS.items() if name != "gateway"}


@pytest.mark.usefixtures("quiet")
def test_a_default_that_was_asked_for_by_another_gives_way() -> None:
    ports = choose_ports(ADDRESS, {"gateway": DEFAULT_PORTS["controller"]})
    assert ports["gateway"] == DEFAULT_PORTS["controller"]
    assert len(set(ports.values())) == len(ports)


def test_a_port_asked_for_and_taken(taken: int) -> None:
    with pytest.raises(NetworkError) as caught:
        choose_ports(ADDRESS, {"gateway": taken})
    for part in ("gateway", f"{ADDRESS}:{taken}", "taken", f"leave out --port gateway={taken}"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        pytest.param({"web": 80}, "no listener is named 'web'", id="unknown"),
        pytest.param({"gateway": 70000}, "not between 1 and 65535", id="no port"),
        pytest.param({"gateway": 8123, "picker": 8123}, "gateway and picker were given the same", id="twice"),
    ],
)
def test_bad_ports(asked: dict[str, int], message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        choose_ports(ADDRESS, asked)


def test_is_free(taken: int) -> None:
    assert not network.is_free(ADDRESS, taken)
    assert network.is_free("127.251.0.2", taken)


@pytest.mark.usefixtures("quiet")
def test_only_the_listeners_of_the_parts_are_chosen(taken: int) -> None:
    assert choose_ports(ADDRESS, {"gateway": taken}, ["api"]) == {"api": DEFAULT_PORTS["api"]}


def test_the_lock_goes_with_the_process(scope: str) -> None:
    code = f"from tidegate.local.network import Network; net = Network.take(scope={scope!r}); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        deadline = time.monotonic() + 20
        while _lowest(scope) == network.FIRST:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        holder.kill()
    assert _lowest(scope) == network.FIRST


def _lowest(scope: str) -> int:
    with Network.take(scope=scope) as net:
        return net.number
