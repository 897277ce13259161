"""Give every linear layer of a loaded network the kernel that dispatch chooses for it, and the network its ops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from gemcut.kernels.gpu import gpu_at
from gemcut.kernels.linear.dispatch import Choice, choose_linear
from gemcut.model.linear import WeightOwner
from gemcut.model.ops import cpu, cuda
from gemcut.model.ops.base import NetworkCase
from gemcut.model.ops.cpu_stack import LayerStack
from gemcut.model.ops.plain import PlainOps

if TYPE_CHECKING:
    from gemcut.model.gemma import Model


def bind_kernels(model: Model, device: torch.device, kernels: str = "auto") -> dict[str, Choice]:
    """Choose a kernel for each linear layer and the head; returns the choices by module name.

    Call it when the weights are in place; replacing a weight afterwards needs another call. ``kernels`` is "auto" or
    the name of one implementation: "plain" is plain PyTorch everywhere. Raises UnsupportedError.
    """
    chosen = bind_products(model, device, kernels)
    _choose_ops(model, device, kernels)
    return chosen


def _choose_ops(model: Model, device: torch.device, kernels: str) -> None:
    """What computes the layers' operations; and all layers in one call, where that can be."""
    attention = model.attention_implementation
    model.kernels, model.fused, model.ops = kernels, None, PlainOps(model.dtype)
    case, gpu = NetworkCase(model.config, model.dtype), gpu_at(device)
    if kernels in ("auto", "cuda") and cuda.refusal(case, gpu) is None:
        eager = model.asked_attention == "eager"
        model.ops = cuda.CudaOps(model.ropes, attention.varlen, decode=not eager)
    elif kernels == "auto" and attention.varlen is None and cpu.refusal(case, gpu) is None:
        model.ops = ops = cpu.CpuOps()
        stack = LayerStack(model.layer_list, ops.library)
        model.fused = stack if stack.refusal is None else None


def bind_products(part: nn.Module, device: torch.device, kernels: str = "auto") -> dict[str, Choice]:
    """Choose a kernel for each matrix in ``part`` of a network, a layer for one, as ``bind_kernels`` does for all."""
    chosen = {}
    for name, module in part.named_modules():
        if isinstance(module, WeightOwner):
            chosen[name] = choose_linear(module.case, device, kernels)
            module.bind(chosen[name].kernel)
    return chosen


def release_products(part: nn.Module) -> None:
    """Take the kernels from ``part``, which hold its matrices."""
    for module in part.modules():
        if isinstance(module, WeightOwner):
            module.bind(None)
