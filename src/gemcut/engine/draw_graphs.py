"""Drawing each sequence's next token as a small CUDA graph, behind the step that made its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gemcut.engine.draw import NUMBERS, Kind, draw
from gemcut.kernels.gpu import gpu_at
from gemcut.kernels.sampling import draw as draw_tokens
from gemcut.kernels.sampling.draw import DrawCase

# Rows up to which tokens are drawn in a graph by PyTorch's operations, one row after another.
_MOST_PLAIN_DRAWS = 8


def most_draws(kind: Kind, vocabulary: int, most: int, device: torch.device) -> int:
    """Sequences up to which tokens are drawn in a graph, where a step has ``most`` at most."""
    return most if _in_one_launch(kind, vocabulary, device) else _MOST_PLAIN_DRAWS


def _in_one_launch(kind: Kind, vocabulary: int, device: torch.device) -> bool:
    return draw_tokens.supports(DrawCase(vocabulary, kind.top_k, kind.filtered), gpu_at(device)) is None


class DrawGraphs:
    """Draws from ``logits`` into ``ids``, a graph for each kind of request, captured at its first use.

    Args:
        logits: fp32 [rows, V], before the final soft-cap, as a step leaves them.
        ids: int32 [rows]: the drawn tokens take the place of what is there.
        softcap: the final soft-cap.
        pool: memory for the graphs: the step's own, of which nothing but ``logits`` is wanted when they run.
        slots: how many steps may be queued before the first one's tokens are taken.
    """

    def __init__(self, logits: Tensor, ids: Tensor, softcap: float | None, pool: Any, slots: int) -> None:
        self.logits, self.ids, self.softcap, self._pool = logits, ids, softcap, pool
        rows = len(ids)
        self._numbers = torch.zeros((rows, NUMBERS), dtype=torch.float64, device=ids.device)
        self._host_numbers = [torch.zeros((rows, NUMBERS), dtype=torch.float64, pin_memory=True) for _ in range(slots)]
        #: int32 [rows]: whether each token is right; where not, it is to be drawn by ``sampler``.
        self.sure = torch.ones(rows, dtype=torch.int32, device=ids.device)
        self._graphs: dict[tuple[Kind, int], torch.cuda.CUDAGraph] = {}

    def graph(self, kind: Kind, count: int) -> torch.cuda.CUDAGraph:
        """The graph for the first ``count`` rows or more. Get it before the step is queued: a capture waits."""
        if self._in_one_launch(kind):
            count = len(self.ids)  # one graph for all: what unused rows draw is not looked at
        if (kind, count) not in self._graphs:
            kept = self.ids.clone()
            stream = torch.cuda.Stream(self.ids.device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(self.ids.device))
            with torch.cuda.stream(stream):
                self._draw_rows(kind, count)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, pool=self._pool, capture_error_mode="thread_local"):
                self._draw_rows(kind, count)
            torch.cuda.current_stream(self.ids.device).wait_stream(stream)
            self.ids.copy_(kept)
            self._graphs[kind, count] = graph
        return self._graphs[kind, count]

    def queue(self, graph: torch.cuda.CUDAGraph, numbers: Sequence[Sequence[float]], slot: int) -> None:
        """Queue a draw with each sequence's ``numbers`` (gemcut.engine.draw); ``slot`` of the step's."""
        self._host_numbers[slot].numpy()[: len(numbers)] = numbers
        self._numbers.copy_(self._host_numbers[slot], non_blocking=True)
        graph.replay()

    def _in_one_launch(self, kind: Kind) -> bool:
        return _in_one_launch(kind, self.logits.shape[1], self.logits.device)

    def _draw_rows(self, kind: Kind, count: int) -> None:
        cap = self.softcap
        if self._in_one_launch(kind):
            numbers = self._numbers[:count]
            draw_tokens.draw_tokens(self.logits, numbers, self.ids, self.sure, top_k=kind.top_k, softcap=cap)
            return
        for row in range(count):
            logits = self.logits[row]
            token, sure = draw(logits if cap is None else logits.div(cap).tanh_().mul_(cap), kind, self._numbers[row])
            self.ids[row].copy_(token)
            self.sure[row].copy_(sure)
