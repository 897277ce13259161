"""The fused GEMM: packed weights times 9 to some hundred rows of x on Hopper, dequantized in registers, by wgmma.

Computes: the launch of the fused GEMM: packed weights times 9 to some hundred rows, dequantized in registers
Shapes: x bf16 [m, k] or in the layout of linear/layout.py, packed weight [n, k] -> bf16 or fp32 [m, n]
Runs: linear/cuda.py on Hopper; linear/routes.py says for how many rows
Schedule: persistent Stream-K, at most one thread block an SM; `choose_variant` takes the tile size
Invariants: the packed layout is that of the GEMV kernels: one tensor serves both

The kernel is in gemm.cuh; what a format adds to it in four_bit_gemm.cu and int8_gemm.cu. The packed layout is that of
the GEMV kernels.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Literal

import torch

from gemcut.errors import ParameterError
from gemcut.kernels.gpu import gpu_of
from gemcut.kernels.linear.gemv import SMALL_BYTES, TILE, Problem, Storage, aligned_rows, arrivals, output
from gemcut.kernels.linear.layout import UNIT, Ordered, order_x
from gemcut.kernels.runtime.nvrtc import CudaKernel, compile_kernel, current_stream, read_sources
from gemcut.kernels.runtime.wgmma import wgmma_source

#: Rows of x a tile can have.
TILE_ROWS = (16, 32, 64, 96, 128, 192, 256)


@dataclass(frozen=True)
class Variant:
    """A kernel: rows of x and warpgroups (64 rows of W each) a tile; units of x (256 columns), stages of W in flight.

    `double_buffer`: with registers for two dequantized blocks; four warpgroups have enough for up to 32 rows.
    `max_wait`: clocks that a block waits for those it shares a tile with.
    """

    rows: int
    warpgroups: int
    x_units: int
    w_stages: int = 3
    double_buffer: bool = True
    max_wait: int = 200_000

    @property
    def threads(self) -> int:
        """Of a block: the consumers and one producer warpgroup."""
        return (self.warpgroups + 1) * 128


def shared_bytes(storage: Storage, variant: Variant) -> int:
    """What one block needs, as laid out at the head of gemm() in kernels/linear/gemm.cuh."""
    slots = variant.x_units * UNIT // 64
    stage = 4 * (storage.gemm_stage_bytes or storage.stage_bytes) + 16
    ring = variant.warpgroups * variant.w_stages * stage
    return storage.codebook_bytes + slots * (variant.rows * 128 + 16) + ring


def tile_rows(m: int) -> tuple[int, int]:
    """(rows of a tile, tiles) for ``m`` rows: as few tiles as there can be, each as small as then suffices."""
    tiles = -(-m // TILE_ROWS[-1])
    return next(rows for rows in TILE_ROWS if rows * tiles >= m), tiles


def order_groups(m: int) -> int:
    """Groups of eight rows that ``gemm`` wants ``m`` rows of x laid out in."""
    rows, tiles = tile_rows(m)
    return rows * tiles // 8


def choose_variant(storage: Storage, m: int, n: int, k: int) -> Variant:
    """The kernel for ``m`` rows.

    Tiles of 128 rows of W split small GEMMs more evenly (measured on an H100). From 129 rows of x on the sums leave
    registers for three warpgroups, then for two; W is dequantized once for all those rows (measured on an H200).
    """
    rows, _ = tile_rows(m)
    x_units = {16: 4, 32: 3, 64: 2}.get(rows, 1)
    if rows > 192 or -(-n // TILE) * -(-k // storage.k_block) * storage.stage_bytes <= SMALL_BYTES:
        return Variant(rows, 2, x_units)
    return Variant(rows, 3 if rows > 128 else 4, x_units, double_buffer=rows <= 32)


@dataclass(frozen=True)
class _Launch:
    """How a GEMM is launched: the problem's sizes in tiles, the grid, what the blocks need."""

    kernel: CudaKernel
    groups: int
    tiles: int
    units: int
    m_tiles: int
    blocks: int
    threads: int
    shared_bytes: int
    partial: int  # values


