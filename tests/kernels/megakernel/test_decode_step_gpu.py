"""A decode step in one launch against the network in float64, beside the same step in several launches a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemcut.config import FULL
from gemcut.engine.cache import CacheShape, PagedCache, Tables
from gemcut.engine.decode_graph import DecodeGraph
from gemcut.model import Model
from gemcut.model.quantized import Int8Embedding
from gemcut.quantization.four_bit import dequantize_4bit
from gemcut.quantization.int8 import dequantize_int8
from gemcut.quantization.weights import FourBitWeight, Int8Weight
from gpu_support import network, relative_error, rms, rotated

pytestmark = pytest.mark.gpu

BLOCK = 8
MOST = 1024  # blocks of a sequence


def exact(module: Any) -> torch.Tensor:
    """The module's matrix in float64."""
    if hasattr(module, "weight"):
        return module.weight.double()
    parts = []
    for weight in module.unpacked():
        if isinstance(weight, Int8Weight):
            parts.append(weight.codes.double() * (weight.absmax.double() / 127)[:, None])
        else:
            assert isinstance(weight, FourBitWeight)
            parts.append(dequantize_4bit(weight, torch.float32).double())
    return torch.cat(parts)


def reference(model: Model, cache: PagedCache, tables: Tables, token: int, position: int) -> torch.Tensor:
    """float64 logits [V] before the final soft-cap; the cache has the tokens before ``position``."""
    config = model.config
    heads, kv_heads, d, eps = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.rms_norm_eps,
    )
    table = exact(model.embed)
    if isinstance(model.embed, Int8Embedding):
        cut = model.embed.table
        row = dequantize_int8(Int8Weight(cut.codes[token : token + 1], cut.absmax[token : token + 1], torch.bfloat16))[
            0
        ]
    else:
        row = model.embed.weight[token]
    residual = row.double() * model.embed_scale
    counts = {True: 0, False: 0}
    for layer, kind in zip(model.layers, config.layer_types, strict=True):
        full = kind == FULL
        storage = (cache.full_storage if full else cache.sliding_storage)[counts[full]]
        counts[full] += 1
        attention = layer.attention
        qkv = exact(attention.qkv_proj) @ (rms(residual, eps) * layer.input_norm.scale.double())
        query, key, value = qkv.split([heads * d, kv_heads * d, kv_heads * d])
        query, key, value = query.view(heads, d), key.view(kv_heads, d), value.view(kv_heads, d)
        if attention.q_norm is not None:
            query = rms(query, eps) * attention.q_norm.scale.double()
            key = rms(key, eps) * attention.k_norm.scale.double()
        base, factor = (config.rope_theta, config.rope_scaling_factor) if full else (config.rope_local_theta, 1.0)
        angles = position / factor * base ** -(torch.arange(0, d, 2, dtype=torch.float64, device="cuda") / d)
        query, key = rotated(query, angles), rotated(key, angles)
        first = 0 if full else max(0, position - config.sliding_window + 1)
        places = torch.arange(first, position, device="cuda")
        blocks = torch.tensor(tables.full if full else tables.sliding, device="cuda")
        places = blocks[places // BLOCK] * BLOCK + places % BLOCK
        keys, values = (part.flatten(0, 1)[places].double() for part in storage)
        keys, values = torch.cat((keys, key[None])), torch.cat((values, value[None]))
        group = heads // kv_heads
        scores = torch.einsum("hd,lhd->hl", query, keys.repeat_interleave(group, dim=1)) * config.attention_scale
        cap = config.attn_logit_softcapping
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        mixed = torch.einsum("hl,lhd->hd", scores.softmax(dim=-1), values.repeat_interleave(group, dim=1)).flatten()
        residual = residual + rms(exact(attention.o_proj) @ mixed, eps) * layer.post_attention_norm.scale.double()
        x = rms(residual, eps) * layer.pre_feedforward_norm.scale.double()
        gate, up = (exact(layer.mlp.gate_up_proj) @ x).chunk(2)
        gated = 0.5 * gate * (1 + torch.tanh(0.7978845608028654 * (gate + 0.044715 * gate**3))) * up
        residual = residual + rms(exact(layer.mlp.down_proj) @ gated, eps) * layer.post_feedforward_norm.scale.double()
    return table @ (rms(residual, eps) * model.norm.scale.double())


SHAPES: list[dict[str, Any]] = [
    {},
    # more tiles than blocks, padded column steps, odd tile counts
    {
        "hidden_size": 2240,
        "intermediate_size": 2304,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 256,
    },
    {
        "hidden_size": 320,
        "intermediate_size": 4608,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
    },
    # Gemma 3: norms of heads, no soft-cap, other angles in sliding layers
    {
        "model_type": "gemma3_text",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "num_hidden_layers": 7,
    },
    # a query head a key head, no soft-cap; then four of them, heads of few values
    {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 128, "attn_logit_softcapping": None},
    {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 32},
]


@pytest.mark.parametrize("shape", range(len(SHAPES)))
@pytest.mark.parametrize("weights", ["bf16", "int8", "nf4"])
def test_one_launch_is_as_near_float64_as_several(weights: str, shape: int) -> None:
    model = network(weights, bound=True, max_position_embeddings=8192, sliding_window=600, **SHAPES[shape])
    device = torch.device("cuda", 0)
    tables = Tables(torch.randperm(MOST).tolist(), torch.randperm(MOST).tolist())
    errors: dict[bool, list[float]] = {True: [], False: []}
    with torch.inference_mode():
        cache = PagedCache(model.config, CacheShape(BLOCK, MOST, MOST), torch.bfloat16, device)
        graphs = {it: DecodeGraph(model, cache, device, 1, MOST, one_launch=it) for it in (True, False)}
        assert graphs[True].step is not None, graphs[True].step_refusal
        assert graphs[False].step is None
        # one run of a head, several side by side, many that are joined first; both sides of edges
        for position in (0, 1, 7, 8, 63, 126, 127, 128, 130, 599, 600, 777, 2047, 4094, 4096, 7999):
            for storage in (cache.full_storage, cache.sliding_storage):
                storage.normal_()
            token = (position * 37 + 5) % 1000
            want = reference(model, cache, tables, token, position)
            written = []
            for it, graph in graphs.items():
                before = [storage.clone() for storage in (cache.full_storage, cache.sliding_storage)]
                for _ in range(2):  # the second step finds the words of the first, and the key it wrote itself
                    graph.logits.fill_(torch.nan)
                    graph.load([token], [position], [tables])
                    graph.launch()
                    graph.take()
                errors[it].append(relative_error(graph.logits[0], want))
                written.append([storage.clone() for storage in (cache.full_storage, cache.sliding_storage)])
                for storage, old in zip((cache.full_storage, cache.sliding_storage), before, strict=True):
                    assert (storage != old).any(dim=-1).sum() <= 2 * storage.shape[0] * storage.shape[-2]
                    storage.copy_(old)
            for ours, theirs in zip(*written, strict=True):  # the same place, and nearly the same values
                assert relative_error(ours, theirs.double()) < 2e-3
    one, several = (sum(errors[it]) / len(errors[it]) for it in (True, False))
    assert one <= 1.05 * several, (errors[True], errors[False])
    assert max(errors[True]) < 1.5 * max(errors[False]), (errors[True], errors[False])


def test_the_same_step_twice_gives_the_same_bits_and_an_empty_row_does_nothing() -> None:
    model = network("nf4", bound=True, max_position_embeddings=8192)
    device = torch.device("cuda", 0)
    tables = Tables(list(range(MOST)), list(range(MOST)))
    with torch.inference_mode():
        cache = PagedCache(model.config, CacheShape(BLOCK, MOST, MOST), torch.bfloat16, device)
        cache.full_storage.normal_(), cache.sliding_storage.normal_()
        graph = DecodeGraph(model, cache, device, 1, MOST)
        assert graph.step is not None
        found: dict[int, list[torch.Tensor]] = {}
        for index in range(150):  # in turns, so that words of other runs lie about
            position = (1234, 40, 250, 8000, 600)[index % 5]
            graph.load([7], [position], [tables])
            graph.launch()
            graph.take()
            if index >= 10:  # by then each has written its own key where the others find it
                found.setdefault(position, []).append(graph.step.x.clone())
        for same in found.values():
            assert all(torch.equal(same[0], other) for other in same)
        kept = cache.full_storage.clone()
        graph.load([7], [-1], [tables])
        graph.launch()
        graph.take()
        assert torch.equal(kept, cache.full_storage)
        assert graph.positions.tolist() == [-1]


@pytest.mark.parametrize("shape", [0, 2, 3])
@pytest.mark.parametrize("one_launch", [True, False])
def test_nothing_but_the_window_is_seen_and_what_is_bad_there_is_told(one_launch: bool, shape: int) -> None:
    """NaN or infinity where no query looks changes no bit of the logits; where one looks, the row has no next token."""
    model = network("nf4", bound=True, max_position_embeddings=8192, sliding_window=600, **SHAPES[shape])
    device = torch.device("cuda", 0)
    tables = Tables(torch.randperm(MOST).tolist(), torch.randperm(MOST).tolist())
    with torch.inference_mode():
        cache = PagedCache(model.config, CacheShape(BLOCK, MOST, MOST), torch.bfloat16, device)
        graph = DecodeGraph(model, cache, device, 1, MOST, one_launch=one_launch)
        groups = (cache.full_storage, tables.full, 0), (cache.sliding_storage, tables.sliding, 600)

        def places(blocks: list[int], first: int, end: int) -> torch.Tensor:
            at = torch.arange(first, end, device=device)
            return torch.tensor(blocks, device=device)[at // BLOCK] * BLOCK + at % BLOCK

        def step(position: int) -> list[list[int]]:
            graph.logits.fill_(torch.nan)
            graph.load([7], [position], [tables])
            graph.launch()
            return list(graph.take())

        for position in (0, 1, 7, 63, 127, 130, 599, 600, 777, 2047, 7999):
            for storage, _, _ in groups:
                storage.normal_()
            found = []
            for other in (0.0, torch.nan, torch.inf):
                for storage, blocks, window in groups:
                    hidden = torch.ones(MOST * BLOCK, dtype=torch.bool, device=device)
                    hidden[places(blocks, max(0, position - window + 1) if window else 0, position)] = False
                    storage.flatten(2, 3)[:, :, hidden] = other
                assert step(position)[1] == [position + 1]
                found.append(graph.logits.clone())
            assert torch.equal(found[0], found[1]), position
            assert torch.equal(found[0], found[2]), position
            for (storage, blocks, _), part, other in (
                (groups[0], 1, torch.inf), (groups[0], 0, torch.nan), (groups[1], 1, torch.nan)
            ):  # fmt: skip
                if position == 0:
                    continue
                place = places(blocks, position - 1, position)  # in every window
                kept = storage.flatten(2, 3)[-1, part, place].clone()
                storage.flatten(2, 3)[-1, part, place] = other
                assert step(position)[:2] == [[0], [-1]], (position, part)
                storage.flatten(2, 3)[-1, part, place] = kept
            assert step(position)[1] == [position + 1]
            assert torch.equal(graph.logits, found[0]), position
