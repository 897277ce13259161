"""Products of packed weights with 9 to some hundred rows of x on Hopper: decoded in registers, multiplied by wgmma.

The kernel is in cuda/gemm.cuh; what a format adds to it in cuda/nf4_gemm.cu and cuda/int8_gemm.cu. The packed order is
that of the matrix-vector kernels: one tensor serves both.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Literal

import torch

from gemcut.errors import ParameterError
from gemcut.kernels.matvec import SMALL_BYTES, TILE, Problem, Storage, aligned_rows, arrivals, limits
from gemcut.kernels.nvrtc import CudaKernel, compile_kernel, read_sources

#: Rows of x a tile can have.
TILE_ROWS = (16, 32, 64, 96, 128)
#: Columns that the work is dealt out in.
UNIT = 256


@dataclass(frozen=True)
class Variant:
    """A kernel: rows of x and warpgroups (64 rows of W each) a tile; units of x (256 columns), stages of W in flight.

    `two_halves`: with registers for two decoded blocks; four warpgroups have enough for up to 32 rows.
    """

    rows: int
    warpgroups: int
    x_units: int
    w_stages: int = 3
    two_halves: bool = True

    @property
    def threads(self) -> int:
        """Of a block: one warpgroup more asks for x."""
        return (self.warpgroups + 1) * 128


def shared_bytes(storage: Storage, variant: Variant) -> int:
    """What one block needs, as laid out at the head of gemm() in cuda/gemm.cuh."""
    slots = variant.x_units * UNIT // 64
    ring = variant.warpgroups * 4 * variant.w_stages * storage.stage_bytes
    return storage.table_bytes + slots * (variant.rows * 128 + 16) + ring


def choose_variant(storage: Storage, m: int, n: int, k: int) -> Variant:
    """The kernel for ``m`` rows: as few tiles along m as there can be, each as small as then suffices.

    Tiles of 128 rows of W deal small products out more evenly (measured on an H100).
    """
    tiles = -(-m // TILE_ROWS[-1])
    rows = next(rows for rows in TILE_ROWS if rows * tiles >= m)
    x_units = 2 if rows <= 64 else 1
    if -(-n // TILE) * -(-k // storage.step) * storage.stage_bytes <= SMALL_BYTES:
        return Variant(rows, 2, x_units)
    return Variant(rows, 4, x_units, two_halves=rows <= 32)


def wgmma_source(rows: int) -> str:
    """The device function wgmma(): 64 x 16 from registers times 16 x ``rows`` from shared memory."""
    count = rows // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    a0, a1, a2, a3, x, accumulate = (f"%{count + i}" for i in range(6))
    return f"""
__device__ __forceinline__ void wgmma(float (&d)[{count}], const u32* a, u64 x, bool accumulate) {{
  asm volatile("{{\\n.reg .pred add;\\nsetp.ne.b32 add, {accumulate}, 0;\\n"
               "wgmma.mma_async.sync.aligned.m64n{rows}k16.f32.bf16.bf16 "
               "{{{sums}}}, {{{a0}, {a1}, {a2}, {a3}}}, {x}, add, 1, 1, 0;\\n}}"
               : {outputs}
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"((u32)accumulate));
}}
"""


@functools.cache
def _kernel(storage: Storage, variant: Variant, float_output: bool, device: int) -> CudaKernel:
    defines = (
        *storage.defines,
        ("FLOAT_OUTPUT", int(float_output)),
        ("GEMM_ROWS", variant.rows),
        ("GEMM_WARPGROUPS", variant.warpgroups),
        ("GEMM_X_UNITS", variant.x_units),
        ("GEMM_TWO_HALVES", int(variant.two_halves)),
        ("GEMM_W_STAGES", variant.w_stages),
    )
    name = storage.kernel.replace("matvec", "gemm")
    frame = read_sources("launch.cuh", "matvec.cuh", f"{storage.kernel}.cu")
    source = "\n".join((frame, wgmma_source(variant.rows), read_sources("gemm.cuh", f"{name}.cu")))
    return compile_kernel(source, name, defines, device)


class _Order(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("ordered", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("m", "k", "x_stride", "blocks", "groups")),
    )


def order_x(x: torch.Tensor, blocks: int, groups: int) -> torch.Tensor:
    """x bf16 [m, k] -> bf16 [blocks, groups, 8, 8, 8] with zeros where x ends: see cuda/order_x.cu."""
    ordered = torch.empty((blocks, groups, 8, 8, 8), dtype=x.dtype, device=x.device)
    m, k = x.shape
    task = _Order(x.data_ptr(), ordered.data_ptr(), m, k, x.stride(0) * 2, blocks, groups)
    kernel = compile_kernel(read_sources("launch.cuh", "order_x.cu"), "order_x", (), x.device.index or 0)
    kernel.launch((-(-blocks * groups // 8), 1), 256, 0, (task,))
    return ordered


@functools.cache
def unavailable_reason(device: int) -> str | None:
    """None where the kernels run on ``device``, else one line that says why not."""
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"wgmma needs compute capability 9.0 (H100, H200), not {capability[0]}.{capability[1]}"
    return None


def gemm(
    storage: Storage,
    weight: ctypes.Structure,
    x: torch.Tensor,
    n: int,
    *,
    out: torch.Tensor | None = None,
    out_dtype: Literal["bfloat16", "float32"] = "bfloat16",
    softcap: float | None = None,
    variant: Variant | None = None,
) -> torch.Tensor:
    """x [m, k] bf16, any m from 1 on -> [m, n], summed in fp32. The sum's order does not depend on timing.

    `weight` is the kernel's `struct Format`; `out`, where given, is contiguous.
    Raises ParameterError on a wrong shape or dtype.
    """
    if x.dim() != 2 or x.dtype != torch.bfloat16 or x.shape[0] < 1:
        raise ParameterError(f"x must be bf16 [1…, k], not {x.dtype} {tuple(x.shape)}")
    x = aligned_rows(x)
    m, k = x.shape
    dtype = torch.float32 if out_dtype == "float32" else torch.bfloat16
    y = torch.empty((m, n), dtype=dtype, device=x.device) if out is None else out
    if y.shape != (m, n) or y.dtype != dtype or not y.is_contiguous():
        raise ParameterError(f"out must be contiguous {dtype} {(m, n)}, not {y.dtype} {tuple(y.shape)}")
    device = x.device.index or 0
    chosen = variant or choose_variant(storage, m, n, k)
    tiles, m_tiles = -(-n // TILE), -(-m // chosen.rows)
    units = -(-k // UNIT)
    all_units = -(-tiles // (chosen.warpgroups * 4)) * m_tiles * units
    blocks = min(limits(device)[0], all_units)
    # Two shared tiles a block; without any (units that divide evenly) it is not touched.
    partial = torch.empty(blocks * chosen.warpgroups * 128 * chosen.rows, dtype=torch.float32, device=x.device)
    counters = arrivals(x.device, torch.cuda.current_stream().cuda_stream)
    groups = m_tiles * chosen.rows // 8
    ordered = order_x(x, units * UNIT // 64, groups)
    problem = Problem(
        ordered.data_ptr(), y.data_ptr(), partial.data_ptr(), counters.data_ptr(), softcap or 0.0,
        m, n, k, groups * 1024, tiles, units, m_tiles,
    )  # fmt: skip
    kernel = _kernel(storage, chosen, dtype == torch.float32, device)
    kernel.launch((blocks, 1), chosen.threads, shared_bytes(storage, chosen), (problem, weight))
    return y
