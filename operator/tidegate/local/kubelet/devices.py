"""Who holds which GPU of a node."""

from tidegate.local.kubelet.model import GPU


class Devices:
    """The GPUs of one node, by index. A holder is a pod's UID."""

    def __init__(self, gpus: int) -> None:
        self._holders: list[str | None] = [None] * gpus

    def take(self, uid: str, count: int) -> tuple[int, ...] | None:
        """Take the lowest free GPUs, all or none (None when too few are free)."""
        free = [i for i, holder in enumerate(self._holders) if holder is None]
        if count > len(free):
            return None
        taken = tuple(free[:count])
        for index in taken:
            self._holders[index] = uid
        return taken

    def release(self, uid: str) -> None:
        """Give back what a pod holds."""
        self._holders = [None if holder == uid else holder for holder in self._holders]

    def refusal(self, count: int) -> str:
        """Message for a pod that does not fit, in the words of the kubelet."""
        used = sum(holder is not None for holder in self._holders)
        return (
            f"Pod was rejected: Node didn't have enough resource: {GPU}, "
            f"requested: {count}, used: {used}, capacity: {len(self._holders)}"
        )
