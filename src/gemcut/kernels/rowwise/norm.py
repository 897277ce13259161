"""The residual stream on an NVIDIA GPU: embedding, and a sublayer's way back into the stream with the next norm.

Computes: the launches of norm.cu: embedding, RMSNorm, the residual sum with the next norm
Shapes: residual fp32 [m, d], y bf16 [m, d] -> x bf16 [m, d], or the same in the fused GEMM's layout
Runs: model/ops/cuda.py, around every sublayer
Schedule: one block a row; one launch where plain PyTorch has four to six
Invariants: fp32 inside; residual is changed in place; d is a multiple of 8 and at most 8192
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from gemcut.kernels.gpu import NEEDS_GPU, Gpu
from gemcut.kernels.linear.layout import UNIT, Ordered
from gemcut.kernels.rowwise.case import RowwiseCase
from gemcut.kernels.runtime.nvrtc import CudaKernel, compile_kernel, read_sources

MOST_COLUMNS = 8192


class _Norm(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "residual", "post", "pre", "x", "ids", "table", "absmax")),
        ("embed_scale", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("d", ctypes.c_int),
        ("groups", ctypes.c_int),
    )


def supports(case: RowwiseCase, gpu: Gpu | None) -> str | None:
    """None where a network's rows are served, else why not."""
    if gpu is None:
        return NEEDS_GPU
    if case.hidden % 8 or case.hidden > MOST_COLUMNS:
        return f"norm kernels take rows of a multiple of 8 and at most {MOST_COLUMNS} values, not {case.hidden}"
    return None


@functools.cache
def _kernel(name: str, device: int) -> CudaKernel:
    return compile_kernel(read_sources("runtime/launch.cuh", "linear/layout.cuh", "rowwise/norm.cu"), name, (), device)


def _run(
    name: str,
    residual: Tensor,
    eps: float,
    *,
    y: Tensor | None = None,
    post: Tensor | None = None,
    pre: Tensor | None = None,
    x: Tensor | Ordered | None = None,
    table: tuple[Tensor, Tensor, Tensor | None, float] | None = None,
) -> None:
    """``table``: ids, the table, its rows' largest magnitudes, the scale."""
    m, d = residual.shape
    target, groups = (x.values, x.groups) if isinstance(x, Ordered) else (x, 0)
    ids, rows, absmax, embed_scale = (None, None, None, 0.0) if table is None else table
    pointers = (None if t is None else t.data_ptr() for t in (y, residual, post, pre, target, ids, rows, absmax))
    task = _Norm(*pointers, embed_scale, eps, d, groups)
    _kernel(name, residual.device.index or 0).launch((m, 1), -(-d // UNIT) * 32, 0, (task,))


def _empty(like: Tensor, groups: int) -> Tensor | Ordered:
    m, d = like.shape
    if groups:
        return Ordered.empty(m, d, groups, like.device)
    return torch.empty((m, d), dtype=torch.bfloat16, device=like.device)


def norm_add(y: Tensor, residual: Tensor, post: Tensor, pre: Tensor, eps: float, groups: int = 0) -> Tensor | Ordered:
    """``residual += rms(y) · post``; returns ``rms(residual) · pre`` in bf16.

    y bf16 [m, d]; residual fp32 [m, d], changed in place; post and pre fp32 [d]. All contiguous. With ``groups`` the
    result is in order, in so many groups of eight rows.
    """
    x = _empty(residual, groups)
    _run("norm_add", residual, eps, y=y, post=post, pre=pre, x=x)
    return x


def norm(residual: Tensor, pre: Tensor, eps: float, groups: int = 0) -> Tensor | Ordered:
    """``rms(residual) · pre`` in bf16 of fp32 [m, d], contiguous; ``groups`` as in ``norm_add``."""
    x = _empty(residual, groups)
    _run("norm_add", residual, eps, pre=pre, x=x)
    return x


def add_norm(y: Tensor, residual: Tensor, post: Tensor, eps: float) -> None:
    """``residual += rms(y) · post``, as in ``norm_add``, where no sublayer follows."""
    _run("norm_add", residual, eps, y=y, post=post)


def norm_embed(
    ids: Tensor, table: Tensor, absmax: Tensor | None, embed_scale: float, pre: Tensor, eps: float, groups: int = 0
) -> tuple[Tensor, Tensor | Ordered]:
    """(residual fp32 [m, d], ``rms(residual) · pre`` bf16): the rows ``ids`` int32 [m] of the table, times a scale.

    The table is bf16 [vocabulary, d], or int8 with fp32 ``absmax`` [vocabulary]; ``groups`` as in ``norm_add``.
    """
    m, d = ids.shape[0], table.shape[1]
    residual = torch.empty((m, d), dtype=torch.float32, device=ids.device)
    x = _empty(residual, groups)
    _run("norm_embed", residual, eps, pre=pre, x=x, table=(ids, table, absmax, embed_scale))
    return residual, x
