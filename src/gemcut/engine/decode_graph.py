"""One new token for each of a few sequences as one CUDA graph: from token ids to the likeliest next tokens.

The graph leaves the next step's inputs where it reads its own, so it can be replayed ahead of the host: while the host
looks at one token, the next is being computed. Requests that draw their tokens have a second, small graph behind it
that puts the drawn tokens in place of the likeliest.

A step computed ahead serves whoever of its sequences is still there: where one has ended its row is not looked at, and
marked as unused before the next step is queued; where a prompt comes in between, the others' tokens are taken from it.
What it wrote for a sequence that has ended is one place in that one's blocks; whoever gets the block writes later.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemcut.engine.cache import PagedCache, Tables
from gemcut.engine.draw import DrawParams
from gemcut.engine.draw_graphs import DrawGraphs, Drawing
from gemcut.engine.tensors import indices
from gemcut.kernels.attention import decode as decode_attention
from gemcut.kernels.gpu import NEEDS_GPU, gpu_at
from gemcut.kernels.megakernel.decode_step import DecodeStep
from gemcut.kernels.rowwise import geglu, norm
from gemcut.kernels.runtime import nvrtc
from gemcut.kernels.sampling import argmax
from gemcut.model import Model
from gemcut.model.key_values import KeyValues, Span
from gemcut.model.ops.base import NetworkCase
from gemcut.model.ops.cuda_megakernel import decode_megakernel

#: Rows a graph has: a batch takes the smallest that holds it.
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_AHEAD = 2  # steps in flight at most


def _rows_for(count: int) -> int:
    return next(size for size in SIZES if size >= count)


def refusal(model: Model, block_size: int, device: torch.device) -> str | None:
    """None where decode graphs serve, else one line that says why not."""
    gpu = gpu_at(device)
    if gpu is None:
        return NEEDS_GPU
    if model.embed.part is not None:
        return "the network is split over several GPUs"
    if model.kernels not in ("auto", "cuda"):
        return f"kernels={model.kernels!r} was asked for"
    if model.asked_attention == "eager":
        return "attn_implementation='eager' was asked for"
    if model.dtype != torch.bfloat16:
        return f"computes in bfloat16 only, not in {model.dtype}"
    if any(getattr(module, "activation_threshold", None) is not None for module in model.modules()):
        return "LLM.int8()'s arithmetic (activation_threshold) looks at activations from the host"
    case = NetworkCase(model.config, model.dtype)
    return (
        nvrtc.unavailable_reason()
        or norm.supports(case.rowwise, gpu)
        or geglu.supports(case.rowwise, gpu)
        or decode_attention.supports(case.decode_attention(block_size), gpu)
    )


class DecodeKeyValues(KeyValues):
    """What the layers ask of a batch's keys and values, at fixed places."""

    def __init__(self, cache: PagedCache, positions: Tensor, full: Tensor, sliding: Tensor) -> None:
        self.spans: tuple[Span, ...] = ()  # they change from step to step; positions and tables say all
        self.positions, self.block_size = positions, cache.block_size
        self._layers, self._tables = cache.layers(), {"full": full, "sliding": sliding}

    @property
    def decode(self) -> DecodeKeyValues:
        return self

    def storage(self, layer: int) -> Tensor:
        return self._layers[layer][1]

    def block_table(self, layer: int) -> Tensor:
        return self._tables[self._layers[layer][0]]


