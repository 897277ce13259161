"""Calibrated cutting: smaller output errors, measured in float64 on inputs, and nothing but bitsandbytes' format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gemcut.quantization.calibrate import Codebook, Method, quantize_4bit_calibrated
from gemcut.quantization.four_bit import dequantize_4bit, quantize_4bit
from gemcut.quantization.moments import Moments, block_width
from gemcut.quantization.tables import code_table, dynamic_map
from gemcut.quantization.weights import FourBitWeight


def correlated(rows: int, size: int, seed: int = 0) -> Tensor:
    """Inputs with a few strong directions and channels, as a network's are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) / size**0.5
    channels = torch.randn(size, generator=generator).mul(1.2).exp()
    return torch.randn(rows, size, generator=generator) @ mixing * channels


def random_weight(out: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(out, size, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)


def moments_of(inputs: Tensor, block: int | None = None) -> Moments:
    moments = Moments(inputs.shape[1], block)
    for chunk in inputs.split(100):
        moments.add(chunk)
    return moments


def output_error(weight: Tensor, cut: FourBitWeight, inputs: Tensor) -> float:
    """Relative error of the layer's outputs, float64."""
    exact = inputs.double() @ weight.double().t()
    difference = exact - inputs.double() @ dequantize_4bit(cut, torch.float32).double().t()
    return (difference.norm() / exact.norm()).item()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("out", "size", "block"), [(96, 256, 64), (64, 384, 128), (30, 48, 64), (7, 129, 64), (1, 64, 64)]
)
def test_outputs_come_closer_than_by_plain_rounding(
    quant_type: Any, double_quant: bool, out: int, size: int, block: int
) -> None:
    # The second half is of the same kind, but calibration does not see it.
    seen, unseen = correlated(4000, size).chunk(2)
    weight = random_weight(out, size)
    options: dict[str, Any] = {"block_size": block, "double_quant": double_quant}
    plain = quantize_4bit(weight, quant_type, **options)
    cut = quantize_4bit_calibrated(weight, moments_of(seen), quant_type, **options)
    for inputs in (seen, unseen):
        assert output_error(weight, cut, inputs) < 0.8 * output_error(weight, plain, inputs)


