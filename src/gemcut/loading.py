"""From a checkpoint to a network ready to run: build it empty, stream the weights in and cut them, bind kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch

from gemcut import process
from gemcut.checkpoint.load import load_model_weights
from gemcut.checkpoint.names import FUSED, export_tensors, hf_module, split_layer
from gemcut.checkpoint.source import Source
from gemcut.config import GemmaConfig
from gemcut.errors import CheckpointError, UnsupportedError
from gemcut.kernels.cpu import library
from gemcut.kernels.cpu.dequantize import dequantize
from gemcut.kernels.cpu.memory import huge_empty
from gemcut.model import Model
from gemcut.model.bind import bind_kernels
from gemcut.model.linear import dense_embedding, dense_linear
from gemcut.model.quantized import (
    Int8Embedding,
    QuantizedLinear,
    QuantizedOwner,
    quantized_embedding,
    quantized_linear,
)
from gemcut.parallel.shape import local_config
from gemcut.parallel.shards import cut_before, cut_behind, cut_stream
from gemcut.parallel.split import Split
from gemcut.progress import Report
from gemcut.quantization.dequantize import dequantize_weight
from gemcut.quantization.spec import Quantization
from gemcut.quantization.stream import quantize_table, quantize_tensors
from gemcut.quantization.weights import CheckpointWeight, Incoming, move_weight


def load_network(
    source: Source,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization | None = None,
    attention: str = "auto",
    kernels: str = "auto",
    progress: Report | None = None,
    split: Split | None = None,
) -> Model:
    """The network of a checkpoint on ``device``.

    Args:
        source: where the weights are.
        dtype: compute dtype, and that of weights that stay whole.
        device: where it will run.
        quantization: cut the weights to this format while they stream in; None keeps what the checkpoint has.
        attention: an attention implementation's name, or "auto".
        kernels: "auto", or "plain" for plain PyTorch everywhere.
        progress: hears (bytes done, bytes in all) of the checkpoint.
        split: the rank's place where it is one of several; of the weights its part alone is loaded.

    Raises CheckpointError, UnsupportedError.
    """
    process.enter()
    spec = effective_quantization(source, quantization)
    model = build_network(
        source.config(), dtype=dtype, device=device, quantization=spec, attention=attention, split=split
    )
    tensors: Iterator[tuple[str, Incoming]]
    if source.quantization is not None:
        tensors = source.tensors(dtype=dtype)
        if split is not None:
            tensors = cut_stream(tensors, split.config, split.share)
        tensors = quantize_table(tensors, dtype=dtype) if spec is not None and spec.head else tensors
    else:
        tensors = source.incoming(dtype=dtype, dequantize=None if kernels == "plain" else dequantize)
        if split is not None:
            tensors = (
                cut_stream(tensors, split.config, split.share)
                if spec is None
                else cut_before(tensors, split.config, split.share, spec)
            )
        if spec is not None:
            tensors = quantize_tensors(tensors, spec, module_name=hf_module, dtype=dtype)
        if split is not None and spec is not None:
            tensors = cut_behind(tensors, split.config, split.share, spec)
    load_model_weights(
        model,
        tensors,
        dtype=dtype,
        device=device,
        progress=progress,
        total=source.nbytes,
        # Every step reads all weights: on a CPU they lie on huge pages.
        allocate=huge_empty if device.type == "cpu" else None,
    )
    bind_kernels(model, device, kernels)
    if device.type == "cpu" and kernels == "auto" and (reason := library.unavailable()) is not None:
        warnings.warn(f"this will be many times slower than it could be on this CPU: {reason}", stacklevel=2)
    return model


def build_network(
    config: GemmaConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization | None = None,
    attention: str = "auto",
    split: Split | None = None,
) -> Model:
    """A network without weights, on the meta device, whose layers hold what ``quantization`` makes of them.

    With ``split`` it is one rank's, of the rank's own shape.
    """
    if quantization is None:
        linear, embedding = dense_linear(dtype), dense_embedding(dtype)
    else:
        linear, embedding = quantized_linear(quantization, dtype), quantized_embedding(quantization, dtype)
    if split is not None:
        config = local_config(config, split.share.size)
        linear, embedding = split.linear(linear), split.embedding(embedding)
    with torch.device("meta"):
        return Model(
            config,
            dtype=dtype,
            attention=attention,
            device=device,
            linear=linear,
            embedding=embedding,
            quantization=quantization,
        )


def move_network(model: Model, device: torch.device, kernels: str = "auto") -> Model:
    """The same network on another device, its weights copied one at a time.

    Raises UnsupportedError for one device's part of a network.
    """
    _require_whole(model, "moved")
    moved = build_network(
        model.config,
        dtype=model.dtype,
        device=device,
        quantization=model.quantization,
        attention=model.asked_attention,
    )
    for name, parameter in list(model.named_parameters()):
        moved.load_state_dict({name: parameter.to(device)}, strict=False, assign=True)
    for old, new in zip(model.modules(), moved.modules(), strict=True):
        if isinstance(old, QuantizedOwner) and isinstance(new, QuantizedOwner):
            new.fill([move_weight(weight, device) for weight in old.unpacked()])
    bind_kernels(moved, device, kernels)
    return moved


def export_network(model: Model) -> Iterator[tuple[str, CheckpointWeight]]:
    """A network's weights under Hugging Face names, cut ones as they are; a table in 8 bits is dequantized.

    bitsandbytes has no stored form for a cut table; dequantized to bf16 or fp32 it gives the same 8-bit codes again.
    Raises UnsupportedError for one device's part of a network.
    """
    _require_whole(model, "saved or read")
    packed: dict[str, Callable[[], CheckpointWeight]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Int8Embedding):
            packed[f"{name}.weight"] = partial(_dequantized, module, model.dtype)
        elif isinstance(module, QuantizedLinear):
            prefix, inner = split_layer(f"{name}.weight")
            for index, part in enumerate(FUSED.get(inner, (inner,))):
                packed[prefix + part] = partial(_matrix, module, index)
    return export_tensors(dict(model.named_parameters()), model.config, packed=packed)


def _require_whole(model: Model, what: str) -> None:
    if model.embed.part is not None:
        raise UnsupportedError(
            f"the weights of a model that is split over several devices cannot be {what}; load it on one device first"
        )


def _dequantized(embedding: Int8Embedding, dtype: torch.dtype) -> CheckpointWeight:
    return dequantize_weight(embedding.table, dtype)


def _matrix(linear: QuantizedLinear, index: int) -> CheckpointWeight:
    return linear.unpacked()[index]


def effective_quantization(source: Source, asked: Quantization | None) -> Quantization | None:
    """What the loaded network's weights are cut to: what the caller asked for, else what the checkpoint holds.

    A checkpoint that is cut already keeps its blocks and statistics; what it computes in, and an 8-bit head, can be
    chosen still. Raises CheckpointError where it was asked for in another format.
    """
    stored = source.quantization
    if stored is None or asked is None:
        return asked or stored
    if asked.format != stored.format:
        raise CheckpointError(
            f"{source.name} is quantized already ({stored.format}); load it without quantization, or start from the "
            f"whole weights to cut them to {asked.format}"
        )
    return stored.replace(
        head=asked.head or stored.head,
        compute_dtype=asked.compute_dtype or stored.compute_dtype,
        activation_threshold=asked.activation_threshold,
    )
