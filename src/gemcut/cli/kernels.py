"""``gemcut info --kernels``: which code computes what on each device here, and why other code would not."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gemcut.config import GemmaConfig
from gemcut.engine import decode_graph, prefill_graph
from gemcut.errors import UnsupportedError
from gemcut.kernels.gpu import gpu_of
from gemcut.kernels.linear import bf16 as bf16_matvec
from gemcut.kernels.linear import four_bit as nf4_matvec
from gemcut.kernels.linear import gated as gated_gemm
from gemcut.kernels.linear import int8 as int8_matvec
from gemcut.kernels.linear.dispatch import LINEAR, LinearCase
from gemcut.kernels.sampling import draw as draw_tokens
from gemcut.loading import build_network
from gemcut.model.attention import FLASH, IMPLEMENTATIONS, choose_attention
from gemcut.model.ops import cpu as cpu_ops
from gemcut.model.ops import cuda as cuda_ops
from gemcut.model.ops import cuda_megakernel
from gemcut.quantization.weights import CheckpointWeight, FourBitWeight, Int8Weight, Nested

DTYPE = torch.bfloat16
BLOCK_SIZE = 16  # of the cache, as the engine has it by default


def kernel_report(config: GemmaConfig) -> dict[str, dict[str, list[str]]]:
    """For each device: what computes each part of a network of this shape in bfloat16."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    return {str(device): _device(config, device) for device in devices}


def _device(config: GemmaConfig, device: torch.device) -> dict[str, list[str]]:
    report = {}
    for name, make in _FORMATS.items():
        found: dict[str, None] = {}
        for k, rows in _shapes(config):
            found.update(dict.fromkeys(_linear(LinearCase(make(k, rows, device), DTYPE, DTYPE), device)))
        report[f"{name} layers"] = list(found)
    for name in ("whole", "int8"):
        head = _FORMATS[name](config.hidden_size, (config.vocab_size,), device)
        report[f"{name} head"] = _linear(LinearCase(head, DTYPE, torch.float32), device)
    chosen = choose_attention("auto", config, DTYPE, device)
    refused = {name: it.supports(config, DTYPE, device) for name, it in IMPLEMENTATIONS.items()}
    report["attention"] = _lines(chosen.name, refused)
    if device.type == "cuda":
        try:
            report[FLASH] = [choose_attention(FLASH, config, DTYPE, device).detail]
        except UnsupportedError as error:
            report[FLASH] = [str(error)]
    steps = {
        "cuda": cuda_ops.supports(config, DTYPE, device),
        "cpu": cpu_ops.supports(DTYPE, config.head_dim, device),
        "plain": None,
    }
    report["between products"] = _lines(next(name for name, reason in steps.items() if reason is None), steps)
    if device.type == "cuda":
        reason = gated_gemm.supports(config.intermediate_size, config.hidden_size, gpu_of(device.index or 0))
        apart = "product and GeGLU apart"
        report["gate and up"] = [
            f"one launch with GeGLU for {gated_gemm.MANY_ROWS} rows or more that fill its tiles and whole or decoded "
            f"weights, else {apart}"
            if reason is None
            else f"{apart} ({reason})"
        ]
    reason = decode_graph.supports(build_network(config, dtype=DTYPE, device=device), BLOCK_SIZE, device)
    short = prefill_graph.supports(chosen.varlen, reason)
    report["prompts"] = [
        f"up to {prefill_graph.SIZES[-1]} tokens as one CUDA graph, from the second of a size on"
        if short is None
        else f"layer by layer (CUDA graphs: {short})"
    ]
    report["decode"] = _decode(config, device) if reason is None else [f"step by step (CUDA graphs: {reason})"]
    return report


def _decode(config: GemmaConfig, device: torch.device) -> list[str]:
    lines = ["one CUDA graph a step"]
    for name, storage in _STORAGES.items():
        reason = cuda_megakernel.supports(config, {storage}, BLOCK_SIZE, device)
        how = "all in one launch" if reason is None else f"several launches each ({reason})"
        lines.append(f"{name} layers, one sequence: {how}")
    for what, top_k, filtered in ("draws", 0, False), ("draws with a top_k", 64, True), ("other draws", 0, True):
        reason = draw_tokens.supports(config.vocab_size, top_k, filtered)
        lines.append(f"{what}: " + ("one launch" if reason is None else f"PyTorch's operations ({reason})"))
    return lines


def _linear(case: LinearCase, device: torch.device) -> list[str]:
    reasons = {implementation.name: implementation.supports(case, device) for implementation in LINEAR}
    return _lines(next(name for name, reason in reasons.items() if reason is None), reasons)


def _lines(chosen: str, reasons: dict[str, str | None]) -> list[str]:
    return [chosen, *(f"not {name}: {reason}" for name, reason in reasons.items() if reason is not None)]


def _shapes(config: GemmaConfig) -> list[tuple[int, tuple[int, ...]]]:
    """(inputs, rows of each matrix that stands in it) of a layer's products."""
    attention = (config.query_size, config.key_value_size, config.key_value_size)
    return [
        (config.hidden_size, attention),
        (config.query_size, (config.hidden_size,)),
        (config.hidden_size, (config.intermediate_size,) * 2),
        (config.intermediate_size, (config.hidden_size,)),
    ]


def _where(device: torch.device) -> torch.device:
    # Memory that is never touched: support depends on shapes alone. A GPU's would be taken.
    return device if device.type == "cpu" else torch.device("meta")


def _whole(k: int, rows: tuple[int, ...], device: torch.device) -> tuple[CheckpointWeight, ...]:
    return (torch.empty((sum(rows), k), dtype=DTYPE, device=_where(device)),)


def _int8(k: int, rows: tuple[int, ...], device: torch.device) -> tuple[CheckpointWeight, ...]:
    where = _where(device)
    return tuple(
        Int8Weight(torch.empty((n, k), dtype=torch.int8, device=where), torch.empty(n, device=where), DTYPE)
        for n in rows
    )


def _nf4(k: int, rows: tuple[int, ...], device: torch.device) -> tuple[CheckpointWeight, ...]:
    where = _where(device)

    def cut(n: int) -> FourBitWeight:
        codes = torch.empty(n * k // 2, dtype=torch.uint8, device=where)
        absmax = torch.empty(-(-n * k // 64), dtype=torch.uint8, device=where)
        nested = Nested(torch.empty(-(-len(absmax) // 256), device=where), 0.0)
        return FourBitWeight(codes, absmax, "nf4", 64, (n, k), DTYPE, nested)

    return tuple(cut(n) for n in rows)


_FORMATS: dict[str, Callable[[int, tuple[int, ...], torch.device], tuple[CheckpointWeight, ...]]] = {
    "whole": _whole,
    "int8": _int8,
    "nf4": _nf4,
}

_STORAGES = {"whole": bf16_matvec.STORAGE, "int8": int8_matvec.STORAGE, "nf4": nf4_matvec.NESTED}
