"""Prompts of up to some hundred tokens through the network's layers as one CUDA graph, for their first token's sake.

Launching the layers takes the host longer than a GPU needs for so few tokens. A graph has a fixed number of rows; a
batch takes the smallest that holds it, and the rows left over are a sequence of their own that is stored nowhere. No
row's result depends on another sequence's rows. For packed weights and 9 to 384 rows it is the same as that of launches
for the same rows, bit for bit; elsewhere another number of rows may take another kernel, which rounds otherwise. So it
is where the engine without a graph asks behind the last attention for a prompt's last row only.

In a mixed step the sequences with one new token come first, and have rows and block tables of their own, as in a decode
graph: their attention is the decode kernel's. That kernel splits the keys by the number of rows, which a graph rounds
up, so a mixed step's results are those of launches but for rounding.

A size's first batch runs as it is, since most sizes are needed once only; the second is captured. Of many sizes those
are kept that were needed last.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemcut.cache_blocks import ceil_div
from gemcut.engine.cache import PagedCache, Tables
from gemcut.engine.decode_graph import DecodeKeyValues
from gemcut.engine.paged import gather, gathered_segments, live_blocks, token_slots
from gemcut.engine.tensors import indices
from gemcut.kernels.attention import varlen as prefill_attention
from gemcut.kernels.attention import varlen_hopper as hopper_attention
from gemcut.kernels.attention.varlen import VarlenAttention, fresh_segments, tiles, triton_varlen
from gemcut.kernels.attention.varlen_hopper import hopper_varlen
from gemcut.model import Model
from gemcut.model.key_values import KeyValues, Pages, Part, Span

#: Rows a graph has for prompts. A packed GEMM has tiles of 16, 32, 64, 96, 128, 192 and 256 rows (linear/gemm.py).
SIZES = (16, 32, 64, 96, 128, 192, 256, 288, 384, 512)
#: Tokens of older context, the batch's own included, that a graph has room to gather; 0: a batch without any.
CONTEXTS = (0, 512, 1024, 2048, 4096, 8192)
#: Rows a graph has for sequences of one new token beside the prompts'.
ANSWERS = (0, 8, 16, 32, 64, 128, 256)
#: Blocks of such a sequence's table; as many as the longest context has where that is not enough.
TABLE_BLOCKS = 512
#: Of prompts, the rows left over counted as one.
MOST_SEQUENCES = 8
#: Graphs that are kept.
MOST_GRAPHS = 64
_GROUPS = ("full", "sliding")  # of the cache


def refusal(varlen: VarlenAttention | None, decode_refusal: str | None) -> str | None:
    """None where prefill graphs serve, else one line that says why not.

    ``varlen``: what computes attention of many queries; ``decode_refusal``: why decode graphs do not serve.
    """
    return decode_refusal or (None if varlen in (triton_varlen, hopper_varlen) else "needs gemcut's attention kernels")


@dataclass(frozen=True)
class GraphSize:
    """What a graph has room for.

    Attributes:
        rows: new tokens of prompts.
        context: all tokens of prompts, where some are in the cache already; 0: none is.
        answers: sequences of one new token.
        table: blocks of each answer's table.
    """

    rows: int
    context: int
    answers: int = 0
    table: int = 0


def input_sizes(size: GraphSize, blocks: int, tiles: int) -> dict[str, int]:
    """How many int64 each of a graph's inputs takes, in the order in which they stand in one buffer.

    A tile is 16 bytes, which kernels read at once: tiles stand first, where they begin at multiples of 16. Positions
    and tables of answers are int32, two in each int64.
    """
    whole = size.answers + size.rows
    sizes = {f"{group} tiles": 2 * tiles for group in _GROUPS} | {"ids": whole, "positions": whole}
    for group in _GROUPS:
        sizes |= {f"{group} slots": size.rows, f"{group} blocks": blocks}
    if size.answers:
        sizes["answers' positions"] = ceil_div(size.answers, 2)
        sizes |= {f"answers' {group} table": ceil_div(size.answers * size.table, 2) for group in _GROUPS}
    return sizes


@dataclass
class _Shared:
    """What all graphs of an engine use."""

    model: Model
    cache: PagedCache
    device: torch.device
    queries: int  # of a tile
    stream: torch.cuda.Stream  # of captures, and of runs before them
    pool: Any  # the graphs' memory: one runs at a time


class _KeyValues(KeyValues):
    """What the layers ask of prompts' keys and values (gemcut.engine.paged), at fixed places."""

    def __init__(self, cache: PagedCache, rows: int, inputs: dict[str, Tensor]) -> None:
        self.spans = (Span(0, rows, rows),)
        self._layers = cache.layers()
        self._inputs = inputs
        context = len(inputs["full blocks"]) > 0
        self.fresh = None if context else self._tiles("full")

    @property
    def paged(self) -> _KeyValues:
        return self

    def _tiles(self, group: str) -> Tensor:
        return self._inputs[f"{group} tiles"].view(torch.int32).view(-1, 4)

    def pages(self, layer: int) -> Pages:
        group, storage = self._layers[layer]
        return Pages(storage[0], storage[1], self._inputs[f"{group} slots"])

    def gathered(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        group, storage = self._layers[layer]
        return *gather(storage, self._inputs[f"{group} blocks"]), self._tiles(group)


class _Mixed(KeyValues):
    """Keys and values of a mixed step: first the answers, which have one new token each, then the prompts.

    For one forward: its parts keep what the layers share.
    """

    def __init__(self, answers: DecodeKeyValues, prompts: _KeyValues, size: GraphSize) -> None:
        self.spans = ()
        self._prompts = prompts
        self._parts = (
            Part(slice(0, size.answers), answers),
            Part(slice(size.answers, size.answers + size.rows), prompts),
        )

    @property
    def paged(self) -> _KeyValues:
        return self._prompts

    @property
    def parts(self) -> tuple[Part, ...]:
        return self._parts


class _Graph:
    """The layers for batches of up to a size; captured at the second run."""

    def __init__(self, shared: _Shared, size: GraphSize) -> None:
        self._shared, self.size = shared, size
        most_tiles = ceil_div(size.rows, shared.queries) + MOST_SEQUENCES
        sizes = input_sizes(size, size.context // shared.cache.block_size, most_tiles)
        self._host = torch.zeros(sum(sizes.values()), dtype=torch.int64, pin_memory=True)
        self._device = torch.zeros_like(self._host, device=shared.device)
        names = list(sizes)
        self._written = dict(zip(names, torch.split(self._host, list(sizes.values())), strict=True))
        self._inputs = dict(zip(names, torch.split(self._device, list(sizes.values())), strict=True))
        self._prompts = _KeyValues(shared.cache, size.rows, self._inputs)
        self._answers: DecodeKeyValues | None = None
        if size.answers:
            positions = self._inputs["answers' positions"].view(torch.int32)[: size.answers]
            full, sliding = (
                self._inputs[f"answers' {group} table"]
                .view(torch.int32)[: size.answers * size.table]
                .view(-1, size.table)
                for group in _GROUPS
            )
            self._answers = DecodeKeyValues(shared.cache, positions, full, sliding)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._hidden: Tensor | None = None
        self._runs = 0

    def run(
        self, answers: int, ids: list[int], positions: list[int], spans: Sequence[Span], tables: Sequence[Tables]
    ) -> Tensor:
        """Hidden states of all rows, fp32 [size.answers + size.rows, d]; the next run overwrites them.

        The first ``answers`` sequences have one new token each and are no prompts.
        """
        self._load_answers(ids[:answers], positions[:answers], tables[:answers])
        prompts = [Span(span.start - answers, span.length, span.context_length) for span in spans[answers:]]
        self._load(ids[answers:], positions[answers:], prompts, tables[answers:])
        if self._runs == 1:
            self._runs += 1  # one that failed is not tried again
            self._capture()
        if self._graph is None or self._hidden is None:
            hidden = self._alone()
            self._runs += 1
            return hidden
        self._graph.replay()
        return self._hidden

    def _load_answers(self, ids: list[int], positions: list[int], tables: Sequence[Tables]) -> None:
        self._copied.synchronize()  # the last upload has left the pinned memory
        self._host.zero_()
        if not self.size.answers:
            return
        used, host = len(ids), {name: part.numpy() for name, part in self._written.items()}
        host["ids"][:used], host["positions"][:used] = ids, positions
        own = host["answers' positions"].view(np.int32)
        own[:used], own[used:] = positions, -1
        for group in _GROUPS:
            table = host[f"answers' {group} table"].view(np.int32)[: self.size.answers * self.size.table]
            for row, blocks in zip(
                table.reshape(-1, self.size.table), (getattr(t, group) for t in tables), strict=False
            ):
                row[: len(blocks)] = blocks[: self.size.table]  # one may be reserved for a later step

    def _load(self, ids: list[int], positions: list[int], spans: Sequence[Span], tables: Sequence[Tables]) -> None:
        size, used, rows, first_row = self._shared.cache.block_size, len(ids), self.size.rows, self.size.answers
        host = {name: part.numpy() for name, part in self._written.items()}
        host["ids"][first_row : first_row + used], host["positions"][first_row : first_row + used] = ids, positions
        context = self.size.context
        rest = [(used, rows - used, 0 if context else used, 0)] if used < rows else []
        fresh = fresh_segments(spans)
        firsts = [0] * len(tables), [table.first_sliding for table in tables]
        for group, first in zip(_GROUPS, firsts, strict=True):
            lists = [getattr(table, group) for table in tables]
            slots, at = host[f"{group} slots"], 0
            slots[used:] = -1
            lives = []
            for table, start, span in zip(lists, first, spans, strict=True):
                slots[span.start : span.start + span.length] = token_slots(table, span, size)
                lives.append(live_blocks(table, start, span, size))
                if context:
                    host[f"{group} blocks"][at : at + len(lives[-1])] = lives[-1]
                    at += len(lives[-1])
            segments = gathered_segments(spans, lives, first, size) if context or fresh is None else fresh
            found = tiles([*segments, *rest], self._shared.queries)
            self._written[f"{group} tiles"].view(torch.int32)[: len(found) * 4] = torch.tensor(found).flatten()
        self._device.copy_(self._host, non_blocking=True)
        self._copied.record()

    def _forward(self) -> Tensor:
        kv = self._prompts if self._answers is None else _Mixed(self._answers, self._prompts, self.size)
        hidden: Tensor = self._shared.model(self._inputs["ids"], self._inputs["positions"], kv)
        return hidden

    def _alone(self) -> Tensor:
        """Without a graph, on the stream of captures: kernels are compiled and make their counters for it."""
        stream, current = self._shared.stream, torch.cuda.current_stream(self._shared.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            hidden = self._forward()
        current.wait_stream(stream)
        hidden.record_stream(current)
        return hidden

    def _capture(self) -> None:
        """Without enough memory for it there is no graph, and the pool it failed in is left alone."""
        shared, graph, hidden = self._shared, torch.cuda.CUDAGraph(), None
        try:
            with (
                torch.cuda.stream(torch.cuda.current_stream(shared.device)),  # what is current again whatever happens
                torch.cuda.graph(graph, pool=shared.pool, stream=shared.stream, capture_error_mode="thread_local"),
            ):
                hidden = self._forward()
        except torch.OutOfMemoryError:
            shared.pool = torch.cuda.graph_pool_handle()
            warnings.warn(
                f"no memory for a CUDA graph of prompts of {self.size.rows} tokens: they start slower", stacklevel=2
            )
            return
        self._graph, self._hidden = graph, hidden


class PrefillGraphs:
    """Graphs of the sizes that were needed so far. One runs at a time, so they share all memory but their results'."""

    def __init__(self, model: Model, cache: PagedCache, device: torch.device) -> None:
        config = model.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        if model.ops.varlen is hopper_varlen:
            queries = hopper_attention.tile_queries(heads, kv_heads)
        else:
            queries = prefill_attention.tile_queries(heads, kv_heads, config.head_dim, device)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._shared = _Shared(model, cache, device, queries, stream, torch.cuda.graph_pool_handle())
        self._sizes: dict[GraphSize, _Graph] = {}
        self._most_blocks = ceil_div(config.max_position_embeddings, cache.block_size)

    def hidden(
        self,
        ids: list[int],
        positions: list[int],
        spans: Sequence[Span],
        tables: Sequence[Tables],
        wanted: Sequence[int] | None = None,
    ) -> Tensor | None:
        """Hidden states before the final norm, fp32 [n, d], of the ``wanted`` rows; None: of all.

        Args:
            ids: token ids of all sequences, one after another.
            positions: each token's position in its sequence.
            spans: which tokens form which sequence.
            tables: the sequences' blocks, with room for the new tokens.
            wanted: rows of the batch.

        Returns:
            None where no graph is large enough.
        """
        # Those of one new token that come first, where others are behind them.
        answers = next((i for i, span in enumerate(spans) if span.length > 1), 0)
        size = self._size_of(answers, spans)
        if size is None:
            return None
        graph = self._sizes.pop(size, None) or _Graph(self._shared, size)
        self._sizes[size] = graph  # the last one is the one needed last
        if len(self._sizes) > MOST_GRAPHS:
            del self._sizes[next(iter(self._sizes))]
        hidden = graph.run(answers, ids, positions, spans, tables)
        unused = size.answers - answers  # rows between those of answers and those of prompts
        rows = [row if row < answers else row + unused for row in (range(len(ids)) if wanted is None else wanted)]
        return hidden[indices(rows, self._shared.device)]

    def _size_of(self, answers: int, spans: Sequence[Span]) -> GraphSize | None:
        """The smallest size that holds a batch whose first ``answers`` sequences are no prompts; None: none does."""
        block, prompts = self._shared.cache.block_size, spans[answers:]
        rest = [Span(span.start - answers, span.length, span.context_length) for span in prompts]
        context = 0
        if fresh_segments(rest) is None:
            context = sum(ceil_div(span.context_length, block) * block for span in prompts)
        tokens = sum(span.length for span in prompts)
        rows = next((rows for rows in SIZES if rows >= tokens), None)
        room = next((room for room in CONTEXTS if room >= context), None)
        beside = next((count for count in ANSWERS if count >= answers), None)
        if rows is None or room is None or beside is None or len(prompts) >= MOST_SEQUENCES:
            return None
        longest = max((ceil_div(span.context_length, block) for span in spans[:answers]), default=0)
        table = min(TABLE_BLOCKS, self._most_blocks) if longest <= TABLE_BLOCKS else self._most_blocks
        return GraphSize(rows, room, beside, table if beside else 0)
