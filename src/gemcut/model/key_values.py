"""What a batch's keys and values offer to attention, whatever holds them: a paged cache, or nothing but the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from gemcut.kernels.attention.varlen import VarlenSegment
from gemcut.model.rope import Rotation


@dataclass(frozen=True)
class Span:
    """One sequence's part of a batch: which rows of the batch are its queries, and how much context there is.

    Queries sit at positions ``context_length - length … context_length - 1``.
    """

    start: int
    length: int
    context_length: int


@dataclass(frozen=True)
class Pages:
    """Where one layer's keys and values stand: what a kernel needs to find them.

    Attributes:
        keys, values: the layer's storage [blocks, block_size, kv_heads, head_dim].
        slots: where each new token goes, int64 [T], counted in tokens of the storage; -1: nowhere.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor


class PagedBatch(Protocol):
    """A batch of any spans over a paged cache, as varlen kernels take it."""

    @property
    def fresh(self) -> Sequence[VarlenSegment] | Tensor | None:
        """The segments of a batch that holds all the keys there are; None: some are in the cache only."""

    def pages(self, layer: int) -> Pages:
        """The layer's place in the cache."""

    def gathered(self, layer: int) -> tuple[Tensor, Tensor, Sequence[VarlenSegment] | Tensor]:
        """(keys, values [L, kv_heads, head_dim], segments): all sequences' live blocks one after another, copied."""


class DecodeBatch(Protocol):
    """A batch of one new token for each of B sequences over a paged cache, as the GPU's decode kernels take it."""

    @property
    def block_size(self) -> int:
        """Tokens in a block of the cache."""

    @property
    def positions(self) -> Tensor:
        """int32 [B]: each new token's position; a negative one marks a row without a sequence."""

    def storage(self, layer: int) -> Tensor:
        """The layer's keys and values: [2, blocks, block_size, kv_heads, head_dim]."""

    def block_table(self, layer: int) -> Tensor:
        """int32 [B, longest]: each sequence's block of each run of block-size tokens; any where none is read."""


class HostDecodeBatch(Protocol):
    """The same batch as the CPU's decode kernels take it."""

    def storage(self, layer: int) -> Tensor:
        """The layer's keys and values: [2, blocks, block_size, kv_heads, head_dim]."""

    def pages(self, layer: int) -> Pages:
        """The layer's place in the cache."""

    def live_blocks(self, layer: int) -> tuple[Tensor, Tensor]:
        """(each sequence's live blocks, int64 [B, longest], padded with block 0; tokens in them, int64 [B])."""


class KeyValues:
    """Keys and values of one batch.

    Each kind of batch offers one or several ways to reach them; an implementation of attention takes the one it is made
    for: ``write``, ``read`` and ``read_decode`` give plain PyTorch contiguous tensors, ``paged``, ``decode`` and
    ``host_decode`` give kernels the cache itself.
    """

    #: The batch's sequences, in row order.
    spans: Sequence[Span]

    @property
    def paged(self) -> PagedBatch | None:
        """None where the batch is not in a paged cache."""
        return None

    @property
    def decode(self) -> DecodeBatch | None:
        """None where the batch is not in a paged cache on a GPU, or some sequence has several new tokens."""
        return None

    @property
    def host_decode(self) -> HostDecodeBatch | None:
        """The same on a CPU."""
        return None

    @property
    def parts(self) -> Sequence[Part]:
        """The sequences with one new token, and those with several, where a paged batch has both kinds; else empty."""
        return ()

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store ``key`` and ``value`` [T, kv_heads, head_dim] of all rows."""
        raise NotImplementedError(f"{type(self).__name__} is for kernels that reach the cache themselves")

    def read(self, layer: int, sequence: int) -> tuple[Tensor, Tensor, int]:
        """(keys, values [L, kv_heads, head_dim], position of the first) up to the sequence's last query."""
        raise NotImplementedError(f"{type(self).__name__} is for kernels that reach the cache themselves")

    def read_decode(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """For sequences of one query each: (keys, values [B, L, kv_heads, head_dim], lengths [B])."""
        raise NotImplementedError(f"{type(self).__name__} is for kernels that reach the cache themselves")


@dataclass(frozen=True)
class Part:
    """Some sequences of a batch, as a batch of their own.

    Attributes:
        rows: their rows of the whole batch, in order: a slice where these are neighbours, else int64 [n].
        kv: their keys and values.
    """

    rows: slice | Tensor
    kv: KeyValues
    _rotations: dict[int, tuple[Rotation, Rotation]] = field(default_factory=dict, repr=False)

    def rotation(self, whole: Rotation) -> Rotation:
        """Their part of the whole batch's rotation, which several layers share."""
        kept = self._rotations.get(id(whole))
        if kept is None or kept[0] is not whole:
            kept = self._rotations[id(whole)] = whole, (whole[0][self.rows], whole[1][self.rows])
        return kept[1]
