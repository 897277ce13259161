"""The paged key-value cache: two groups of blocks, one for full-attention layers and one for sliding layers.

A sequence has a table of blocks in each group. A sliding block is given back as soon as no later query can see it.
Blocks that are full are published under a key that names all tokens up to their end; a new sequence with the same
beginning takes them over. With a window that is right only if, at the point where the new sequence goes on, every
sliding block its first query can see is still there; older ones may be missing.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gemcut.cache_blocks import ceil_div, sliding_blocks_needed
from gemcut.config import FULL, GemmaConfig
from gemcut.engine.blocks import ROOT_KEY, BlockKey, BlockPool, block_key
from gemcut.kernels.cpu.memory import huge_zeros

FREED = -1  # stands in a table for a sliding block that was given back


@dataclass
class Tables:
    """One sequence's blocks, by logical block index, in each group."""

    full: list[int] = field(default_factory=list)
    sliding: list[int] = field(default_factory=list)
    first_sliding: int = 0  # sliding blocks before this one were given back, or were never there
    published: int = 0  # blocks from the first on that others can find


@dataclass(frozen=True)
class CacheShape:
    """How many blocks each group has, and how many tokens a block holds."""

    block_size: int
    full_blocks: int
    sliding_blocks: int


def bytes_per_block(config: GemmaConfig, dtype: torch.dtype, block_size: int) -> tuple[int, int]:
    """Bytes of one block of the (full, sliding) group: keys and values of all the group's layers."""
    row = 2 * config.key_value_size * dtype.itemsize * block_size
    return row * len(config.full_layers), row * len(config.sliding_layers)


def shape_for_tokens(config: GemmaConfig, *, sequences: int, context: int, chunk: int, block_size: int) -> CacheShape:
    """The blocks that ``sequences`` of ``context`` tokens need, all at once."""
    return CacheShape(
        block_size,
        sequences * ceil_div(context, block_size),
        sequences * sliding_blocks_needed(config, context, chunk, block_size),
    )


