"""The sampler's time a step on a CPU, for rows over a vocabulary of 256,000: each kind of request, and a mix of all.

    python benchmarks/cpu_sampler.py

Milliseconds of processor time, so that a busy machine does not spoil them; with one thread they are those of the clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from gemcut.engine import Request, SamplingParams
from gemcut.engine.request import Sequence
from gemcut.engine.sampler import sample

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "all tokens": {},
    "top-k, top-p": {"top_k": 40, "top_p": 0.95},
    "top-p": {"top_p": 0.9},
    "min-p": {"min_p": 0.05},
    "repetition penalty": {"temperature": 0.7, "top_k": 64, "repetition_penalty": 1.1},
    "log-probabilities": {"frequency_penalty": 0.3, "logprobs": 5},
    "bias": {"temperature": 0, "logit_bias": dict.fromkeys(range(20), 1.0)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1,8,64")
    parser.add_argument("--vocabulary", type=int, default=256_000)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, kinds in {**{name: [kind] for name, kind in KINDS.items()}, "mixed": list(KINDS.values())}.items():
        for rows in map(int, options.rows.split(",")):
            generator = torch.Generator().manual_seed(0)
            logits = torch.randn(rows, options.vocabulary, generator=generator) * 2
            logits[:, :200] += torch.linspace(16, 4, 200)  # some tokens that are likely, as a model's are
            sequences = [
                Sequence(
                    Request(prompt_ids=tuple(range(500)), params=SamplingParams(seed=i, **kinds[(i + 4) % len(kinds)]))
                )
                for i in range(rows)
            ]
            times = []
            for _ in range(options.repetitions):
                start = time.process_time()
                sample(logits, sequences)
                times.append(1e3 * (time.process_time() - start))
            print(f"{name}, {rows} rows: {statistics.median(times):.2f} ms ({min(times):.2f}–{max(times):.2f})")


if __name__ == "__main__":
    main()
