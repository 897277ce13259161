"""What the GPU tests share: errors, exact norms and rotation, a small random network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from gemcut.config import GemmaConfig
from gemcut.model import Model
from gemcut.model.bind import bind_kernels
from gemcut.model.quantized import quantized_embedding, quantized_linear
from gemcut.quantization.four_bit import quantize_4bit
from gemcut.quantization.int8 import quantize_int8, quantize_int8_rows
from gemcut.quantization.spec import Quantization


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return ((out.double() - reference).norm() / reference.norm()).item()


def rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()


def rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
    )


CONFIG: dict[str, Any] = {
    "model_type": "gemma2",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "query_pre_attn_scalar": 48,
    "sliding_window": 24,
    "max_position_embeddings": 512,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 30.0,
    "rope_theta": 10000.0,
}


def network(weights: str, *, bound: bool, **changes: Any) -> Model:
    """A small random network, the same whether its kernels are bound or not; ``changes`` of its CONFIG."""
    spec = {"bf16": None, "int8": Quantization("int8"), "nf4": Quantization("nf4", head="int8")}[weights]
    factories: dict[str, Any] = {}
    if spec is not None:
        factories = {
            "linear": quantized_linear(spec, torch.bfloat16),
            "embedding": quantized_embedding(spec, torch.bfloat16),
        }
    where: dict[str, Any] = {"device": torch.device("cuda", 0)} if bound else {"attention": "eager"}
    with torch.device("meta"):
        model = Model(GemmaConfig.from_dict({**CONFIG, **changes}), dtype=torch.bfloat16, **where, **factories)
    generator = torch.Generator(device="cpu").manual_seed(1)

    def random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to("cuda", dtype)

    for name, module in list(model.named_modules()):
        if hasattr(module, "part_shapes"):
            cut = []
            for part in module.part_shapes:
                whole = random(part, torch.bfloat16)
                if name == "embed":
                    cut.append(quantize_int8_rows(whole * 8))
                else:
                    cut.append(quantize_int8(whole) if weights == "int8" else on_gpu(whole))
            module.fill(cut)
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            value = random(tuple(parameter.shape), parameter.dtype) * (8 if name == "embed" else 1)
            setattr(module, leaf, torch.nn.Parameter(value + (leaf == "scale"), requires_grad=False))
    if bound:
        assert {choice.name for choice in bind_kernels(model, torch.device("cuda", 0)).values()} == {"cuda"}
    return model


def on_gpu(whole: torch.Tensor) -> Any:
    cut = quantize_4bit(whole.cpu())
    nested = replace(cut.nested, scale=cut.nested.scale.cuda())
    return replace(cut, codes=cut.codes.cuda(), absmax=cut.absmax.cuda(), nested=nested)
