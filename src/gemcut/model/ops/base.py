"""What an implementation of the network's operations computes. ``gemcut.model.gemma`` says in which order.

The form is that of a deferred norm: a sublayer's way back into the residual stream comes together with the norm that
the next sublayer begins with, since fused kernels compute the two in one pass.

Shapes: T rows (tokens of all sequences of a batch), d hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from gemcut.config import GemmaConfig
from gemcut.kernels.attention.case import AttentionCase
from gemcut.kernels.attention.varlen import VarlenAttention
from gemcut.kernels.linear.layout import Ordered
from gemcut.kernels.rowwise.case import RowwiseCase
from gemcut.model.attention import attention_case
from gemcut.model.key_values import KeyValues
from gemcut.model.linear import LinearLayer, TokenTable
from gemcut.model.norm import RMSNorm
from gemcut.model.rope import Rotation

if TYPE_CHECKING:
    from gemcut.model.gemma import MLP, Attention

#: Rows [T, n] in the compute dtype; or in the order that the linear layer which reads them asked for.
Activations = Tensor | Ordered


@dataclass(frozen=True)
class NetworkCase:
    """What a network asks of the kernels between its GEMMs: its sizes and its compute dtype."""

    config: GemmaConfig
    dtype: torch.dtype

    @property
    def rowwise(self) -> RowwiseCase:
        """Of norms, of GeGLU, of rotations."""
        return RowwiseCase(self.config.hidden_size, self.config.intermediate_size, self.config.head_dim)

    @property
    def attention(self) -> AttentionCase:
        """Of attention of many queries."""
        return attention_case(self.config, self.dtype)

    def decode_attention(self, block_size: int) -> AttentionCase:
        """Of attention of one new token of each sequence, over a cache of such blocks."""
        return attention_case(self.config, self.dtype, block_size)


class Ops(Protocol):
    """The operations. All sums are fp32; the residual stream is fp32 and may be changed in place."""

    @property
    def varlen(self) -> VarlenAttention | None:
        """What computes attention of many queries; None: the network's own implementation."""

    def embed(
        self, ids: Tensor, table: TokenTable, scale: float, norm: RMSNorm, reader: LinearLayer
    ) -> tuple[Tensor, Activations]:
        """The residual stream of token ``ids`` [T]: their vectors times ``scale``, fp32 [T, d]; and its ``norm``.

        ``reader``: the linear layer that reads the normed rows.
        """

    def add_norm(
        self, y: Tensor, residual: Tensor, post: RMSNorm, pre: RMSNorm | None, reader: LinearLayer | None
    ) -> tuple[Tensor, Activations | None]:
        """(``residual`` + ``post(y)``, ``pre`` of that): a sublayer's result ``y`` [T, d] joins the stream.

        Without ``pre`` nothing follows, and there are no normed rows. ``reader`` is as in ``embed``; None: the head.
        """

    def attend(
        self, attention: Attention, x: Activations, rotations: Rotations, kv: KeyValues, wanted: Tensor | None
    ) -> Tensor:
        """Attention of normed rows ``x`` [T, d] -> [T, d], or the ``wanted`` rows of it, int64 [n].

        The cache gets keys and values of all rows.
        """

    def mlp(self, mlp: MLP, x: Activations) -> Tensor:
        """``down(gelu(gate(x)) · up(x))``, [T, d] -> [T, d]."""

    def softcap(self, values: Tensor, cap: float) -> Tensor:
        """``cap · tanh(values / cap)`` of fp32 ``values``, in place; NaN where one is infinite."""


class FusedLayers(Protocol):
    """All layers of a batch in one call, with neither Python nor launches between them."""

    def serves(self, kv: KeyValues, rows: int) -> bool:
        """Whether it takes a batch of so many rows."""

    def __call__(self, residual: Tensor, rotations: Rotations, kv: KeyValues) -> None:
        """``residual`` fp32 [T, d] goes through all layers, in place; the cache gets keys and values."""


class Rotations(Protocol):
    """Each layer's rotation of the batch's positions."""

    def __getitem__(self, layer: int) -> Rotation:
        """cos and sin, fp32 [T, 1, head_dim / 2]."""
