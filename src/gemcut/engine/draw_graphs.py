"""Drawing each sequence's next token as a small CUDA graph, behind the step that made its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gemcut.engine.draw import DrawMode, DrawParams, draw
from gemcut.kernels.gpu import gpu_at
from gemcut.kernels.sampling import draw as draw_tokens
from gemcut.kernels.sampling.draw import DrawCase

# Rows up to which tokens are drawn in a graph by PyTorch's operations, one row after another.
_MOST_PLAIN_DRAWS = 8


def most_draws(mode: DrawMode, vocabulary: int, most: int, device: torch.device) -> int:
    """Sequences up to which tokens are drawn in a graph, where a step has ``most`` at most."""
    return most if _in_one_launch(mode, vocabulary, device) else _MOST_PLAIN_DRAWS


def _in_one_launch(mode: DrawMode, vocabulary: int, device: torch.device) -> bool:
    return draw_tokens.supports(DrawCase(vocabulary, mode.top_k, mode.filtered), gpu_at(device)) is None


class DrawGraphs:
    """Draws from ``logits`` into ``ids``, a graph for each mode of drawing, captured at its first use.

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
        self._params = torch.zeros((rows, len(DrawParams._fields)), dtype=torch.float64, device=ids.device)
        self._host_params = [
            torch.zeros((rows, len(DrawParams._fields)), dtype=torch.float64, pin_memory=True) for _ in range(slots)
        ]
        #: int32 [rows]: whether each token is right; where not, it is to be drawn by ``sampler``.
        self.exact = torch.ones(rows, dtype=torch.int32, device=ids.device)
        self._graphs: dict[tuple[DrawMode, int], torch.cuda.CUDAGraph] = {}

    def graph(self, mode: DrawMode, count: int) -> torch.cuda.CUDAGraph:
        """The graph for the first ``count`` rows or more. Get it before the step is queued: a capture waits."""
        if self._in_one_launch(mode):
            count = len(self.ids)  # one graph for all: what unused rows draw is not looked at
        if (mode, count) not in self._graphs:
            kept = self.ids.clone()
            stream = torch.cuda.Stream(self.ids.device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(self.ids.device))
            with torch.cuda.stream(stream):
                self._draw_rows(mode, count)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, pool=self._pool, capture_error_mode="thread_local"):
                self._draw_rows(mode, count)
            torch.cuda.current_stream(self.ids.device).wait_stream(stream)
            self.ids.copy_(kept)
            self._graphs[mode, count] = graph
        return self._graphs[mode, count]

    def queue(self, graph: torch.cuda.CUDAGraph, params: Sequence[DrawParams], slot: int) -> None:
        """Queue a draw with each sequence's ``params``; ``slot`` of the step's."""
        self._host_params[slot].numpy()[: len(params)] = params
        self._params.copy_(self._host_params[slot], non_blocking=True)
        graph.replay()

    def _in_one_launch(self, mode: DrawMode) -> bool:
        return _in_one_launch(mode, self.logits.shape[1], self.logits.device)

    def _draw_rows(self, mode: DrawMode, count: int) -> None:
        cap = self.softcap
        if self._in_one_launch(mode):
            params = self._params[:count]
            draw_tokens.draw_tokens(self.logits, params, self.ids, self.exact, top_k=mode.top_k, softcap=cap)
            return
        for row in range(count):
            logits = self.logits[row]
            token, exact = draw(logits if cap is None else logits.div(cap).tanh_().mul_(cap), mode, self._params[row])
            self.ids[row].copy_(token)
            self.exact[row].copy_(exact)
