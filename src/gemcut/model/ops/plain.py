"""The operations in plain PyTorch: right on any device and in any dtype, and the twin of every other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemcut.kernels.attention.varlen import VarlenAttention
from gemcut.kernels.linear.plain import softcap_in_place
from gemcut.model.key_values import KeyValues
from gemcut.model.linear import LinearLayer, TokenTable
from gemcut.model.norm import RMSNorm
from gemcut.model.ops.base import Activations, Rotations

if TYPE_CHECKING:
    from gemcut.model.gemma import MLP, Attention


class PlainOps:
    """gemcut.model.ops.base.Ops, computed in ``dtype``."""

    varlen: VarlenAttention | None = None

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def embed(
        self, ids: Tensor, table: TokenTable, scale: float, norm: RMSNorm, reader: LinearLayer
    ) -> tuple[Tensor, Tensor]:
        residual = table(ids).float() * scale
        return residual, self.norm(residual, norm)

    def norm(self, residual: Tensor, norm: RMSNorm) -> Tensor:
        """``norm(residual)`` in the compute dtype."""
        out: Tensor = norm(residual)
        return out.to(self.dtype)

    def add_norm(
        self, y: Tensor, residual: Tensor, post: RMSNorm, pre: RMSNorm | None, reader: LinearLayer | None
    ) -> tuple[Tensor, Tensor | None]:
        residual = post(y).add_(residual)
        return residual, None if pre is None else self.norm(residual, pre)

    def attend(
        self, attention: Attention, x: Activations, rotations: Rotations, kv: KeyValues, wanted: Tensor | None
    ) -> Tensor:
        out: Tensor = attention(x, rotations[attention.layer], kv, wanted)
        return out

    def mlp(self, mlp: MLP, x: Activations) -> Tensor:
        out: Tensor = mlp(x)
        return out

    def softcap(self, values: Tensor, cap: float) -> Tensor:
        return softcap_in_place(values, cap)
