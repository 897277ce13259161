"""Drawing each sequence's next token as a small CUDA graph, behind the step that made its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gemcut.engine.draw import DrawMode, DrawParams, common_mode, draw
from gemcut.engine.sampling import SamplingParams
from gemcut.kernels.gpu import gpu_at
from gemcut.kernels.sampling import draw as draw_tokens
from gemcut.kernels.sampling.draw import DrawCase

#: How a step's tokens are drawn: in one launch, each row with its own parameters, or all rows in one mode by PyTorch's
#: operations.
Drawing = DrawMode | Literal["one launch"]
# Rows up to which tokens are drawn by PyTorch's operations, one row after another.
_MOST_PLAIN_DRAWS = 8


def drawing_of(params: Sequence[SamplingParams], vocabulary: int, device: torch.device) -> Drawing | None:
    """How a graph draws the tokens of requests with these parameters, greedy ones among them; None: it cannot."""
    gpu = gpu_at(device)

    def in_one_launch(p: SamplingParams) -> bool:
        # What top_p and min_p keep of all tokens is often more than a launch looks at, and then the step is done again.
        certain = p.greedy or p.top_k > 0 or not DrawMode.of(p).filtered
        return certain and draw_tokens.supports(DrawCase(vocabulary, 1 if p.greedy else p.top_k), gpu) is None

    if all(map(in_one_launch, params)):
        return "one launch"
    return common_mode(params) if len(params) <= _MOST_PLAIN_DRAWS else None


class DrawGraphs:
    """Draws from ``logits`` into ``ids``, a graph for each way of drawing, captured at its first use.

    Args:
        logits: fp32 [rows, V], before the final soft-cap, as a step leaves them.
        ids: int32 [rows]: the drawn tokens take the place of what is there.
        softcap: the final soft-cap.
        pool: memory for the graphs: the steps' own, of which nothing but ``logits`` is wanted when they run.
        stream: of captures.
        slots: how many steps may be queued before the first one's tokens are taken.
    """

    def __init__(
        self, logits: Tensor, ids: Tensor, softcap: float | None, pool: Any, stream: torch.cuda.Stream, slots: int
    ) -> None:
        self.logits, self.ids, self.softcap, self._pool, self._stream = logits, ids, softcap, pool, stream
        rows = len(ids)
        self._params = torch.zeros((rows, len(DrawParams._fields)), dtype=torch.float64, device=ids.device)
        self._host_params = [
            torch.zeros((rows, len(DrawParams._fields)), dtype=torch.float64, pin_memory=True) for _ in range(slots)
        ]
        #: int32 [rows]: whether each token is right; where not, it is to be drawn by ``sampler``.
        self.exact = torch.ones(rows, dtype=torch.int32, device=ids.device)
        self._graphs: dict[tuple[Drawing, int], torch.cuda.CUDAGraph] = {}

    def graph(self, drawing: Drawing, count: int) -> torch.cuda.CUDAGraph:
        """The graph for the first ``count`` rows or more. Get it before the step is queued: a capture waits."""
        if drawing == "one launch":
            count = len(self.ids)  # one graph for all: what unused rows draw is not looked at
        if (drawing, count) not in self._graphs:
            kept, stream, current = self.ids.clone(), self._stream, torch.cuda.current_stream(self.ids.device)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                self._draw_rows(drawing, count)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with (
                torch.cuda.stream(current),  # what is current again whatever happens
                torch.cuda.graph(graph, stream=stream, pool=self._pool, capture_error_mode="thread_local"),
            ):
                self._draw_rows(drawing, count)
            current.wait_stream(stream)
            self.ids.copy_(kept)
            self._graphs[drawing, count] = graph
        return self._graphs[drawing, count]

    def queue(self, graph: torch.cuda.CUDAGraph, params: Sequence[DrawParams], rows: Sequence[int], slot: int) -> None:
        """Queue a draw with the ``params`` of each of ``rows``; ``slot`` of the step's."""
        self._host_params[slot].numpy()[list(rows)] = params
        self._params.copy_(self._host_params[slot], non_blocking=True)
        graph.replay()

    def _draw_rows(self, drawing: Drawing, count: int) -> None:
        cap = self.softcap
        if drawing == "one launch":
            draw_tokens.draw_tokens(self.logits, self._params[:count], self.ids, self.exact, softcap=cap)
            return
        for row in range(count):
            logits = self.logits[row]
            token, exact = draw(
                logits if cap is None else logits.div(cap).tanh_().mul_(cap), drawing, self._params[row]
            )
            self.ids[row].copy_(token)
            self.exact[row].copy_(exact)
