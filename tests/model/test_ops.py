"""The operations' implementations on a CPU, against the network in fp32 and each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gemcut.config import GemmaConfig
from gemcut.engine.cache import PagedCache, Tables, shape_for_tokens
from gemcut.engine.paged import PagedKeyValues
from gemcut.kernels.cpu import library as cpu
from gemcut.kernels.cpu.attention import DecodeAttention
from gemcut.kernels.cpu.linear import MAX_M, CpuLinear
from gemcut.loading import build_network
from gemcut.model import Model
from gemcut.model.bind import bind_kernels
from gemcut.model.dense import DenseKeyValues
from gemcut.model.key_values import Span
from gemcut.model.linear import Linear, LinearLayer
from gemcut.model.ops.cpu import CpuOps
from gemcut.model.ops.cpu_stack import LayerStack
from gemcut.model.ops.plain import PlainOps
from gemcut.quantization.spec import Quantization
from support import tiny_config

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
BF16 = torch.bfloat16
VARIANTS = cpu.variants()


def tiny_model(kind: str, dtype: torch.dtype) -> Model:
    """A random network of three blocks' worth of context; the same bf16 numbers in any dtype."""
    config = GemmaConfig.from_dict(tiny_config(kind).to_dict())
    model = Model(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (1 + 0.2 * noise) if name.endswith("scale") else (0.2 * noise).to(BF16).to(dtype)
    return model.eval()


@torch.inference_mode()
def logits_of_steps(model: Model, ids: Tensor, prompt: int) -> Tensor:
    """Logits after the prompt and after each further token, one at a time, over a paged cache."""
    shape = shape_for_tokens(model.config, sequences=1, context=len(ids), chunk=len(ids), block_size=16)
    cache = PagedCache(model.config, shape, model.dtype, torch.device("cpu"))
    tables = Tables()
    rows, done = [], 0
    for end in [prompt, *range(prompt + 1, len(ids) + 1)]:
        cache.extend(tables, done, end - done)
        kv = PagedKeyValues(model.config, cache, [tables], [Span(0, end - done, end)])
        hidden = model(ids[done:end], torch.arange(done, end), kv)
        rows.append(model.head(hidden[-1:]))
        done = end
    return torch.cat(rows)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_network(kind: str, variant: str) -> None:
    """Prefill and decode beyond the window: as near to the network in fp32 as the plain one in bf16."""
    ids = torch.randint(0, 300, (60,), generator=torch.Generator().manual_seed(1))
    want = logits_of_steps(tiny_model(kind, torch.float32), ids, 21)
    model = tiny_model(kind, BF16)
    plain = logits_of_steps(model, ids, 21)
    model.ops = CpuOps(variant)
    got = logits_of_steps(model, ids, 21)
    assert (got - want).square().mean() <= 1.1 * (plain - want).square().mean()


@torch.inference_mode()
@pytest.mark.parametrize("variant", VARIANTS)
def test_wanted_rows(variant: str) -> None:
    """Behind the last attention only they are computed; the products of fewer rows may round otherwise."""
    model, ids = tiny_model("gemma2", BF16), torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(2))
    model.ops = CpuOps(variant)
    positions, wanted = torch.arange(40), torch.tensor([39, 3])
    whole, some = (model(ids, positions, DenseKeyValues(40), rows) for rows in (None, wanted))
    assert some.shape == (2, whole.shape[1])
    assert (some - whole[wanted]).norm() < 0.02 * whole[wanted].norm()


