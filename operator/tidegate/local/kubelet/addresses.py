"""Loopback addresses of pods: `127.N.<node>.<k>`."""

from collections import OrderedDict
from typing import Final

QUARANTINE_S: Final = 30.0
"""An address rests this long after its pod, so that late requests do not reach another one."""


class Addresses:
    """The addresses of one node. Reuse is in the order of release, after a rest where there is room."""

    def __init__(self, network: str, node: int) -> None:
        """`network` is the first two octets, as `127.7`; `node` counts from 1."""
        self._prefix = f"{network}.{node}."
        self._free: OrderedDict[str, float] = OrderedDict((f"{self._prefix}{k}", 0.0) for k in range(1, 255))

    def take(self, now: float, wanted: str = "") -> str | None:
        """Take an address, `wanted` if it is free; None when all are in use or resting."""
        if wanted in self._free:
            del self._free[wanted]
            return wanted
        address = next(iter(self._free), None)
        if address is None or self._free[address] > now:
            return None
        del self._free[address]
        return address

    def release(self, address: str, now: float) -> None:
        """Give an address back."""
        if address.startswith(self._prefix):
            self._free[address] = now + QUARANTINE_S
