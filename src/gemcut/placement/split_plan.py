"""What each of several GPUs holds of a network, and over how many of them it goes: from the configuration alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gemcut.cache_blocks import ceil_div
from gemcut.checkpoint.names import expected_shapes, hf_module
from gemcut.config import GemmaConfig
from gemcut.parallel.shape import EMBEDDING, Share, local_config, refusal, slice_of, vocabulary_range
from gemcut.placement.plan import MemoryPlan, layer_bytes, matrix_bytes
from gemcut.quantization.spec import DTYPE_BYTES, Quantization, skip_matcher

#: Bytes a second from host to GPU, as a guess where none was measured: PCIe 5 with 16 lanes gives about this.
HOST_BYTES_A_SECOND = 50e9


def rank_weight_bytes(
    config: GemmaConfig, size: int, dtype: str = "bfloat16", quantization: Quantization | None = None
) -> int:
    """Bytes of the weights of one of ``size`` devices (the first, which never holds less than another)."""
    stays = skip_matcher(None if quantization is None else quantization.skip)
    total = 0
    for name, shape in expected_shapes(config).items():
        part = slice_of(name, config, Share(0, size))
        if len(shape) == 1:
            total += 4 * shape[0]
            continue
        rows, columns = shape
        if part is not None:
            count = part.stop - part.start
            rows, columns = (count, columns) if part.axis == "rows" else (rows, count)
        if quantization is None or (name == EMBEDDING and quantization.head is None):
            total += rows * columns * DTYPE_BYTES[dtype]
        elif name == EMBEDDING:
            total += rows * (columns + 4)
        elif stays(hf_module(name)):
            total += rows * columns * DTYPE_BYTES[dtype]
        else:
            # Groups of statistics straddle the slices of o and down: there they are kept in fp32.
            whole = part is None or part.axis == "rows"
            total += matrix_bytes(rows, columns, quantization if whole else quantization.replace(double_quant=False))
    return total


def rank_plan(plan: MemoryPlan, size: int) -> MemoryPlan:
    """``plan`` for one of ``size`` devices; ``memory`` is that of one."""
    if size == 1:
        return plan
    own = MemoryPlan.make(
        local_config(plan.config, size),
        dtype=plan.dtype,
        quantization=plan.quantization,
        context=plan.context,
        batch=plan.batch,
        chunk=plan.chunk,
        memory=plan.memory,
    )
    return dataclasses.replace(own, weights=rank_weight_bytes(plan.config, size, plan.dtype, plan.quantization))


def holds(config: GemmaConfig, size: int) -> str:
    """What one of ``size`` devices holds, in words."""
    own = local_config(config, size)
    tokens = vocabulary_range(config.vocab_size, Share(0, size))[1]
    shared = (
        f" (the same one on {size // config.num_key_value_heads} GPUs)" if size > config.num_key_value_heads else ""
    )
    return (
        f"{own.num_attention_heads} of {config.num_attention_heads} heads with {own.num_key_value_heads} of "
        f"{config.num_key_value_heads} key-value heads{shared}, {own.intermediate_size:,} of "
        f"{config.intermediate_size:,} MLP columns, {tokens:,} of {config.vocab_size:,} tokens of the table"
    )


@dataclass(frozen=True)
class Placement:
    """Where a network goes.

    Attributes:
        kind: "one" device; "tensor": every layer split over GPUs; "layers": whole layers, on one GPU after the other;
            "offload": layers that the GPU has no room for are streamed from host memory; "cpu".
        bytes_by_device: what each device holds of weights, keys, values and temporary tensors: "cuda:0", …, "cpu".
        layers: of each device how many layers it holds.
        step_seconds: what streaming adds to each step, at least.
    """

    kind: Literal["one", "tensor", "layers", "offload", "cpu"]
    bytes_by_device: dict[str, int]
    layers: dict[str, int]
    step_seconds: float = 0.0


def place(plan: MemoryPlan, gpus: Sequence[int], host: int) -> Placement | None:
    """Where a network goes: one GPU if it fits, else every layer over the fewest GPUs that fit, else layers one GPU
    after the other, else some of them streamed from the host, else the CPU; None: nowhere.

    Args:
        plan: of the whole network; its ``memory`` is not looked at.
        gpus: bytes that each GPU has room for, of one kind.
        host: bytes that the CPU has room for.
    """
    count = plan.config.num_hidden_layers
    for index, room in enumerate(gpus):
        if plan.total <= room:
            return Placement("one", {f"cuda:{index}": plan.total}, {f"cuda:{index}": count})
    for size in range(2, len(gpus) + 1):
        if refusal(plan.config, size, plan.quantization) is None:
            own = rank_plan(plan, size)
            if own.total <= min(gpus[:size]):
                names = [f"cuda:{index}" for index in range(size)]
                return Placement("tensor", dict.fromkeys(names, own.total), dict.fromkeys(names, count))
    return _layers(plan, gpus) or _offload(plan, gpus, host) or _cpu(plan, host)


def _layers(plan: MemoryPlan, gpus: Sequence[int]) -> Placement | None:
    """Whole layers, each GPU filled before the next; the table and the head are with the first."""
    if len(gpus) < 2:
        return None
    outer = plan.weights - sum(layer_bytes(plan.config, plan.dtype, plan.quantization))
    each = _with_cache(plan)
    held, counts, at = {}, {}, 0
    for index, room in enumerate(gpus):
        used, first = plan.workspace + (outer if index == 0 else 0), at
        while at < len(each) and used + each[at] <= room:
            used += each[at]
            at += 1
        if at > first or index == 0:
            held[f"cuda:{index}"], counts[f"cuda:{index}"] = used, at - first
        if index == 0 and used > room:
            return None
    return Placement("layers", held, counts) if at == len(each) else None


def _offload(plan: MemoryPlan, gpus: Sequence[int], host: int) -> Placement | None:
    """The first GPU with as many layers as it has room for beside two that are streamed; the others wait on the host.

    Keys and values stay on the GPU.
    """
    if not gpus:
        return None
    weights = layer_bytes(plan.config, plan.dtype, plan.quantization)
    used = plan.weights - sum(weights) + plan.workspace + plan.batch * plan.kv(plan.context) + 2 * max(weights)
    kept = 0
    while kept < len(weights) and used + weights[kept] <= gpus[0]:
        used += weights[kept]
        kept += 1
    streamed = sum(weights[kept:])
    if used > gpus[0] or streamed > host or kept == len(weights):
        return None
    return Placement(
        "offload",
        {"cuda:0": used, "cpu": streamed},
        {"cuda:0": kept, "cpu": len(weights) - kept},
        streamed / HOST_BYTES_A_SECOND,
    )


def _cpu(plan: MemoryPlan, host: int) -> Placement | None:
    count = plan.config.num_hidden_layers
    return Placement("cpu", {"cpu": plan.total}, {"cpu": count}) if plan.total <= host else None


def _with_cache(plan: MemoryPlan) -> list[int]:
    """Of each layer the bytes of its weights and of its part of the cache."""
    config, total = plan.config, plan.batch * plan.kv(plan.context)
    share = ceil_div(total, config.num_hidden_layers)
    return [size + share for size in layer_bytes(config, plan.dtype, plan.quantization)]
