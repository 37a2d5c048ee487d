"""Addresses and ports: every cluster has a loopback network 127.N.0.0/16 of its own."""

import contextlib
import errno
import socket
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Final, Self

FIRST, LAST = 10, 250

DEFAULT_PORTS: Final[Mapping[str, int]] = {
    "api": 6443,
    "etcd": 2379,
    "etcd-peer": 2380,
    "scheduler": 10259,
    "tidegate-scheduler": 10269,
    "kubelet": 10250,
    "gateway": 8080,
    "envoy-admin": 9901,
    "controller": 9090,
    "extender": 9100,
    "picker": 9091,
    "picker-ext-proc": 9002,
    "picker-health": 9003,
    "picker-measure": 9004,
}
"""Name of each listener and the port that it has unless that one is taken."""


class NetworkError(Exception):
    """No address or port to be had; the message names which, and what to do."""


class Network:
    """The network 127.N.0.0/16, locked until `release` or the end of the process.

    The lock is a Unix socket in the abstract namespace: the kernel lets go of it with the process,
    and it is shared by exactly those who share these addresses, every user of a network namespace.
    """

    def __init__(self, number: int, lock: socket.socket) -> None:
        self.number, self._lock = number, lock

    @classmethod
    def take(cls, preferred: int | None = None, *, scope: str = "tidegate") -> Self:
        """Take a free network: `preferred` if it is free, else the lowest. Raises NetworkError.

        Only those who name the same `scope` keep out of each other's way.
        """
        numbers: list[int] = [preferred] if preferred is not None and FIRST <= preferred <= LAST else []
        for number in [*numbers, *range(FIRST, LAST + 1)]:
            lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                lock.bind(f"\0{scope}-127.{number}")
            except OSError as error:
                lock.close()
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            return cls(number, lock)
        raise NetworkError(
            f"all networks 127.{FIRST} to 127.{LAST} are in use; stop a cluster with `tidegate local down`"
        )

    @property
    def prefix(self) -> str:
        """First two octets, as the kubelet wants them: `127.N`."""
        return f"127.{self.number}"

    @property
    def address(self) -> str:
        """Address of the control plane and of the parts; pods get others."""
        return f"{self.prefix}.0.1"

    def release(self) -> None:
        """Give the network back; twice is harmless."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_free(address: str, port: int) -> bool:
    """Whether a server could listen there now."""
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        # As servers do: connections that linger in TIME_WAIT do not make a port taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def choose_ports(
    address: str, asked: Mapping[str, int], wanted: Iterable[str] = tuple(DEFAULT_PORTS)
) -> dict[str, int]:
    """A port for each listener in `wanted`: the one asked for, else the default, else any free one.

    Raises:
        NetworkError: a name is unknown, or a port that was asked for is taken.
    """
    if unknown := sorted(set(asked) - set(DEFAULT_PORTS)):
        raise NetworkError(f"no listener is named {unknown[0]!r}; there are {', '.join(DEFAULT_PORTS)}")
    chosen = {name: asked[name] for name in wanted if name in asked}
    for name, port in chosen.items():
        if not 1 <= port <= 65535:
            raise NetworkError(f"port {port} for {name} is not between 1 and 65535")
        if not is_free(address, port):
            raise NetworkError(
                f"{name} cannot listen on {address}:{port}: the port is taken; stop what listens there"
                f" (ss -ltnp 'sport = :{port}'), or leave out --port {name}={port} to have a free one chosen"
            )
    twice = sorted(name for name, port in chosen.items() if list(chosen.values()).count(port) > 1)
    if twice:
        raise NetworkError(f"{' and '.join(twice)} were given the same port {chosen[twice[0]]}")
    for name in wanted:
        if name not in chosen:
            chosen[name] = _default_or_free(address, DEFAULT_PORTS[name], set(chosen.values()))
    return chosen


def _default_or_free(address: str, default: int, used: set[int]) -> int:
    if default not in used and is_free(address, default):
        return default
    while True:
        with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
            probe.bind((address, 0))
            port: int = probe.getsockname()[1]
        if port not in used:
            return port
