"""Times the GPU kernels at Gemma 2 27B's shapes: `python benchmarks/gpu_kernels.py --formats nf4 --rows 1,8`.

Each figure is one launch inside a CUDA graph of many launches, each with a weight of its own: together several times
the L2 cache, as in a real decode step. Random data. Bytes are what the kernel must read and write once; "% of read"
compares with the read bandwidth measured in the same run. "torch" is torch.mm on bf16, the peer.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gemcut.kernels import bf16_matvec, int8_matvec, nf4_matvec, nvrtc
from gemcut.kernels.bandwidth import read_bandwidth
from gemcut.quantization.weights import FourBitWeight, Nested

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
FORMATS = {
    "nf4": [name for name in SHAPES if name != "head"],
    "int8": list(SHAPES),
    "bf16": list(SHAPES),
    "torch": list(SHAPES),
}
ROTATED_BYTES = 600 << 20


@dataclass
class Weight:
    run: Callable[[torch.Tensor, torch.Tensor], object]
    nbytes: int


def random_weight(name: str, n: int, k: int, head: bool) -> Weight:
    if name == "bf16":
        bf16 = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        if head:
            return Weight(lambda x, y: bf16_matvec.bf16_head(x, bf16, 30.0), bf16.numel() * 2)
        return Weight(lambda x, y: bf16_matvec.bf16_matvec(x, bf16, out=y), bf16.numel() * 2)
    if name == "torch":
        dense = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        return Weight(lambda x, y: torch.mm(x, dense.T, out=y), dense.numel() * 2)
    if name == "int8":
        values = torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8)
        int8 = int8_matvec.Int8Rows(values, torch.rand(n, device="cuda"))
        if head:
            return Weight(lambda x, y: int8_matvec.int8_head(x, int8, 30.0), n * k + n * 4)
        return Weight(lambda x, y: int8_matvec.int8_matvec(x, int8, out=y), n * k + n * 4)
    blocks = n * k // 64
    codes = torch.randint(0, 256, (n * k // 2,), device="cuda", dtype=torch.uint8)
    absmax = torch.randint(0, 256, (blocks,), device="cuda", dtype=torch.uint8)
    nested = Nested(torch.rand(-(-blocks // 256), device="cuda"), 0.5)
    packed = nf4_matvec.pack([FourBitWeight(codes, absmax, "nf4", 64, (n, k), torch.bfloat16, nested)])
    return Weight(lambda x, y: nf4_matvec.nf4_matvec(x, packed, out=y), packed.nbytes)


def time_launches(weights: list[Weight], m: int, n: int, k: int, repetitions: int) -> list[float]:
    """Seconds a launch, one figure for each replay of a graph over all weights."""
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    y = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
    rounds = max(1, 16 // len(weights))
    for weight in weights:
        weight.run(x, y)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for weight in weights:
                weight.run(x, y)
    times = []
    for repetition in range(repetitions + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if repetition >= 3:
            times.append(start.elapsed_time(end) / 1000 / (rounds * len(weights)))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the GPU kernels at Gemma 2 27B's shapes.")
    parser.add_argument("--formats", default="nf4,int8,bf16,torch")
    parser.add_argument("--rows", default="1,2,4,8")
    parser.add_argument("--repetitions", type=int, default=20)
    options = parser.parse_args()
    reason = nvrtc.unavailable_reason()
    if reason is not None:
        parser.exit(2, f"{reason}\n")
    print(f"device {torch.cuda.get_device_name()}, torch {torch.__version__}, python {platform.python_version()}")
    before = read_bandwidth()
    print(f"read bandwidth {before / 1e9:.0f} GB/s (4 GiB, best); {options.repetitions} replays a figure")
    print(f"{'format':7}{'linear':9}{'n x k':>14}{'m':>3}{'MB':>8}{'us':>9}{'spread':>14}{'GB/s':>7}{'% of read':>10}")
    for name in options.formats.split(","):
        for linear in FORMATS[name]:
            n, k = SHAPES[linear]
            first = random_weight(name, n, k, linear == "head")
            count = max(2, -(-ROTATED_BYTES // first.nbytes))
            weights = [first] + [random_weight(name, n, k, linear == "head") for _ in range(count - 1)]
            for m in (int(rows) for rows in options.rows.split(",")):
                times = time_launches(weights, m, n, k, options.repetitions)
                median = statistics.median(times)
                moved = first.nbytes + m * k * 2 + m * n * (4 if linear == "head" and name != "torch" else 2)
                spread = f"{min(times) * 1e6:.2f}-{max(times) * 1e6:.2f}"
                print(
                    f"{name:7}{linear:9}{f'{n} x {k}':>14}{m:3}{moved / 1e6:8.1f}{median * 1e6:9.2f}{spread:>14}"
                    f"{moved / median / 1e9:7.0f}{moved / median / before * 100:9.1f}%",
                    flush=True,
                )
            del weights, first
    print(f"read bandwidth again {read_bandwidth() / 1e9:.0f} GB/s")


if __name__ == "__main__":
    main()
