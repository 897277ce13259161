"""MemoryPlan: what a model needs before anything is downloaded or loaded. Works from the config alone."""

from __future__ import annotations

from dataclasses import dataclass

from gemcut.cache_blocks import BLOCK_SIZE, ceil_div, sliding_blocks_needed
from gemcut.checkpoint.names import expected_shapes, hf_module
from gemcut.config import GemmaConfig
from gemcut.errors import ParameterError
from gemcut.quantization.spec import DTYPE_BYTES, NESTED_BLOCK_SIZE, Quantization, skip_matcher

CHUNK = {"cpu": 512, "cuda": 2048}  # tokens a step computes at most


def weight_bytes(config: GemmaConfig, dtype: str, quantization: Quantization | None = None) -> int:
    """Bytes of all weights; norms are kept in fp32 whatever ``dtype`` and ``quantization`` are."""
    stays = skip_matcher(None if quantization is None else quantization.skip)
    total = 0
    for name, shape in expected_shapes(config).items():
        if len(shape) == 1:
            total += 4 * shape[0]
        elif name == "embed.weight":
            cut = quantization is not None and quantization.head == "int8"
            total += shape[0] * (shape[1] + 4) if cut else shape[0] * shape[1] * DTYPE_BYTES[dtype]
        elif quantization is None or stays(hf_module(name)):
            total += shape[0] * shape[1] * DTYPE_BYTES[dtype]
        else:
            total += matrix_bytes(shape[0], shape[1], quantization)
    return total


def layer_bytes(config: GemmaConfig, dtype: str, quantization: Quantization | None = None) -> list[int]:
    """Bytes of each layer's weights."""
    one, two = (
        weight_bytes(
            config.replace(num_hidden_layers=count, layer_types=(config.layer_types * 2)[:count]), dtype, quantization
        )
        for count in (1, 2)
    )
    return [two - one] * config.num_hidden_layers


def matrix_bytes(rows: int, columns: int, cut: Quantization) -> int:
    """Bytes of one cut matrix: codes and statistics."""
    count = rows * columns
    if cut.format == "int8":
        return count + 4 * rows
    blocks = -(-count // cut.block_size)
    return -(-count // 2) + (blocks + 4 * -(-blocks // NESTED_BLOCK_SIZE) if cut.double_quant else 4 * blocks)


def workspace_bytes(config: GemmaConfig, dtype: str, chunk: int) -> int:
    """A rough upper bound of temporary tensors in one step of ``chunk`` tokens: MLP, logits and attention scores."""
    size = DTYPE_BYTES[dtype]
    mlp = chunk * (3 * config.intermediate_size * size + 4 * config.hidden_size * 4)
    scores = config.num_attention_heads * 256 * config.max_position_embeddings * (4 + size)
    logits = 64 * config.vocab_size * 4
    return max(mlp, scores, logits) + mlp // 2


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one model in one format. All sizes are bytes.

    Attributes:
        dtype: of what is computed and kept, and of whole weights.
        full_kv_per_token: keys and values of the full-attention layers; grows over the whole context.
        sliding_kv_per_token: those of sliding layers; grows until the window is full.
        context: the context the plan is for.
        batch: how many requests of that context.
        memory: what there is, or None if that is not known.
    """

    config: GemmaConfig
    dtype: str
    context: int
    batch: int
    chunk: int
    memory: int | None
    weights: int
    workspace: int
    full_kv_per_token: int
    sliding_kv_per_token: int
    quantization: Quantization | None = None

    @classmethod
    def make(
        cls,
        config: GemmaConfig,
        *,
        dtype: str = "bfloat16",
        quantization: Quantization | None = None,
        context: int | None = None,
        batch: int = 1,
        chunk: int = 512,
        memory: int | None = None,
    ) -> MemoryPlan:
        """Plan for ``batch`` requests of ``context`` tokens (the model's limit if None) in ``memory`` bytes."""
        limit = config.max_position_embeddings
        if context is not None and not 1 <= context <= limit:
            raise ParameterError(f"context is {context}; this model takes from 1 to {limit} tokens")
        for name, value in (("batch", batch), ("chunk", chunk)):
            if value < 1:
                raise ParameterError(f"{name} is {value}; expected at least 1")
        if dtype not in DTYPE_BYTES:
            raise ParameterError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPE_BYTES)}")
        row = 2 * config.key_value_size * DTYPE_BYTES[dtype]
        return cls(
            config=config,
            dtype=dtype,
            context=context or limit,
            batch=batch,
            chunk=chunk,
            memory=memory,
            weights=weight_bytes(config, dtype, quantization),
            workspace=workspace_bytes(config, dtype, chunk),
            full_kv_per_token=row * len(config.full_layers),
            sliding_kv_per_token=row * len(config.sliding_layers),
            quantization=quantization,
        )

    @property
    def label(self) -> str:
        """The format in a word or two: "bfloat16", "nf4", "nf4 + int8 head"."""
        if self.quantization is None:
            return self.dtype
        head = " + int8 head" if self.quantization.head else ""
        return f"{self.quantization.format}{head}"

    def kv(self, context: int) -> int:
        """Bytes of keys and values one request of ``context`` tokens holds at most, in whole blocks."""
        full = ceil_div(context, BLOCK_SIZE)
        sliding = sliding_blocks_needed(self.config, context, self.chunk, BLOCK_SIZE)
        return BLOCK_SIZE * (full * self.full_kv_per_token + sliding * self.sliding_kv_per_token)

    @property
    def total(self) -> int:
        """Weights, workspace, and keys and values of the whole batch."""
        return self.weights + self.workspace + self.batch * self.kv(self.context)

    @property
    def fits(self) -> bool | None:
        """Whether ``memory`` suffices; None if it is not known."""
        return None if self.memory is None else self.total <= self.memory

    @property
    def largest_context(self) -> int | None:
        """The longest context one request can have in ``memory``; 0 if not even the weights fit."""
        if self.memory is None:
            return None
        room = self.memory - self.weights - self.workspace
        low, high = 0, self.config.max_position_embeddings
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.kv(middle) <= room else (low, middle - 1)
        return low

    @property
    def largest_batch(self) -> int | None:
        """How many requests of ``context`` tokens ``memory`` holds at once."""
        if self.memory is None:
            return None
        return max(0, self.memory - self.weights - self.workspace) // self.kv(self.context)
