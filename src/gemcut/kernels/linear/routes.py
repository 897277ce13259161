"""Which kernel multiplies by a weight matrix, by the rows of x: what linear/cuda.py does, as data.

Row counts come from measurements on an H100 and an H200 (docs/notes/): where two kernels cross depends on the
matrix's size.
"""

from __future__ import annotations

from dataclasses import dataclass

from gemcut.kernels.gpu import Gpu
from gemcut.kernels.linear import bf16, four_bit, int8
from gemcut.kernels.linear.gemv import MAX_ROWS, SMALL_BYTES, TILE, Storage, most_rows

# Without fused GEMMs. Dequantizing a matrix for cuBLAS writes and reads 4 bytes a weight more: about as much as
# eight passes over packed ones.
PASSES = 8
# From this many rows on cuBLAS multiplies bf16 weights at least as fast as the GEMV (measured).
DENSE_ROWS = 5


@dataclass(frozen=True)
class Route:
    """Up to ``up_to_rows`` rows of x (None: any number) go through ``kernel``, a name of gemcut.kernels.catalogue."""

    up_to_rows: int | None
    kernel: str
    why: str


def fused_rows(weights: int, is_four_bit: bool) -> int:
    """Up to so many rows a fused GEMM with a matrix of so many weights beats dequantizing and cuBLAS (on an H200)."""
    if weights < 20 << 20:
        return 384
    if weights < 64 << 20:
        return 768 if is_four_bit else 512
    if weights < 128 << 20:
        return 1152 if is_four_bit else 1024
    return 1792


def routes(storage: Storage, n: int, k: int, gpu: Gpu, *, float_output: bool = False) -> list[Route]:
    """The routes of a matrix [n, k], fewest rows first.

    Args:
        storage: the weights' format (linear.four_bit.NESTED or FLAT, linear.int8.STORAGE, linear.bf16.STORAGE).
        n: rows of W, of all matrices that are fused in it.
        k: columns.
        gpu: where it would run.
        float_output: whether the result is fp32, as logits are.
    """
    if storage is bf16.STORAGE:
        few = MAX_ROWS if float_output else DENSE_ROWS - 1
        return [
            Route(few, "bf16_gemv", "reads W once at nearly the memory's speed"),
            Route(None, "cublas", "as fast from here on, and tensor cores take any number of rows"),
        ]
    is_four_bit = storage is not int8.STORAGE
    prefix = "four_bit" if is_four_bit else "int8"
    few = MAX_ROWS
    codes = -(-n // TILE) * -(-k // storage.k_block) * TILE * storage.k_block // 2
    if storage is four_bit.FLAT and codes > SMALL_BYTES and gpu.wgmma_refusal is None:
        few = MAX_ROWS - 1  # with fp32 scales eight rows of a large matrix are faster fused: 92 -> 78 µs, 27B's gate+up
    elif is_four_bit:
        few = most_rows(storage, n, k, gpu)
    found = [Route(few, f"{prefix}_gemv", "reads the packed W once; memory is the limit")]
    if gpu.wgmma_refusal is None:
        most = fused_rows(n * k, is_four_bit)
        found.append(
            Route(most, f"{prefix}_gemm", "dequantizes W in registers into wgmma: W is still read once, packed")
        )
    else:
        why = f"{MAX_ROWS} rows at a time: {PASSES} passes over packed weights cost as much as dequantizing them once"
        found.append(Route(MAX_ROWS * PASSES, f"{prefix}_gemv", why))
    found.append(Route(None, f"{prefix}_dequant", "W is dequantized to bf16 once for so many rows, then cuBLAS"))
    return found


def route_of(found: list[Route], rows: int) -> Route:
    """The one that ``rows`` rows of x take."""
    return next(route for route in found if route.up_to_rows is None or rows <= route.up_to_rows)
