"""What the GPU tests of products share: a random weight in each format, what it stands for, its products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from four_bit_reference import FP4, NF4, dequantize, quantize
from gemcut.kernels.gpu import gpu_of
from gemcut.kernels.linear import bf16 as bf16_linear
from gemcut.kernels.linear import four_bit as four_bit_linear
from gemcut.kernels.linear import gemm as fused_gemm
from gemcut.kernels.linear import gemv
from gemcut.kernels.linear import int8 as int8_linear
from gemcut.quantization.weights import Int8Weight

PACKED = ["int8", "nf4", "nf4-nested", "fp4", "fp4-nested"]
FORMATS = ["bf16", *PACKED]


@dataclass
class Case:
    dense: torch.Tensor  # fp64 [n, k]: what the weight stands for
    gemv: Callable[..., torch.Tensor]
    gemm: Callable[..., torch.Tensor]  # not for bf16
    plain: Callable[[torch.Tensor], torch.Tensor]
    most_rows: int = 8  # that gemv takes


def case(name: str, n: int, k: int) -> Case:
    weight = torch.randn(n, k, device="cuda") * torch.rand(n, 1, device="cuda") * 0.1
    if name == "bf16":
        bf16 = weight.bfloat16()
        return Case(
            bf16.double(),
            lambda x, **kw: bf16_linear.bf16_gemv(x, bf16, **kw),
            lambda x, **kw: None,
            lambda x: bf16_linear.bf16_gemv_plain(x, bf16),
        )
    if name == "int8":
        absmax = weight.abs().amax(dim=1)
        codes = (weight / (absmax / 127)[:, None]).round().to(torch.int8)
        codes.view(-1)[:2] = torch.tensor([-128, 127], dtype=torch.int8)
        int8 = int8_linear.PackedInt8.of([Int8Weight(codes, absmax, torch.bfloat16)])
        return Case(
            int8.codes.double() * int8.scales.double()[:, None],
            lambda x, **kw: int8_linear.int8_gemv(x, int8, **kw),
            lambda x, **kw: fused_gemm.gemm(int8_linear.STORAGE, int8_linear.argument(int8), x, n, **kw),
            lambda x: int8_linear.int8_gemv_plain(x, int8),
        )
    four = quantize(weight, NF4 if name.startswith("nf4") else FP4, nested=name.endswith("nested"))
    packed = four_bit_linear.pack([four])
    storage = four_bit_linear.NESTED if packed.nested else four_bit_linear.FLAT
    return Case(
        dequantize(four),
        lambda x, **kw: four_bit_linear.four_bit_gemv(x, packed, **kw),
        lambda x, **kw: fused_gemm.gemm(storage, packed.argument, x, n, **kw),
        lambda x: four_bit_linear.four_bit_gemv_plain(x, [four]),
        gemv.most_rows(storage, n, k, gpu_of(torch.cuda.current_device())),
    )


def check_replays(chain: Callable[[], torch.Tensor]) -> None:
    """A graph of the chain gives at each replay what the chain gives by itself."""
    eager = chain()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(5):
        captured.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, eager)
