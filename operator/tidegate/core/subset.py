"""What a gateway lets the picker choose from: its subset hint, read and matched."""

from collections.abc import Iterable, Iterator

Subset = tuple[str, ...]
"""Addresses, `ip:port`, or `ip` for every port of it; none of them is none allowed."""


def read(hint: object) -> Subset:
    """Read a hint that is there: a list of texts, or one text, with commas between addresses.

    What cannot be read allows nothing: the gateway wanted some, and which is not known.
    """
    texts = hint if isinstance(hint, list | tuple) else (hint,)
    return tuple(sorted(set(_parts(texts))))


def holds(subset: Subset, address: str) -> bool:
    """Whether an endpoint, `ip:port`, is in it."""
    host = address.rpartition(":")[0]
    return address in subset or host in subset or host.strip("[]") in subset


def _parts(texts: Iterable[object]) -> Iterator[str]:
    for text in texts:
        if isinstance(text, str):
            yield from (part.strip() for part in text.split(",") if part.strip())
