"""Products of many rows of x on a CPU (gemm.cpp), against float64 and the plain twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gemcut.kernels.cpu import library as cpu
from gemcut.kernels.cpu import linear
from gemcut.kernels.linear.dispatch import LinearCase
from gemcut.kernels.linear.plain import plain_linear
from gemcut.quantization.dequantize import dequantize_weight
from gemcut.quantization.four_bit import quantize_4bit
from gemcut.quantization.int8 import quantize_int8
from gemcut.quantization.weights import CheckpointWeight

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
BF16, FP32 = torch.bfloat16, torch.float32
FORMATS = ("nf4", "nf4-nested", "fp4", "fp4-nested", "int8", "bf16")


def served_variants() -> list[str]:
    """Instruction sets of this machine that have products of many rows."""
    return [name for name in cpu.variants() if linear.many_rows(cpu.library(name)) is not None]


def make_weight(kind: str, rows: int, k: int, seed: int = 0, block_size: int = 64) -> CheckpointWeight:
    """A random matrix in one format, with rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, k, generator=generator) * 0.02 * torch.rand(rows, 1, generator=generator).mul(4).exp2()
    if kind == "bf16":
        return matrix.to(BF16)
    if kind == "int8":
        return quantize_int8(matrix.to(BF16))
    quant_type, *nested = kind.split("-")
    four_bit = "nf4" if quant_type == "nf4" else "fp4"
    return quantize_4bit(matrix.to(BF16), four_bit, block_size=block_size, double_quant=bool(nested))


