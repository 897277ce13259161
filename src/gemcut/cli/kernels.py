"""``gemcut info --kernels``: which code computes what on each device here, and why other code would not."""

from __future__ import annotations

import torch

from gemcut.cache_blocks import BLOCK_SIZE
from gemcut.cli.kernel_cases import DTYPE, FORMATS, layer_shapes, linear_case
from gemcut.config import GemmaConfig
from gemcut.engine import decode_graph, prefill_graph
from gemcut.errors import UnsupportedError
from gemcut.kernels.gpu import Gpu, gpu_at
from gemcut.kernels.linear import gated as gated_gemm
from gemcut.kernels.linear.dispatch import LINEAR, LinearCase
from gemcut.kernels.megakernel import decode_step
from gemcut.kernels.megakernel.decode_step import StepCase
from gemcut.kernels.sampling import draw as draw_tokens
from gemcut.kernels.sampling.draw import DrawCase
from gemcut.loading import build_network
from gemcut.model.attention import FLASH, IMPLEMENTATIONS, choose_attention
from gemcut.model.ops import cpu as cpu_ops
from gemcut.model.ops import cuda as cuda_ops
from gemcut.model.ops.base import NetworkCase
from gemcut.model.ops.cuda_megakernel import step_shape

#: The formats that are shown, as people call them: FP4 goes where NF4 goes.
_LABELS = {"bf16": "whole", "int8": "int8", "nf4": "nf4"}


def kernel_report(config: GemmaConfig) -> dict[str, dict[str, list[str]]]:
    """For each device: what computes each part of a network of this shape in bfloat16."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    return {str(device): _device(config, device) for device in devices}


def _device(config: GemmaConfig, device: torch.device) -> dict[str, list[str]]:
    report, gpu, case = {}, gpu_at(device), NetworkCase(config, DTYPE)
    for name, label in _LABELS.items():
        found: dict[str, None] = {}
        for shape in layer_shapes(config).values():
            found.update(dict.fromkeys(_linear(linear_case(name, shape, device), gpu)))
        report[f"{label} layers"] = list(found)
    for name in ("bf16", "int8"):
        head = linear_case(name, ((config.vocab_size,), config.hidden_size), device, torch.float32)
        report[f"{_LABELS[name]} head"] = _linear(head, gpu)
    chosen = choose_attention("auto", config, DTYPE, device)
    refused = {name: it.refusal(case.attention, gpu) for name, it in IMPLEMENTATIONS.items()}
    report["attention"] = _lines(chosen.name, refused)
    if device.type == "cuda":
        try:
            report[FLASH] = [choose_attention(FLASH, config, DTYPE, device).detail]
        except UnsupportedError as error:
            report[FLASH] = [str(error)]
    steps = {
        "cuda": cuda_ops.refusal(case, gpu),
        "cpu": cpu_ops.refusal(case, gpu),
        "plain": None,
    }
    report["between products"] = _lines(next(name for name, reason in steps.items() if reason is None), steps)
    if device.type == "cuda":
        reason = gated_gemm.supports(linear_case("bf16", layer_shapes(config)["mlp.gate_up_proj"], device), gpu)
        apart = "product and GeGLU apart"
        report["gate and up"] = [
            f"one launch with GeGLU for {gated_gemm.MANY_ROWS} rows or more that fill its tiles and whole or decoded "
            f"weights, else {apart}"
            if reason is None
            else f"{apart} ({reason})"
        ]
    reason = decode_graph.refusal(build_network(config, dtype=DTYPE, device=device), BLOCK_SIZE, device)
    short = prefill_graph.refusal(chosen.varlen, reason)
    report["prompts"] = [
        f"up to {prefill_graph.SIZES[-1]} tokens as one CUDA graph, from the second of a size on"
        if short is None
        else f"layer by layer (CUDA graphs: {short})"
    ]
    report["decode"] = _decode(config, device) if reason is None else [f"step by step (CUDA graphs: {reason})"]
    return report


def _decode(config: GemmaConfig, device: torch.device) -> list[str]:
    lines = ["one CUDA graph a step"]
    for name, label in _LABELS.items():
        reason = decode_step.supports(StepCase(step_shape(config), FORMATS[name], BLOCK_SIZE), gpu_at(device))
        how = "all in one launch" if reason is None else f"several launches each ({reason})"
        lines.append(f"{label} layers, one sequence: {how}")
    for what, top_k in ("draws", 0), ("draws with a top_k of more than 64", 65):
        reason = draw_tokens.supports(DrawCase(config.vocab_size, top_k), gpu_at(device))
        lines.append(f"{what}: " + ("one launch" if reason is None else f"PyTorch's operations ({reason})"))
    lines.append(
        "draws with top_p or min_p and no top_k: PyTorch's operations (they may keep more than a launch looks at)"
    )
    return lines


def _linear(case: LinearCase, gpu: Gpu | None) -> list[str]:
    reasons = {implementation.name: implementation.refusal(case, gpu) for implementation in LINEAR}
    return _lines(next(name for name, reason in reasons.items() if reason is None), reasons)


def _lines(chosen: str, reasons: dict[str, str | None]) -> list[str]:
    return [chosen, *(f"not {name}: {reason}" for name, reason in reasons.items() if reason is not None)]