class DecodeGraph:
    """The network for ``rows`` sequences of one new token each, captured once.

    ``ids`` and ``positions`` (int32 [rows]) and the block tables are its inputs; a negative position marks an unused
    row. After a replay ``ids`` holds the likeliest tokens, ``positions`` have moved on by one (to -1 where a row's
    logits are not finite), ``logits`` is fp32 [rows, V], before the final soft-cap. ``one_launch=False`` keeps several
    launches a layer where one would serve. Graphs of one ``pool`` share all memory but their logits: one runs at a
    time. They are captured on one ``stream``, since freed memory serves the stream it was taken on.
    """

    def __init__(
        self,
        model: Model,
        cache: PagedCache,
        device: torch.device,
        rows: int,
        most_blocks: int,
        *,
        pool: Any = None,
        stream: torch.cuda.Stream | None = None,
        one_launch: bool = True,
    ) -> None:
        self.model, self.cache, self.rows, self.most_blocks = model, cache, rows, most_blocks
        width = 2 + 2 * most_blocks
        self._host = torch.zeros((rows, width), dtype=torch.int32, pin_memory=True)
        self._inputs = torch.zeros(rows * width, dtype=torch.int32, device=device)
        blocks = rows * most_blocks
        self.ids, self.positions = self._inputs[:rows], self._inputs[rows : 2 * rows]
        self.full = self._inputs[2 * rows : 2 * rows + blocks].view(rows, most_blocks)
        self.sliding = self._inputs[2 * rows + blocks :].view(rows, most_blocks)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        #: Of each step in flight: ids, positions after it, and whether each id is right where they were drawn.
        self._results = [torch.ones(3, rows, dtype=torch.int32, pin_memory=True) for _ in range(_AHEAD)]
        self._events = [torch.cuda.Event() for _ in range(_AHEAD)]  # type: ignore[no-untyped-call]
        self._launched = self._taken = 0
        self._blocks = [0] * rows  # of each row, what the pinned memory has of its table
        self._used: list[int] = []  # rows whose positions are not negative
        self._kv = DecodeKeyValues(cache, self.positions, self.full, self.sliding)
        #: All layers in one launch where that serves a single sequence; else ``step_refusal`` says why not.
        self.step: DecodeStep | None = None
        self.step_refusal: str | None = "not asked for" if rows == 1 else "several sequences"
        if rows == 1 and one_launch:
            made = decode_megakernel(model, self._kv, self.ids, (self.full, self.sliding))
            self.step, self.step_refusal = (None, made) if isinstance(made, str) else (made, None)
        stream = stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.logits = self._capture(device, pool, stream)
        cap = model.config.final_logit_softcapping
        self._draws = DrawGraphs(self.logits, self.ids, cap, self.graph.pool(), stream, _AHEAD)

    def _capture(self, device: torch.device, pool: Any, stream: torch.cuda.Stream) -> Tensor:
        self.positions.fill_(-1)
        current = torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):  # compiles kernels and makes their counters, which must not be captured
            self._forward()
        stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.stream(current),  # what is current again whatever happens
            torch.cuda.graph(self.graph, stream=stream, pool=pool),
        ):
            logits = self._forward()
        current.wait_stream(stream)
        return logits

    def _forward(self) -> Tensor:
        model, config = self.model, self.model.config
        if self.step is not None:
            logits = model.embed.logits(self.step())
        else:
            logits = model.next_logits(self.ids, self.positions, self._kv)
        argmax.argmax(logits, self.ids, self.positions, softcap=config.final_logit_softcapping)
        return logits

    def load(self, ids: Sequence[int], positions: Sequence[int], tables: Sequence[Tables]) -> None:
        """Set the next step's inputs; what was launched ahead and not taken is thrown away."""
        self._taken = self._launched
        self._copied.synchronize()  # the last upload has left the pinned memory
        rows, count = self.rows, len(ids)
        host = self._host.view(-1).numpy()
        host[:rows] = 0
        host[rows : 2 * rows] = -1
        host[:count] = ids
        host[rows : rows + count] = positions
        self._blocks, self._used = [0] * rows, list(range(count))
        self._write_tables(self._used, tables)
        self._inputs.copy_(self._host.view(-1), non_blocking=True)
        self._copied.record()

    def _write_tables(self, rows: Sequence[int], tables: Sequence[Tables]) -> None:
        """Into the pinned memory, what it does not have yet; ``_blocks`` says how many blocks of each row it has."""
        blocks = self.rows * self.most_blocks
        host = self._host.view(-1).numpy()[2 * self.rows :]
        full, sliding = (part.reshape(self.rows, -1) for part in (host[:blocks], host[blocks:]))
        for row, table in zip(rows, tables, strict=True):
            have, now = self._blocks[row], len(table.full)
            if have < now:
                full[row, have:now] = table.full[have:]
                sliding[row, have:now] = table.sliding[have:]
                self._blocks[row] = now

    def go_on(self, rows: Sequence[int], tables: Sequence[Tables]) -> None:
        """Before another step is launched behind one in flight: the sequences of ``rows`` alone go on.

        ``tables``: theirs, which may have got blocks.
        """
        if any(self._blocks[row] < len(table.full) for row, table in zip(rows, tables, strict=True)):
            # The last upload stands before the step in flight, so it has left the pinned memory at once.
            self._copied.synchronize()
            self._write_tables(rows, tables)
            start = 2 * self.rows
            self._inputs[start:].copy_(self._host.view(-1)[start:], non_blocking=True)
            self._copied.record()
        going = set(rows)
        ended = [row for row in self._used if row not in going]
        if ended:
            self.positions.index_fill_(0, indices(ended, self.positions.device), -1)
            self._used = list(rows)

    def launch(
        self, drawing: Drawing | None = None, params: Sequence[DrawParams] = (), rows: Sequence[int] = ()
    ) -> None:
        """Queue a step; with a ``drawing``, tokens are drawn with the ``params`` of each of ``rows``."""
        slot = self._launched % _AHEAD
        draws = None if drawing is None else self._draws.graph(drawing, len(params))
        self.graph.replay()
        if draws is not None:
            self._draws.queue(draws, params, rows, slot)
            self._results[slot][2].copy_(self._draws.exact, non_blocking=True)
        self._results[slot][:2].view(-1).copy_(self._inputs[: 2 * self.rows], non_blocking=True)
        self._events[slot].record()
        self._launched += 1

    @property
    def ahead(self) -> int:
        """Steps launched and not taken."""
        return self._launched - self._taken

    def take(self) -> tuple[list[int], list[int], list[int]]:
        """Wait for the oldest step in flight: its tokens; positions after it, negative where logits were not finite or
        a row is not used; and whether each token is right where they were drawn."""
        slot = self._taken % _AHEAD
        self._events[slot].synchronize()
        self._taken += 1
        tokens, positions, exact = self._results[slot].tolist()
        return tokens, positions, exact


