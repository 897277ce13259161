"""One new token for each of a few sequences as one CUDA graph: from token ids to the likeliest next tokens.

The graph leaves the next step's inputs where it reads its own, so it can be replayed ahead of the host: while the host
looks at one token, the next is being computed. A step computed ahead of a change of plan is thrown away; all it wrote
is one place in its own sequences' blocks, beyond what they have computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemcut.config import FULL, GemmaConfig
from gemcut.engine.cache import PagedCache, Tables
from gemcut.kernels import argmax, decode_attention, geglu, norm, nvrtc
from gemcut.kernels.decode_attention import DecodeSpec
from gemcut.model import Model
from gemcut.model.gemma import Layer
from gemcut.model.linear import Embedding
from gemcut.model.quantized import Int8Embedding
from gemcut.quantization.weights import Int8Weight

#: Rows a graph has: a batch takes the smallest that holds it.
SIZES = (1, 2, 4, 8, 16, 32, 64)
_AHEAD = 2  # steps in flight at most


def supports(model: Model, cache: PagedCache, device: torch.device) -> str | None:
    """None where decode graphs serve, else one line that says why not."""
    if device.type != "cuda":
        return "needs an NVIDIA GPU"
    config = model.config
    if model.kernels not in ("auto", "cuda"):
        return f"kernels={model.kernels!r} was asked for"
    if model.asked_attention == "eager":
        return "attn_implementation='eager' was asked for"
    if model.dtype != torch.bfloat16:
        return f"computes in bfloat16 only, not in {model.dtype}"
    if any(getattr(module, "activation_threshold", None) is not None for module in model.modules()):
        return "LLM.int8()'s arithmetic (activation_threshold) looks at activations from the host"
    return (
        nvrtc.unavailable_reason()
        or norm.supports(config.hidden_size)
        or geglu.supports(config.intermediate_size)
        or decode_attention.supports(
            config.num_attention_heads, config.num_key_value_heads, config.head_dim, cache.block_size
        )
    )


class DecodeGraph:
    """The network for ``rows`` sequences of one new token each, captured once.

    ``ids`` and ``positions`` (int32 [rows]) and the block tables are its inputs; a negative position marks an unused
    row. After a replay ``ids`` holds the likeliest tokens, ``positions`` have moved on by one, ``logits`` is fp32
    [rows, V], before the final soft-cap.
    """

    def __init__(self, model: Model, cache: PagedCache, device: torch.device, rows: int, most_blocks: int) -> None:
        self.model, self.cache, self.rows, self.most_blocks = model, cache, rows, most_blocks
        width = 2 + 2 * most_blocks
        self._host = torch.zeros((rows, width), dtype=torch.int32, pin_memory=True)
        self._inputs = torch.zeros(rows * width, dtype=torch.int32, device=device)
        blocks = rows * most_blocks
        self.ids, self.positions = self._inputs[:rows], self._inputs[rows : 2 * rows]
        self.full = self._inputs[2 * rows : 2 * rows + blocks].view(rows, most_blocks)
        self.sliding = self._inputs[2 * rows + blocks :].view(rows, most_blocks)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._results = [torch.zeros(rows, dtype=torch.int32, pin_memory=True) for _ in range(_AHEAD)]
        self._events = [torch.cuda.Event() for _ in range(_AHEAD)]  # type: ignore[no-untyped-call]
        self._launched = self._taken = 0
        self.logits = self._capture(device)

    def _capture(self, device: torch.device) -> Tensor:
        self.positions.fill_(-1)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):  # compiles kernels and makes their counters, which must not be captured
            self._forward()
        stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            logits = self._forward()
        torch.cuda.current_stream(device).wait_stream(stream)
        return logits

    def _forward(self) -> Tensor:
        model = self.model
        config = model.config
        layers: list[Layer] = list(model.layers)  # type: ignore[arg-type]
        table, absmax = _table(model)
        eps = config.rms_norm_eps
        residual, x = norm.norm_embed(self.ids, table, absmax, model.embed_scale, layers[0].input_norm.scale, eps)
        counts = {FULL: 0, "": 0}
        for index, (layer, kind) in enumerate(zip(layers, config.layer_types, strict=True)):
            group = FULL if kind == FULL else ""
            storage = self.cache.full_storage if group else self.cache.sliding_storage
            rope = (model.rope_full if group else model.rope_sliding).table(self.ids.device)
            attention = layer.attention
            attended = decode_attention.decode_attention(
                attention.qkv_proj(x),
                storage[counts[group]],
                self.full if group else self.sliding,
                self.positions,
                rope,
                _spec(config, attention.scale, attention.spec.window),
                q_norm=attention.q_norm.scale if attention.q_norm is not None else None,
                k_norm=attention.k_norm.scale if attention.k_norm is not None else None,
            )
            counts[group] += 1
            post, pre = layer.post_attention_norm.scale, layer.pre_feedforward_norm.scale
            y = norm.norm_add(attention.o_proj(attended), residual, post, pre, eps)
            down = layer.mlp.down_proj(geglu.geglu(layer.mlp.gate_up_proj(y)))
            after = layers[index + 1].input_norm if index + 1 < len(layers) else model.norm
            x = norm.norm_add(down, residual, layer.post_feedforward_norm.scale, after.scale, eps)
        logits: Tensor = model.embed.logits(x)
        argmax.argmax(logits, self.ids, self.positions, softcap=config.final_logit_softcapping)
        return logits

    def load(self, ids: Sequence[int], positions: Sequence[int], tables: Sequence[Tables]) -> None:
        """Set the next step's inputs; what was launched ahead and not taken is thrown away."""
        self._taken = self._launched
        self._copied.synchronize()  # the last upload has left the page-locked memory
        rows, blocks = self.rows, self.rows * self.most_blocks
        host = self._host.view(-1)
        host[:rows] = 0
        host[rows : 2 * rows] = -1
        count = len(ids)
        host[:count] = torch.tensor(ids, dtype=torch.int32)
        host[rows : rows + count] = torch.tensor(positions, dtype=torch.int32)
        full = host[2 * rows : 2 * rows + blocks].view(rows, -1)
        sliding = host[2 * rows + blocks :].view(rows, -1)
        for row, table in enumerate(tables):
            full[row, : len(table.full)] = torch.tensor(table.full, dtype=torch.int32)
            sliding[row, : len(table.sliding)] = torch.tensor(table.sliding, dtype=torch.int32)
        self._inputs.copy_(host, non_blocking=True)
        self._copied.record()

    def launch(self) -> None:
        """Queue a step."""
        slot = self._launched % _AHEAD
        self.graph.replay()
        self._results[slot].copy_(self.ids, non_blocking=True)
        self._events[slot].record()
        self._launched += 1

    @property
    def ahead(self) -> int:
        """Steps launched and not taken."""
        return self._launched - self._taken

    def take(self) -> list[int]:
        """Wait for the oldest step in flight; its tokens."""
        slot = self._taken % _AHEAD
        self._events[slot].synchronize()
        self._taken += 1
        tokens: list[int] = self._results[slot].tolist()
        return tokens


