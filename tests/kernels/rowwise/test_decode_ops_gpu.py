"""The decode step's kernels on a GPU against float64, and whole decode graphs against the plain network."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from four_bit_reference import FP4, NF4, dequantize, quantize
from gemcut.engine import Engine, EngineConfig, Request, SamplingParams
from gemcut.engine.decode_graph import DecodeGraph
from gemcut.kernels.attention import decode as decode_attention
from gemcut.kernels.attention.decode import DecodeSpec
from gemcut.kernels.linear import cuda as cuda_linear
from gemcut.kernels.linear.dispatch import LinearCase, choose_linear
from gemcut.kernels.linear.layout import Ordered
from gemcut.kernels.linear.plain import plain_linear
from gemcut.kernels.rowwise import geglu, norm
from gemcut.kernels.sampling import argmax
from gemcut.model.rope import RotaryTable
from gemcut.quantization.int8 import dequantize_int8, quantize_int8, quantize_int8_rows
from gemcut.quantization.weights import Int8Weight, unpacked
from gpu_support import network, relative_error, rms, rotated

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("d", [8, 48, 640, 2304, 4608, 8192])
@pytest.mark.parametrize("m", [1, 3, 70])
def test_norm_add(m: int, d: int) -> None:
    y = (torch.randn(m, d, device="cuda") * 3).bfloat16()
    residual = torch.randn(m, d, device="cuda") * 100
    post, pre = torch.randn(d, device="cuda"), torch.randn(d, device="cuda")
    want = residual.double() + rms(y.double(), 1e-6) * post.double()
    x = norm.norm_add(y, residual, post, pre, 1e-6)
    assert relative_error(residual, want) < 1e-6
    assert relative_error(x, rms(want, 1e-6) * pre.double()) < 2.5e-3


@pytest.mark.parametrize("d", [8, 192, 640, 2304, 4608, 8192])
@pytest.mark.parametrize("m", [1, 9, 70])
def test_norms_and_gated_products_write_rows_in_order(m: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same values as in plain rows, at their places, with zeros behind each row's end."""
    y, residual = (torch.randn(m, d, device="cuda") * 3).bfloat16(), torch.randn(m, d, device="cuda") * 100
    post, pre = torch.randn(d, device="cuda"), torch.randn(d, device="cuda")
    gate_up = torch.randn(m, 2 * d, device="cuda").bfloat16()
    table, ids = torch.randn(50, d, device="cuda").bfloat16(), torch.arange(m, device="cuda", dtype=torch.int32) % 50
    groups, other = -(-m // 16) * 2, residual.clone()

    def both(groups: int, residual: torch.Tensor) -> list[Any]:
        return [
            norm.norm_add(y, residual, post, pre, 1e-6, groups),
            norm.norm(residual, pre, 1e-6, groups),
            norm.norm_embed(ids, table, None, 25.25, pre, 1e-6, groups)[1],
            geglu.geglu(gate_up, groups),
        ]

    empty = Ordered.empty

    def poisoned(*size: Any) -> Ordered:
        ordered = empty(*size)
        ordered.values.fill_(torch.nan)
        return ordered

    monkeypatch.setattr(Ordered, "empty", poisoned)
    for plain, ordered in zip(both(0, residual), both(groups, other), strict=True):
        assert isinstance(ordered, Ordered)
        assert torch.equal(ordered.rows(), plain)
        whole = Ordered(ordered.values, m, ordered.values.shape[0] * 64).rows()
        assert not whole[:, d:].any()
    assert torch.equal(residual, other)


@pytest.mark.parametrize("int8", [False, True])
def test_norm_embed(int8: bool) -> None:
    table = torch.randn(100, 640, device="cuda")
    ids = torch.tensor([0, 99, 7, 7], device="cuda", dtype=torch.int32)
    pre = torch.randn(640, device="cuda")
    if int8:
        cut = quantize_int8_rows(table)
        residual, x = norm.norm_embed(ids, cut.codes, cut.absmax, 25.25, pre, 1e-6)
        rows = dequantize_int8(cut, torch.bfloat16)[ids.long()]
    else:
        residual, x = norm.norm_embed(ids, table.bfloat16(), None, 25.25, pre, 1e-6)
        rows = table.bfloat16()[ids.long()]
    assert torch.equal(residual, rows.float() * 25.25)
    assert relative_error(x, rms(rows.double() * 25.25, 1e-6) * pre.double()) < 2.5e-3


@pytest.mark.parametrize(("m", "width"), [(1, 8), (3, 9216), (70, 2056), (1, 36864)])
def test_geglu(m: int, width: int) -> None:
    gate_up = (torch.randn(m, 2 * width, device="cuda") * 4).bfloat16()
    gate_up[0, :4] = torch.tensor([-1e30, 1e30, -200.0, 200.0])
    gate, up = gate_up.double().chunk(2, dim=-1)
    want = 0.5 * gate * (1 + torch.tanh(0.7978845608028654 * (gate + 0.044715 * gate**3))) * up
    out = geglu.geglu(gate_up)
    assert bool(out.isfinite().all())
    assert relative_error(out[:, 4:], want[:, 4:]) < 2.5e-3
    assert relative_error(out[:, :4], want[:, :4]) < 5e-3


def test_argmax_takes_the_first_of_equal_ones_and_moves_positions_on() -> None:
    logits = torch.randn(5, 256000, device="cuda")
    logits[0, [17, 9000, 255999]] = 100.0
    logits[1, 255999] = 100.0
    logits[2] = -torch.inf
    ids = torch.full((5,), -7, device="cuda", dtype=torch.int32)
    positions = torch.tensor([3, -1, 0, 8191, 5], device="cuda", dtype=torch.int32)
    for _ in range(2):
        argmax.argmax(logits, ids, positions)
    assert ids.tolist() == [17, 255999, 0, *logits[3:].argmax(dim=1).tolist()]
    assert positions.tolist() == [5, -1, -1, 8193, 7]  # a row of minus infinity has no next token


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_argmax_marks_rows_that_are_not_finite(softcap: float | None) -> None:
    logits = torch.randn(7, 256000, device="cuda")
    logits[1, 0], logits[2, 255999], logits[3, 70000], logits[4] = torch.nan, torch.inf, -torch.inf, torch.nan
    ids = torch.full((7,), -7, device="cuda", dtype=torch.int32)
    positions = torch.tensor([3, 4, 5, 6, 7, -1, 9], device="cuda", dtype=torch.int32)
    argmax.argmax(logits, ids, positions, softcap=softcap)
    best = (logits if softcap is None else softcap * torch.tanh(logits / softcap)).argmax(dim=-1).tolist()
    assert ids.tolist() == [best[0], 0, 0, 0, 0, best[5], best[6]]
    assert positions.tolist() == [4, -1, -1, -1, -1, -1, 10]


@pytest.mark.parametrize("window", [None, 5, 700])
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads", "softcap"), [(128, 32, 16, 5.0), (256, 4, 1, None)])
def test_decode_attention_sees_nothing_but_its_window(
    head_dim: int, heads: int, kv_heads: int, softcap: float | None, window: int | None
) -> None:
    """NaN or infinity in every place of the cache that no row may look at gives what zeros there give: bit for bit."""
    lengths, size = [1, 2, 16, 17, 129, 701, 2049, 0], 16
    spec = DecodeSpec(heads, kv_heads, head_dim, head_dim**-0.5, softcap, window)
    most = -(-max(lengths) // size)
    table = torch.randperm(len(lengths) * most, device="cuda").int().view(len(lengths), most)
    storage = torch.randn(2, len(lengths) * most, size, kv_heads, head_dim, device="cuda").bfloat16()
    qkv = torch.randn(len(lengths), (heads + 2 * kv_heads) * head_dim, device="cuda").bfloat16()
    positions = torch.tensor([n - 1 for n in lengths], device="cuda", dtype=torch.int32)
    rope = RotaryTable(head_dim, 10000.0, 4096).table(torch.device("cuda", 0))
    seen = torch.zeros(storage.shape[1] * size, dtype=torch.bool, device="cuda")
    for row, length in enumerate(lengths):
        places = torch.arange(max(0, length - window) if window else 0, max(length - 1, 0), device="cuda")
        seen[table[row].long()[places // size] * size + places % size] = True
    found = []
    for other in (0.0, torch.nan, torch.inf):
        storage.flatten(1, 2)[:, ~seen] = other
        found.append(decode_attention.decode_attention(qkv, storage, table, positions, rope, spec)[:-1])
    assert bool(found[0].isfinite().all())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def reference_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spec: DecodeSpec
) -> torch.Tensor:
    """fp64: query [heads, D] (rotated, unscaled); keys and values [L, kv_heads, D] up to the query's own."""
    group = spec.heads // spec.kv_heads
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    scores = torch.einsum("hd,lhd->hl", query, keys) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if spec.window is not None:
        scores[:, : max(0, keys.shape[0] - spec.window)] = -torch.inf
    return torch.einsum("hl,lhd->hd", scores.softmax(dim=-1), values)


@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "block_size"),
    [(128, 32, 16, 16), (256, 8, 4, 16), (256, 4, 1, 32), (64, 2, 2, 8), (16, 4, 2, 4)],
)
@pytest.mark.parametrize("window", [None, 5, 700])
@pytest.mark.parametrize("norms", [False, True])
def test_decode_attention(
    head_dim: int, heads: int, kv_heads: int, block_size: int, window: int | None, norms: bool
) -> None:
    lengths = [1, 2, 16, 17, 33, 129, 700, 701, 2049, 0]  # with the new token; 0: an unused row
    spec = DecodeSpec(heads, kv_heads, head_dim, head_dim**-0.5, None if norms else 5.0, window)
    most = -(-max(lengths) // block_size)
    blocks = len(lengths) * most
    table = torch.randperm(blocks, device="cuda").int().view(len(lengths), most)
    storage = torch.randn(2, blocks, block_size, kv_heads, head_dim, device="cuda").bfloat16()
    qkv = torch.randn(len(lengths), (heads + 2 * kv_heads) * head_dim, device="cuda").bfloat16() * 2
    positions = torch.tensor([n - 1 for n in lengths], device="cuda", dtype=torch.int32)
    rope = RotaryTable(head_dim, 10000.0, 4096).table(torch.device("cuda", 0))
    weights = [torch.rand(head_dim, device="cuda") + 0.5 for _ in range(2)] if norms else [None, None]
    before = storage.clone()
    results = []
    for _ in range(2):
        storage.copy_(before)
        out = decode_attention.decode_attention(
            qkv, storage, table, positions, rope, spec, q_norm=weights[0], k_norm=weights[1]
        )
        results.append(out)
    inverse = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device="cuda") / head_dim)
    untouched = torch.ones(blocks * block_size, dtype=torch.bool, device="cuda")
    for row, length in enumerate(lengths):
        if length == 0:
            continue
        assert torch.equal(results[0][row], results[1][row]), "the same inputs gave another sum"
        query, key, value = qkv[row].split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim])
        query, key = query.view(heads, -1).double(), key.view(kv_heads, -1).double()
        if norms:
            query = (rms(query, 1e-6) * weights[0]).bfloat16().double()
            key = (rms(key, 1e-6) * weights[1]).bfloat16().double()
        angles = (length - 1) * inverse
        key = rotated(key, angles).bfloat16()
        places = torch.arange(length, device="cuda")
        places = table[row].long()[places // block_size] * block_size + places % block_size
        keys, values = (part.flatten(0, 1)[places].double() for part in before)
        keys[-1], values[-1] = key.double(), value.view(kv_heads, -1).double()
        want = reference_attention(rotated(query, angles), keys, values, spec)
        assert relative_error(results[0][row].view(heads, -1), want) < 4e-3, (row, length)
        assert relative_error(storage[0].flatten(0, 1)[places[-1]], key.double()) < 1e-3
        assert torch.equal(storage[1].flatten(0, 1)[places[-1]], value.view(kv_heads, -1))
        untouched[places[-1]] = False
    assert torch.equal(storage.flatten(1, 2)[:, untouched], before.flatten(1, 2)[:, untouched])


@pytest.mark.parametrize("m", [1, 8, 9, 17, 64, 65, 200])
@pytest.mark.parametrize("name", ["nf4", "fp4", "nf4-flat", "int8"])
def test_several_matrices_in_one_call_against_float64(name: str, m: int) -> None:
    k, rows = 512, (256, 128, 72)
    whole = [torch.randn(n, k, device="cuda") * (0.01 + i) for i, n in enumerate(rows)]
    if name == "int8":
        weights = tuple(quantize_int8(w.bfloat16()) for w in whole)
        dense = torch.cat([w.codes.double() * (w.absmax.double() / 127)[:, None] for w in weights])
    else:
        table = FP4 if name == "fp4" else NF4
        weights = tuple(quantize(w, table, nested=not name.endswith("flat")) for w in whole)
        dense = torch.cat([dequantize(w) for w in weights])
    case = LinearCase(weights, torch.bfloat16, torch.bfloat16)
    choice = choose_linear(case, torch.device("cuda", 0))
    assert choice.name == "cuda"
    x = torch.randn(m, k, device="cuda").bfloat16()
    reference = x.double() @ dense.T
    error, twin = relative_error(choice.kernel(x), reference), relative_error(plain_linear(case, x), reference)
    assert error <= 1.1 * twin, (error, twin)
    for given, back in zip(weights, unpacked(choice.kernel.weights), strict=True):
        assert torch.equal(given.codes, back.codes)
        assert torch.equal(given.absmax, back.absmax)


def test_decoding_many_rows_is_exact() -> None:
    weight = quantize(torch.randn(40, 320, device="cuda"), NF4, nested=True)
    from gemcut.kernels.linear import four_bit as four_bit_linear
    from gemcut.quantization.four_bit import dequantize_4bit

    out = torch.full((40, 320), torch.nan, device="cuda", dtype=torch.bfloat16)
    cuda_linear.dequantize_four_bit(four_bit_linear.pack([weight]), 0, 3, out)
    assert relative_error(out, dequantize(weight)) < 2e-3
    assert (out != dequantize_4bit(weight, torch.bfloat16)).float().mean() < 1e-3  # fp32 contraction at a tie
    int8 = quantize_int8(torch.randn(40, 320, device="cuda").bfloat16())
    out.fill_(torch.nan)
    cuda_linear.dequantize_int8(int8.codes, int8.absmax / 127, out)
    assert (out != dequantize_int8(int8, torch.bfloat16)).float().mean() < 1e-3  # the order of two products at a tie


def test_int8_weights_are_what_the_embedding_reads() -> None:
    model = network("nf4", bound=True)
    assert isinstance(model.embed.table, Int8Weight)


@pytest.mark.parametrize("weights", ["bf16", "int8", "nf4"])
def test_a_graph_step_gives_the_plain_networks_logits(weights: str) -> None:
    """Every step of a few requests: the graph's logits beside plain ones from the same cache, up to bf16's rounding."""
    model, plain = network(weights, bound=True), network(weights, bound=False)
    device = torch.device("cuda", 0)
    engine, twin = (
        Engine(m, device, EngineConfig(max_batch_tokens=64, block_size=4, max_context=256)) for m in (model, plain)
    )
    assert engine.runner.graph_refusal is None
    twin.runner.graph_refusal = "compared with"
    generator = torch.Generator().manual_seed(2)
    prompts = [tuple(torch.randint(0, 1000, (n,), generator=generator).tolist()) for n in (1, 30, 77)]
    outputs = []
    for it in (engine, twin):
        params = SamplingParams(max_new_tokens=60, temperature=0, ignore_eos=True)
        sequences = [it.submit(Request(prompt_ids=prompt, params=params)) for prompt in prompts]
        while it.has_work:
            it.step()
        outputs.append([s.tokens[s.prompt_length :] for s in sequences])
        assert it.cache.full.free == it.cache.full.count
    assert engine.runner._graphs is not None
    for prompt, ours, theirs in zip(prompts, *outputs, strict=True):
        for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            if one != other:  # then the plain logits of the two must be as near as rounding can bring them
                tokens = torch.tensor([*prompt, *ours[:place]], device="cuda")
                from gemcut.model.dense import dense_logits

                logits = dense_logits(plain, tokens)[-1]
                assert (logits.max() - logits[one]).item() < 0.15, (place, one, other)
                break


@pytest.mark.parametrize("weights", ["bf16", "nf4"])
def test_sampled_requests_in_graphs_give_the_same_tokens(weights: str) -> None:
    """Every kind of request that needs logits, beside the same engine without graphs: same kernels, same draws."""
    model = network(weights, bound=True)
    device = torch.device("cuda", 0)
    engine, twin = (
        Engine(model, device, EngineConfig(max_batch_tokens=64, block_size=4, max_context=256)) for _ in range(2)
    )
    twin.runner.graph_refusal = "compared with"
    several: list[list[dict[str, Any]]] = [
        [{"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 3}],
        [{"temperature": 1.3, "seed": 5}, {"temperature": 0.7, "top_p": 0.8, "min_p": 0.02, "seed": 9}],
        [{"temperature": 0, "repetition_penalty": 1.3, "logprobs": 3}, {"temperature": 0, "logit_bias": {7: 3.0}}],
        [{"temperature": 0.8, "top_k": 20, "seed": seed} for seed in range(11)],
        [{"temperature": 0.8, "top_k": 70, "seed": seed} for seed in range(2)],
    ]
    generator = torch.Generator().manual_seed(6)
    for kinds in several:
        prompts = [tuple(torch.randint(0, 1000, (20 + n,), generator=generator).tolist()) for n in range(11)]
        outputs = []
        for it in (engine, twin):
            requests = [
                Request(prompt_ids=prompt, params=SamplingParams(max_new_tokens=40, ignore_eos=True, **kind))
                for prompt, kind in zip(prompts, kinds, strict=False)
            ]
            sequences = [it.submit(request) for request in requests]
            while it.has_work:
                it.step()
            outputs.append([s.tokens for s in sequences])
        assert outputs[0] == outputs[1], kinds
    assert engine.runner._graphs is not None
    assert twin.runner._graphs is None


def test_graph_logits_are_near_the_plain_ones() -> None:
    from gemcut.engine.cache import CacheShape, PagedCache, Tables
    from gemcut.model.dense import dense_logits

    model = network("bf16", bound=True)
    device = torch.device("cuda", 0)
    with torch.inference_mode():
        cache = PagedCache(model.config, CacheShape(4, 64, 64), torch.bfloat16, device)
        graph = DecodeGraph(model, cache, device, 2, 64)
        ids = torch.randint(0, 1000, (60,), device="cuda")
        want = dense_logits(model, ids)
        tables = Tables(list(range(16))[::-1], list(range(20, 36)))
        cap = 30.0
        worst = 0.0
        for position, token in enumerate(ids.tolist()):
            graph.load([token], [position], [tables])
            graph.launch()
            got = cap * torch.tanh(graph.logits[0] / cap)
            assert graph.take()[0][0] == got.argmax().item()
            worst = max(worst, ((got - want[position]).norm() / want[position].norm()).item())
    assert worst < 0.03
