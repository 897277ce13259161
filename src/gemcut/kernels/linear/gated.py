"""``gelu(gate) · up`` of an MLP for many rows of x in one launch, with both GEMMs, on Hopper GPUs.

Computes: the launch of gated.cu: gelu(gate) · up of an MLP for many rows, with both GEMMs
Shapes: x bf16 [m, k], weight bf16 [2 · width, k], gate before up -> bf16 [m, width]
Runs: linear/cuda.py on Hopper where `pays` says so (from 768 rows on)
Schedule: persistent clusters of two thread blocks, 256 rows by 128 columns at a time
Invariants: gate and up are never stored; cuBLAS would write both, twice what the next GEMM reads

cuBLAS would write gate and up for another kernel to read; here they stay in registers.
"""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcut.errors import ParameterError
from gemcut.kernels.gpu import NEEDS_GPU, Gpu, gpu_of
from gemcut.kernels.linear.case import LinearCase
from gemcut.kernels.linear.gemv import aligned_rows
from gemcut.kernels.runtime.nvrtc import CudaKernel, TensorMap, compile_kernel, read_sources, tensor_map
from gemcut.kernels.runtime.wgmma import wgmma_source

#: From so many rows on one launch is faster than cuBLAS and the GeGLU kernel behind it (on an H100).
MANY_ROWS = 768
# It gains up to 10 % and computes in tiles of 256 rows; where the last one adds more than this share it does not pay.
_MOST_ADDED = 1 / 16

# As in the source: rows of x and columns of the result a thread block; columns of x and W, rows of results at a time.
_ROWS, _COLUMNS, _K_BLOCK, _STORED_ROWS = 128, 128, 64, 64
_THREADS = 384
# Stages, results, barriers.
_SHARED_BYTES = 4 * (_ROWS + 2 * _COLUMNS) * _K_BLOCK * 2 + _ROWS * _COLUMNS * 2 + 4 * 2 * 8


class _Tiles(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int) for name in ("m_pairs", "n_tiles", "k_blocks", "width"))


def supports(case: LinearCase, gpu: Gpu | None) -> str | None:
    """None where a case whose rows are gate, then up, is served once it is bf16, else one line that says why not."""
    if gpu is None:
        return NEEDS_GPU
    rows, columns = case.shape
    if rows % 2 or case.out_dtype != torch.bfloat16:
        return "needs as many rows of gate as of up, and gives bfloat16"
    return _refusal(rows // 2, columns, gpu)


def _refusal(width: int, k: int, gpu: Gpu) -> str | None:
    reason = gpu.wgmma_refusal
    if reason is not None:
        return reason
    # Dequantized weights come in tiles of 16 rows, and TMA takes rows of whole 16-byte chunks.
    if width % 16 or k % 8:
        return f"takes widths that are a multiple of 16 and inputs that are one of 8, not {width} and {k}"
    return None


def pays(m: int) -> bool:
    """Whether one launch is faster for ``m`` rows."""
    tile = 2 * _ROWS
    return m >= MANY_ROWS and -m % tile <= m * _MOST_ADDED


@functools.cache
def _kernel(device: int) -> CudaKernel:
    wgmma = wgmma_source("wgmma", 2 * _COLUMNS)
    source = "\n".join(
        (read_sources("runtime/launch.cuh", "runtime/hopper.cuh"), wgmma, read_sources("linear/gated.cu"))
    )
    return compile_kernel(source, "gated_gemm", (), device)


def _map(matrix: Tensor, box_rows: int) -> TensorMap:
    rows, columns = matrix.shape
    return tensor_map(matrix.data_ptr(), rows, columns, matrix.stride(0) * 2, box_rows, _K_BLOCK)


def gated_gemm(x: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x bf16 [m, k], any m from 1 on; weight bf16 [2 · width, k], gate before up -> bf16 [m, width]; fp32 inside.

    ``out``, where given, has contiguous rows that begin at multiples of 16 bytes, as those of ``weight`` do. Raises
    ParameterError on a wrong shape or dtype.
    """
    if x.dim() != 2 or x.dtype != torch.bfloat16 or x.shape[0] < 1:
        raise ParameterError(f"x must be bf16 [1…, k], not {x.dtype} {tuple(x.shape)}")
    (m, k), width = x.shape, weight.shape[0] // 2
    if weight.dtype != torch.bfloat16 or weight.shape[1] != k or weight.shape[0] % 2:
        raise ParameterError(f"weight must be bf16 [2 · width, {k}], not {weight.dtype} {tuple(weight.shape)}")
    device = x.device.index or 0
    reason = _refusal(width, k, gpu_of(device))
    if reason is not None:
        raise ParameterError(reason)
    if out is None:
        out = torch.empty((m, width), dtype=torch.bfloat16, device=x.device)
    elif out.shape != (m, width) or out.dtype != torch.bfloat16:
        raise ParameterError(f"out must be bf16 {(m, width)}, not {out.dtype} {tuple(out.shape)}")
    for name, rows in ("weight", weight), ("out", out):
        if rows.stride(1) != 1 or rows.stride(0) % 8 or rows.data_ptr() % 16:
            raise ParameterError(f"{name} needs contiguous rows that begin at multiples of 16 bytes")
    x = aligned_rows(x)
    m_pairs, n_tiles = -(-m // (2 * _ROWS)), -(-width // _COLUMNS)
    sms = gpu_of(device).sms
    clusters = min(sms // 2, m_pairs * n_tiles)
    maps = _map(x, _ROWS), _map(weight, _COLUMNS), _map(out, _STORED_ROWS)
    tiles = _Tiles(m_pairs, n_tiles, -(-k // _K_BLOCK), width)
    _kernel(device).launch((2 * clusters, 1), _THREADS, _SHARED_BYTES, (*maps, tiles))
    return out


def gated_gemm_plain(x: Tensor, weight: Tensor) -> Tensor:
    """The same in plain torch."""
    gate, up = F.linear(x, weight).chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)