def shape_for_bytes(
    config: GemmaConfig, budget: int, *, dtype: torch.dtype, context: int, chunk: int, block_size: int
) -> CacheShape:
    """Blocks that ``budget`` bytes hold, in the ratio in which sequences of ``context`` tokens use the two groups.

    Where not even one such sequence fits the ratio is that of the longest one that does. No blocks at all if there is
    none.
    """
    full_bytes, sliding_bytes = bytes_per_block(config, dtype, block_size)

    def one(blocks: int) -> tuple[int, int, int]:
        """(full blocks, sliding blocks, bytes) of a sequence that fills ``blocks``."""
        sliding = sliding_blocks_needed(config, blocks * block_size, chunk, block_size)
        return blocks, sliding, blocks * full_bytes + sliding * sliding_bytes

    longest = bisect_right(range(1, ceil_div(context, block_size) + 1), budget, key=lambda blocks: one(blocks)[2])
    if longest == 0:
        return CacheShape(block_size, 0, 0)
    full, sliding, total = one(longest)
    return CacheShape(block_size, full * budget // total, sliding * budget // total)


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU in memory that is not touched before it is used, so that a large cache costs little at first (a
    huge page for each layer's keys and values), and on huge pages: a head's keys lie far enough apart for the search of
    ordinary ones to cost as much as reading.

    Zeros rather than anything, since attention multiplies the unused places of a block by a weight of 0.
    """
    if device.type != "cpu" or 0 in size:  # a small network may have layers of one kind alone
        return torch.zeros(size, dtype=dtype, device=device)
    return huge_zeros(size, dtype)


class PagedCache:
    """Storage of both groups and the bookkeeping of their blocks."""

    def __init__(self, config: GemmaConfig, shape: CacheShape, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.shape, self.block_size = config, shape, shape.block_size
        self.window = config.sliding_window
        self.forget()

        def storage(blocks: int, layers: int) -> Tensor:
            size = (layers, 2, blocks, shape.block_size, config.num_key_value_heads, config.head_dim)
            return _zeros(size, dtype, device)

        #: [layers of the group, key or value, block, place in the block, kv head, head_dim]
        self.full_storage = storage(shape.full_blocks, len(config.full_layers))
        self.sliding_storage = storage(shape.sliding_blocks, len(config.sliding_layers))

    def forget(self) -> None:
        """Begin anew: every block is free and nothing can be found. No table may be in use."""
        self.full = BlockPool(self.shape.full_blocks)
        self.sliding = BlockPool(self.shape.sliding_blocks)

    def layers(self) -> list[tuple[Literal["full", "sliding"], Tensor]]:
        """Of each layer: its group, and its keys and values [2, blocks, block_size, kv_heads, head_dim]."""
        full, sliding = iter(self.full_storage), iter(self.sliding_storage)
        return [
            ("full", next(full)) if kind == FULL else ("sliding", next(sliding)) for kind in self.config.layer_types
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of both groups' storage."""
        return self.full_storage.nbytes + self.sliding_storage.nbytes

    def match_prefix(
        self, tokens: list[int], keys: list[BlockKey], end: int | None = None, root: BlockKey = ROOT_KEY
    ) -> tuple[Tables, int]:
        """Tables of the longest usable beginning of ``tokens`` that is in the cache, and its length in tokens.

        At least one token is left to compute, and one of the ``end`` first ones where that is given. Nothing is taken
        yet: see ``adopt``. ``keys`` are the names of the tokens' blocks as far as they are known; it grows as needed,
        so that a waiting request is hashed only once. ``root`` is what they begin with: see ``root_key``.
        """
        size = self.block_size
        full: list[int] = []
        sliding: list[int | None] = []
        unbroken: list[int] = []  # run of present sliding blocks that ends at this one
        for index in range((min(len(tokens), end or len(tokens)) - 1) // size):
            key = self._key(tokens, keys, index, root)
            block = self.full.lookup(key)
            if block is None:
                break
            full.append(block)
            sliding.append(self.sliding.lookup(key))
            run = unbroken[-1] if unbroken else 0
            unbroken.append(run + 1 if sliding[-1] is not None else 0)
        for count in range(len(full), 0, -1):
            first = max(0, count * size - self.window + 1) // size  # block of the oldest key the next query sees
            if unbroken[count - 1] >= count - first:
                seen = [b if b is not None and i >= first else FREED for i, b in enumerate(sliding[:count])]
                return Tables(full[:count], seen, first, published=count), count * size
        return Tables(), 0

    def adopt(self, tables: Tables) -> None:
        """Become a user of every block of tables that ``match_prefix`` gave."""
        for block in tables.full:
            self.full.share(block)
        for block in tables.sliding[tables.first_sliding :]:
            self.sliding.share(block)

    def shortfall(self, tables: Tables, computed: int, new: int) -> int:
        """How many blocks are missing (0: none) to compute ``new`` tokens after ``computed``."""
        blocks = ceil_div(computed + new, self.block_size)
        freed = max(0, self._first_visible(computed) - tables.first_sliding)
        missing_full = blocks - len(tables.full) - self.full.free
        missing_sliding = blocks - len(tables.sliding) - self.sliding.free
        if missing_sliding > 0:  # count what leaves the window only when it matters: those may be shared
            going = tables.sliding[tables.first_sliding : tables.first_sliding + freed]
            missing_sliding -= sum(self.sliding.has_one_user(block) for block in going)
        return max(0, missing_full, missing_sliding)

    def holds(self, tables: Tables, tokens: int) -> bool:
        """Whether the blocks there are suffice for so many first tokens."""
        return tokens <= len(tables.full) * self.block_size

    def reserve(self, tables: Tables, tokens: int) -> None:
        """Take one block more where so many first tokens need it and it is free."""
        if not self.holds(tables, tokens) and self.full.free and self.sliding.free:
            tables.full.append(self.full.allocate())
            tables.sliding.append(self.sliding.allocate())

    def extend(self, tables: Tables, computed: int, new: int) -> None:
        """Give back sliding blocks out of sight, then take blocks for ``new`` tokens. ``shortfall`` was 0."""
        self.free_out_of_window(tables, computed)
        blocks = ceil_div(computed + new, self.block_size)
        while len(tables.full) < blocks:
            tables.full.append(self.full.allocate())
        while len(tables.sliding) < blocks:
            tables.sliding.append(self.sliding.allocate())

    def free_out_of_window(self, tables: Tables, computed: int) -> None:
        """Give back the sliding blocks that no query at position ``computed`` or later can see."""
        visible = min(self._first_visible(computed), len(tables.sliding))
        for index in range(tables.first_sliding, visible):
            self.sliding.release(tables.sliding[index])
            tables.sliding[index] = FREED
        tables.first_sliding = max(tables.first_sliding, visible)

    def has_room(self, tables: Tables, tokens: int, chunk: int) -> bool:
        """Whether the free blocks suffice, with those in ``tables``, to compute ``tokens``, ``chunk`` a step."""
        full = ceil_div(tokens, self.block_size) - len(tables.full)
        sliding = sliding_blocks_needed(self.config, tokens, chunk, self.block_size)
        sliding -= len(tables.sliding) - tables.first_sliding
        return full <= self.full.free and sliding <= self.sliding.free

    def publish(
        self, tables: Tables, tokens: list[int], keys: list[BlockKey], computed: int, root: BlockKey = ROOT_KEY
    ) -> None:
        """Make blocks that ``computed`` tokens have filled findable by others.

        ``keys`` and ``root`` as in ``match_prefix``.
        """
        for index in range(tables.published, computed // self.block_size):
            key = self._key(tokens, keys, index, root)
            self.full.publish(tables.full[index], key)
            if tables.sliding[index] != FREED:
                self.sliding.publish(tables.sliding[index], key)
            tables.published = index + 1

    def release(self, tables: Tables) -> None:
        """Give back everything; the end of a sequence first, so that beginnings stay findable longest."""
        for block in reversed(tables.full):
            self.full.release(block)
        for block in reversed(tables.sliding[tables.first_sliding :]):
            self.sliding.release(block)
        tables.full, tables.sliding, tables.first_sliding, tables.published = [], [], 0, 0

    def keys(self, tokens: list[int], keys: list[BlockKey], count: int, root: BlockKey = ROOT_KEY) -> list[BlockKey]:
        """Names of the first ``count`` blocks of ``tokens``; ``keys`` and ``root`` as in ``match_prefix``."""
        for index in range(len(keys), count):
            self._key(tokens, keys, index, root)
        return keys[:count]

    def _key(self, tokens: list[int], keys: list[BlockKey], index: int, root: BlockKey = ROOT_KEY) -> BlockKey:
        """Name of block ``index``, whose predecessors have been named in ``keys`` already."""
        if index == len(keys):
            tail = tokens[index * self.block_size : (index + 1) * self.block_size]
            keys.append(block_key(keys[-1] if keys else root, tail))
        return keys[index]

    def _first_visible(self, position: int) -> int:
        """Index of the first block a query at ``position`` sees in a sliding layer."""
        return max(0, position - self.window + 1) // self.block_size
