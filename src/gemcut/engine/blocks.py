"""BlockPool: which blocks of one cache group are free, in use, or kept for prefix sharing."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

BlockKey = bytes
ROOT_KEY: BlockKey = b"gemcut"


def root_key(salt: bytes) -> BlockKey:
    """What the names of a sequence's blocks begin with: sequences of another salt find none of its blocks."""
    return hashlib.blake2b(salt, digest_size=16, person=ROOT_KEY).digest() if salt else ROOT_KEY


def block_key(parent: BlockKey, tokens: Sequence[int]) -> BlockKey:
    """Name of a block by its tokens and everything before them; 128 bits of BLAKE2, so no two prefixes meet."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """Reference-counted blocks ``0 … count - 1``.

    A block whose content has been published under a key stays findable after its last user lets go, until the space
    is needed: free blocks are handed out oldest first, those never published before all others.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._users = [0] * count
        self._blank: list[int] = list(range(count - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()  # free, but still holding a published content
        self._key_of: dict[int, BlockKey] = {}
        self._block_of: dict[BlockKey, int] = {}

    @property
    def free(self) -> int:
        """Blocks nobody uses now."""
        return len(self._blank) + len(self._kept)

    def allocate(self) -> int:
        """Take a free block. The caller has checked ``free``."""
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._kept.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        self._users[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a user to a block found by ``lookup``."""
        if self._users[block] == 0:
            del self._kept[block]
        self._users[block] += 1

    def release(self, block: int) -> None:
        """Let go of a block."""
        self._users[block] -= 1
        if self._users[block] == 0:
            if block in self._key_of:
                self._kept[block] = None
            else:
                self._blank.append(block)

    def publish(self, block: int, key: BlockKey) -> None:
        """Make a full block findable. If its content is there already, the older block stays the one found."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def lookup(self, key: BlockKey) -> int | None:
        """The block published under ``key``, if it is still there."""
        return self._block_of.get(key)

    def has_one_user(self, block: int) -> bool:
        """Whether releasing the block once makes it free."""
        return self._users[block] == 1
