"""The MLP's gated product of many rows in one launch, on a GPU, against float64 and beside its plain twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from four_bit_reference import FP4, NF4, dequantize, quantize
from gemcut.errors import ParameterError
from gemcut.kernels.linear import cuda as cuda_linear
from gemcut.kernels.linear import gated as gated_gemm
from gemcut.kernels.linear.case import LinearCase
from gemcut.kernels.linear.gated import gated_gemm_plain
from gemcut.model.linear import LinearLayer
from gemcut.model.ops import cuda
from gemcut.quantization.int8 import dequantize_int8, quantize_int8
from gemcut.quantization.weights import CheckpointWeight
from gpu_products import FORMATS, check_replays
from gpu_support import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("hopper")]


def random_weight(width: int, k: int) -> Tensor:
    """Gates spread over where GELU bends, ups of another size."""
    weight = torch.randn(2 * width, k, device="cuda") * k**-0.5
    weight[:width] *= 1.5
    return weight.bfloat16()


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """fp64 [m, width]; (1 + tanh u) / 2 as the sigmoid of 2 u, which keeps its digits where tanh u is almost -1."""
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=-1)
    return gate * torch.sigmoid(2 * 0.7978845608028654 * (gate + 0.044715 * gate**3)) * up


def check(m: int, width: int, k: int) -> None:
    x, weight = torch.randn(m, k, device="cuda").bfloat16(), random_weight(width, k)
    whole = torch.full((m + 1, width + 16), torch.nan, device="cuda", dtype=torch.bfloat16)
    out = whole[:m, :width]
    assert gated_gemm.gated_gemm(x, weight, out=out) is out
    want = reference(x, weight)
    # One rounding to bf16 is 0.17 % rms; the twin rounds gate, up and GELU of gate, too.
    error, twin = relative_error(out, want), relative_error(gated_gemm_plain(x, weight), want)
    assert error < 2.5e-3, (m, width, k, error)
    assert m * width < 500 or error < twin
    assert bool(whole[m:].isnan().all()), "rows behind the end were written"
    assert bool(whole[:, width:].isnan().all()), "columns behind the end were written"
    assert torch.equal(out, gated_gemm.gated_gemm(x, weight)), "the same inputs gave another result"


@pytest.mark.parametrize(("width", "k"), [(16, 8), (48, 72), (128, 64), (144, 640), (528, 136), (1152, 2304)])
def test_row_counts_around_tiles_against_float64(width: int, k: int) -> None:
    for m in (1, 7, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300, 511, 513, 1025):
        check(m, width, k)


# 27B, 9B and 2B; more tiles than processors, several bands of rows, an odd number of blocks of columns.
@pytest.mark.parametrize(
    ("m", "width", "k"),
    [(4096, 4608, 4608), (1031, 36864, 4608), (2500, 14336, 3584), (4500, 9216, 2304), (9000, 272, 72)],
)
def test_large_products_against_float64(m: int, width: int, k: int) -> None:
    check(m, width, k)


def test_each_output_uses_its_own_row_and_columns() -> None:
    m, width, k = 400, 272, 400
    x = torch.eye(m, k, device="cuda", dtype=torch.bfloat16)
    weight = (torch.randn(2 * width, k, device="cuda") * 2).bfloat16()
    want = reference(x, weight)
    assert bool(((gated_gemm.gated_gemm(x, weight).double() - want).abs() <= 0.005 * want.abs() + 1e-30).all())


def test_gates_far_from_zero() -> None:
    """Where exp overflows or vanishes: gelu(gate) is 0 or the gate itself."""
    gates = torch.tensor([-1e30, -200.0, -20.0, -3.0, -0.0, 0.0, 1e-30, 3.0, 20.0, 200.0, 1e30], device="cuda")
    x = torch.zeros(len(gates), 8, device="cuda", dtype=torch.bfloat16)
    x[:, 0], x[:, 1] = gates.bfloat16(), 1
    weight = torch.zeros(32, 8, device="cuda", dtype=torch.bfloat16)
    weight[:16, 0], weight[16:, 1] = 1, 2
    out, want = gated_gemm.gated_gemm(x, weight), reference(x, weight)
    assert bool(out.isfinite().all())
    assert bool(((out.double() - want).abs() <= 0.005 * want.abs() + 1e-30).all())


def test_strided_and_misaligned_inputs() -> None:
    weight = random_weight(144, 512)
    wide = torch.randn(700, 1024, device="cuda").bfloat16()
    for x in (wide[:, :512], wide[:, 512:], wide[:, 3:515], wide[::2, :512], wide.t().contiguous().t()[:, :512]):
        packed = x.clone(memory_format=torch.contiguous_format)
        assert torch.equal(gated_gemm.gated_gemm(x, weight), gated_gemm.gated_gemm(packed, weight))


def test_chains_in_a_graph_replay_the_same_results() -> None:
    """Products that follow each other overlap at their ends; each reads what the one before wrote."""
    weights = [random_weight(512, 512), random_weight(528, 512), random_weight(512, 528)]
    x = torch.randn(1500, 512, device="cuda").bfloat16()

    def chain() -> Tensor:
        y = x
        for _ in range(4):
            for weight in weights:
                y = gated_gemm.gated_gemm(y, weight)
                y = y / y.float().norm().to(y.dtype) * 700
        return y

    check_replays(chain)


def test_wrong_inputs_are_named() -> None:
    x, weight = torch.randn(4, 64, device="cuda").bfloat16(), random_weight(16, 64)
    wrong: list[tuple[Any, Any, Any, str]] = [
        (x.float(), weight, None, "x must be"),
        (x[:0], weight, None, "x must be"),
        (x[:, :32], weight, None, "weight must be"),
        (x, weight[:31], None, "weight must be"),
        (x, weight[:24], None, "multiple of 16"),
        (x, weight, torch.empty(4, 17, device="cuda", dtype=torch.bfloat16), "out must be"),
        (x, weight, torch.empty(4, 17, device="cuda", dtype=torch.bfloat16)[:, :16], "out needs"),
    ]
    for rows, matrix, out, text in wrong:
        with pytest.raises(ParameterError, match=text):
            gated_gemm.gated_gemm(rows, matrix, out=out)


def packed(name: str, part: Tensor) -> tuple[CheckpointWeight, Tensor]:
    """(``part`` in a format, the fp64 matrix it then stands for)."""
    if name == "bf16":
        return part, part.double()
    if name == "int8":
        int8 = quantize_int8(part)
        return int8, dequantize_int8(int8).double()
    four = quantize(part.float(), NF4 if name.startswith("nf4") else FP4, nested=name.endswith("nested"))
    return four, dequantize(four)


class Layer(LinearLayer):
    """A linear layer that is nothing but its kernel."""

    def __init__(self, case: LinearCase) -> None:
        super().__init__("layers.0.mlp.gate_up_proj")
        self.kernel = cuda_linear.prepare(case, torch.device("cuda", 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel(x)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("buffer", [None, 512 * 300 * 2])
def test_layers_of_all_formats(name: str, buffer: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through dispatch, packed gate and up decoded whole or in runs of 144 rows of each, the last one shorter."""
    if buffer is not None:
        monkeypatch.setattr(cuda_linear, "BUFFER_BYTES", buffer)
    cuda_linear._buffer.cache_clear()
    width, k = 256 + 160, 512
    parts = [packed(name, part) for part in random_weight(width, k).chunk(2)]
    stored = (torch.cat([p for p, _ in parts]),) if name == "bf16" else tuple(p for p, _ in parts)  # type: ignore[arg-type]
    layer = Layer(LinearCase(stored, torch.bfloat16, torch.bfloat16))
    exact = torch.cat([whole for _, whole in parts])
    for m in (9, 767, 768, 1024, 1025, 1220, 4096):
        x = torch.randn(m, k, device="cuda").bfloat16()
        calls: list[int] = []
        whole = layer.kernel.gated
        layer.kernel.gated = lambda x: (calls.append(len(x)), whole(x))[1]  # noqa: B023
        out = cuda.apply_gated(layer, x, 0)
        layer.kernel.gated = whole
        assert calls == ([m] if m in (768, 1024, 1220, 4096) else [])
        # The decoded weights' own rounding to bf16 comes on top: in two launches, gate and up are rounded as well.
        assert relative_error(out, reference(x, exact)) < 5e-3
    cuda_linear._buffer.cache_clear()


