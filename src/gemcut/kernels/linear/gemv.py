"""What the GEMV kernels share: how the work is split over the GPU, and the launch.

Computes: the launch of the GEMV kernels: up to 8 (fixed columns: 16) rows of x against a weight read once
Shapes: x bf16 [m, k], a format's packed weight [n, k] -> bf16 or fp32 [m, n]
Runs: linear/four_bit.py, int8.py, bf16.py and linear/cuda.py; `plan` chooses the layout for a GPU
Schedule: persistent GEMV; `plan_split`: split-K so that the busiest block has least to do
Invariants: the same plan for the same sizes: results do not depend on timing

The frame is in gemv.cuh: up to eight rows of x against a weight read exactly once. Small four-bit matrices have kernels
for up to 16 (fixed.cuh).
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, replace
from typing import Literal

import torch

from gemcut.errors import ParameterError
from gemcut.kernels.gpu import Gpu, gpu_of
from gemcut.kernels.runtime.nvrtc import CudaKernel, compile_kernel, current_stream, read_sources

MAX_ROWS = 8
MAX_FIXED_ROWS = 16
TILE = 16
SMALL_BYTES = 64 << 20
# What parts of a launch cost, in stages (2 KB) that a block could have read meanwhile; from measurements on an H100.
_FIXUP_STAGES = 10  # adding up slices: the counter and the fences
_FIXUP_ROUND_STAGES = 6  # and each round of loads that the last block needs for it
_ALONE_STAGES = 32  # the next kernel's block finds no room beside this one


@dataclass(frozen=True)
class Layout:
    """A thread block: warps, stages of 2 KB in flight per warp, blocks that an SM must have registers for.

    `fixed`: k_blocks that a warp keeps for all tiles, with its x in registers; 0: the even split of stages in gemv.cuh.
    `rows`: of x, that such a warp has registers for.
    """

    warps: int
    stages: int
    resident: int
    fixed: int = 0
    rows: int = 1


@dataclass(frozen=True, eq=False)
class Storage:
    """What the launch must know of a weight format: the constants of its `struct Format`. There is one of each format.

    `small` serves weights of up to SMALL_BYTES whose block leaves room for the next kernel's, `large` all others.
    """

    kernel: str
    k_block: int
    stage_bytes: int
    codebook_bytes: int
    x_pad: int
    small: Layout
    large: Layout
    defines: tuple[tuple[str, int], ...] = ()
    fixed_kernel: str | None = None  # where plan_fixed takes the GEMV
    gemm_stage_bytes: int | None = None  # where a warp's stage takes more in gemm.cuh, which keeps scales in fp32


@dataclass(frozen=True)
class Split:
    """A layout; `chunks` of row tiles times `slices` (split-K) of `slice_k_blocks` k_blocks: one thread block each."""

    layout: Layout
    chunks: int
    slices: int
    slice_k_blocks: int
    shared_bytes: int


class Problem(ctypes.Structure):
    """The kernels' `struct Problem`."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("partial", ctypes.c_void_p),
        ("arrivals", ctypes.c_void_p),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("m", "n", "k", "x_stride", "tiles", "k_blocks", "slice_k_blocks")),
    )


def shared_bytes(storage: Storage, layout: Layout, slice_k_blocks: int, m: int) -> int:
    """What one block needs, as laid out at the head of gemv() in kernels/linear/gemv.cuh."""
    ring = layout.warps * layout.stages * storage.stage_bytes
    x = m * (slice_k_blocks * storage.k_block * 2 + storage.x_pad)
    return storage.codebook_bytes + ring + x + layout.warps * 2 * TILE * m * 4