def test_each_step_lowers_the_error() -> None:
    inputs, weight = correlated(3000, 256), random_weight(128, 256)
    moments = moments_of(inputs)
    errors = [
        output_error(weight, quantize_4bit_calibrated(weight, moments, method=method), inputs)
        for method in (
            Method(damping=0.01, feedback=False, sweeps=0),
            Method(damping=0.01, feedback=True, sweeps=0),
            Method(damping=0.01, feedback=True, sweeps=1),
            Method(damping=0.01, feedback=True, sweeps=3),
        )
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_bitsandbytes_decodes_the_same_values(dtype: torch.dtype, quant_type: Any, double_quant: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = random_weight(64, 192, dtype)
    cut = quantize_4bit_calibrated(weight, moments_of(correlated(500, 192)), quant_type, double_quant=double_quant)
    nested = None
    if cut.nested is not None:
        nested = functional.QuantState(
            absmax=cut.nested.scale, blocksize=256, code=dynamic_map().clone(), dtype=torch.float32
        )
    state = functional.QuantState(
        absmax=cut.absmax,
        shape=torch.Size(cut.shape),
        code=code_table(quant_type).clone(),
        blocksize=cut.block_size,
        quant_type=quant_type,
        dtype=dtype,
        offset=None if cut.nested is None else torch.tensor(cut.nested.offset),
        state2=nested,
    )
    theirs = functional.dequantize_4bit(cut.codes.view(-1, 1), state, quant_type=quant_type)
    assert torch.equal(theirs.view(64, 192), dequantize_4bit(cut))
    assert dequantize_4bit(cut).dtype == dtype


def test_weights_of_zero_stay_zero() -> None:
    weight = random_weight(16, 128)
    weight[3:5] = 0.0
    weight[7, 64:] = 0.0
    cut = quantize_4bit_calibrated(weight, moments_of(correlated(400, 128)), double_quant=False)
    decoded = dequantize_4bit(cut, torch.float32)
    assert torch.isfinite(decoded).all()
    assert not decoded[3:5].any()
    nested = dequantize_4bit(quantize_4bit_calibrated(weight, moments_of(correlated(400, 128))), torch.float32)
    # A nested statistic of exactly 0 cannot always be stored; its codes still stand for 0.
    assert nested[3:5].abs().max() < 1e-3


def test_a_matrix_of_zeros() -> None:
    cut = quantize_4bit_calibrated(torch.zeros(8, 64), moments_of(correlated(100, 64)))
    assert not dequantize_4bit(cut, torch.float32).any()


def test_inputs_never_seen_do_no_harm() -> None:
    inputs, weight = correlated(1000, 128), random_weight(32, 128)
    inputs[:, 5:20] = 0.0
    cut = quantize_4bit_calibrated(weight, moments_of(inputs))
    decoded = dequantize_4bit(cut, torch.float32)
    assert torch.isfinite(decoded).all()
    assert output_error(weight, cut, inputs) < 0.6 * output_error(weight, quantize_4bit(weight), inputs)
    # Unseen inputs keep a rounded weight, not an arbitrary one: about plain rounding's error.
    plain = (dequantize_4bit(quantize_4bit(weight), torch.float32) - weight)[:, 5:20].norm()
    assert (decoded - weight)[:, 5:20].norm() < 3 * plain


def test_no_inputs_at_all() -> None:
    weight = random_weight(32, 128)
    cut = quantize_4bit_calibrated(weight, Moments(128))
    assert (dequantize_4bit(cut, torch.float32) - weight).norm() < 0.13 * weight.norm()


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_fewer_samples_than_inputs(rows: int) -> None:
    inputs, weight = correlated(rows, 256), random_weight(64, 256)
    cut = quantize_4bit_calibrated(weight, moments_of(inputs))
    assert torch.isfinite(dequantize_4bit(cut, torch.float32)).all()
    assert output_error(weight, cut, inputs) < 0.6 * output_error(weight, quantize_4bit(weight), inputs)


def test_inputs_that_are_copies_of_one_another() -> None:
    inputs, weight = correlated(1000, 128), random_weight(32, 128)
    inputs[:, 64:] = inputs[:, :64]
    cut = quantize_4bit_calibrated(weight, moments_of(inputs))
    assert output_error(weight, cut, inputs) < 0.5 * output_error(weight, quantize_4bit(weight), inputs)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_size_of_inputs_does_not_matter(scale: float) -> None:
    inputs, weight = correlated(500, 128), random_weight(32, 128)
    cut = quantize_4bit_calibrated(weight, moments_of(inputs * scale))
    assert output_error(weight, cut, inputs) < 0.6 * output_error(weight, quantize_4bit(weight), inputs)


def test_blocks_of_correlations_help_less_than_all_but_help() -> None:
    inputs, weight = correlated(3000, 320), random_weight(64, 320)
    whole = output_error(weight, quantize_4bit_calibrated(weight, moments_of(inputs)), inputs)
    blocks = output_error(weight, quantize_4bit_calibrated(weight, moments_of(inputs, 128)), inputs)
    assert whole < blocks < 0.9 * output_error(weight, quantize_4bit(weight), inputs)


def test_rows_do_not_depend_on_one_another() -> None:
    # Of one shape, so that sums round alike: a tie that turns would change the rest of its row.
    inputs, weight = correlated(500, 128), random_weight(64, 128)
    other = torch.cat([weight[:10], random_weight(54, 128).flip(1)])
    first, second = (quantize_4bit_calibrated(w, moments_of(inputs), double_quant=False) for w in (weight, other))
    decoded = [dequantize_4bit(each, torch.float32) for each in (first, second)]
    assert torch.equal(decoded[0][:10], decoded[1][:10])
    assert not torch.equal(decoded[0][10:], decoded[1][10:])


def test_the_caller_keeps_its_number_of_threads() -> None:
    before = torch.get_num_threads()
    quantize_4bit_calibrated(random_weight(8, 64), moments_of(correlated(100, 64)))
    assert torch.get_num_threads() == before


def test_moments_are_the_sum_of_outer_products() -> None:
    inputs = correlated(300, 100)
    exact = inputs.double().t() @ inputs.double()
    moments = moments_of(inputs, 40)
    assert moments.sizes == [40, 40, 20]
    assert moments.count == 300
    for block, start in zip(moments.blocks, (0, 40, 80), strict=True):
        stop = start + block.shape[0]
        assert torch.allclose(block.double(), exact[start:stop, start:stop], rtol=1e-4, atol=1e-4 * exact.max().item())


@pytest.mark.parametrize(
    ("size", "memory", "expected"),
    [(2304, 2 << 30, 2304), (9216, 2 << 30, 9216), (36864, 2 << 30, 4608), (36864, 1, 64), (48, 1, 48), (100, 1, 64)],
)
def test_memory_bounds_the_width_of_blocks(size: int, memory: int, expected: int) -> None:
    assert block_width(size, memory, 64) == expected


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_many_values_find_their_nearest_codes(quant_type: Any) -> None:
    """The quick search for many values against distances in float64, and against the rule for ties: the lower code."""
    book = Codebook(quant_type, torch.device("cpu"))
    middles, inf = book.middles, torch.tensor(torch.inf)
    edges = torch.cat([middles, middles.nextafter(inf), middles.nextafter(-inf), torch.linspace(-1, 1, 4097)])
    far = torch.tensor([0.0, -0.0, 1e30, -1e30, torch.inf, -torch.inf])
    values = torch.cat([edges, far, torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 0.6])
    places = book.nearest(values.view(1, -1))
    assert torch.equal(places[0], (values[:, None] > middles).sum(1))
    finite = values.isfinite() & (values.abs() < 2)
    distance = (values[finite, None].double() - book.values.double()).abs()
    chosen = distance.gather(1, places[0][finite, None])[:, 0]
    assert (chosen - distance.amin(1)).max() < 1e-7  # middles are rounded to fp32
    assert torch.equal(book.at(places), book.values[places])
    assert book.nearest(torch.full((1 << 14,), torch.nan)).shape == (1 << 14,)
