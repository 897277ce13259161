"""How the GPU benchmarks time kernels: replays of a CUDA graph that holds many of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def replay_seconds(runs: Sequence[Callable[[], object]], repetitions: int, rounds: int = 1) -> list[float]:
    """Seconds a run, one figure for each replay of a graph of ``rounds`` times all ``runs``."""
    for run in runs[:2]:  # compiles
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for run in runs:
                run()
    seconds = []
    for repetition in range(repetitions + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if repetition >= 3:
            seconds.append(start.elapsed_time(end) / 1000 / (rounds * len(runs)))
    return seconds
