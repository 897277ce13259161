"""What the GPU tests share: errors, exact norms and rotation, a small random network, logits beside references."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from gemcut.config import GemmaConfig
from gemcut.engine import Engine, EngineConfig, Request, SamplingParams
from gemcut.engine.cache import CacheShape, PagedCache, Tables
from gemcut.engine.paged import PagedKeyValues
from gemcut.model import Model
from gemcut.model.bind import bind_kernels
from gemcut.model.key_values import Span
from gemcut.model.quantized import quantized_embedding, quantized_linear
from gemcut.quantization.four_bit import quantize_4bit
from gemcut.quantization.int8 import quantize_int8, quantize_int8_rows
from gemcut.quantization.spec import Quantization
from model.build import our_model, their_logits
from model.build import rms as rms_of
from reference.gemma import reference_logits


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


@torch.inference_mode()
def prompt_logits(model: Model, ids: list[int]) -> torch.Tensor:
    """fp32 [T, V] of one prompt through the paged cache, as the engine runs it without graphs."""
    device = model.norm.scale.device
    blocks = list(range(-(-len(ids) // 16)))
    cache = PagedCache(model.config, CacheShape(16, len(blocks), len(blocks)), model.dtype, device)
    kv = PagedKeyValues(model.config, cache, [Tables(blocks, blocks)], [Span(0, len(ids), len(ids))])
    return model.head(model(torch.tensor(ids, device=device), torch.arange(len(ids), device=device), kv))


def greedy_logits(model: Model, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """A greedy request through an engine: its ``count`` tokens, and the logits fp32 [count, V] they are chosen from.

    The first row is the prompt's last; the others come from the decode graphs.
    """
    engine = Engine(model, model.norm.scale.device, EngineConfig(max_context=len(prompt) + count))
    kept, run = [], engine.runner.run

    def keeping(batch: Any, tables: Any) -> torch.Tensor:
        logits = run(batch, tables)
        kept.append(logits.clone())
        return logits

    engine.runner.run = keeping  # type: ignore[method-assign]
    params = SamplingParams(max_new_tokens=count, temperature=0, ignore_eos=True, logprobs=0)
    sequence = engine.submit(Request(prompt_ids=tuple(prompt), params=params))
    while engine.has_work:
        engine.step()
    return sequence.tokens[len(prompt) :], torch.cat(kept)


def check_beside_theirs(theirs: Any, ids: list[int], new: int) -> None:
    """Our bf16 network on the GPU is as near float64 as ``theirs`` there is: all of a prompt, and ``new`` tokens more.

    ``theirs``: a transformers model in bf16 on the GPU, whose weights both have.
    """
    ours = our_model(theirs)
    choices = bind_kernels(ours, theirs.device)
    if theirs.device.type == "cuda":
        assert {choice.name for choice in choices.values()} == {"cuda"}

    def exact(ids: list[int], last: int = 0) -> torch.Tensor:
        with theirs.device:
            weights, config = theirs.state_dict(), theirs.config.to_dict()
            return reference_logits(weights, config, ids, scale_dtype=torch.bfloat16, last=last)

    want = exact(ids)
    their_error = rms_of(their_logits(theirs, torch.tensor(ids, device=theirs.device)) - want)
    our_error = rms_of(prompt_logits(ours, ids) - want)
    print(f"prompt of {len(ids)}: rms against float64 {our_error:.4f}, transformers {their_error:.4f}")
    assert 0 < our_error <= their_error
    found, logits = greedy_logits(ours, ids, new)
    whole = ids + found
    want = exact(whole, new + 1)[:-1]
    their_error = rms_of(their_logits(theirs, torch.tensor(whole, device=theirs.device))[-new - 1 : -1] - want)
    our_error = rms_of(logits - want)
    print(f"{new} tokens decoded: rms against float64 {our_error:.4f}, transformers {their_error:.4f}")
    assert 0 < our_error <= their_error