@functools.lru_cache(maxsize=1024)
def plan_split(storage: Storage, tiles: int, k_blocks: int, m: int, sms: int, shared_limit: int) -> Split:
    """The split whose busiest block has least to do, counting what slices cost to add up.

    Raises ParameterError where even one k_block a slice does not fit shared memory.
    """

    def candidates(layout: Layout, only_beside_another: bool) -> list[tuple[int, Split]]:
        found = []
        for slices in range(1, min(k_blocks, sms, 64) + 1):
            slice_k_blocks = -(-k_blocks // slices)
            nbytes = shared_bytes(storage, layout, slice_k_blocks, m)
            alone = nbytes > shared_limit // 2
            if (slices - 1) * slice_k_blocks >= k_blocks or nbytes > shared_limit or (alone and only_beside_another):
                continue
            chunks = min(tiles, sms // slices)
            busiest = -(-tiles // chunks)
            cost = busiest * slice_k_blocks + (_ALONE_STAGES if alone else 0)
            if slices > 1:
                rounds = -(-busiest * TILE * m // (layout.warps * 32))
                cost += _FIXUP_STAGES + _FIXUP_ROUND_STAGES * rounds
            if chunks * slices != sms:
                # Two blocks of such a grid must not share a SM while another idles: leave no room for a second.
                nbytes = max(nbytes, shared_limit // 2 + 1024)
            found.append((cost, Split(layout, chunks, slices, slice_k_blocks, nbytes)))
        return found

    options = candidates(storage.large, False)
    if tiles * k_blocks * storage.stage_bytes <= SMALL_BYTES:
        options = candidates(storage.small, True) + options
    if not options:  # sms with less shared memory than the large layout needs
        options = candidates(replace(storage.small, stages=2), False)
    if not options:
        raise ParameterError(
            f"{k_blocks * storage.k_block} columns are too many for {shared_limit} bytes of shared memory"
        )
    return min(options, key=lambda option: option[0])[1]


def plan_fixed(storage: Storage, split: Split, tiles: int, k_blocks: int, m: int, shared_limit: int) -> Split | None:
    """`split`, planned for one row of x, with warps of fixed columns; None where the split of gemv.cuh does better.

    Measured on an H100: 16 to 18 warps of one k_block where the weight is small, up to 16 of them and no slices for
    more than eight rows (18 warps have too few registers); for one row, of two k_blocks where it is large and its
    columns are sliced. 9 warps, and large weights of few columns, are slower than gemv.cuh's split. For int8, 14 to 18
    warps of two k_blocks of 128 columns where the weight is small, for one row only where its columns would be sliced.
    """
    small = tiles * k_blocks * storage.stage_bytes <= SMALL_BYTES
    rows = next(rows for rows in (1, MAX_ROWS, MAX_FIXED_ROWS) if m <= rows)
    if storage.k_block < 256:
        rows = MAX_ROWS
        if m > rows or not small or not 28 <= k_blocks <= 36 or (m == 1 and split.slices == 1):
            return None
        layout = Layout(-(-k_blocks // 2), 2, 1, 2, rows)
        split = replace(split, chunks=min(tiles, split.chunks * split.slices), slices=1, slice_k_blocks=k_blocks)
    elif small and 14 <= (own := split.slice_k_blocks) <= 18 and (m <= MAX_ROWS or (own <= 16 and split.slices == 1)):
        resident = 2 if own <= 16 and m == 1 else 1  # eight rows need too many registers for two blocks
        layout = Layout(own, 1, resident, 1, rows)
    elif m == 1 and not small and split.slices > 1 and 28 <= split.slice_k_blocks <= 36:
        layout = Layout(-(-split.slice_k_blocks // 2), 2, 1, fixed=2)
    else:
        return None
    nbytes = storage.codebook_bytes + -(-tiles // split.chunks) * layout.warps * TILE * rows * 4
    if split.shared_bytes > shared_limit // 2 and small:
        nbytes = max(nbytes, shared_limit // 2 + 1024)  # as in plan_split: no second block on the same SM
    return replace(split, layout=layout, shared_bytes=nbytes) if nbytes <= shared_limit else None


@functools.cache
def arrivals(device: torch.device, stream: int) -> torch.Tensor:
    """Counters of thread blocks that are done, zero between launches."""
    # One per stream: kernels of one stream follow each other, and each leaves the counters at zero.
    return torch.zeros(4096, dtype=torch.int32, device=device)


def limits(gpu: Gpu) -> tuple[int, int]:
    """(multiprocessors, bytes of shared memory a block can plan with)."""
    # The block's flags and the alignment of its ring take less than 2048 bytes beside what shared_bytes counts.
    return gpu.sms, gpu.shared_memory - 2048


def _kernel(storage: Storage, layout: Layout, float_output: bool, device: int) -> CudaKernel:
    defines = (
        *storage.defines,
        ("FLOAT_OUTPUT", int(float_output)),
        ("BLOCK_WARPS", layout.warps),
        ("BLOCK_STAGES", layout.stages),
        ("BLOCK_RESIDENT", layout.resident),
        ("FIXED_K_BLOCKS", layout.fixed),
        ("FIXED_ROWS", layout.rows),
    )
    files, name = ["runtime/launch.cuh", "linear/gemv.cuh", f"linear/{storage.kernel}.cu"], storage.kernel
    if layout.fixed and storage.fixed_kernel is not None:
        name = storage.fixed_kernel
        files += ["linear/fixed.cuh", f"linear/{name}.cu"]
    return compile_kernel(read_sources(*files), name, defines, device)


def plan(storage: Storage, m: int, n: int, k: int, gpu: Gpu) -> Split | None:
    """How ``m`` rows of x are multiplied; None where they are too many."""
    sms, shared_limit = limits(gpu)
    tiles, k_blocks = -(-n // TILE), -(-k // storage.k_block)
    fixed = None
    if storage.fixed_kernel is not None:
        of_one = plan_split(storage, tiles, k_blocks, 1, sms, shared_limit)
        fixed = plan_fixed(storage, of_one, tiles, k_blocks, m, shared_limit)
    if fixed is not None or m > MAX_ROWS:
        return fixed
    return plan_split(storage, tiles, k_blocks, m, sms, shared_limit)


@functools.lru_cache(maxsize=1024)
def _launch(
    storage: Storage, m: int, n: int, k: int, float_output: bool, device: int
) -> tuple[CudaKernel, Split, int, int]:
    """(kernel, split, tiles, k_blocks) of a GEMV."""
    split = plan(storage, m, n, k, gpu_of(device))
    if split is None:
        raise ParameterError(f"{m} rows of x are too many for a GEMV kernel with {n} x {k} weights")
    return _kernel(storage, split.layout, float_output, device), split, -(-n // TILE), -(-k // storage.k_block)


def most_rows(storage: Storage, n: int, k: int, gpu: Gpu) -> int:
    """Rows of x that `gemv` takes for such a weight."""
    return MAX_ROWS if plan(storage, MAX_FIXED_ROWS, n, k, gpu) is None else MAX_FIXED_ROWS


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` bf16 [m, k] itself where its rows are contiguous and begin at multiples of 16 bytes, else a copy."""
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        return x.contiguous().clone() if x.data_ptr() % 16 else x.contiguous()
    return x


def output(
    m: int,
    n: int,
    out_dtype: Literal["bfloat16", "float32"],
    out: torch.Tensor | None,
    device: torch.device,
    softcap: float | None = None,
) -> torch.Tensor:
    """Where a result [m, n] goes: ``out`` where given.

    Raises ParameterError where that has another shape or dtype, and on a soft-cap of bf16: kernels cap fp32 only.
    """
    if softcap is not None and out_dtype != "float32":
        raise ParameterError(f"softcap is of float32 logits, not of {out_dtype}")
    dtype = torch.float32 if out_dtype == "float32" else torch.bfloat16
    if out is None:
        return torch.empty((m, n), dtype=dtype, device=device)
    if out.shape != (m, n) or out.dtype != dtype or not out.is_contiguous():
        raise ParameterError(f"out must be contiguous {dtype} {(m, n)}, not {out.dtype} {tuple(out.shape)}")
    return out


def gemv(
    storage: Storage,
    weight: ctypes.Structure,
    x: torch.Tensor,
    n: int,
    *,
    out: torch.Tensor | None = None,
    out_dtype: Literal["bfloat16", "float32"] = "bfloat16",
    softcap: float | None = None,
) -> torch.Tensor:
    """x [m, k] bf16, m from 1 to 8, or to ``most_rows`` -> [m, n].

    `weight` is the kernel's `struct Format`; `out`, where given, is contiguous.
    Raises ParameterError on a wrong shape or dtype.
    """
    if x.dim() != 2 or x.dtype != torch.bfloat16 or not 1 <= x.shape[0] <= MAX_FIXED_ROWS:
        raise ParameterError(
            f"x must be bf16 [1…{MAX_ROWS}, k], not {x.dtype} {tuple(x.shape)}; cast it or split its rows"
        )
    x = aligned_rows(x)
    m, k = x.shape
    y = output(m, n, out_dtype, out, x.device, softcap)
    kernel, split, tiles, k_blocks = _launch(storage, m, n, k, y.dtype == torch.float32, x.device.index or 0)
    count = split.slices * tiles * TILE * m if split.slices > 1 else 0
    partial = torch.empty(count, dtype=torch.float32, device=x.device)
    counters = arrivals(x.device, current_stream(kernel.device))
    problem = Problem(
        x.data_ptr(), y.data_ptr(), partial.data_ptr(), counters.data_ptr(), softcap or 0.0,
        m, n, k, x.stride(0) * 2, tiles, k_blocks, split.slice_k_blocks,
    )  # fmt: skip
    kernel.launch((split.chunks, split.slices), split.layout.warps * 32, split.shared_bytes, (problem, weight))
    return y
