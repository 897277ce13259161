"""The matrix-vector kernels on a GPU against float64 of the dequantized weights, beside their plain twins."""

from __future__ import annotations

import itertools

import pytest
import torch

from four_bit_reference import NF4, quantize
from gemcut.errors import ParameterError
from gemcut.kernels.linear import bf16 as bf16_linear
from gemcut.kernels.linear import four_bit as four_bit_linear
from gemcut.kernels.linear import int8 as int8_linear
from gemcut.quantization.int8 import quantize_int8
from gpu_products import FORMATS, case, check_replays
from gpu_support import relative_error

pytestmark = pytest.mark.gpu

SHAPES = [
    (1, 64),
    (16, 256),
    (17, 192),
    (33, 2304),
    (1000, 640),
    (1024, 1152),
    (2049, 4608),
    (300, 36864),
    (4608, 4096),
    (2048, 4288),
    (8193, 4608),
    (4600, 36800),
    (3584, 3584),
]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_row_count_against_float64(name: str, n: int, k: int) -> None:
    it = case(name, n, k)
    for m in range(1, it.most_rows + 1):
        x = torch.randn(m, k, device="cuda").bfloat16()
        out = torch.full((m, n), torch.nan, device="cuda", dtype=torch.bfloat16)
        assert it.gemv(x, out=out) is out
        reference = x.double() @ it.dense.T
        error, twin = relative_error(out, reference), relative_error(it.plain(x), reference)
        # Both round the output to bf16 (0.17 % rms). With few outputs the two errors are one draw each.
        assert error <= (1.1 * twin if m * n > 500 else 4e-3), (m, error, twin)
        assert torch.equal(out, it.gemv(x)), "the same inputs gave another sum"


@pytest.mark.parametrize("name", FORMATS)
def test_each_output_uses_its_own_row_and_column(name: str) -> None:
    n, k = 48, 640
    it = case(name, n, k)
    for m, begin in ((1, 0), (8, 5), (3, 632)):
        x = torch.zeros(m, k, device="cuda", dtype=torch.bfloat16)
        for row in range(m):
            x[row, begin + row] = 1
        reference = it.dense[:, begin : begin + m].T
        difference = (it.gemv(x).double() - reference).abs()
        assert bool((difference <= 0.008 * reference.abs() + 1e-12).all())


@pytest.mark.parametrize("name", FORMATS)
def test_strided_and_misaligned_inputs(name: str) -> None:
    it = case(name, 100, 512)
    wide = torch.randn(5, 1024, device="cuda").bfloat16()
    for x in (wide[:, :512], wide[:, 512:], wide[:, 3:515], wide[::2, :512], wide.flatten()[1:513].view(1, 512)):
        assert torch.equal(it.gemv(x), it.gemv(x.clone().contiguous()))


@pytest.mark.parametrize("name", FORMATS)
def test_values_beyond_fp16_do_not_overflow(name: str) -> None:
    it = case(name, 64, 512)
    x = torch.randn(2, 512, device="cuda").bfloat16() * 1e6
    out = it.gemv(x)
    assert bool(out.isfinite().all())
    assert out.abs().max().item() > 65504
    assert relative_error(out, x.double() @ it.dense.T) < 4e-3


def test_blocks_of_zeros_stay_zero() -> None:
    weight = torch.randn(32, 512, device="cuda")
    weight[:, 64:192] = 0
    packed = four_bit_linear.pack([quantize(weight, NF4, nested=True)])
    x = torch.zeros(1, 512, device="cuda", dtype=torch.bfloat16)
    x[:, 64:192] = 1e4
    assert not four_bit_linear.four_bit_gemv(x, packed).any()


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_head(name: str, softcap: float | None) -> None:
    weight = (torch.randn(4097, 2304, device="cuda") * 0.3).bfloat16()
    x = torch.randn(3, 2304, device="cuda").bfloat16()
    if name == "bf16":
        out, dense = bf16_linear.bf16_head(x, weight, softcap), weight.double()
        plain = bf16_linear.bf16_head_plain(x, weight, softcap)
    else:
        int8 = int8_linear.PackedInt8.of([quantize_int8(weight)])
        out, dense = int8_linear.int8_head(x, int8, softcap), int8.dequantize().double()
        plain = int8_linear.int8_head_plain(x, int8, softcap)
    reference = x.double() @ dense.T
    if softcap is not None:
        reference = softcap * torch.tanh(reference / softcap)
    assert out.dtype == torch.float32
    assert relative_error(out, reference) < 2e-6
    assert relative_error(plain, reference) < 2e-3  # float32 matmul may be tf32 on this device


# Products that follow each other overlap at their ends and share counters; (4608, 9216) is cut into slices.
@pytest.mark.parametrize("m", [1, 8])
@pytest.mark.parametrize("format", ["nf4-nested", "int8"])
def test_a_graph_of_many_products_replays_the_same_sums(format: str, m: int) -> None:
    cases = [case(format, 9216, 4096), case(format, 4608, 9216), case(format, 512, 4608), case("bf16", 4608, 512)]
    x = torch.randn(m, 4096, device="cuda").bfloat16()

    def chain() -> torch.Tensor:
        y = x
        for _ in range(20):
            for it in cases:
                y = it.gemv(y)
                y = y / y.float().norm().to(y.dtype)
            y = y[:, :4096].contiguous()
        return y

    check_replays(chain)


def test_back_to_back_products_without_anything_between() -> None:
    """Consecutive launches overlap on Hopper; each must still see the previous one's output."""
    square = case("nf4-nested", 4608, 4608)
    y = torch.randn(1, 4608, device="cuda").bfloat16()
    values = [y]
    for _ in range(30):
        values.append(square.gemv(values[-1]))
    torch.cuda.synchronize()
    for before, after in itertools.pairwise(values):
        assert torch.equal(square.gemv(before.clone()), after)
        torch.cuda.synchronize()


def test_wrong_inputs_are_refused() -> None:
    weight = torch.zeros(32, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ParameterError, match="columns"):
        bf16_linear.bf16_gemv(torch.zeros(1, 32, device="cuda", dtype=torch.bfloat16), weight)
    with pytest.raises(ParameterError, match="bf16"):
        bf16_linear.bf16_gemv(torch.zeros(1, 64, device="cuda"), weight)
    with pytest.raises(ParameterError, match="rows"):
        bf16_linear.bf16_gemv(torch.zeros(9, 64, device="cuda", dtype=torch.bfloat16), weight)