@pytest.mark.parametrize("name", ["nf4-nested", "int8"])
def test_layers_that_follow_each_other_decode_into_the_same_buffer(name: str) -> None:
    """Gated products and others in turns, without a wait between them: as with one after each."""
    k, width = 512, 1024
    cuda_linear._buffer.cache_clear()
    layers: list[tuple[Layer, bool]] = []
    for _ in range(3):
        parts = tuple(packed(name, part)[0] for part in random_weight(width, k).chunk(2))
        down = packed(name, (torch.randn(k, width, device="cuda") * width**-0.5).bfloat16())[0]
        layers.append((Layer(LinearCase(parts, torch.bfloat16, torch.bfloat16)), True))
        layers.append((Layer(LinearCase((down,), torch.bfloat16, torch.bfloat16)), False))
    x = torch.randn(2048, k, device="cuda").bfloat16()

    def run(wait: bool) -> Tensor:
        y = x
        for layer, gate in layers * 4:
            y = cuda.apply_gated(layer, y, 0) if gate else layer(y)  # type: ignore[assignment]
            if wait:
                torch.cuda.synchronize()
            y = y if gate else (y / y.float().norm().to(y.dtype) * 1000)
        return y

    want = run(True)
    assert bool(want.isfinite().all())
    for _ in range(5):
        assert torch.equal(run(False), want)


def test_other_matrices_have_no_gated_product() -> None:
    odd = Layer(LinearCase((torch.randn(33, 64, device="cuda").bfloat16(),), torch.bfloat16, torch.bfloat16))
    narrow = Layer(LinearCase((torch.randn(24, 64, device="cuda").bfloat16(),), torch.bfloat16, torch.bfloat16))
    assert odd.kernel.gated is None
    assert narrow.kernel.gated is None