@dataclass(frozen=True)
class _Flight:
    """A step that was launched and not taken.

    Attributes:
        graph: whose.
        inputs: of each sequence in it, by id: its row, the token that it reads, that one's position, its blocks.
        drawn: whether tokens are drawn, so that some may not be right.
    """

    graph: DecodeGraph
    inputs: dict[int, tuple[int, int, int, Tables]]
    drawn: bool

    def rows(self, sequences: Sequence[tuple[int, int, int]], tables: Sequence[Tables]) -> list[int] | None:
        """The rows of sequences, each given as (id, last token, its position); None where one is not in it.

        ``tables``: theirs. One that starts gets new ones, so it is not taken for an older one of its id.
        """
        rows = []
        for (identity, token, position), table in zip(sequences, tables, strict=True):
            own = self.inputs.get(identity)
            if own is None or own[1:3] != (token, position) or own[3] is not table:
                return None
            rows.append(own[0])
        return rows

    def take(self, rows: Sequence[int]) -> tuple[list[int | None], list[bool]]:
        """Wait for it: of each row its token, None where its logits are not finite; whether it is right."""
        tokens, positions, exact = self.graph.take()
        found = [tokens[row] if positions[row] >= 0 else None for row in rows]
        return found, [not self.drawn or positions[row] < 0 or bool(exact[row]) for row in rows]