class DecodeGraphs:
    """Decode graphs of the sizes that were needed so far, and the step computed ahead."""

    def __init__(self, model: Model, cache: PagedCache, device: torch.device, most_tokens: int) -> None:
        self.model, self.cache, self.device = model, cache, device
        self.most_tokens, self.most_blocks = most_tokens, -(-most_tokens // cache.block_size)
        self._graphs: dict[int, DecodeGraph] = {}
        self._expected: tuple[tuple[int, int], ...] = ()  # (sequence, position) of the step computed ahead
        self._last: tuple[DecodeGraph, list[int]] | None = None

    def greedy(self, sequences: Sequence[tuple[int, int, int]], tables: Sequence[Tables]) -> list[int]:
        """The likeliest next token of each sequence, given (its id, its last token, that token's position)."""
        graph = self._graph(len(sequences))
        now = tuple((identity, position) for identity, _, position in sequences)
        ids = [token for _, token, _ in sequences]
        foreseen = self._last is not None and self._last == (graph, ids) and self._expected == now and graph.ahead > 0
        if not foreseen:
            graph.load(ids, [position for _, position in now], tables)
            graph.launch()
        size = self.cache.block_size
        self._expected = ()
        room = ((len(table.full) * size, position + 1) for (_, position), table in zip(now, tables, strict=True))
        if all(place < min(end, self.most_tokens) for end, place in room):
            graph.launch()  # the next step's places lie in blocks these sequences have already
            self._expected = tuple((identity, position + 1) for identity, position in now)
        tokens = graph.take()[: len(sequences)]
        self._last = (graph, tokens)
        return tokens

    def logits(self, sequences: Sequence[tuple[int, int]], tables: Sequence[Tables]) -> Tensor:
        """The logits after the last token of each sequence, given (that token, its position).

        fp32 [sequences, V], before the final soft-cap; the next step overwrites them.
        """
        graph = self._graph(len(sequences))
        self.forget()
        graph.load([token for token, _ in sequences], [position for _, position in sequences], tables)
        graph.graph.replay()
        return graph.logits[: len(sequences)]

    def forget(self) -> None:
        """Another kind of step comes between: nothing computed ahead may be taken after it."""
        self._expected, self._last = (), None

    def _graph(self, count: int) -> DecodeGraph:
        rows = next(size for size in SIZES if size >= count)
        if rows not in self._graphs:
            self.forget()
            self._graphs[rows] = DecodeGraph(self.model, self.cache, self.device, rows, self.most_blocks)
        return self._graphs[rows]


def _spec(config: GemmaConfig, scale: float, window: int | None) -> DecodeSpec:
    return DecodeSpec(
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        scale,
        config.attn_logit_softcapping,
        window,
        config.rms_norm_eps,
    )


def _table(model: Model) -> tuple[Tensor, Tensor | None]:
    """The embedding's table, and its rows' largest magnitudes where it is int8."""
    embed = model.embed
    if isinstance(embed, Int8Embedding):
        (weight,) = embed.weights
        assert isinstance(weight, Int8Weight)
        return weight.codes, weight.absmax
    assert isinstance(embed, Embedding)
    return embed.weight, None
