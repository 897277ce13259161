"""The residual stream on an NVIDIA GPU: embedding, and a sublayer's way back into the stream with the next norm.

One launch where plain PyTorch has four to six; everything inside is fp32.
"""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcut.kernels.nvrtc import CudaKernel, compile_kernel, read_sources

MOST_COLUMNS = 8192


class _Norm(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "residual", "post", "pre", "x", "ids", "table", "absmax")),
        ("embed_scale", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("d", ctypes.c_int),
    )


def supports(columns: int) -> str | None:
    """None where rows of ``columns`` are served, else why not."""
    if columns % 8 or columns > MOST_COLUMNS:
        return f"norm kernels take rows of a multiple of 8 and at most {MOST_COLUMNS} values, not {columns}"
    return None


@functools.cache
def _kernel(name: str, device: int) -> CudaKernel:
    return compile_kernel(read_sources("launch.cuh", "norm.cu"), name, (), device)


def _threads(columns: int) -> int:
    return -(-columns // 256) * 32


def norm_add(y: Tensor, residual: Tensor, post: Tensor, pre: Tensor, eps: float) -> Tensor:
    """``residual += rms(y) · post``; returns ``rms(residual) · pre`` in bf16.

    y bf16 [m, d]; residual fp32 [m, d], changed in place; post and pre fp32 [d]. All contiguous.
    """
    m, d = y.shape
    x = torch.empty_like(y)
    task = _Norm(
        y.data_ptr(), residual.data_ptr(), post.data_ptr(), pre.data_ptr(), x.data_ptr(), None, None, None, 0.0, eps, d,
    )  # fmt: skip
    _kernel("norm_add", y.device.index or 0).launch((m, 1), _threads(d), 0, (task,))
    return x


def norm(residual: Tensor, pre: Tensor, eps: float) -> Tensor:
    """``rms(residual) · pre`` in bf16 of fp32 [m, d], contiguous."""
    x = torch.empty(residual.shape, dtype=torch.bfloat16, device=residual.device)
    task = _Norm(None, residual.data_ptr(), None, pre.data_ptr(), x.data_ptr(), None, None, None, 0.0, eps, x.shape[1])
    _kernel("norm_add", x.device.index or 0).launch((len(x), 1), _threads(x.shape[1]), 0, (task,))
    return x


def add_norm(y: Tensor, residual: Tensor, post: Tensor, eps: float) -> None:
    """``residual += rms(y) · post``, as in ``norm_add``, where no sublayer follows."""
    m, d = y.shape
    task = _Norm(y.data_ptr(), residual.data_ptr(), post.data_ptr(), None, None, None, None, None, 0.0, eps, d)
    _kernel("norm_add", y.device.index or 0).launch((m, 1), _threads(d), 0, (task,))


def norm_embed(
    ids: Tensor, table: Tensor, absmax: Tensor | None, embed_scale: float, pre: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(residual fp32 [m, d], ``rms(residual) · pre`` bf16): the rows ``ids`` int32 [m] of the table, times a scale.

    The table is bf16 [vocabulary, d], or int8 with fp32 ``absmax`` [vocabulary].
    """
    m, d = ids.shape[0], table.shape[1]
    residual = torch.empty((m, d), dtype=torch.float32, device=ids.device)
    x = torch.empty((m, d), dtype=torch.bfloat16, device=ids.device)
    task = _Norm(
        None, residual.data_ptr(), None, pre.data_ptr(), x.data_ptr(), ids.data_ptr(), table.data_ptr(),
        absmax.data_ptr() if absmax is not None else None, embed_scale, eps, d,
    )  # fmt: skip
    _kernel("norm_embed", ids.device.index or 0).launch((m, 1), _threads(d), 0, (task,))
    return residual, x


def norm_add_plain(y: Tensor, residual: Tensor, post: Tensor, pre: Tensor, eps: float) -> Tensor:
    """The same in plain torch."""
    residual += F.rms_norm(y.float(), post.shape, post, eps)
    return F.rms_norm(residual, pre.shape, pre, eps).to(y.dtype)
