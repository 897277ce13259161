"""NF4 and FP4, bit for bit against bitsandbytes' CPU code, and against slow arithmetic of our own."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemcut.quantization import four_bit
from gemcut.quantization.four_bit import block_absmax, dequantize_4bit, nest, quantize_4bit
from gemcut.quantization.spec import BLOCK_SIZES
from gemcut.quantization.tables import code_table, dynamic_map, nearest_dynamic
from gemcut.quantization.weights import FourBitWeight, Nested
from quantization.inputs import DTYPES, KINDS, matrix

TYPES: tuple[Any, ...] = ("nf4", "fp4")
SHAPES = ((1, 1), (3, 5), (7, 129), (33, 64), (13, 333), (3, 4096))
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@pytest.fixture(scope="module")
def functional() -> Iterator[Any]:
    module = pytest.importorskip("bitsandbytes.functional")
    with torch.compiler.set_stance("force_eager"):  # it would compile some of its code anew for every shape
        yield module


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    return ours.dtype == theirs.dtype and torch.equal(ours.view(BITS[ours.dtype]), theirs.view(BITS[ours.dtype]))


def same_values(ours: Tensor, theirs: Tensor) -> bool:
    """The same bits, but for the sign of zero: FP4's code 8 is 0 or -0 by the processor bitsandbytes runs on."""
    return same_bits(ours + 0.0, theirs + 0.0)


def decoded_by_bitsandbytes(functional: Any, weight: FourBitWeight, dtype: torch.dtype) -> Tensor:
    absmax = weight.absmax
    if weight.nested is not None:
        code = functional.create_dynamic_map()
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(absmax, weight.nested.scale, code, 256, torch.float32)
        absmax = absmax + torch.tensor(weight.nested.offset)
    # Its AVX-512 code gives a wrong statistic to blocks that span rows: one long row has none.
    shape = weight.shape if weight.shape[1] % weight.block_size == 0 else (1, math.prod(weight.shape))
    out = torch.ops.bitsandbytes.dequantize_4bit(
        weight.codes[:, None], absmax, weight.block_size, weight.quant_type, shape, dtype
    )
    return torch.as_tensor(out).view(weight.shape)


# ---- cutting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_stored_byte_is_bitsandbytes(kind: str, dtype: torch.dtype, functional: Any) -> None:
    for shape, quant_type, block_size, double in itertools.product(SHAPES, TYPES, BLOCK_SIZES, (False, True)):
        weight = matrix(kind, shape, dtype)
        before = weight.clone()
        ours = quantize_4bit(weight, quant_type, block_size=block_size, double_quant=double)
        codes, state = functional.quantize_4bit(
            before, blocksize=block_size, quant_type=quant_type, compress_statistics=double
        )
        what = (shape, quant_type, block_size, double)
        assert torch.equal(weight, before), what
        assert torch.equal(ours.codes, codes.view(-1)), what
        assert (ours.shape, ours.dtype, ours.block_size, ours.quant_type) == (shape, dtype, block_size, quant_type)
        if not double:
            assert ours.nested is None
            assert same_bits(ours.absmax, state.absmax), what
            continue
        assert ours.nested is not None
        if not torch.isfinite(state.offset):
            assert kind == "huge"  # its sum of statistics overflows: see the test of that below
            continue
        assert ours.nested.offset == state.offset.item(), what
        assert torch.equal(ours.absmax, state.absmax), what
        assert same_bits(ours.nested.scale, state.state2.absmax), what


