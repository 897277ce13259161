"""Products of packed weights with many rows on a GPU against float64 of the dequantized weights, beside plain twins."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from four_bit_reference import NF4, dequantize, quantize
from gemcut.errors import ParameterError
from gemcut.kernels.linear import cuda as cuda_linear
from gemcut.kernels.linear import four_bit as four_bit_linear
from gemcut.kernels.linear import gemm as fused_gemm
from gemcut.kernels.linear import int8 as int8_linear
from gemcut.kernels.linear.case import LinearCase
from gemcut.kernels.linear.dispatch import choose_linear
from gemcut.kernels.linear.gemv import arrivals
from gemcut.kernels.linear.layout import Ordered, order_x
from gemcut.kernels.linear.routes import fused_rows
from gemcut.quantization.int8 import quantize_int8
from gpu_products import PACKED, Case, case, check_replays
from gpu_support import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]


def check(it: Case, m: int) -> None:
    n, k = it.dense.shape
    x = torch.randn(m, k, device="cuda").bfloat16()
    out = torch.full((m, n), torch.nan, device="cuda", dtype=torch.bfloat16)
    assert it.gemm(x, out=out) is out
    reference = x.double() @ it.dense.T
    error, twin = relative_error(out, reference), relative_error(it.plain(x), reference)
    # Both round the output to bf16 (0.17 % rms), the twin each weight too. From 96 rows on four-bit weights are rounded
    # here as well, after their codes' rounding to fp16, an eighth of bf16's: in all at most 1 % more than the twin.
    # With few outputs the two errors are one draw each.
    bound = 1.01 * twin if m * n > 20_000 else 1.1 * twin if m * n > 500 else 4e-3
    assert error <= bound, (m, error, twin)
    assert torch.equal(out, it.gemm(x)), "the same inputs gave another sum"


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize(("n", "k"), [(1, 64), (17, 192), (1000, 640), (2049, 4608)])
def test_every_row_count_from_1_to_70_against_float64(name: str, n: int, k: int) -> None:
    it = case(name, n, k)
    for m in range(1, 71):
        check(it, m)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize(("n", "k"), [(33, 2304), (300, 36864), (4608, 4096), (40000, 4608)])
def test_many_rows_against_float64(name: str, n: int, k: int) -> None:
    it = case(name, n, k)
    for m in (9, 64, 96, 97, 129, 257, 1023):
        check(it, m)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("m", [9, 40, 70, 150])
def test_each_output_uses_its_own_row_and_column(name: str, m: int) -> None:
    it = case(name, 300, 640)
    for begin in (0, 5, 640 - m):
        x = torch.zeros(m, 640, device="cuda", dtype=torch.bfloat16)
        x[torch.arange(m), begin + torch.arange(m)] = 1
        reference = it.dense[:, begin : begin + m].T
        difference = (it.gemm(x).double() - reference).abs()
        assert bool((difference <= 0.008 * reference.abs() + 1e-12).all())


@pytest.mark.parametrize("name", PACKED)
def test_strided_and_misaligned_inputs(name: str) -> None:
    it = case(name, 100, 512)
    wide = torch.randn(90, 1024, device="cuda").bfloat16()
    for x in (wide[:, :512], wide[:, 512:], wide[:, 3:515], wide[::2, :512], wide.t().contiguous().t()[:, :512]):
        assert torch.equal(it.gemm(x), it.gemm(x.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("m", [9, 40, 100])
def test_stacked_matrices_use_their_own_scales(m: int) -> None:
    """Three matrices one below the other, a hundred times apart: each has its offset and its groups of scales."""
    parts = [
        quantize(torch.randn(n, 512, device="cuda") * size, NF4, nested=True)
        for n, size in ((64, 0.01), (32, 1.0), (41, 100.0))
    ]
    packed = four_bit_linear.pack(parts)
    x = torch.randn(m, 512, device="cuda").bfloat16()
    out = fused_gemm.gemm(four_bit_linear.NESTED, packed.argument, x, packed.n)
    for part, columns in zip(parts, out.split([64, 32, 41], dim=1), strict=True):
        assert relative_error(columns, x.double() @ dequantize(part).T) < 4e-3


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("m", [20, 100])
def test_values_beyond_fp16_do_not_overflow(name: str, m: int) -> None:
    it = case(name, 64, 512)
    x = torch.randn(m, 512, device="cuda").bfloat16() * 1e6
    out = it.gemm(x)
    assert bool(out.isfinite().all())
    assert out.abs().max().item() > 65504
    assert relative_error(out, x.double() @ it.dense.T) < 4e-3


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("m", [9, 64, 130])
def test_float32_logits_of_an_int8_head(m: int, softcap: float | None) -> None:
    it = case("int8", 4097, 2304)
    x = torch.randn(m, 2304, device="cuda").bfloat16() * 10
    out = it.gemm(x, out_dtype="float32", softcap=softcap)
    reference = x.double() @ it.dense.T
    if softcap is not None:
        reference = softcap * torch.tanh(reference / softcap)
    assert out.dtype == torch.float32
    assert relative_error(out, reference) < 2e-6


def test_products_in_a_graph_replay_the_same_sums() -> None:
    """Tiles shared between blocks leave their counters at zero, also for kernels of other formats and shapes."""
    cases = [case("nf4-nested", 4608, 4096), case("int8", 512, 4608), case("nf4", 4608, 512), case("fp4", 4096, 4608)]
    x = torch.randn(40, 4096, device="cuda").bfloat16()

    def chain() -> torch.Tensor:
        y = x
        for _ in range(5):
            for it in cases:
                y = it.gemm(y)
                y = y / y.float().norm().to(y.dtype)
        return y

    check_replays(chain)


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_dispatch_serves_every_row_count_and_decodes_no_matrix_for_few(name: str) -> None:
    n, k = 8192, 1024
    whole = torch.randn(n, k, device="cuda") * 0.05
    weight = quantize_int8(whole.bfloat16()) if name == "int8" else quantize(whole, NF4, nested=True)
    dense = weight.codes.double() * (weight.absmax.double() / 127)[:, None] if name == "int8" else dequantize(weight)
    choice = choose_linear(LinearCase((weight,), torch.bfloat16, torch.bfloat16), torch.device("cuda", 0))
    assert choice.name == "cuda"
    buffer = cuda_linear._buffer(torch.device("cuda", 0))
    buffer.kept.clear()
    most = fused_rows(n * k, name == "nf4")
    for m in (1, 8, 9, 64, 65, most, most + 1, 1024):
        x = torch.randn(m, k, device="cuda").bfloat16()
        out = choice.kernel(x)
        if m <= most:
            assert not buffer.kept, "a product of few rows asked for the decode buffer"
        assert relative_error(out, x.double() @ dense.T) < 2.9e-3


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize(("n", "k"), [(17, 192), (1000, 640), (4608, 4096), (300, 36864)])
def test_rows_in_order_give_the_same_products(name: str, n: int, k: int) -> None:
    it = case(name, n, k)
    for m in (9, 16, 33, 100, 260):
        x = torch.randn(m, k, device="cuda").bfloat16()
        ordered = order_x(x, fused_gemm.order_groups(m))
        assert torch.equal(ordered.rows(), x)
        spoilt = Ordered.empty(ordered.groups * 8, k, ordered.groups, x.device)
        spoilt = order_x(torch.cat((x, x.new_full((spoilt.m - m, k), torch.nan))), ordered.groups)
        want = it.gemm(x)
        for given in (ordered, Ordered(spoilt.values, m, k)):  # rows past m may hold anything
            assert torch.equal(it.gemm(given), want)
    with pytest.raises(ParameterError, match="groups"):
        it.gemm(order_x(x, 2))


@pytest.mark.parametrize("name", ["int8", "nf4-nested"])
@pytest.mark.parametrize(("n", "k"), [(16, 36864), (4608, 4096), (4608, 36864), (40000, 4608)])
def test_blocks_that_do_not_wait_for_each_other_give_the_same_sums(name: str, n: int, k: int) -> None:
    """Without max_wait a block leaves its part of a shared tile unless all others have come."""
    it = case(name, n, k)
    storage = int8_linear.STORAGE if name == "int8" else four_bit_linear.NESTED
    for m in (9, 64, 100, 200):
        x = torch.randn(m, k, device="cuda").bfloat16()
        want, hasty = it.gemm(x), replace(fused_gemm.choose_variant(storage, m, n, k), max_wait=0)
        for _ in range(20):
            out = torch.full_like(want, torch.nan)
            assert torch.equal(it.gemm(x, out=out, variant=hasty), want)
    counters = arrivals(x.device, torch.cuda.current_stream().cuda_stream)
    assert not counters.any()


def test_products_on_several_streams_at_once_come_to_an_end() -> None:
    """Each product's blocks wait for each other, and those of another stream's keep some of them from starting."""
    cases = [case("nf4-nested", 16, 36864), case("int8", 16, 36864), case("nf4-nested", 256, 36864)]
    x = torch.randn(40, 36864, device="cuda").bfloat16()
    want = [it.gemm(x) for it in cases]
    streams = [torch.cuda.Stream() for _ in range(6)]
    torch.cuda.synchronize()
    results: list[tuple[int, torch.Tensor]] = []
    for _ in range(30):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results.append((index % 3, cases[index % 3].gemm(x)))
    torch.cuda.synchronize()
    for index, out in results:
        assert torch.equal(out, want[index])


def test_wrong_inputs_are_refused() -> None:
    it = case("nf4", 32, 64)
    for x in (torch.zeros(9, 64, device="cuda"), torch.zeros(0, 64, device="cuda", dtype=torch.bfloat16)):
        with pytest.raises(ParameterError, match="bf16"):
            it.gemm(x)
    x = torch.zeros(9, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(ParameterError, match="out must be"):
        it.gemm(x, out=torch.zeros(9, 31, device="cuda", dtype=torch.bfloat16))
    with pytest.raises(ParameterError, match="softcap"):
        it.gemm(x, softcap=30.0)
