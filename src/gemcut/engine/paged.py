"""PagedKeyValues: one batch's view of the paged cache, in the form the network's attention asks for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gemcut.cache_blocks import ceil_div
from gemcut.config import FULL, GemmaConfig
from gemcut.engine.cache import PagedCache, Tables
from gemcut.kernels.attention.varlen import VarlenSegment, fresh_segments
from gemcut.model.key_values import HostPart, KeyValues, Pages, Span


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
    """Index tensors of one cache group for one batch."""

    def __init__(
        self, storage: Tensor, tables: list[list[int]], first: list[int], spans: Sequence[Span], size: int
    ) -> None:
        device, self.size = storage.device, size
        self.storage = storage
        self.first_positions = [block * size for block in first]
        live = [live_blocks(*each, size) for each in zip(tables, first, spans, strict=True)]
        slots = [token_slots(table, span, size) for table, span in zip(tables, spans, strict=True)]
        self._segments = gathered_segments(spans, live, first, size)
        self.slots = torch.from_numpy(np.concatenate(slots)).to(device)
        self.blocks = [torch.tensor(blocks, dtype=torch.long, device=device) for blocks in live]
        self.lengths = [span.context_length - start for span, start in zip(spans, self.first_positions, strict=True)]
        self._decode: tuple[Tensor, Tensor, int] | None = None
        self._tables = tables
        self._table: Tensor | None = None
        self._all: Tensor | None = None

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

    def _padded(self) -> tuple[Tensor, Tensor, int]:
        if self._decode is None:
            padded = torch.nn.utils.rnn.pad_sequence(self.blocks, batch_first=True)  # pads with block 0; masked later
            self._decode = (padded, torch.tensor(self.lengths, device=padded.device), max(self.lengths))
        return self._decode

    def pages(self, layer: int) -> Pages:
        keys, values = self.storage[layer]
        return Pages(keys, values, self.slots)

    def live_blocks(self) -> tuple[Tensor, Tensor]:
        padded, lengths, _ = self._padded()
        return padded, lengths

    def block_table(self) -> Tensor:
        """int32 [B, longest]: each sequence's block of each run of block-size tokens; 0 where it has none any more."""
        if self._table is None:
            longest = max(map(len, self._tables))
            rows = [[max(b, 0) for b in table] + [0] * (longest - len(table)) for table in self._tables]
            self._table = torch.tensor(rows, dtype=torch.int32, device=self.storage.device)
        return self._table

    def gathered(self, layer: int) -> tuple[Tensor, Tensor, tuple[VarlenSegment, ...]]:
        if self._all is None:
            self._all = torch.cat(self.blocks)
        return *gather(self.storage[layer], self._all), self._segments

    def read_decode(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        padded, lengths, longest = self._padded()
        keys, values = (
            part.index_select(0, padded.flatten()).view(len(padded), -1, *part.shape[2:])[:, :longest]
            for part in self.storage[layer]
        )
        return keys, values, lengths


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
        self._parts: tuple[HostPart, ...] | None = None
        self._positions: Tensor | None = None
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

    @property
    def host_parts(self) -> tuple[HostPart, ...]:
        if self._parts is None:
            ones = [span.length == 1 for span in self.spans]
            both = self._on_cpu and any(ones) and not all(ones)
            self._parts = tuple(self._part([one is kind for one in ones]) for kind in (True, False)) if both else ()
        return self._parts

    def _part(self, chosen: Sequence[bool]) -> HostPart:
        """The sequences that are ``chosen``, as a batch of their own."""
        config, cache, tables = self._source
        rows: list[int] = []
        spans: list[Span] = []
        for span in (span for span, own in zip(self.spans, chosen, strict=True) if own):
            spans.append(Span(len(rows), span.length, span.context_length))
            rows += range(span.start, span.start + span.length)
        kv = PagedKeyValues(config, cache, [t for t, own in zip(tables, chosen, strict=True) if own], spans)
        neighbours = rows[-1] - rows[0] + 1 == len(rows)
        return HostPart(slice(rows[0], rows[-1] + 1) if neighbours else torch.tensor(rows), kv)

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

    @property
    def positions(self) -> Tensor:
        """int32 [B]: each sequence's last position."""
        if self._positions is None:
            last = [span.context_length - 1 for span in self.spans]
            self._positions = torch.tensor(last, dtype=torch.int32, device=self.storage(0).device)
        return self._positions

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
