"""The CPU's matrix-vector products against float64, in every format, for every instruction set this machine has."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

import forked
from gemcut.kernels.cpu import library as cpu
from gemcut.kernels.cpu import linear
from gemcut.kernels.cpu.linear import MAX_M, CpuLinear, supports
from gemcut.kernels.gpu import PRESETS
from gemcut.kernels.linear.case import LinearCase
from gemcut.kernels.linear.plain import plain_linear
from gemcut.quantization.four_bit import quantize_4bit
from gemcut.quantization.int8 import quantize_int8
from gemcut.quantization.spec import BLOCK_SIZES
from gemcut.quantization.weights import CheckpointWeight, FourBitWeight, Int8Weight
from support import ROOT

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
VARIANTS = cpu.variants()
CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
# From NF4's definition (Dettmers et al. 2023, appendix E) and bitsandbytes' FP4, by code.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip
FP4 = [s * m for s in (1, -1) for m in (0, 0.0625 / 12, 8 / 12, 1, 4 / 12, 6 / 12, 2 / 12, 3 / 12)]


def random_matrix(rows: int, k: int, dtype: torch.dtype = BF16) -> Tensor:
    return (torch.randn(rows, k) * 0.1).to(dtype)


def pack(
    rows: int, k: int, form: str, block: int = 64, nested: bool = False, dtype: torch.dtype = BF16
) -> CheckpointWeight:
    dense = random_matrix(rows, k, dtype)
    if form == "whole":
        return dense
    if form == "int8":
        return quantize_int8(dense)
    return quantize_4bit(dense, "nf4" if form == "nf4" else "fp4", block_size=block, double_quant=nested)


def matrix(weight: CheckpointWeight) -> Tensor:
    """The matrix in float64, value by value from the format's definition."""
    if isinstance(weight, Int8Weight):
        return weight.codes.double() * weight.absmax.double()[:, None] / 127
    if not isinstance(weight, FourBitWeight):
        return weight.double()
    table = torch.tensor(NF4 if weight.quant_type == "nf4" else FP4, dtype=torch.float64)
    codes = torch.stack((weight.codes.long() // 16, weight.codes.long() % 16), 1).flatten()
    absmax = weight.absmax.double()
    if weight.nested is not None:
        values = [0.0, 1.0]
        for i in range(7):
            edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
            for middle in ((edges[1:] + edges[:-1]) / 2).tolist():
                values += [10.0 ** (i - 6) * middle, -(10.0 ** (i - 6)) * middle]
        places = torch.arange(weight.absmax.numel()) // 256
        dynamic = torch.tensor(sorted(values), dtype=torch.float64)
        absmax = dynamic[weight.absmax.long()] * weight.nested.scale.double()[places] + weight.nested.offset
    return (table[codes] * absmax.repeat_interleave(weight.block_size)).view(weight.shape)


def exact(x: Tensor, weights: tuple[CheckpointWeight, ...]) -> Tensor:
    return torch.cat([x.double() @ matrix(weight).t() for weight in weights], 1)


def few_rows(case: LinearCase, variant: str) -> CpuLinear:
    """The kernel for up to MAX_M rows even where another one (test_cpu_gemm.py) is faster from fewer on."""
    kernel = CpuLinear(case, cpu.library(variant))
    kernel.few = MAX_M
    return kernel


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def check(weights: tuple[CheckpointWeight, ...], m: int, variant: str, compute: torch.dtype = BF16) -> None:
    """The kernel is no further from float64 than the twin is (up to fp32's own noise)."""
    k = weights[0].shape[1]
    x = torch.randn(m, k).to(compute)
    x[:, k // 2] *= 30  # an outlier, as Gemma's activations have
    case = LinearCase(weights, compute, FP32)
    want = exact(x, weights)
    got = few_rows(case, variant)(x)
    assert got.dtype == FP32
    assert error(got, want) <= max(error(plain_linear(case, x), want), 5e-7)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("compute", [BF16, FP32])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("form", ["nf4", "fp4"])
def test_four_bit_in_every_block_size(form: str, nested: bool, compute: torch.dtype, variant: str) -> None:
    for i, block in enumerate(BLOCK_SIZES):
        for k in {block, 5 * block if block < 1024 else 2 * block}:
            check((pack(7, k, form, block, nested, compute),), 1 + i % MAX_M, variant, compute)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("compute", [BF16, FP32])
@pytest.mark.parametrize("form", ["nf4", "fp4", "int8", "whole"])
@pytest.mark.parametrize("m", range(1, MAX_M + 1))
def test_each_number_of_rows_and_several_parts(m: int, form: str, compute: torch.dtype, variant: str) -> None:
    parts = tuple(pack(rows, 704, form, 64, rows != 5, compute) for rows in (9, 5, 16))
    check(parts, m, variant, compute)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("compute", [BF16, FP32])
@pytest.mark.parametrize("form", ["int8", "whole"])
@pytest.mark.parametrize("k", [1, 7, 31, 33, 63, 65, 127, 129, 1000])
def test_odd_sizes(k: int, form: str, compute: torch.dtype, variant: str) -> None:
    for rows in (1, 3, 6):
        check((pack(rows, k, form, dtype=compute),), 1 + k % MAX_M, variant, compute)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_in_different_formats(variant: str) -> None:
    check((pack(6, 256, "nf4", 64, True), pack(5, 256, "int8"), pack(3, 256, "whole"), pack(2, 256, "fp4")), 3, variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("m", [1, 2, 5])
def test_four_bit_rows_by_the_hundred(m: int, nested: bool, variant: str) -> None:
    # Statistics are decoded for many rows in advance: in one piece's middle, at its end and at a matrix's.
    for rows, k in ((301, 1152), (62, 2304), (41, 9216), (70, 1088)):
        check((pack(rows, k, "nf4", 64, nested), pack(rows // 3, k, "fp4", 64, nested)), m, variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("m", [1, 2])
def test_parts_in_different_block_sizes(m: int, variant: str) -> None:
    check(tuple(pack(9, 1024, "nf4", block, block != 128) for block in (64, 256, 32, 128)), m, variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["nf4", "nf4-nested", "int8", "whole"])
def test_results_do_not_depend_on_threads_nor_on_the_other_rows_of_x(
    form: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    form, nested = form.removesuffix("-nested"), form.endswith("-nested")
    weights = (pack(301, 640, form, nested=nested), pack(77, 640, form, nested=nested))
    kernel = few_rows(LinearCase(weights, BF16, FP32), variant)
    x = torch.randn(5, 640).to(BF16)
    monkeypatch.setattr(linear.cpu, "threads", lambda: 1)
    alone = kernel(x)
    for threads in (2, 3, 7):
        monkeypatch.setattr(linear.cpu, "threads", lambda threads=threads: threads)
        for _ in range(5):
            assert torch.equal(kernel(x), alone)
    for row in range(5):
        assert torch.equal(kernel(x[row : row + 1])[0], alone[row])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("compute", [BF16, FP32])
@pytest.mark.parametrize("form", ["nf4", "fp4", "int8", "whole"])
def test_any_number_of_rows(form: str, compute: torch.dtype, variant: str) -> None:
    """Tiles of x: full ones and what is left of one, several passes over the weights, inputs that fill no vector. Each
    row is what it is alone, bit for bit, where its weights are read in sequence and where four rows side by side."""
    many = 4172 if compute == BF16 else 2364  # sums in fp32 round as often as they have values
    for k, block in ((1120, 32), (2368, 64)) if form in ("nf4", "fp4") else ((77, 0), (many, 0)):
        weights = (pack(13, k, form, block, True, compute), pack(24, k, form, block, False, compute))
        kernel = CpuLinear(LinearCase(weights, compute, FP32), cpu.library(variant))
        kernel.few = 1 << 30
        x = torch.randn(71, k).to(compute)
        x[:, k // 2] *= 30
        want, twin = exact(x, weights), plain_linear(kernel.case, x)
        rows = [kernel(row[None]) for row in x]
        for m in (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 31, 64, 71):
            got = kernel(x[:m])
            assert torch.equal(got, torch.cat(rows[:m]))
            assert error(got, want[:m]) <= max(error(twin[:m], want[:m]), 5e-7)


@pytest.mark.skipif(VARIANTS[:1] != ("avx2",), reason="other instruction sets take many rows in panels")
def test_avx2_takes_many_rows_in_tiles() -> None:
    packed, whole = pack(9, 128, "nf4"), pack(9, 128, "whole")
    assert CpuLinear(LinearCase((packed,), BF16, FP32), cpu.library()).few > 4096
    assert CpuLinear(LinearCase((packed, whole), BF16, FP32), cpu.library()).few == linear.WHOLE_TILED
    assert CpuLinear(LinearCase((packed,), FP32, FP32), cpu.library()).few == MAX_M


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["nf4", "int8", "whole"])
def test_bf16_results_are_the_fp32_ones_rounded_once(form: str, variant: str) -> None:
    weights, x = (pack(33, 256, form),), torch.randn(4, 256).to(BF16)
    wide = few_rows(LinearCase(weights, BF16, FP32), variant)(x)
    assert torch.equal(few_rows(LinearCase(weights, BF16, BF16), variant)(x), wide.to(BF16))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["nf4", "int8", "whole"])
def test_strided_x_and_every_output_written(form: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = (pack(13, 128, form), pack(6, 128, form))
    case = LinearCase(weights, BF16, FP32)
    kernel = few_rows(case, variant)
    wide = torch.randn(3, 500).to(BF16)
    x = wide[:, 100:228]
    real_empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: real_empty(*size, **options).fill_(float("nan")))
    got, columns = kernel(x), kernel(x.t().contiguous().t())
    assert torch.equal(got, columns)
    assert error(got, exact(x, weights)) < 3e-3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["nf4", "fp4", "int8", "whole"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_spread_as_in_the_twin(bad: float, form: str, variant: str) -> None:
    weights = (pack(20, 192, form),)
    case = LinearCase(weights, BF16, FP32)
    x = torch.randn(3, 192).to(BF16)
    x[1, 77] = bad
    got, want = few_rows(case, variant)(x), plain_linear(case, x)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    assert torch.equal(got[want.isinf()], want[want.isinf()])
    assert got[[0, 2]].isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("compute", [BF16, FP32])
@pytest.mark.parametrize("form", ["nf4", "nf4-nested", "fp4", "int8", "whole", "mixed"])
def test_no_neighbour_changes_a_rows_bits(form: str, compute: torch.dtype, variant: str) -> None:
    """Whatever the other rows hold; and the odd rows themselves are what they are alone."""
    nested, form = form.endswith("-nested"), form.removesuffix("-nested")
    forms = ("nf4", "int8", "whole") if form == "mixed" else (form,)
    weights = tuple(pack(rows, 320, each, nested=nested, dtype=compute) for each in forms for rows in (21, 6))
    kernel = few_rows(LinearCase(weights, compute, FP32), variant)
    for m in (2, 3, 5, MAX_M):
        x = torch.randn(m, 320).to(compute)
        sound = kernel(x)
        assert error(sound, exact(x, weights)) < 3e-3
        for odd in (torch.nan, torch.inf, -torch.inf, 1e38, 1e31, 1e-35, 0.0):
            for place in (0, m - 1):
                mixed = x.clone()
                if abs(odd) < 1:
                    mixed[place] = odd
                else:
                    mixed[place, 170] = odd
                got = kernel(mixed)
                others = torch.arange(m) != place
                assert torch.equal(got[others], sound[others]), (m, odd, place)
                alone = kernel(mixed[place : place + 1])[0]
                assert torch.equal(got[place].nan_to_num(7.0), alone.nan_to_num(7.0)), (m, odd, place)
                if odd == 1e31 or (odd == 1e38 and "int8" not in forms):  # 127 times 1e38 is beyond fp32
                    assert error(alone[None], exact(mixed[place : place + 1], weights)) < 3e-3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["nf4", "int8", "whole"])
@pytest.mark.parametrize("size", [0.0, 1e-35, 1e-20, 1e20, 1e33])
def test_x_of_any_size(size: float, form: str, variant: str) -> None:
    weights = (pack(9, 256, form),)
    x = (torch.randn(2, 256) * size).to(BF16)
    got = few_rows(LinearCase(weights, BF16, FP32), variant)(x)
    if size in (0.0, 1e-35):  # bf16 instructions take such products for zero
        assert got.abs().max() <= 1e-33
    else:
        assert error(got, exact(x, weights)) < 3e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_of_zeros_and_an_extreme_block(variant: str) -> None:
    dense = random_matrix(6, 256)
    dense[2] = 0
    dense[3, :64] = 1e6
    for weights in ((quantize_4bit(dense, "nf4", double_quant=False),), (quantize_int8(dense.clamp(max=6e4)),)):
        x = torch.randn(2, 256).to(BF16)
        got = few_rows(LinearCase(weights, BF16, FP32), variant)(x)
        assert error(got, exact(x, weights)) < 1e-3
        assert (got[:, 2] == 0).all()


def test_more_rows_than_the_kernel_serves() -> None:
    weights = (pack(12, 128, "nf4"),)
    case = LinearCase(weights, BF16, BF16)
    for m in (0, MAX_M + 1, 40):
        x = torch.randn(m, 128).to(BF16)
        torch.testing.assert_close(CpuLinear(case, cpu.library())(x), plain_linear(case, x), rtol=0.02, atol=0.02)


def test_refusals_say_why() -> None:
    def reason(weight: CheckpointWeight, compute: torch.dtype = BF16, out: torch.dtype = BF16, **more: float) -> str:
        return str(supports(LinearCase((weight,), compute, out, **more), None))

    assert reason(pack(4, 64, "nf4")) == "None"
    assert "not in torch.float16" in reason(pack(4, 64, "nf4"), torch.float16)
    assert "not torch.float16" in reason(pack(4, 64, "nf4"), BF16, torch.float16)
    assert "whole number of blocks of 64" in reason(quantize_4bit(random_matrix(4, 96)))
    assert "activation_threshold" in reason(pack(4, 64, "int8"), activation_threshold=6.0)
    assert "contiguous" in reason(random_matrix(64, 4).t())
    assert "float32" in reason(random_matrix(4, 64, FP32), BF16)
    assert "inputs, not 70000" in reason(random_matrix(1, 70000))
    assert "on a CPU only" in str(supports(LinearCase((pack(4, 64, "nf4"),), BF16, BF16), PRESETS["a100"]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear.cpu, "threads", lambda: 3)
    kernel = CpuLinear(LinearCase((pack(2000, 640, "nf4"),), BF16, FP32), cpu.library())
    x = torch.randn(2, 640).to(BF16)
    want = kernel(x)
    child = os.fork()
    if child == 0:  # nothing of pytest may run here
        os._exit(0 if all(torch.equal(kernel(x), want) for _ in range(20)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(kernel(x), want)


#: In a process of its own, whose memory is small: a fork of a test process takes a second.
FORKS = """
import os, threading, warnings
import torch
from gemcut.kernels.cpu import library, linear
from gemcut.kernels.linear.case import LinearCase

warnings.simplefilter("ignore")  # of forks of a process with threads: that is the point
linear.cpu.threads = lambda: 4
BF16 = torch.bfloat16

def kernel(rows, k):
    matrix = (torch.randn(rows, k) * 0.1).to(BF16)
    return linear.CpuLinear(LinearCase((matrix,), BF16, BF16), library.library())

large, small = kernel(8192, 1024), kernel(4096, 512)
x, y = torch.randn(1, 1024).to(BF16), torch.randn(1, 512).to(BF16)
want, over = small(y), threading.Event()

def keep_busy():
    while not over.is_set():
        large(x)

other = threading.Thread(target=keep_busy)
other.start()
failed = 0
for _ in range(60):
    child = os.fork()
    if child == 0:
        os._exit(0 if all(torch.equal(small(y), want) for _ in range(3)) else 1)
    failed += os.waitpid(child, 0)[1] != 0
over.set()
other.join()
print("failed:", failed)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_forked_in_the_middle_of_a_loop_leaves_that_loop_alone() -> None:
    """60 times: a child's thread is rarely soon enough to take chunks of that loop."""
    done = forked.run([], env=dict(os.environ) | {"PYTHONPATH": str(ROOT / "src")}, code=FORKS)
    assert done.stdout == "failed: 0\n", done.stderr


def test_many_callers_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    kernel = CpuLinear(LinearCase((pack(500, 640, "nf4"),), BF16, FP32), cpu.library())
    inputs = [torch.randn(1 + i % 8, 640).to(BF16) for i in range(40)]
    want = [kernel(x) for x in inputs]
    with ThreadPoolExecutor(4) as callers:
        for _ in range(5):
            for got, right in zip(callers.map(kernel, inputs), want, strict=True):
                assert torch.equal(got, right)