@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 3, MAX_M, MAX_M + 2])
@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_all_layers_in_one_call(kind: str, variant: str, batch: int) -> None:
    """The same kernels in the same order as one by one: the same bits, for sequences of any lengths."""
    model, library = tiny_model(kind, BF16), cpu.library(variant)
    for module in model.modules():
        if isinstance(module, Linear):
            module.kernel = CpuLinear(module.case, library)
    lengths = [1 + 7 * b for b in range(batch)]
    shape = shape_for_tokens(model.config, sequences=batch, context=128, chunk=128, block_size=16)
    results = []
    for in_one in (True, False):
        cache = PagedCache(model.config, shape, BF16, torch.device("cpu"))
        tables = [Tables() for _ in lengths]
        model.ops = CpuOps(variant)
        model.fused = LayerStack(model.layer_list, library) if in_one else None
        assert model.fused is None or model.fused.refusal is None
        for turn in range(3):
            spans, ids, positions = [], [], []
            for b, length in enumerate(lengths):
                done, new = (0, length) if turn == 0 else (length + turn - 1, 1)
                cache.extend(tables[b], done, new)
                spans.append(Span(len(ids), new, done + new))
                ids += [(7 * b + 3 * i) % 300 for i in range(done, done + new)]
                positions += range(done, done + new)
            kv = PagedKeyValues(model.config, cache, tables, spans)
            hidden = model(torch.tensor(ids), torch.tensor(positions), kv)
        results.append((hidden, cache.full_storage.clone(), cache.sliding_storage.clone()))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_bind_kernels_sets_them() -> None:
    """In bf16 on a CPU they serve; never where plain PyTorch was asked for, nor in fp32."""
    model, device = tiny_model("gemma2", BF16), torch.device("cpu")
    bind_kernels(model, device)
    assert isinstance(model.ops, CpuOps)
    assert model.fused is not None
    bind_kernels(model, device, "plain")
    assert isinstance(model.ops, PlainOps)
    assert model.fused is None
    model = tiny_model("gemma2", torch.float32)
    bind_kernels(model, device)
    assert isinstance(model.ops, PlainOps)
    assert model.fused is None


def test_a_linear_layer_knows_its_name_and_role() -> None:
    """Both kinds, as modules are named; the role is the same in every layer."""
    config = GemmaConfig.from_dict(tiny_config("gemma2").to_dict())
    for quantization in (None, Quantization("nf4")):
        model = build_network(config, dtype=BF16, device=torch.device("cpu"), quantization=quantization)
        linears = {name: module for name, module in model.named_modules() if isinstance(module, LinearLayer)}
        assert {name: module.name for name, module in linears.items()} == {name: name for name in linears}
        roles = [module.role for module in linears.values()]
        assert len(linears) == 4 * config.num_hidden_layers
        assert set(roles) == {"attention.qkv_proj", "attention.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}


@torch.inference_mode()
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1)], ids=["last", "amid", "first"])
@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prompt_beside_answers(
    kind: str, order: tuple[int, ...], variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sequences of one new token and a prompt's second chunk in one step: the first two take the way of a decode
    step, and all are as near to the network in fp32 as plain ones."""
    lengths, new = (17, 30, 40), (1, 1, 22)
    alone: list[int] = []
    inner = DecodeAttention.__call__

    def counted(self: DecodeAttention, qkv: Tensor, *args: Any, **more: Any) -> Tensor:
        alone.append(len(qkv))
        return inner(self, qkv, *args, **more)

    monkeypatch.setattr(DecodeAttention, "__call__", counted)

    def hidden_of(model: Model, chosen: tuple[int, ...]) -> Tensor:
        """Rows of the ``chosen`` sequences, in that order, of the step behind the one that fills the cache."""
        shape = shape_for_tokens(model.config, sequences=3, context=64, chunk=64, block_size=16)
        cache = PagedCache(model.config, shape, model.dtype, torch.device("cpu"))
        tables = {i: Tables() for i in chosen}
        for step in range(2):
            spans, ids, positions = [], [], []
            for i in chosen:
                done, count = (0, lengths[i]) if step == 0 else (lengths[i], new[i])
                cache.extend(tables[i], done, count)
                spans.append(Span(len(ids), count, done + count))
                ids += [(11 * i + 5 * place) % 300 for place in range(done, done + count)]
                positions += range(done, done + count)
            kv = PagedKeyValues(model.config, cache, list(tables.values()), spans)
            hidden = model(torch.tensor(ids), torch.tensor(positions), kv)
        return hidden

    want = hidden_of(tiny_model(kind, torch.float32), order)
    model = tiny_model(kind, BF16)
    plain = hidden_of(model, order)
    model.ops = CpuOps(variant)
    got = hidden_of(model, order)
    assert alone == [2] * model.config.num_hidden_layers
    assert (got - want).square().mean() <= 1.1 * (plain - want).square().mean()
    assert bool(((got - want).norm(dim=1) < 0.02 * want.norm(dim=1)).all())  # a wrong place would change a row wholly
    for module in model.modules():
        if isinstance(module, Linear):
            module.kernel = CpuLinear(module.case, cpu.library(variant))
            module.kernel.few = 1 << 30  # rows that do not depend on their neighbours
    whole, pair = hidden_of(model, order), hidden_of(model, (0, 1))
    places = torch.tensor([i for own in order for i in [own] * new[own]])
    assert torch.equal(whole[places == 0], pair[:1])
    assert torch.equal(whole[places == 1], pair[1:])
