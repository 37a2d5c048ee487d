"""vLLM's prefix cache as a pure model: full blocks of KV, known by the text that they end.

It follows vLLM 0.32's `BlockPool`. A block is known from the step in which its last token is scheduled.
Requests whose texts agree up to its end share it. When the last of them leaves, it is free, and is found
again until its place is needed: blocks that are not full go first, then those that were freed first, of one
request its last block first, so that tails go before heads. A block that a request holds is never given away.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from hashlib import blake2b
from typing import Protocol

Key = tuple[bytes, Hashable, int]
"""A text up to the end of a block: what was before its last part, that part, and how much of it."""


class Text:
    """The text of a request, prompt and answer, as the keys of its blocks; see `types.Request`.

    Args:
        own: What a text that is nobody else's is known by: the request's id.
        shared: Its first parts, names and tokens.
        rest: The name of the text after them; empty, its own.
    """

    __slots__ = ("_before", "_keys", "_left", "_rest", "_start")

    def __init__(self, own: str, shared: Sequence[tuple[str, int]] = (), rest: str = "") -> None:
        self._left = list(reversed(shared))
        self._rest: Hashable = rest or (own,)
        self._before = b""
        self._start = 0
        self._keys: list[Key] = []

    def keys(self, blocks: int, block_size: int) -> list[Key]:
        """Of the first so many blocks, and maybe more; of one block size."""
        keys, left = self._keys, self._left
        while len(keys) < blocks:
            end = (len(keys) + 1) * block_size
            while left and end > self._start + left[-1][1]:
                part = left.pop()
                self._start += part[1]
                self._before = blake2b(self._before + repr(part).encode(), digest_size=16).digest()
            keys.append((self._before, left[-1][0] if left else self._rest, end - self._start))
        return keys


class Block:
    """A full block, and how many requests hold it."""

    __slots__ = ("holders", "key")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.holders = 1


class Holder(Protocol):
    """A request inside an engine: its text, and the full blocks that it holds, from the first on."""

    text: Text
    held: list[Block]


class PrefixCache:
    """The full blocks of one engine. How many blocks are free in all is the engine's to count."""

    def __init__(self, block_size: int) -> None:
        self._block = block_size
        # Two requests that compute the same at once have a block each; the older one is found.
        self._known: dict[Key, list[Block]] = {}
        self._idle: OrderedDict[Block, None] = OrderedDict()

    @property
    def idle(self) -> int:
        """Blocks that are free and can still be found."""
        return len(self._idle)

    def find(self, one: Holder, tokens: int) -> list[Block]:
        """The blocks that a request of so many known tokens need not compute: never its last token's."""
        found = []
        most = (tokens - 1) // self._block
        keys = one.text.keys(most, self._block)
        for index in range(most):
            blocks = self._known.get(keys[index])
            if blocks is None:
                break
            found.append(blocks[0])
        return found

    @staticmethod
    def free(blocks: Iterable[Block]) -> int:
        """How many of these are free: who takes them up leaves so many less to others."""
        return sum(not block.holders for block in blocks)

    def share(self, one: Holder, blocks: Sequence[Block]) -> None:
        """A request that holds nothing takes up blocks that were found."""
        for block in blocks:
            if not block.holders:
                del self._idle[block]
            block.holders += 1
        one.held = list(blocks)

    def note(self, one: Holder, tokens: int) -> None:
        """So many tokens of a request are scheduled and known: its full blocks can be found from now on."""
        full, held = tokens // self._block, one.held
        if full <= len(held):
            return
        for key in one.text.keys(full, self._block)[len(held) : full]:
            block = Block(key)
            self._known.setdefault(key, []).append(block)
            held.append(block)

    def leave(self, one: Holder, blocks: int) -> int:
        """A request lets go of its blocks, so many in all; returns those that are free by it."""
        freed = blocks - len(one.held)
        for block in reversed(one.held):
            block.holders -= 1
            if not block.holders:
                self._idle[block] = None
                freed += 1
        one.held = []
        return freed

    def fit(self, free: int) -> None:
        """So many blocks are free now: what does not fit into them is forgotten."""
        while len(self._idle) > free:
            block, _ = self._idle.popitem(last=False)
            same = self._known[block.key]
            same.remove(block)
            if not same:
                del self._known[block.key]