class DecodeGraphs:
    """Decode graphs of the sizes that were needed so far, and the step computed ahead.

    Where a graph's memory is lacking its size has none: such steps are computed by launches, and a warning says so.
    """

    def __init__(
        self, model: Model, cache: PagedCache, device: torch.device, most_tokens: int, *, one_launch: bool = True
    ) -> None:
        self.model, self.cache, self.device, self.one_launch = model, cache, device, one_launch
        self.most_tokens, self.most_blocks = most_tokens, -(-most_tokens // cache.block_size)
        self._graphs: dict[int, DecodeGraph | None] = {}
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._flight: _Flight | None = None

    def tokens(
        self,
        sequences: Sequence[tuple[int, int, int]],
        tables: Sequence[Tables],
        drawing: Drawing | None = None,
        params: Callable[[int], list[DrawParams]] = lambda ahead: [],
    ) -> list[int | None] | None:
        """The next token of each sequence; None for one whose logits are not finite.

        Args:
            sequences: (its id, its last token, that token's position) of each.
            tables: their blocks.
            drawing: None takes the likeliest tokens; else they are drawn so.
            params: each sequence's for the draw of this step, given 0, and of the next, given 1.

        Returns:
            The tokens; None in place of all where a draw needs more than a graph can do, or where there is none.
        """
        flight, self._flight = self._flight, None
        size = _rows_for(len(sequences))
        rows = None if flight is None else flight.rows(sequences, tables)
        if flight is None or rows is None:
            graph = self._graph(len(sequences))
            if graph is None:
                return None
            rows = list(range(len(sequences)))
            graph.load([token for _, token, _ in sequences], [position for *_, position in sequences], tables)
            graph.launch(drawing, params(0), rows)
            flight = _Flight(graph, {}, drawing is not None)
        graph = flight.graph
        # Rows that are no more leave gaps, which draws by PyTorch's operations do not know of.
        in_order = rows == list(range(len(rows))) or drawing in (None, "one launch")
        if graph.rows == size and in_order and self._have_places(sequences, tables):
            graph.go_on(rows, tables)
            graph.launch(drawing, params(1), rows)
        found, right = flight.take(rows)
        if not all(right):
            return None
        if graph.ahead:
            inputs = {
                identity: (row, token, position + 1, table)
                for (identity, _, position), row, token, table in zip(sequences, rows, found, tables, strict=True)
                if token is not None  # one without a token ends here
            }
            self._flight = _Flight(graph, inputs, drawing is not None)
        return found

    def computed_ahead(
        self, sequences: Sequence[tuple[int, int, int]], tables: Sequence[Tables]
    ) -> dict[int, int | None]:
        """The next tokens of those of the ``sequences`` that the step in flight has, by id; it ends with this.

        Given as in ``tokens``; None: the logits are not finite.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return {}
        rows = {
            sequence[0]: found[0]
            for sequence, table in zip(sequences, tables, strict=True)
            if (found := flight.rows([sequence], [table])) is not None
        }
        if not rows:
            return {}
        tokens, right = flight.take(list(rows.values()))
        return {identity: token for identity, token, good in zip(rows, tokens, right, strict=True) if good}

    def _have_places(self, sequences: Sequence[tuple[int, int, int]], tables: Sequence[Tables]) -> bool:
        """Whether the step behind the next one can be computed: its places lie in blocks these sequences have."""
        size = self.cache.block_size
        ends = (min(len(table.full) * size, self.most_tokens) for table in tables)
        return all(position + 1 < end for (*_, position), end in zip(sequences, ends, strict=True))

    def logits(self, sequences: Sequence[tuple[int, int]], tables: Sequence[Tables]) -> Tensor | None:
        """The logits after the last token of each sequence, given (that token, its position).

        fp32 [sequences, V], before the final soft-cap; the next step overwrites them. None where there is no graph.
        """
        graph = self._graph(len(sequences))
        self.forget()
        if graph is None:
            return None
        graph.load([token for token, _ in sequences], [position for _, position in sequences], tables)
        graph.graph.replay()
        return graph.logits[: len(sequences)]

    def forget(self) -> None:
        """After a step that failed, or where everything starts anew: what was computed ahead is not taken."""
        self._flight = None

    def _graph(self, count: int) -> DecodeGraph | None:
        rows = _rows_for(count)
        if rows not in self._graphs:
            self._graphs[rows] = self._captured(rows)
        return self._graphs[rows]

    def _captured(self, rows: int) -> DecodeGraph | None:
        try:
            return DecodeGraph(
                self.model, self.cache, self.device, rows, self.most_blocks,
                pool=self._pool, stream=self._stream, one_launch=self.one_launch,
            )  # fmt: skip
        except torch.OutOfMemoryError:
            self._pool = torch.cuda.graph_pool_handle()  # the one it failed in is left alone
            warnings.warn(
                f"no memory for a CUDA graph of steps of {rows} sequences: they take longer; a smaller kv_memory "
                "leaves room for it",
                stacklevel=2,
            )
            return None
