"""Times the GPU's kernels at 27B's shapes: `python benchmarks/gpu_kernels.py --formats nf4 --rows 1,64`.

`--kernels attention,rows,gated` times what stands between the products instead: attention of prompts and of single
tokens; norms, GeGLU, rotation, embedding and the draw of a token; gate, up and GeGLU of many rows in one launch.

Each figure is one product inside a CUDA graph of many, each with a weight of its own: together several times the L2
cache, as in a real decode step. Random data. "ours" is what the engine would run for so many rows, given x as it gives
it: in order where norms and GeGLU write it so (all but o and the head). Beside it decoding to bf16 and cuBLAS, and
torch.mm of bf16 weights, the peer. Bytes are what a product must read and write once; "% of
read" compares with the read bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import functools
import platform
import statistics
from collections.abc import Callable

import torch
from gpu_bandwidth import read_bandwidth
from gpu_layer_kernels import HEADER, decode_attentions, draws, gated_products, prefill_attention, row_kernels
from gpu_timing import replay_seconds
from options import names_of, row_counts
from torch import Tensor

from gemcut.kernels.linear import cuda as cuda_linear
from gemcut.kernels.linear.case import LinearCase
from gemcut.kernels.linear.layout import Ordered, order_x
from gemcut.kernels.runtime import nvrtc
from gemcut.quantization.weights import CheckpointWeight, FourBitWeight, Int8Weight, Nested

SHAPES = {
    "gate+up": (73728, 4608),
    "down": (4608, 36864),
    "qkv": (8192, 4608),
    "o": (4608, 4096),
    "gate": (36864, 4608),
    "q": (4096, 4608),
    "k": (2048, 4608),
    "head": (256000, 4608),
}
FORMATS = ("nf4", "fp4", "nf4-flat", "fp4-flat", "int8", "bf16")
GROUPS = ("products", "attention", "rows", "gated")
LAYER_KERNELS = {
    "attention": (prefill_attention, decode_attentions),
    "rows": (row_kernels, draws),
    "gated": (gated_products,),
}
LINEARS = "gate+up,down,qkv,o"
ROTATED_BYTES = 600 << 20
Product = Callable[[Tensor | Ordered], object]


def random_weight(name: str, n: int, k: int) -> CheckpointWeight:
    """A random matrix: bf16, int8, or nf4 and fp4 with double quantization or ("-flat") without."""
    if name == "bf16":
        return torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    if name == "int8":
        codes = torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8)
        return Int8Weight(codes, torch.rand(n, device="cuda"), torch.bfloat16)
    blocks = n * k // 64
    codes = torch.randint(0, 256, (n * k // 2,), device="cuda", dtype=torch.uint8)
    if name.endswith("-flat"):
        nested, absmax = None, torch.rand(blocks, device="cuda")
    else:
        nested = Nested(torch.rand(-(-blocks // 256), device="cuda"), 0.5)
        absmax = torch.randint(0, 256, (blocks,), device="cuda", dtype=torch.uint8)
    return FourBitWeight(codes, absmax, "fp4" if name.startswith("fp4") else "nf4", 64, (n, k), torch.bfloat16, nested)


def products(name: str, n: int, k: int, head: bool) -> tuple[list[Product], list[Product], int]:
    """(the engine's products, the same dequantized for cuBLAS, bytes of a weight); weights enough to miss the cache."""
    ours: list[Product] = []
    dequantized: list[Product] = []
    nbytes = 0
    out_dtype = torch.float32 if head else torch.bfloat16
    while len(ours) < 2 or nbytes * len(ours) < ROTATED_BYTES:
        weight = random_weight(name, n, k)
        kernel = cuda_linear.prepare(LinearCase((weight,), torch.bfloat16, out_dtype), torch.device("cuda", 0))
        nbytes = weight.nbytes
        ours.append(kernel)
        dequantized.append(kernel.many)  # type: ignore[attr-defined]
    return ours, dequantized, nbytes


def as_given(product: Product, linear: str, x: Tensor, how: str) -> Tensor | Ordered:
    """x as the kernel before this product leaves it, or as ``how`` says."""
    plain = linear in ("o", "head") if how == "engine" else how == "rows"
    groups = 0 if plain else product.groups(len(x))  # type: ignore[attr-defined]
    return order_x(x, groups) if groups else x


def time_products(runs: list[Product], x: Tensor | Ordered, repetitions: int) -> list[float]:
    """Seconds a product, one figure for each replay of a graph over all weights."""
    rows = x.m if isinstance(x, Ordered) else len(x)
    rounds = max(1, (16 if rows < 256 else 4) // len(runs))
    return replay_seconds([functools.partial(run, x) for run in runs], repetitions, rounds)


@functools.cache
def bf16_seconds(linear: str, m: int, repetitions: int) -> float:
    """Median seconds of torch.mm with a bf16 weight of this shape."""
    n, k = SHAPES[linear]
    weights = [random_weight("bf16", n, k) for _ in range(2 if n * k > 100 << 20 else 8)]
    out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
    runs: list[Product] = [lambda x, w=weight: torch.mm(x, w.T, out=out) for weight in weights]  # type: ignore[misc]
    return statistics.median(time_products(runs, torch.randn(m, k, device="cuda").bfloat16(), repetitions))


def print_products(options: argparse.Namespace, bandwidth: float) -> None:
    print(
        f"{'format':9}{'linear':8}{'m':>5}{'ours':>9}{'spread':>16}{'of m=1':>7}{'TFLOP/s':>8}{'% of read':>10}"
        f"{'dequant':>9}{'bf16 mm':>9}"
    )
    for name in options.formats:
        for linear in options.linears:
            n, k = SHAPES[linear]
            ours, dequantized, nbytes = products(name, n, k, linear == "head")
            first = None
            for m in options.rows:
                x = torch.randn(m, k, device="cuda").bfloat16()
                times = time_products(ours, as_given(ours[0], linear, x, options.x), options.repetitions)
                median = statistics.median(times)
                first = first or median
                moved = nbytes + m * k * 2 + m * n * (4 if linear == "head" else 2)
                spread = f"{min(times) * 1e6:.1f}-{max(times) * 1e6:.1f}"
                whole = statistics.median(time_products(dequantized[:2], x, options.repetitions)) if m > 8 else 0.0
                peer = bf16_seconds(linear, m, options.repetitions)
                print(
                    f"{name:9}{linear:8}{m:5}{median * 1e6:9.1f}{spread:>16}{median / first:7.2f}"
                    f"{2e-12 * m * n * k / median:8.0f}{moved / median / bandwidth * 100:9.1f}%"
                    f"{whole * 1e6:9.1f}{peer * 1e6:9.1f}",
                    flush=True,
                )
            del ours, dequantized


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the GPU's kernels at Gemma 2 27B's shapes.")
    for option, known, default in (
        ("kernels", GROUPS, "products"),
        ("formats", FORMATS, "nf4,fp4,nf4-flat,int8"),
        ("linears", SHAPES, LINEARS),
    ):
        of = "" if option == "kernels" else "of products, "
        parser.add_argument(
            f"--{option}",
            type=names_of(option, known),
            default=default,
            help=f"{of}comma-separated: {', '.join(known)}",
        )
    rows = "1,8,16,32,64,128,256,512,1024,4096"
    parser.add_argument("--rows", type=row_counts, default=rows, help="of products, comma-separated")
    parser.add_argument(
        "--x", default="engine", choices=("engine", "rows", "ordered"), help="how products get x; rows: as plain rows"
    )
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    reason = nvrtc.unavailable_reason()
    if reason is not None:
        parser.error(reason)
    print(f"device {torch.cuda.get_device_name()}, torch {torch.__version__}, python {platform.python_version()}")
    bandwidth = read_bandwidth()
    print(
        f"read bandwidth {bandwidth / 1e9:.0f} GB/s (4 GiB, best); {options.repetitions} replays a figure, median, us"
    )
    for group in options.kernels:
        if group == "products":
            print_products(options, bandwidth)
            continue
        print(HEADER)
        for kinds in LAYER_KERNELS[group]:
            for timed in kinds(options.repetitions):
                print(timed.line(bandwidth), flush=True)
    print(f"read bandwidth again {read_bandwidth() / 1e9:.0f} GB/s")


if __name__ == "__main__":
    main()
