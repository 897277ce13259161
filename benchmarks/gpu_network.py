"""A Gemma 2 network of a full shape with random weights, on the GPU."""

from __future__ import annotations

import torch

from gemcut.config import SLIDING, GemmaConfig
from gemcut.model import Model
from gemcut.model.bind import bind_kernels
from gemcut.model.quantized import quantized_embedding, quantized_linear
from gemcut.quantization.spec import Quantization
from gemcut.quantization.weights import CheckpointWeight, FourBitWeight, Int8Weight, Nested

SIZES = {
    "2b": (26, 2304, 9216, 8, 4, 256, 256),
    "9b": (42, 3584, 14336, 16, 8, 256, 256),
    "27b": (46, 4608, 36864, 32, 16, 128, 144),
}
WEIGHTS = {
    "bf16": None,
    "int8": Quantization("int8"),
    "nf4": Quantization("nf4"),
    "nf4-head8": Quantization("nf4", head="int8"),
}


def shape(size: str, layers: int | None) -> dict[str, object]:
    """config.json of a member of the family, cut to ``layers`` where given."""
    count, hidden, width, heads, kv_heads, head_dim, scalar = SIZES[size]
    return {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers or count,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "query_pre_attn_scalar": scalar,
        "sliding_window": 4096,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "rope_theta": 10000.0,
    }


def random_weight(shape: tuple[int, int], spec: Quantization, head: bool) -> CheckpointWeight:
    """A random packed matrix whose values are of a usual size."""
    n, k = shape
    if head or spec.format == "int8":
        codes = torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")
        return Int8Weight(codes, torch.full((n,), 0.035, device="cuda"), torch.bfloat16)
    codes = torch.randint(0, 256, (n * k // 2,), dtype=torch.uint8, device="cuda")
    absmax = torch.randint(0, 256, (n * k // 64,), dtype=torch.uint8, device="cuda")
    nested = Nested(torch.full((-(-n * k // 64 // 256),), 0.01, device="cuda"), 0.04)
    return FourBitWeight(codes, absmax, "nf4", 64, shape, torch.bfloat16, nested)


def build(size: str, weights: str, layers: int | None = None) -> tuple[Model, int]:
    """(the network with its kernels bound, bytes of weights a decode step reads)."""
    spec = WEIGHTS[weights]
    device = torch.device("cuda", torch.cuda.current_device())
    factories = {}
    if spec is not None:
        factories = {
            "linear": quantized_linear(spec, torch.bfloat16),
            "embedding": quantized_embedding(spec, torch.bfloat16),
        }
    with torch.device("meta"):
        model = Model(GemmaConfig.from_dict(shape(size, layers)), dtype=torch.bfloat16, device=device, **factories)
    nbytes = 0
    for name, module in list(model.named_modules()):
        if spec is not None and hasattr(module, "part_shapes"):
            module.fill([random_weight(part, spec, name == "embed") for part in module.part_shapes])
            nbytes += sum(weight.nbytes for weight in module.weights)
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if leaf == "scale":
                value = torch.ones(parameter.shape, device=device)
            else:
                value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device).normal_(std=0.02)
            nbytes += value.nbytes
            setattr(module, leaf, torch.nn.Parameter(value, requires_grad=False))
    bind_kernels(model, device)
    return model, nbytes


def cache_bytes(config: GemmaConfig, context: int) -> int:
    """Bytes of bf16 keys and values a step after ``context`` tokens reads; in sliding layers those of the window."""
    token = 2 * config.num_key_value_heads * config.head_dim * 2
    windows = [config.sliding_window if kind == SLIDING else context for kind in config.layer_types]
    return sum(token * min(context, window) for window in windows)


def product_flop(module: torch.nn.Module) -> int:
    """Floating-point operations a token takes in the matrix products of ``module``."""
    shapes = [part for child in module.modules() for part in getattr(child, "part_shapes", ())]
    whole = [p.shape for p in module.parameters() if p.dim() == 2]
    return 2 * sum(n * k for n, k in [*shapes, *whole])