@functools.lru_cache(maxsize=4096)
def _launch(
    storage: Storage, m: int, n: int, k: int, variant: Variant | None, float_output: bool, device: int
) -> _Launch:
    chosen = variant or choose_variant(storage, m, n, k)
    tiles, m_tiles, units = -(-n // TILE), -(-m // chosen.rows), -(-k // UNIT)
    blocks = min(gpu_of(device).sms, -(-tiles // (chosen.warpgroups * 4)) * m_tiles * units)
    # Two shared tiles a block; without any (units that divide evenly) it is not touched.
    partial = blocks * chosen.warpgroups * 128 * chosen.rows
    kernel, nbytes = _kernel(storage, chosen, float_output, device), shared_bytes(storage, chosen)
    return _Launch(kernel, m_tiles * chosen.rows // 8, tiles, units, m_tiles, blocks, chosen.threads, nbytes, partial)


def _kernel(storage: Storage, variant: Variant, float_output: bool, device: int) -> CudaKernel:
    defines = (
        *storage.defines,
        ("FLOAT_OUTPUT", int(float_output)),
        ("GEMM_ROWS", variant.rows),
        ("GEMM_WARPGROUPS", variant.warpgroups),
        ("GEMM_X_UNITS", variant.x_units),
        ("GEMM_DOUBLE_BUFFER", int(variant.double_buffer)),
        ("GEMM_W_STAGES", variant.w_stages),
        ("GEMM_MAX_WAIT", variant.max_wait),
    )
    name = storage.kernel.replace("gemv", "gemm")
    frame = read_sources("runtime/launch.cuh", "runtime/hopper.cuh", "linear/gemv.cuh", f"linear/{storage.kernel}.cu")
    wgmma = wgmma_source("wgmma", variant.rows, a_in_registers=True)
    source = "\n".join((frame, wgmma, read_sources("linear/gemm.cuh", f"linear/{name}.cu")))
    return compile_kernel(source, name, defines, device)


def gemm(
    storage: Storage,
    weight: ctypes.Structure,
    x: torch.Tensor | Ordered,
    n: int,
    *,
    out: torch.Tensor | None = None,
    out_dtype: Literal["bfloat16", "float32"] = "bfloat16",
    softcap: float | None = None,
    variant: Variant | None = None,
) -> torch.Tensor:
    """x [m, k] bf16, any m from 1 on -> [m, n], summed in fp32. The sum's order does not depend on timing.

    `weight` is the kernel's `struct Format`; `out`, where given, is contiguous. Plain rows are copied to
    the kernel's layout first. Raises ParameterError on a wrong shape or dtype.
    """
    if isinstance(x, Ordered):
        m, k, device = x.m, x.k, x.values.device
    else:
        if x.dim() != 2 or x.dtype != torch.bfloat16 or x.shape[0] < 1:
            raise ParameterError(f"x must be bf16 [1…, k], not {x.dtype} {tuple(x.shape)}")
        (m, k), device = x.shape, x.device
    y = output(m, n, out_dtype, out, device, softcap)
    how = _launch(storage, m, n, k, variant, y.dtype == torch.float32, device.index or 0)
    ordered = x if isinstance(x, Ordered) else order_x(aligned_rows(x), how.groups)
    if ordered.groups != how.groups:
        raise ParameterError(f"{m} rows of x are read in {how.groups} groups of eight, not in {ordered.groups}")
    partial = torch.empty(how.partial, dtype=torch.float32, device=device)
    counters = arrivals(device, current_stream(how.kernel.device))
    problem = Problem(
        ordered.values.data_ptr(), y.data_ptr(), partial.data_ptr(), counters.data_ptr(), softcap or 0.0,
        m, n, k, how.groups * 1024, how.tiles, how.units, how.m_tiles,
    )  # fmt: skip
    how.kernel.launch((how.blocks, 1), how.threads, how.shared_bytes, (problem, weight))
    return y
