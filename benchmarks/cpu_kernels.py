"""Matrix-vector products on a CPU: ours, torch's in bf16 and bitsandbytes' NF4, against what memory can deliver.

    python benchmarks/cpu_kernels.py
    python benchmarks/cpu_kernels.py --rows 1 4 8 --formats nf4 int8 --variants avx2 --no-peers

For each shape and format there are copies of the weights that together exceed the caches, used in turn. A repetition
goes once through all copies; the read probe (the same threads summing a buffer on huge pages) runs right before and
after, and the percentage is against the mean of the two. Peers take turns with ours. Medians, with the smallest and
largest repetition.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable

import torch

from gemcut.kernels.cpu import library as cpu
from gemcut.kernels.cpu.linear import CpuLinear
from gemcut.kernels.cpu.memory import huge_empty
from gemcut.kernels.linear.case import LinearCase
from gemcut.quantization.weights import CheckpointWeight, FourBitWeight, Int8Weight, Nested

#: name -> (rows of each fused matrix, inputs)
SHAPES = {
    "2B qkv": ((2048, 1024, 1024), 2304),
    "2B o": ((2304,), 2048),
    "2B gate+up": ((9216, 9216), 2304),
    "2B down": ((2304,), 9216),
    "270M gate+up": ((2048, 2048), 640),
    "270M down": ((640,), 2048),
    "2B head": ((256000,), 2304),
}
FORMATS = ("nf4", "nf4-nested", "int8", "bf16")


def random_weight(rows: int, k: int, form: str) -> CheckpointWeight:
    """Random packed weights on huge pages."""
    if form == "bf16":
        dense = huge_empty((rows, k), torch.bfloat16)
        return dense.normal_(std=0.02)
    if form == "int8":
        codes = huge_empty((rows, k), torch.int8)
        codes.random_(-127, 128)
        return Int8Weight(codes, torch.rand(rows) + 0.5, torch.bfloat16)
    codes = huge_empty((rows * k // 2,), torch.uint8)
    codes.random_(0, 256)
    blocks = rows * k // 64
    if form == "nf4":
        absmax = huge_empty((blocks,), torch.float32)
        return FourBitWeight(codes, absmax.uniform_(0.5, 1.5), "nf4", 64, (rows, k), torch.bfloat16)
    small = huge_empty((blocks,), torch.uint8)
    small.random_(0, 256)
    nested = Nested(torch.rand(-(-blocks // 256)) * 0.1, 1.0)
    return FourBitWeight(codes, small, "nf4", 64, (rows, k), torch.bfloat16, nested)


class Probe:
    """Bytes a second that the library's threads read from a large buffer."""

    def __init__(self, size: int = 1 << 30) -> None:
        self.buffer = huge_empty((size,), torch.uint8).fill_(1)
        self.run = cpu.library().function("read", [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int], ctypes.c_uint64)

    def __call__(self) -> float:
        start = time.perf_counter()
        self.run(self.buffer.data_ptr(), self.buffer.nbytes, cpu.threads())
        return self.buffer.nbytes / (time.perf_counter() - start)


def bitsandbytes_product(rows: int, k: int) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """bitsandbytes' NF4 layer of random weights; None where it is not installed."""
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError:
        return None
    layer = Linear4bit(k, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = Params4bit(torch.randn(rows, k, dtype=torch.bfloat16), requires_grad=False, quant_type="nf4")
    return layer.to("cpu").eval()


def measure(kernels: list[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor, repeat: int) -> list[float]:
    """Seconds of one product in every repetition."""
    seconds = []
    for repetition in range(repeat + 1):
        start = time.perf_counter()
        for kernel in kernels:
            kernel(x)
        if repetition:  # the first warms up
            seconds.append((time.perf_counter() - start) / len(kernels))
    return seconds


def show(name: str, seconds: list[float], size: int, probe: float) -> None:
    """One line of the table."""
    rates = sorted(size / s / 1e9 for s in seconds)
    middle = statistics.median(rates)
    print(
        f"{name:44}{1e6 * statistics.median(seconds):9.0f} µs {middle:7.1f} ({rates[0]:.1f}–{rates[-1]:.1f}) GB/s"
        f"{probe / 1e9:8.1f}{100e9 * middle / probe:7.0f} %",
        flush=True,
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1], help="rows of x")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--variants", nargs="+", default=None, help="instruction sets; the best one if not given")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--megabytes", type=int, default=400, help="weights to rotate through, for each line")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"threads {cpu.threads()}, instruction sets {', '.join(cpu.variants())}")
    print(f"{'':44}{'median':>12}{'weights read (range)':>26}{'probe':>12}{'of it':>9}")
    probe = Probe()
    for shape in args.shapes:
        rows, k = SHAPES[shape]
        for form in args.formats:
            if shape == "2B head" and form.startswith("nf4"):
                continue
            weights = [tuple(random_weight(n, k, form) for n in rows)]
            size = sum(w.nbytes for w in weights[0])
            while len(weights) * size < args.megabytes << 20:
                weights.append(tuple(random_weight(n, k, form) for n in rows))
            out_dtype = torch.float32 if shape == "2B head" else torch.bfloat16
            cases = [LinearCase(w, torch.bfloat16, out_dtype) for w in weights]
            for m in args.rows:
                x = torch.randn(m, k, dtype=torch.bfloat16)
                for variant in args.variants or [cpu.variants()[0]]:
                    kernels = [CpuLinear(case, cpu.library(variant)) for case in cases]
                    before = probe()
                    seconds = measure(kernels, x, args.repeat)
                    show(f"{shape} {form}, {m} rows, {variant}", seconds, size, (before + probe()) / 2)
                if args.no_peers:
                    continue
                if form == "bf16":
                    dense = [torch.cat([t for t in w if isinstance(t, torch.Tensor)]) for w in weights]
                    peers = [lambda x, w=w: torch.nn.functional.linear(x, w) for w in dense]
                    before = probe()
                    seconds = measure(peers, x, args.repeat)
                    show(f"{shape} torch bf16, {m} rows", seconds, size, (before + probe()) / 2)
                if form == "nf4" and bitsandbytes_product(64, 64) is not None:
                    others = [bitsandbytes_product(sum(rows), k) for _ in weights]
                    before = probe()
                    seconds = measure([layer for layer in others if layer is not None], x, args.repeat)
                    show(f"{shape} bitsandbytes NF4, {m} rows", seconds, size, (before + probe()) / 2)


if __name__ == "__main__":
    main()