def inputs(rows: int, k: int, seed: int = 1) -> Tensor:
    """Random rows of bf16 with a few large values, as activations have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator)
    x[:, ::97] *= 30
    return x.to(BF16)


def exact(x: Tensor, weights: tuple[CheckpointWeight, ...]) -> Tensor:
    """The product in float64 of x and the weights as decoded to bf16."""
    return torch.cat([x.double() @ dequantize_weight(weight, BF16).double().t() for weight in weights], dim=1)


def kernel(
    weights: tuple[CheckpointWeight, ...], out_dtype: torch.dtype, variant: str | None = None
) -> linear.CpuLinear:
    """The product bound to one instruction set, in panels even where tiles of x (test_linear.py) are faster."""
    case = LinearCase(weights, BF16, out_dtype)
    assert linear.supports(case, None) is None
    bound = linear.CpuLinear(case, cpu.library(variant))
    bound.few = min(bound.few, linear.MAX_M)
    return bound


def check(x: Tensor, weights: tuple[CheckpointWeight, ...], out_dtype: torch.dtype, got: Tensor) -> None:
    """``got`` is right: within rounding of fp32 sums, and no worse than the twin for a result in bf16."""
    want = exact(x, weights)
    magnitude = exact(x.abs(), tuple(dequantize_weight(weight, BF16).abs() for weight in weights))
    assert got.shape == want.shape
    assert got.dtype == out_dtype
    error = (got.double() - want).abs()
    grid = 2.0**-8 if out_dtype == BF16 else 0.0
    assert bool((error <= grid * want.abs() + 2.0**-20 * magnitude).all())
    if out_dtype == BF16:
        twin = plain_linear(LinearCase(weights, BF16, BF16), x)
        assert error.square().mean() <= 1.01 * (twin.double() - want).square().mean()


@pytest.mark.parametrize("variant", served_variants())
@pytest.mark.parametrize("kind", FORMATS)
def test_formats(kind: str, variant: str) -> None:
    """Each format with each instruction set, in bf16 and in fp32, at sizes that fill no tile."""
    x = inputs(37, 576)
    weights = (make_weight(kind, 75, 576),)
    for out_dtype in (BF16, FP32):
        check(x, weights, out_dtype, kernel(weights, out_dtype, variant)(x))


@pytest.mark.parametrize("variant", served_variants())
def test_every_number_of_rows(variant: str) -> None:
    """From the first that comes in panels to beyond two pairs of strips; a row does not depend on its neighbours."""
    weights = (make_weight("nf4-nested", 48, 320),)
    x = inputs(71, 320)
    run = kernel(weights, FP32, variant)
    whole = run(x)
    check(x, weights, FP32, whole)
    for rows in range(linear.MAX_M + 1, 71):  # fewer may go another way
        assert torch.equal(run(x[:rows]), whole[:rows])


@pytest.mark.parametrize("variant", served_variants())
@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("k", [1, 2, 31, 33, 255, 257, 511, 700])
def test_odd_inputs(kind: str, k: int, variant: str) -> None:
    """Any number of inputs where the format has no blocks."""
    x, weights = inputs(19, k), (make_weight(kind, 33, k),)
    check(x, weights, FP32, kernel(weights, FP32, variant)(x))


@pytest.mark.parametrize("variant", served_variants())
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize("nested", ["", "-nested"])
def test_block_sizes(block_size: int, nested: str, variant: str) -> None:
    """Blocks shorter and longer than a panel; rows that begin in the middle of 256 nested statistics."""
    k = 3 * block_size
    x, weights = inputs(33, k), (make_weight("nf4" + nested, 90, k, block_size=block_size),)
    check(x, weights, FP32, kernel(weights, FP32, variant)(x))


@pytest.mark.parametrize("variant", served_variants())
def test_parts_stand_side_by_side(variant: str) -> None:
    """Several matrices of different formats and heights in one call, each with its own statistics."""
    kinds = zip(("nf4-nested", "nf4-nested", "int8", "bf16"), (1, 300, 17, 64), strict=True)
    weights = tuple(make_weight(kind, rows, 256, seed=i) for i, (kind, rows) in enumerate(kinds))
    x = inputs(40, 256)
    check(x, weights, BF16, kernel(weights, BF16, variant)(x))


@pytest.mark.parametrize("rows", [512, 513, 1030])
def test_more_than_one_chunk(rows: int) -> None:
    """A prompt as long as a chunk, and longer ones."""
    x, weights = inputs(rows, 640), (make_weight("nf4-nested", 130, 640),)
    check(x, weights, BF16, kernel(weights, BF16)(x))


@pytest.mark.parametrize("variant", served_variants())
def test_threads_do_not_change_a_bit(variant: str) -> None:
    """The same bits with one, two and five threads."""
    weights = (make_weight("nf4", 700, 384), make_weight("int8", 70, 384))
    x, bound = inputs(50, 384), kernel(weights, FP32, variant)
    function, results = linear.many_rows(cpu.library(variant)), []
    for threads in (1, 2, 5):
        out = torch.full((50, 770), torch.nan)
        function(bound._plan_reference, x.data_ptr(), 50, x.stride(0), out.data_ptr(), 770, threads)
        results.append(out)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("variant", served_variants())
@pytest.mark.parametrize("out_dtype", [BF16, FP32])
def test_writes_its_columns_and_nothing_else(out_dtype: torch.dtype, variant: str) -> None:
    """Every place of the result is written, none beside it."""
    weights, x = (make_weight("nf4", 37, 128),), inputs(21, 128)
    bound, function = kernel(weights, out_dtype, variant), linear.many_rows(cpu.library(variant))
    out = torch.full((24, 50), 77.0, dtype=out_dtype)
    function(bound._plan_reference, x.data_ptr(), 21, x.stride(0), out[1:, 5:].data_ptr(), 50, 2)
    inner = out[1:22, 5:42].clone()
    check(x, weights, out_dtype, inner)
    out[1:22, 5:42] = 77.0
    assert bool((out == 77.0).all())


@pytest.mark.parametrize("variant", served_variants())
def test_rows_of_a_wider_tensor(variant: str) -> None:
    """x may be a slice whose rows stand apart, or a transposed view."""
    weights, wide = (make_weight("nf4-nested", 50, 192),), inputs(30, 500)
    run = kernel(weights, FP32, variant)
    assert torch.equal(run(wide[:, 100:292]), run(wide[:, 100:292].contiguous()))
    turned = inputs(192, 30).t()
    assert torch.equal(run(turned), run(turned.contiguous()))


@pytest.mark.parametrize("variant", served_variants())
def test_values_that_are_not_finite_stay_in_their_rows(variant: str) -> None:
    """NaN and infinity in x reach their own row of the result; in a weight, their own column."""
    matrix = make_weight("bf16", 40, 100)
    assert isinstance(matrix, Tensor)
    x = inputs(20, 100)
    clean = kernel((matrix,), FP32, variant)(x)
    x[3, 50], x[7, 99] = torch.nan, torch.inf
    got = kernel((matrix,), FP32, variant)(x)
    assert bool(got[3].isnan().all())
    assert not bool(got[7].isfinite().any())
    kept = [i for i in range(20) if i not in (3, 7)]
    assert torch.equal(got[kept], clean[kept])
    matrix = matrix.clone()
    matrix[11, 0], matrix[39, 99] = torch.nan, -torch.inf
    got = kernel((matrix,), BF16, variant)(x)
    assert bool(got[kept][:, 11].isnan().all())
    assert not bool(got[kept][:, 39].isfinite().any())
    others = [i for i in range(40) if i not in (11, 39)]
    assert bool(got[kept][:, others].isfinite().all())
    statistics = make_weight("nf4", 40, 128)
    statistics.absmax[5] = torch.nan  # type: ignore[union-attr]
    got = kernel((statistics,), BF16, variant)(inputs(20, 128))
    assert bool(got[:, 2].isnan().all())
    assert bool(got[:, 3:].isfinite().all())


def test_many_rows_in_fp32_are_plain() -> None:
    """Rows in fp32 have no kernel of their own: the plain product serves them."""
    weights, x = (make_weight("nf4", 32, 128),), inputs(20, 128).float()
    case = LinearCase(weights, FP32, FP32)
    assert torch.equal(linear.CpuLinear(case, cpu.library())(x), plain_linear(case, x))
