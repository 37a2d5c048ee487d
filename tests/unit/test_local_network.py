"""Addresses and ports."""

import socket
from collections.abc import Iterator
from pathlib import Path

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
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens anywhere, whatever the machine that tests run on is used for."""
    monkeypatch.setattr(network, "is_free", lambda _address, _port: True)


def test_two_clusters_have_two_networks(tmp_path: Path) -> None:
    with Network.take(locks=tmp_path) as first, Network.take(locks=tmp_path) as second:
        assert (first.prefix, first.address) == ("127.10", "127.10.0.1")
        assert second.prefix == "127.11"


def test_a_network_given_back_is_free(tmp_path: Path) -> None:
    first = Network.take(locks=tmp_path)
    first.release()
    first.release()
    with Network.take(locks=tmp_path) as again:
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
def test_the_preferred_network(tmp_path: Path, preferred: int | None, number: int) -> None:
    with Network.take(locks=tmp_path), Network.take(preferred, locks=tmp_path) as net:
        assert net.number == number


def test_no_network_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "LAST", network.FIRST)
    with Network.take(locks=tmp_path), pytest.raises(NetworkError, match="tidegate local down"):
        Network.take(locks=tmp_path)


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
