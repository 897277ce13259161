"""Whether a checkpoint's weights fit, asked before they are read, and what is left for the cache."""

from __future__ import annotations

import torch

from gemcut.checkpoint.source import Source
from gemcut.engine import EngineConfig
from gemcut.engine.cache import bytes_per_block, shape_for_tokens
from gemcut.errors import CapacityError, MemoryOption
from gemcut.model import Model
from gemcut.placement.devices import free_memory
from gemcut.placement.plan import MemoryPlan, weight_bytes
from gemcut.quantization.spec import Quantization

#: Share of the free memory that the cache may take; the rest is for temporary tensors and other programs.
CACHE_SHARE = 0.8


def check_memory(
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    spec: Quantization | None,
    *,
    allowed: int | None = None,
    devices: int = 1,
) -> None:
    """Refuse before loading what cannot fit. Raises CapacityError.

    Args:
        source: the checkpoint; its configuration is read.
        dtype: compute dtype.
        device: where the weights will be.
        spec: what they are cut to.
        allowed: bytes that they may take there; None: what is free.
        devices: how many share the weights evenly. On a CPU they share its memory, too.
    """
    plan = MemoryPlan.make(source.config(), dtype=str(dtype).removeprefix("torch."), context=1, quantization=spec)
    available = free_memory(device) if allowed is None else allowed
    needed = plan.weights if device.type == "cpu" else -(-plan.weights // devices)
    if available is not None and needed > available:
        kind = plan.dtype if spec is None else spec.format
        there = f"are free on {device}" if allowed is None else f"are allowed on {device} (max_memory)"
        each = f" on each of {devices} GPUs" if needed != plan.weights else ""
        raise CapacityError(
            f"the weights of {source.name} need {_size(needed)}{each} in {kind}; {_size(available)} {there}",
            options=_smaller(source, plan, spec, available),
        )


def _smaller(source: Source, plan: MemoryPlan, spec: Quantization | None, available: int) -> tuple[MemoryOption, ...]:
    """Other forms of the same weights that are smaller, the closest to what was asked for first."""
    if spec is not None:
        return ()
    found = [MemoryOption("dtype", "bfloat16", weight_bytes(source.config(), "bfloat16"), available)]
    for name in ("int8", "nf4"):
        size = weight_bytes(source.config(), "bfloat16", Quantization(name))
        found.append(MemoryOption("quantization", name, size, available))
    return tuple(option for option in found if option.nbytes < plan.weights)


def cache_bytes(
    model: Model,
    device: torch.device,
    max_context: int | None,
    chunk: int,
    *,
    devices: int = 1,
    others: int | None = None,
) -> int:
    """Bytes of cache for a few whole contexts, as far as a share of the memory left after loading allows.

    Of several ``devices`` each has so much; ``others``: the least memory that another one has left. Processes on a CPU
    share its memory.
    """
    config, size = model.config, EngineConfig.block_size
    context = min(max_context or config.max_position_embeddings, config.max_position_embeddings)
    sequences = 8 if device.type == "cuda" else 2
    shape = shape_for_tokens(config, sequences=sequences, context=context, chunk=min(chunk, context), block_size=size)
    full, sliding = bytes_per_block(config, model.dtype, size)
    wanted = shape.full_blocks * full + shape.sliding_blocks * sliding
    available = free_memory(device)
    if available is not None and device.type == "cpu":
        available //= devices
    elif available is not None and others is not None:
        available = min(available, others)
    return wanted if available is None else min(wanted, int(available * CACHE_SHARE))


def _size(count: int) -> str:
    """Bytes as people compare them; small ones not as "0.0 GB"."""
    return f"{count / 1e9:.1f} GB" if count >= 10**8 else f"{count / 1e6:,.3f} MB"
