"""What the GPU tests of products share: a random weight in each format, what it stands for, its products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from four_bit_reference import FP4, NF4, dequantize, quantize
from gemcut.kernels.gpu import gpu_of
from gemcut.kernels.linear import bf16 as bf16_matvec
from gemcut.kernels.linear import four_bit as nf4_matvec
from gemcut.kernels.linear import gemm as packed_gemm
from gemcut.kernels.linear import gemv as matvec
from gemcut.kernels.linear import int8 as int8_matvec
from gemcut.quantization.weights import Int8Weight

PACKED = ["int8", "nf4", "nf4-nested", "fp4", "fp4-nested"]
FORMATS = ["bf16", *PACKED]


@dataclass
class Case:
    dense: torch.Tensor  # fp64 [n, k]: what the weight stands for
    matvec: Callable[..., torch.Tensor]
    gemm: Callable[..., torch.Tensor]  # not for bf16
    plain: Callable[[torch.Tensor], torch.Tensor]
    most_rows: int = 8  # that matvec takes


def case(name: str, n: int, k: int) -> Case:
    weight = torch.randn(n, k, device="cuda") * torch.rand(n, 1, device="cuda") * 0.1
    if name == "bf16":
        bf16 = weight.bfloat16()
        return Case(
            bf16.double(),
            lambda x, **kw: bf16_matvec.bf16_matvec(x, bf16, **kw),
            lambda x, **kw: None,
            lambda x: bf16_matvec.bf16_matvec_plain(x, bf16),
        )
    if name == "int8":
        absmax = weight.abs().amax(dim=1)
        codes = (weight / (absmax / 127)[:, None]).round().to(torch.int8)
        codes.view(-1)[:2] = torch.tensor([-128, 127], dtype=torch.int8)
        int8 = int8_matvec.PackedInt8.of([Int8Weight(codes, absmax, torch.bfloat16)])
        return Case(
            int8.codes.double() * int8.scales.double()[:, None],
            lambda x, **kw: int8_matvec.int8_matvec(x, int8, **kw),
            lambda x, **kw: packed_gemm.gemm(int8_matvec.STORAGE, int8_matvec.argument(int8), x, n, **kw),
            lambda x: int8_matvec.int8_matvec_plain(x, int8),
        )
    four = quantize(weight, NF4 if name.startswith("nf4") else FP4, nested=name.endswith("nested"))
    packed = nf4_matvec.pack([four])
    storage = nf4_matvec.NESTED if packed.nested else nf4_matvec.FLAT
    return Case(
        dequantize(four),
        lambda x, **kw: nf4_matvec.nf4_matvec(x, packed, **kw),
        lambda x, **kw: packed_gemm.gemm(storage, packed.argument, x, n, **kw),
        lambda x: nf4_matvec.nf4_matvec_plain(x, [four]),
        matvec.most_rows(storage, n, k, gpu_of(torch.cuda.current_device())),
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