@pytest.mark.parametrize("quant_type", TYPES)
def test_pieces_and_threads_change_nothing(quant_type: Any, functional: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(four_bit, "PIECE", 4096)
    threads = torch.get_num_threads()
    for shape, block_size in itertools.product(((3, 4096), (37, 333), (1, 12287), (5, 4097)), (32, 64, 4096)):
        weight = matrix("normal", shape, torch.bfloat16)
        codes, state = functional.quantize_4bit(weight, blocksize=block_size, quant_type=quant_type)
        theirs = FourBitWeight(codes.view(-1), state.absmax, quant_type, block_size, shape, torch.bfloat16)
        for count in (1, 3):
            torch.set_num_threads(count)
            try:
                ours = quantize_4bit(weight, quant_type, block_size=block_size, double_quant=False)
                decoded = dequantize_4bit(ours)
                assert torch.get_num_threads() == count
            finally:
                torch.set_num_threads(threads)
            assert torch.equal(ours.codes, theirs.codes)
            assert torch.equal(ours.absmax, theirs.absmax)
            assert same_values(decoded, decoded_by_bitsandbytes(functional, theirs, torch.bfloat16))


@pytest.mark.parametrize("quant_type", TYPES)
def test_ratios_next_to_a_midpoint(quant_type: Any, functional: Any) -> None:
    values = sorted(code_table(quant_type).tolist())
    middles = torch.tensor([(torch.tensor(a) + torch.tensor(b)).item() / 2 for a, b in itertools.pairwise(values)])
    above = torch.nextafter(middles, torch.tensor(2.0))
    below = torch.nextafter(middles, torch.tensor(-2.0))
    weight = torch.cat((middles, above, below, torch.ones(1), torch.zeros(18)))[None]
    ours = quantize_4bit(weight, quant_type, double_quant=False)
    codes, _ = functional.quantize_4bit(weight, quant_type=quant_type)
    assert torch.equal(ours.codes, codes.view(-1))
    chosen = dequantize_4bit(ours)[0]
    assert torch.equal(chosen[:15], torch.tensor(values[:-1]))  # a tie goes down
    assert torch.equal(chosen[15:30], torch.tensor(values[1:]))
    assert torch.equal(chosen[30:45], torch.tensor(values[:-1]))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.floats(width=32, min_value=-(2.0**99), max_value=2.0**99, allow_subnormal=False), min_size=1, max_size=80
    ),
    quant_type=st.sampled_from(TYPES),
    dtype=st.sampled_from(DTYPES),
)
def test_no_other_code_is_nearer(values: list[float], quant_type: Any, dtype: torch.dtype) -> None:
    weight = torch.tensor([values]).clamp(-60000, 60000).to(dtype)
    ours = quantize_4bit(weight, quant_type, block_size=32, double_quant=False)
    nibbles = [nibble for byte in ours.codes.tolist() for nibble in (byte >> 4, byte & 15)]
    table = [Fraction(value) for value in code_table(quant_type).tolist()]
    exact = [Fraction(value) for value in weight[0].tolist()]
    for first in range(0, len(exact), 32):
        block = exact[first : first + 32]
        largest = max(map(abs, block))
        if largest < Fraction(1e-37):
            continue
        assert Fraction(ours.absmax[first // 32].item()) == largest
        for value, nibble in zip(block, nibbles[first:], strict=False):
            distances = [abs(value / largest - entry) for entry in table]
            # Two roundings of the ratio and one of the midpoint, each of at most 2⁻²⁴.
            assert distances[nibble] <= min(distances) + Fraction(1, 1 << 22)


@pytest.mark.parametrize(("quant_type", "byte"), [("nf4", 0x77), ("fp4", 0x00)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_blocks_of_zeros(quant_type: Any, byte: int, double_quant: bool) -> None:
    weight = matrix("normal", (4, 128), torch.float32)
    weight[1] = 0.0
    ours = quantize_4bit(weight, quant_type, double_quant=double_quant)
    assert set(ours.codes.view(4, 64)[1].tolist()) == {byte}
    assert set(ours.codes.view(4, 64)[0].tolist()) != {byte}
    assert not dequantize_4bit(ours)[1].any()


def test_any_layout_and_gradient_mode() -> None:
    weight = matrix("normal", (96, 160), torch.float32)
    expected = quantize_4bit(weight)
    turned = quantize_4bit(weight.t().contiguous().t())
    learned = quantize_4bit(torch.nn.Parameter(weight.clone()))
    with torch.inference_mode():
        inside = quantize_4bit(weight.clone())
        decoded = dequantize_4bit(inside)
    for other in (turned, learned, inside):
        assert all(torch.equal(a, b) for a, b in zip(expected.tensors, other.tensors, strict=True))
    assert torch.equal(decoded, dequantize_4bit(expected))
    assert not dequantize_4bit(learned).is_inference()  # a module may hold it as a parameter
    assert not learned.codes.is_inference()


@pytest.mark.parametrize("quant_type", TYPES)
def test_what_was_decoded_is_cut_to_the_same_codes(quant_type: Any) -> None:
    once = quantize_4bit(matrix("heavy", (64, 256), torch.float32), quant_type, double_quant=False)
    twice = quantize_4bit(dequantize_4bit(once), quant_type, double_quant=False)
    assert torch.equal(once.absmax, twice.absmax)
    assert torch.equal(dequantize_4bit(once), dequantize_4bit(twice))
    assert quant_type == "fp4" or torch.equal(once.codes, twice.codes)


# ---- statistics of statistics ----------------------------------------------------------------------------------------


def test_tables_are_bitsandbytes(functional: Any) -> None:
    assert same_bits(dynamic_map(), functional.create_dynamic_map())
    for quant_type in TYPES:
        theirs = functional.get_4bit_type(quant_type, device="cpu")
        assert same_bits(code_table(quant_type), theirs)


def test_codes_of_the_dynamic_map(functional: Any) -> None:
    # Every step that bitsandbytes tells apart, where it passes from one to the next, and a finer grid.
    steps = torch.arange(65536, dtype=torch.float64) / 65535 * 2 - 1
    edges = (steps + 1 / 65535).float()
    ratios = torch.cat(
        (steps.float(), edges, torch.nextafter(edges, torch.tensor(-2.0)), torch.linspace(-1, 1, 500_001))
    )
    ratios = ratios.clamp(-1, 1)
    ratios = torch.cat((ratios, torch.zeros(-ratios.numel() % 255))).view(-1, 255)
    blocks = torch.cat((torch.ones(ratios.shape[0], 1), ratios), dim=1)  # the largest is 1: ratios stay as they are
    theirs, _ = functional.quantize_blockwise(blocks.flatten(), blocksize=256)
    assert torch.equal(nearest_dynamic(blocks.flatten()), theirs)
    # Not far from the nearest entry: a step is 2 / 65535.
    entries = dynamic_map()
    nearest = (ratios.flatten()[:, None].double() - entries.double()).abs_().amin(dim=1)
    chosen = (ratios.flatten().double() - entries[nearest_dynamic(ratios.flatten()).int()].double()).abs()
    assert (chosen - nearest).max() <= 2 / 65535


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 1000, 100_003])
@pytest.mark.parametrize("kind", ["normal", "spread", "constant", "zero", "denormal", "one large"])
def test_nested_statistics_are_bitsandbytes(kind: str, count: int, functional: Any) -> None:
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(count, generator=generator).abs_()
    absmax = {
        "normal": values * 0.1 + 0.05,
        "spread": values.mul(6).exp(),
        "constant": torch.full((count,), 0.1),
        "zero": torch.zeros(count),
        "denormal": values * 1e-40,
        "one large": torch.cat((torch.full((count - 1,), 1e-3), torch.tensor([1e6]))),
    }[kind]
    offset = absmax.mean()
    codes, state = functional.quantize_blockwise(absmax - offset, blocksize=256)
    ours, nested = nest(absmax)
    assert nested.offset == offset.item()
    assert torch.equal(ours, codes)
    assert same_bits(nested.scale, state.absmax)
    weight = FourBitWeight(torch.empty(0), ours, "nf4", 64, (count, 64), torch.float32, nested)
    assert same_bits(block_absmax(weight), functional.dequantize_blockwise(codes, state) + offset)


def test_statistics_whose_sum_overflows(functional: Any) -> None:
    weight = matrix("huge", (64, 4096), torch.float32)
    ours = quantize_4bit(weight)
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(ours.codes, codes.view(-1))
    assert not torch.isfinite(state.offset)  # bitsandbytes loses the matrix
    assert ours.nested is not None
    exact = weight.view(-1, 64).double().abs().amax(dim=1).mean()
    assert ours.nested.offset == pytest.approx(exact.item(), rel=1e-6)
    difference = dequantize_4bit(ours).double() - weight.double()
    assert difference.norm() < 0.12 * weight.double().norm()


# ---- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_decoded_value_is_bitsandbytes(kind: str, dtype: torch.dtype, functional: Any) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    for shape, quant_type, block_size, double in itertools.product(SHAPES, TYPES, BLOCK_SIZES, (False, True)):
        weight = matrix(kind, shape, torch.float32 if kind == "huge" else dtype)
        cut = quantize_4bit(weight, quant_type, block_size=block_size, double_quant=double)
        ours, theirs = dequantize_4bit(cut, dtype), decoded_by_bitsandbytes(functional, cut, dtype)
        if dtype == torch.bfloat16:
            # Where the processor has an instruction for this rounding, bitsandbytes uses it: denormals become 0.
            flushed = (theirs == 0) & (ours.abs() < tiny)
            theirs = torch.where(flushed, ours, theirs)
        assert same_values(ours, theirs), (shape, quant_type, block_size, double)


@pytest.mark.parametrize("quant_type", TYPES)
def test_every_byte_stands_for_two_values(quant_type: Any, functional: Any) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    absmax = torch.tensor([3.0, 0.5, 0.0, 1e-3, 7.0, 1.0, 2.0, 1e30])
    weight = FourBitWeight(codes, absmax, quant_type, 64, (8, 64), torch.float32)
    table = code_table(quant_type).double()
    expected = [
        (table[nibble] * absmax[(2 * byte) // 64].double()).float().item()
        for byte in range(256)
        for nibble in (byte >> 4, byte & 15)
    ]
    assert torch.equal(dequantize_4bit(weight), torch.tensor(expected).view(8, 64))
    assert same_values(dequantize_4bit(weight), decoded_by_bitsandbytes(functional, weight, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_rounded_once(dtype: torch.dtype) -> None:
    stored = quantize_4bit(matrix("normal", (33, 96), torch.bfloat16))
    ours = dequantize_4bit(stored, dtype)
    assert ours.dtype == dtype
    statistics = block_absmax(stored).repeat_interleave(64)[: 33 * 96]
    nibbles = torch.stack((stored.codes >> 4, stored.codes & 15), dim=1).flatten()
    product = code_table("nf4")[nibbles.int()].double() * statistics.double()  # exact: 24 bits each
    assert torch.equal(ours.view(-1), product.float().to(dtype))
    assert dequantize_4bit(stored).dtype == torch.bfloat16


def test_statistics_nested_or_not() -> None:
    scale = torch.tensor([2.0, 3.0])
    codes = torch.arange(300).remainder(256).to(torch.uint8)
    weight = FourBitWeight(torch.empty(0), codes, "nf4", 64, (300, 64), torch.float32, Nested(scale, 0.25))
    entries = dynamic_map().tolist()
    expected = [torch.tensor(entries[i % 256]).mul(2.0 if i < 256 else 3.0).add(0.25).item() for i in range(300)]
    assert block_absmax(weight).tolist() == expected
    plain = FourBitWeight(torch.empty(0), torch.ones(3), "nf4", 64, (3, 64), torch.float32)
    assert block_absmax(plain) is plain.absmax


# ---- memory and devices ----------------------------------------------------------------------------------------------

_PEAK = """
import pathlib, torch
from gemcut.quantization.four_bit import dequantize_4bit, quantize_4bit
from gemcut.quantization.int8 import dequantize_int8, quantize_int8

def peak():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

def now():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

small = torch.ones(512, 1024, dtype=torch.bfloat16)  # what the first call needs once
dequantize_4bit(quantize_4bit(small)), dequantize_int8(quantize_int8(small))
weight = torch.ones(16384, 2048, dtype=torch.bfloat16)  # 64 MiB
for quantize, decode in ((quantize_4bit, dequantize_4bit), (quantize_int8, dequantize_int8)):
    for step in (lambda: quantize(weight), lambda: decode(cut)):
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = now()
        result = step()
        held = sum(tensor.nbytes for tensor in getattr(result, "tensors", (result,))) / 2**20
        print(peak() - before - held)
        cut, result = result, None
    cut = None
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_temporaries_are_small() -> None:
    run = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=False)
    if "clear_refs" in run.stderr:
        pytest.skip("the kernel does not let a process reset its peak")
    assert run.returncode == 0, run.stderr
    extra = [float(line) for line in run.stdout.split()]
    assert len(extra) == 4
    # One temporary of the whole matrix would take 32 MiB in 8 bits and 128 MiB in fp32.
    assert max(extra) < 24, extra


@pytest.mark.gpu
@pytest.mark.parametrize("quant_type", TYPES)
def test_a_gpu_gives_the_same(quant_type: Any) -> None:
    for kind, dtype, block_size in itertools.product(KINDS, DTYPES, (32, 64, 4096)):
        weight = matrix(kind, (40, 333), dtype)
        here = quantize_4bit(weight, quant_type, block_size=block_size, double_quant=False)
        there = quantize_4bit(weight.cuda(), quant_type, block_size=block_size, double_quant=False)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(here.tensors, there.tensors, strict=True)), (kind, dtype)
        assert torch.equal(dequantize_4bit(here), dequantize_4bit(there).cpu()), (kind, dtype)
        nested = quantize_4bit(weight.cuda(), quant_type, block_size=block_size)
        decoded = dequantize_4bit(nested).cpu().double()
        error = (decoded - dequantize_4bit(quantize_4bit(weight, quant_type, block_size=block_size)).double()).norm()
        # A mean is summed up in another order, which may move a nested code by one.
        assert error <= 0.01 * weight.double().norm(), (kind, dtype)
