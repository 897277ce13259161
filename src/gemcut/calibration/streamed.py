"""A checkpoint's network computed layer by layer: one layer's weights in memory at a time, whatever the model's size.

This is how a 27B and its cut copy are compared on a machine that can hold neither.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemcut.calibration.divergence import Divergence, measure_all
from gemcut.checkpoint.load import load_model_weights
from gemcut.checkpoint.names import expected_shapes, hf_module
from gemcut.checkpoint.source import Source
from gemcut.config import GemmaConfig
from gemcut.errors import ParameterError
from gemcut.kernels.linear.dispatch import LinearCase, choose_linear
from gemcut.kernels.linear.plain import softcap_in_place
from gemcut.model import Model
from gemcut.model.bind import bind_products, release_products
from gemcut.model.dense import DenseKeyValues
from gemcut.model.norm import RMSNorm
from gemcut.progress import Report
from gemcut.quantization.dequantize import dequantize_weight
from gemcut.quantization.spec import Quantization
from gemcut.quantization.stream import quantize_tensors
from gemcut.quantization.weights import CheckpointWeight

_TABLE = "embed.weight"


class Weights(Protocol):
    """A model's weights: a checkpoint (gemcut.checkpoint.source.Source), or one that is cut as it is read."""

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, for progress."""

    def config(self) -> GemmaConfig:
        """The model's shape."""

    def tensors(
        self, *, dtype: torch.dtype | None = None, only: Collection[str] | None = None
    ) -> Iterator[tuple[str, CheckpointWeight]]:
        """(our name, weight) of the tensors in ``only``."""


class Rounded:
    """A checkpoint whose linear layers are cut to the nearest codes each time they are read."""

    def __init__(self, whole: Source, spec: Quantization) -> None:
        self.whole, self.spec = whole, spec.replace(head=None)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole weights."""
        return self.whole.nbytes

    def config(self) -> GemmaConfig:
        """The model's shape."""
        return self.whole.config()

    def tensors(
        self, *, dtype: torch.dtype | None = None, only: Collection[str] | None = None
    ) -> Iterator[tuple[str, CheckpointWeight]]:
        """(our name, weight) of the tensors in ``only``."""
        return quantize_tensors(self.whole.tensors(dtype=dtype, only=only), self.spec, module_name=hf_module)


def compare_checkpoints(
    whole: Source,
    cuts: Sequence[Weights],
    documents: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype | None = None,
    progress: Report | None = None,
) -> list[Divergence]:
    """How far each of ``cuts`` is from ``whole`` on held-out documents (token ids, ``<bos>`` included).

    All are weights of one model that share the embedding; ``dtype`` is the compute dtype, None the checkpoint's own.
    ``progress`` hears (bytes done, bytes in all). Raises ParameterError, CheckpointError.
    """
    if not documents or any(len(document) < 2 for document in documents):
        raise ParameterError("comparison needs documents of at least two tokens each")
    compute = dtype or whole.stored_dtype or torch.bfloat16
    total, done = whole.nbytes + sum(cut.nbytes for cut in cuts), 0

    def states(weights: Weights) -> Tensor:
        nonlocal done
        before, size = done, weights.nbytes
        found = final_states(
            weights,
            documents,
            compute,
            lambda share: progress(before + int(share * size), total) if progress else None,
        )
        done += size
        return found

    expected = states(whole)
    (_, table), *_ = whole.tensors(dtype=compute, only={_TABLE})
    matrix = dequantize_weight(table, compute)
    cap = whole.config().final_logit_softcapping

    product = choose_linear(LinearCase((matrix,), compute, torch.float32), matrix.device).kernel

    def head(states: Tensor) -> Tensor:
        logits = product(states)
        return logits if cap is None else softcap_in_place(logits, cap)

    targets = torch.cat([torch.tensor(document[1:]) for document in documents])
    return measure_all(expected, [states(cut) for cut in cuts], targets, head, [head] * len(cuts))


@torch.inference_mode()
def final_states(
    source: Weights, documents: Sequence[Sequence[int]], dtype: torch.dtype, progress: Callable[[float], None]
) -> Tensor:
    """What the head gets, in ``dtype`` [T, d], at every position that predicts a token of its document."""
    config = source.config()
    with torch.device("meta"):
        model = Model(config, dtype=dtype)
    lengths = [len(document) - 1 for document in documents]
    ids = torch.tensor([token for document in documents for token in document[:-1]])
    table = next(iter(source.tensors(dtype=dtype, only={_TABLE})))[1]
    hidden = F.embedding(ids, dequantize_weight(table, dtype)).float() * model.embed_scale
    del table
    names = list(expected_shapes(config))
    for index, layer in enumerate(model.layer_list):
        prefix = f"layers.{index}."
        _fill(layer, source, {name for name in names if name.startswith(prefix)}, prefix, dtype)
        start = 0
        for length in lengths:
            rows = slice(start, start + length)
            rotation = model.ropes[index].at(torch.arange(length))
            hidden[rows] = layer.alone(hidden[rows], rotation, DenseKeyValues(length))
            start += length
        release_products(layer)
        layer.to_empty(device="meta")  # before the next one comes
        progress((index + 1) / len(model.layers))
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    scale = next(iter(source.tensors(only={"norm.scale"})))[1]
    assert isinstance(scale, Tensor)
    norm.scale = nn.Parameter(scale.float(), requires_grad=False)
    out: Tensor = norm(hidden).to(dtype)
    return out


def _fill(layer: nn.Module, source: Weights, names: set[str], prefix: str, dtype: torch.dtype) -> None:
    """Give one layer its weights, dequantized to ``dtype``."""
    holder = nn.Module()
    holder.add_module("layers", nn.ModuleDict({prefix.split(".")[1]: layer}))
    stream = (
        (name, weight if name.endswith(".scale") else dequantize_weight(weight, dtype))
        for name, weight in source.tensors(dtype=dtype, only=names)
    )
    load_model_weights(holder, stream, dtype=dtype, device="cpu")
    bind_products(layer, torch.device("cpu"))
