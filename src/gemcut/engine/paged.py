"""PagedKeyValues: one batch's view of the paged cache, in the form the network's attention asks for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemcut.cache_blocks import ceil_div
from gemcut.config import FULL, GemmaConfig
from gemcut.engine.cache import PagedCache, Tables
from gemcut.engine.tensors import upload
from gemcut.kernels.attention.varlen import VarlenSegment, fresh_segments
from gemcut.model.key_values import KeyValues, Pages, Part, Span


def token_slots(table: list[int], span: Span, size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Where a sequence's new tokens go, given its block ``table``: int64 [length], counted in tokens."""
    positions = np.arange(span.context_length - span.length, span.context_length)
    return np.asarray(table, dtype=np.int64)[positions // size] * size + positions % size


def live_blocks(table: list[int], first: int, span: Span, size: int) -> list[int]:
    """A sequence's blocks from ``first`` on up to the one its last new token is in."""
    return table[first : ceil_div(span.context_length, size)]


def gathered_segments(
    spans: Sequence[Span], lives: Sequence[list[int]], first: list[int], size: int
) -> tuple[VarlenSegment, ...]:
    """The segments of a batch whose sequences' live blocks, from their ``first`` on, stand one after another."""
    segments, start = [], 0
    for span, live, block in zip(spans, lives, first, strict=True):
        segments.append((span.start, span.length, start, span.context_length - span.length - block * size))
        start += len(live) * size
    return tuple(segments)


def gather(storage: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(keys, values [L, kv_heads, head_dim]): copies of a layer's ``blocks``, one after another."""
    keys, values = (part.index_select(0, blocks).flatten(0, 1) for part in storage)
    return keys, values


class _Group:
    """Index tensors of one cache group for one batch, made where they are asked for."""

    def __init__(
        self, storage: Tensor, tables: list[list[int]], first: list[int], spans: Sequence[Span], size: int
    ) -> None:
        self.storage, self._size, self._tables, self._first, self._spans = storage, size, tables, first, spans
        self.first_positions = [block * size for block in first]
        self.lengths = [span.context_length - start for span, start in zip(spans, self.first_positions, strict=True)]

    @cached_property
    def slots(self) -> Tensor:
        """int64 [T]: where each new token goes."""
        slots = [token_slots(table, span, self._size) for table, span in zip(self._tables, self._spans, strict=True)]
        return upload(np.concatenate(slots), self.storage.device)

    @cached_property
    def _live(self) -> list[list[int]]:
        return [live_blocks(*each, self._size) for each in zip(self._tables, self._first, self._spans, strict=True)]

    @cached_property
    def blocks(self) -> list[Tensor]:
        """Of each sequence its live blocks, int64."""
        return list(torch.split(self._all, [len(blocks) for blocks in self._live]))

    @cached_property
    def _all(self) -> Tensor:
        return upload(np.concatenate(self._live, dtype=np.int64), self.storage.device)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        keys, values = self.storage[layer].flatten(1, 2)
        keys.index_copy_(0, self.slots, key)
        values.index_copy_(0, self.slots, value)

    def read(self, layer: int, sequence: int) -> tuple[Tensor, Tensor, int]:
        keys, values = self.storage[layer]
        blocks, length = self.blocks[sequence], self.lengths[sequence]
        return (
            keys.index_select(0, blocks).flatten(0, 1)[:length],
            values.index_select(0, blocks).flatten(0, 1)[:length],
            self.first_positions[sequence],
        )

    @cached_property
    def _padded(self) -> tuple[Tensor, Tensor, int]:
        padded = _rectangle(self._live, np.int64)  # block 0 is masked later
        lengths = np.array(self.lengths, dtype=np.int64)
        device = self.storage.device
        return upload(padded, device), upload(lengths, device), max(self.lengths)

    def pages(self, layer: int) -> Pages:
        keys, values = self.storage[layer]
        return Pages(keys, values, self.slots)

    def live_blocks(self) -> tuple[Tensor, Tensor]:
        padded, lengths, _ = self._padded
        return padded, lengths

    def block_table(self) -> Tensor:
        """int32 [B, longest]: each sequence's block of each run of block-size tokens; 0 where it has none any more."""
        return self._table

    @cached_property
    def _table(self) -> Tensor:
        return upload(_rectangle(self._tables, np.int32).clip(min=0), self.storage.device)

    def gathered(self, layer: int) -> tuple[Tensor, Tensor, tuple[VarlenSegment, ...]]:
        return *gather(self.storage[layer], self._all), self._segments

    @cached_property
    def _segments(self) -> tuple[VarlenSegment, ...]:
        return gathered_segments(self._spans, self._live, self._first, self._size)

    def read_decode(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        padded, lengths, longest = self._padded
        keys, values = (
            part.index_select(0, padded.flatten()).view(len(padded), -1, *part.shape[2:])[:, :longest]
            for part in self.storage[layer]
        )
        return keys, values, lengths


def _rectangle(rows: Sequence[list[int]], dtype: type[np.integer[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
    """``rows`` side by side, [rows, longest], with 0 behind the shorter ones' ends."""
    found = np.zeros((len(rows), max(map(len, rows))), dtype=dtype)
    for target, row in zip(found, rows, strict=True):
        target[: len(row)] = row
    return found


class PagedKeyValues(KeyValues):
    """Keys and values of one batch in the paged cache."""

    def __init__(self, config: GemmaConfig, cache: PagedCache, tables: list[Tables], spans: Sequence[Span]) -> None:
        self.spans: Sequence[Span] = spans
        #: The segments of a batch that holds all the keys there are; None: some are in the cache only.
        self.fresh = fresh_segments(spans)
        size = self.block_size = cache.block_size
        self._one_each = all(span.length == 1 for span in spans)
        self._on_cpu = cache.full_storage.device.type == "cpu"
        self._source = config, cache, tables
        full = _Group(cache.full_storage, [t.full for t in tables], [0] * len(tables), spans, size)
        first = [t.first_sliding for t in tables]
        sliding = _Group(cache.sliding_storage, [t.sliding for t in tables], first, spans, size)
        counts = {id(full): 0, id(sliding): 0}
        self._layers: list[tuple[_Group, int]] = []  # of each layer: its group, and its place in the group's storage
        for kind in config.layer_types:
            group = full if kind == FULL else sliding
            self._layers.append((group, counts[id(group)]))
            counts[id(group)] += 1

    @property
    def paged(self) -> PagedKeyValues:
        return self

    @property
    def decode(self) -> PagedKeyValues | None:
        return self if self._one_each and not self._on_cpu else None

    @property
    def host_decode(self) -> PagedKeyValues | None:
        return self if self._one_each and self._on_cpu else None

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        ones = [span.length == 1 for span in self.spans]
        if not any(ones) or all(ones):
            return ()
        return tuple(self._part([one is kind for one in ones]) for kind in (True, False))

    def _part(self, chosen: Sequence[bool]) -> Part:
        """The sequences that are ``chosen``, as a batch of their own."""
        config, cache, tables = self._source
        rows: list[int] = []
        spans: list[Span] = []
        for span in (span for span, own in zip(self.spans, chosen, strict=True) if own):
            spans.append(Span(len(rows), span.length, span.context_length))
            rows += range(span.start, span.start + span.length)
        kv = PagedKeyValues(config, cache, [t for t, own in zip(tables, chosen, strict=True) if own], spans)
        neighbours = rows[-1] - rows[0] + 1 == len(rows)
        return Part(slice(rows[0], rows[-1] + 1) if neighbours else torch.tensor(rows), kv)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        group, index = self._layers[layer]
        group.write(index, key, value)

    def read(self, layer: int, sequence: int) -> tuple[Tensor, Tensor, int]:
        group, index = self._layers[layer]
        return group.read(index, sequence)

    def read_decode(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        group, index = self._layers[layer]
        return group.read_decode(index)

    def pages(self, layer: int) -> Pages:
        """The layer's place in the cache."""
        group, index = self._layers[layer]
        return group.pages(index)

    def live_blocks(self, layer: int) -> tuple[Tensor, Tensor]:
        """(each sequence's live blocks, int64 [B, longest], padded with block 0; tokens in them, int64 [B])."""
        return self._layers[layer][0].live_blocks()

    @cached_property
    def positions(self) -> Tensor:
        """int32 [B]: each sequence's last position."""
        last = np.array([span.context_length - 1 for span in self.spans], dtype=np.int32)
        return upload(last, self.storage(0).device)

    def storage(self, layer: int) -> Tensor:
        """The layer's keys and values: [2, blocks, block_size, kv_heads, head_dim]."""
        group, index = self._layers[layer]
        return group.storage[index]

    def block_table(self, layer: int) -> Tensor:
        """int32 [B, longest]: each sequence's block of each run of block-size tokens, for the layer's group.

        Blocks that left the window, and those behind a shorter sequence's end, read 0.
        """
        return self._layers[layer][0].block_table()

    def gathered(self, layer: int) -> tuple[Tensor, Tensor, tuple[VarlenSegment, ...]]:
        """(keys, values [L, kv_heads, head_dim], segments): all sequences' live blocks one after another, copied."""
        group, index = self._layers[layer]
        return group.gathered(index)
