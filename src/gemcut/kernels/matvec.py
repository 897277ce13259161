"""What the matrix-vector kernels share: how the work is split over the GPU, and the launch.

The frame is in cuda/matvec.cuh: up to eight rows of x against a weight read exactly once.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Literal

import torch

from gemcut.errors import ParameterError
from gemcut.kernels.nvrtc import CudaKernel, compile_kernel, read_sources, shared_memory_limit

MAX_ROWS = 8
TILE = 16
_FIXUP_STAGES = 16  # what adding up the slices costs, in stages a block could have read meanwhile
_ALONE_STAGES = 32  # what it costs when the next kernel's block finds no room beside this one


@dataclass(frozen=True)
class Storage:
    """What the launch must know of a weight format: the constants of its `struct Format`."""

    kernel: str
    step: int
    stage_bytes: int
    table_bytes: int
    x_pad: int
    warps: int
    stages: int
    resident: int
    early: int = 1
    defines: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Split:
    """`chunks` runs of row tiles times `slices` of `slice_steps` column steps: one thread block each."""

    chunks: int
    slices: int
    slice_steps: int


class _Problem(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("partial", ctypes.c_void_p),
        ("arrivals", ctypes.c_void_p),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("m", "n", "k", "x_stride", "tiles", "steps", "slice_steps")),
    )


def shared_bytes(storage: Storage, slice_steps: int, m: int) -> int:
    ring = storage.warps * storage.stages * storage.stage_bytes
    x = m * (slice_steps * storage.step * 2 + storage.x_pad)
    return storage.table_bytes + ring + x + storage.warps * 2 * TILE * m * 4


@functools.lru_cache(maxsize=1024)
def plan_split(storage: Storage, tiles: int, steps: int, m: int, processors: int, shared_limit: int) -> Split:
    """The split whose busiest block has least to read; counting what slices cost to add up.

    Raises ParameterError where even one step a slice does not fit shared memory.
    """
    best: tuple[int, Split] | None = None
    for slices in range(1, min(steps, 32) + 1):
        slice_steps = -(-steps // slices)
        nbytes = shared_bytes(storage, slice_steps, m)
        chunks = min(tiles, processors // slices)
        if (slices - 1) * slice_steps >= steps or nbytes > shared_limit or chunks == 0:
            continue
        cost = -(-tiles // chunks) * slice_steps
        cost += (_FIXUP_STAGES if slices > 1 else 0) + (_ALONE_STAGES if nbytes > shared_limit // 2 else 0)
        if best is None or cost < best[0]:
            best = (cost, Split(chunks, slices, slice_steps))
    if best is None:
        raise ParameterError(f"{steps * storage.step} columns are too many for {shared_limit} bytes of shared memory")
    return best[1]


@functools.cache
def _arrivals(device: torch.device, stream: int) -> torch.Tensor:
    # One per stream: kernels of one stream follow each other, and each leaves the counters at zero.
    return torch.zeros(4096, dtype=torch.int32, device=device)


@functools.cache
def _limits(device: int) -> tuple[int, int]:
    # The block's flags and the alignment of its ring take less than 2048 bytes beside what shared_bytes counts.
    return torch.cuda.get_device_properties(device).multi_processor_count, shared_memory_limit(device) - 2048


@functools.cache
def _kernel(storage: Storage, float_output: bool, device: int) -> CudaKernel:
    defines = (
        *storage.defines,
        ("FLOAT_OUTPUT", int(float_output)),
        ("BLOCK_WARPS", storage.warps),
        ("BLOCK_STAGES", storage.stages),
        ("BLOCK_RESIDENT", storage.resident),
        ("EARLY", storage.early),
    )
    return compile_kernel(read_sources("matvec.cuh", f"{storage.kernel}.cu"), storage.kernel, defines, device)


def matvec(
    storage: Storage,
    weight: ctypes.Structure,
    x: torch.Tensor,
    n: int,
    *,
    out: torch.Tensor | None = None,
    out_dtype: Literal["bfloat16", "float32"] = "bfloat16",
    softcap: float | None = None,
) -> torch.Tensor:
    """x [m, k] bf16, m from 1 to 8 -> [m, n].

    `weight` is the kernel's `struct Format`; `out`, where given, is contiguous.
    Raises ParameterError on a wrong shape or dtype.
    """
    if x.dim() != 2 or x.dtype != torch.bfloat16 or not 1 <= x.shape[0] <= MAX_ROWS:
        raise ParameterError(
            f"x must be bf16 [1…{MAX_ROWS}, k], not {x.dtype} {tuple(x.shape)}; cast it or split its rows"
        )
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = x.contiguous().clone() if x.data_ptr() % 16 else x.contiguous()
    m, k = x.shape
    dtype = torch.float32 if out_dtype == "float32" else torch.bfloat16
    y = torch.empty((m, n), dtype=dtype, device=x.device) if out is None else out
    if y.shape != (m, n) or y.dtype != dtype or not y.is_contiguous():
        raise ParameterError(f"out must be contiguous {dtype} {(m, n)}, not {y.dtype} {tuple(y.shape)}")
    device = x.device.index or 0
    processors, shared_limit = _limits(device)
    tiles, steps = -(-n // TILE), -(-k // storage.step)
    split = plan_split(storage, tiles, steps, m, processors, shared_limit)
    partial = torch.empty(split.slices * tiles * TILE * m if split.slices > 1 else 0, device=x.device)
    arrivals = _arrivals(x.device, torch.cuda.current_stream().cuda_stream)
    problem = _Problem(
        x.data_ptr(), y.data_ptr(), partial.data_ptr(), arrivals.data_ptr(), softcap or 0.0,
        m, n, k, x.stride(0) * 2, tiles, steps, split.slice_steps,
    )  # fmt: skip
    nbytes = shared_bytes(storage, split.slice_steps, m)
    kernel = _kernel(storage, dtype == torch.float32, device)
    kernel.launch((split.chunks, split.slices), storage.warps * 32, nbytes, (problem, weight))
    return y
