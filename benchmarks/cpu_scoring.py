"""Scoring pairs of continuations on a CPU, beside the prefill of as many tokens: tok/s of all texts' tokens.

    python benchmarks/cpu_scoring.py --pairs valid.jsonl --rows 100

``--pairs`` is a file of JSON lines with ``goal``, ``sol1`` and ``sol2``, as PIQA's. Three figures: prefill alone, of as
many random tokens in texts of the same lengths; the continuations scored behind their contexts; every token scored.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gemcut import Gemma, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=100, help="so many questions")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    gemma = Gemma.load(options.model, dtype=options.dtype, progress=False)
    texts, starts = [], []
    for line in options.pairs.read_text().splitlines()[: options.rows]:
        row = json.loads(line)
        context = gemma.encode(f"Question: {row['goal']}\nAnswer:")
        for name in ("sol1", "sol2"):
            ids = gemma.encode(f"Question: {row['goal']}\nAnswer: {row[name]}")
            same = (a == b for a, b in zip(context, ids, strict=False))
            texts.append(ids)
            starts.append(next((place for place, equal in enumerate(same) if not equal), len(context)))
    count, chance = sum(map(len, texts)), random.Random(0)

    def prefill() -> None:
        fresh = [[chance.randrange(1000, 200_000) for _ in ids] for ids in texts]
        gemma.complete(fresh, SamplingParams(max_new_tokens=0))

    def afresh(work: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            gemma.engine.cache.forget()  # nothing runs, and no beginning of the last round may be found
            return work()

        return run

    work: dict[str, Callable[[], object]] = {
        "prefill alone": prefill,
        "continuations scored": afresh(lambda: gemma.score(texts, start=starts)),
        "every token scored": afresh(lambda: gemma.score(texts)),
    }
    print(f"{len(texts)} texts, {count} tokens, {gemma.dtype}, {torch.get_num_threads()} threads of PyTorch")
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(options.repetitions):  # in turns: the machine's speed drifts
        for name, run in work.items():
            start = time.perf_counter()
            run()
            found[name].append(count / (time.perf_counter() - start))
    for name, speeds in found.items():
        speeds.sort()
        print(f"{name}: {speeds[len(speeds) // 2]:.0f} tok/s ({speeds[0]:.0f}–{speeds[-1]:.0f})")


if __name__ == "__main__":
    main()
