"""Known ways to get Gemma 2's network wrong, one test each.

Those of text have their tests in tests/text, those of batches and caches in tests/engine, those of checkpoints in
tests/checkpoint and tests/test_config.py; a few more of the network stand in test_attention.py and test_forward.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import apply_rotary_pos_emb

from gemcut.config import FAMILY, SLIDING, GemmaConfig
from gemcut.model import Model
from gemcut.model.dense import dense_logits
from gemcut.model.norm import RMSNorm
from gemcut.model.rope import RotaryTable, rotate
from model.build import in_dtype, our_logits, our_model, random_ids, rms, their_logits
from reference.gemma import reference_logits
from support import hf_model, tiny_config

FP32 = 1e-4
HALF = (torch.bfloat16, torch.float16)


def _first_residual(model: Model, ids: Tensor) -> Tensor:
    """What enters the first layer: the scaled embeddings."""
    seen: list[Tensor] = []
    hook = model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    dense_logits(model, ids)
    hook.remove()
    return seen[0]


@torch.no_grad()
def _set(theirs: Any, ending: str, change: Any) -> None:
    """Replace each parameter of a transformers model whose name ends so by ``change(parameter)``."""
    found = [parameter for name, parameter in theirs.named_parameters() if name.endswith(ending)]
    assert found, ending
    for parameter in found:
        parameter.copy_(change(parameter))


@pytest.mark.parametrize(
    ("hidden_size", "dtype", "scale"),
    [
        (2304, torch.bfloat16, 48.0),
        (3584, torch.bfloat16, 59.75),
        (4608, torch.bfloat16, 68.0),
        (4608, torch.float16, 67.875),
        (3584, torch.float16, 59.875),
        (4608, torch.float32, 67.8822479248046875),
    ],
    ids=str,
)
def test_embedding_scale_is_rounded_to_the_compute_dtype(hidden_size: int, dtype: torch.dtype, scale: float) -> None:
    config = tiny_config(
        hidden_size=hidden_size, intermediate_size=8, num_hidden_layers=1, final_logit_softcapping=None
    )
    theirs, ids = in_dtype(hf_model(config), dtype), random_ids(5)
    ours = _first_residual(our_model(theirs), ids)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs.model.embed_tokens.weight[ids].float() * scale)
    assert torch.equal(ours.to(dtype), theirs.model.embed_tokens(ids))


def test_the_scale_follows_the_compute_dtype_not_the_weight() -> None:
    """An embedding kept in another dtype (fp32 here, int8 when quantized) must not change √d."""
    config = tiny_config(hidden_size=4608, intermediate_size=8, num_hidden_layers=1)
    model, ids = our_model(in_dtype(hf_model(config), torch.bfloat16)), random_ids(5)
    before = _first_residual(model, ids)
    assert model.embed_scale == 68.0
    model.embed.forward = lambda ids: nn.functional.embedding(ids, model.embed.weight.float())  # type: ignore[method-assign]
    assert torch.equal(_first_residual(model, ids), before)


def test_one_plus_w_is_not_rounded_to_bf16() -> None:
    """A final norm of w = 2⁻⁹ raises logits by 0.195 %. In bf16, 1 + 2⁻⁹ is 1 and nothing would change."""
    theirs, ids = in_dtype(hf_model(tiny_config(final_logit_softcapping=None)), torch.bfloat16), random_ids(29)
    _set(theirs, "model.norm.weight", torch.zeros_like)
    plain = our_logits(theirs, ids).double()
    _set(theirs, "model.norm.weight", lambda w: torch.full_like(w, 2.0**-9))
    raised = our_logits(theirs, ids).double()
    slope = (raised * plain).sum() / plain.square().sum()
    assert abs(slope - (1 + 2**-9)) < 5e-4


def test_the_norm_is_computed_in_fp32() -> None:
    """fp16 input whose squares overflow fp16, and a weight that bf16 would round."""
    x = (torch.randn(7, 48) * 20_000).clamp(-65_000, 65_000).half()
    w = torch.randn(48) * 0.01
    norm = RMSNorm(48, 1e-6)
    norm.scale.copy_(1 + w)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + w.double())
    assert norm(x).dtype == torch.float32
    assert (norm(x) - exact).abs().max() < 1e-5


def test_epsilon_stands_inside_the_root() -> None:
    norm, x = RMSNorm(4, 1e-2), torch.full((1, 4), 1e-3)
    assert torch.allclose(norm(x), torch.full((1, 4), 1e-3 / math.sqrt(1e-6 + 1e-2)))


@pytest.mark.parametrize("post_norm", ["post_attention_layernorm.weight", "post_feedforward_layernorm.weight"])
def test_the_residual_is_added_after_the_post_norm(post_norm: str) -> None:
    """Post-norms of w = −1 silence their half of every layer, and leave the residual alone."""
    config = tiny_config()
    theirs, ids = hf_model(config), random_ids(13)
    _set(theirs, post_norm, lambda w: torch.full_like(w, -1.0))
    half_silent = our_logits(theirs, ids)
    silenced = "self_attn.v_proj.weight" if "attention" in post_norm else "mlp.up_proj.weight"
    _set(theirs, silenced, torch.zeros_like)
    assert (our_logits(theirs, ids) - half_silent).abs().max() < 1e-6
    assert (half_silent - their_logits(theirs, ids)).abs().max() < FP32


def test_with_both_post_norms_silent_only_the_embedding_is_left() -> None:
    theirs, ids = hf_model(tiny_config(final_logit_softcapping=None)), random_ids(13)
    for name in ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight"):
        _set(theirs, name, lambda w: torch.full_like(w, -1.0))
    table = theirs.model.embed_tokens.weight.detach().double()
    x = table[ids]
    expected = x / x.square().mean(-1, keepdim=True).sqrt() * (1 + theirs.model.norm.weight.detach().double())
    assert (our_logits(theirs, ids) - expected @ table.T).abs().max() < FP32


def test_query_scale_is_that_of_the_config() -> None:
    """27B scales by 1/12 although its head_dim is 128; doubling the queries and quadrupling the scalar cancel."""
    scales = {name: FAMILY[name].attention_scale for name in ("gemma-2-2b", "gemma-2-9b", "gemma-2-27b")}
    assert scales == {"gemma-2-2b": 1 / 16, "gemma-2-9b": 1 / 16, "gemma-2-27b": 1 / 12}
    theirs, ids = hf_model(tiny_config()), random_ids(13)
    before = our_logits(theirs, ids)
    _set(theirs, "q_proj.weight", lambda w: w * 2)
    assert (our_logits(theirs, ids, query_pre_attn_scalar=96.0) - before).abs().max() < 1e-5
    assert (our_logits(theirs, ids) - before).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_the_future_does_not_leak_through_the_cap(dtype: torch.dtype) -> None:
    """Masked before the cap, −inf becomes −cap, and with a cap of 0.5 every key would get a share of the weight."""
    theirs = in_dtype(hf_model(tiny_config(attn_logit_softcapping=0.5)), dtype)
    ids = random_ids(29)
    other_future = torch.cat((ids[:13], random_ids(16, seed=7)))
    before, after = our_logits(theirs, ids), our_logits(theirs, other_future)
    assert torch.equal(before[:13], after[:13])
    assert (before[13:] - after[13:]).abs().amax(-1).min() > 0.01


def test_scores_beyond_the_cap_are_squashed_not_cut() -> None:
    """Queries 30 times as large push scores far past the cap of 5; the reference says what tanh makes of them."""
    config = tiny_config()
    theirs, ids = hf_model(config), random_ids(29)
    _set(theirs, "q_proj.weight", lambda w: w * 30)
    exact = reference_logits(theirs.state_dict(), config.to_dict(), ids, scale_dtype=torch.float32)
    assert (our_logits(theirs, ids) - exact).abs().max() < FP32


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_the_final_cap_is_applied_in_fp32(dtype: torch.dtype) -> None:
    """A result capped in bf16 would lie on bf16's grid; ours is fp32, inside the cap, and equal to 3·tanh(l/3)."""
    theirs, ids = in_dtype(hf_model(tiny_config()), dtype), random_ids(29)
    capped, raw = our_logits(theirs, ids), our_logits(theirs, ids, final_logit_softcapping=None)
    assert capped.dtype == torch.float32
    assert raw.abs().max() > 6  # the cap bites
    assert capped.abs().max() <= 3
    assert (capped.double() - 3 * torch.tanh(raw.double() / 3)).abs().max() < 1e-6
    assert not torch.equal(capped, capped.to(torch.bfloat16).float())


def _reach(theirs: Any, token: int, length: int) -> list[int]:
    """The rows whose logits change with the ``token``-th id."""
    ids = random_ids(length)
    changed = ids.clone()
    changed[token] = (ids[token] + 1) % 320
    difference = (our_logits(theirs, ids) - our_logits(theirs, changed)).abs().amax(-1)
    return (difference > 1e-5).nonzero().flatten().tolist()


def test_even_layers_slide() -> None:
    for name, layers in (("gemma-2-2b", 26), ("gemma-2-9b", 42), ("gemma-2-27b", 46)):
        with torch.device("meta"):
            model = Model(FAMILY[name])
        windows = [layer.attention.spec.window for layer in model.layers]
        assert windows == [4096, None] * (layers // 2)
    one_layer = hf_model(tiny_config(num_hidden_layers=1, layer_types=None))
    assert _reach(one_layer, 5, 20) == [5, 6, 7, 8]  # layer 0 slides
    two_layers = hf_model(tiny_config(num_hidden_layers=2, layer_types=None))
    assert _reach(two_layers, 5, 20) == list(range(5, 20))  # layer 1 sees everything


@pytest.mark.parametrize("window", [1, 2, 4, 7])
def test_the_window_counts_the_query_itself(window: int) -> None:
    """One sliding layer: token 5 is seen by rows 5 … 5 + W − 1 and by no other; two layers double the reach."""
    one = hf_model(tiny_config(num_hidden_layers=1, sliding_window=window))
    assert _reach(one, 5, 30) == list(range(5, 5 + window))
    two = hf_model(tiny_config(num_hidden_layers=2, sliding_window=window, layer_types=[SLIDING, SLIDING]))
    assert _reach(two, 5, 30) == list(range(5, 5 + 2 * window - 1))


def test_rotary_angles_are_exact_to_the_last_position() -> None:
    """cos and sin within fp32's rounding of the float64 value; fp32 angles would be off by 4e-4 at position 8191."""
    positions = torch.tensor([0, 1, 17, 4095, 4096, 8191])
    cos, sin = RotaryTable(256, 10_000.0, 8192).at(positions)
    angles = positions.double()[:, None] * 10_000.0 ** (-torch.arange(0, 256, 2, dtype=torch.float64) / 256)
    assert cos.dtype == sin.dtype == torch.float32
    assert (cos[:, 0] - angles.cos()).abs().max() < 1e-7
    assert (sin[:, 0] - angles.sin()).abs().max() < 1e-7


def test_angles_do_not_depend_on_what_was_asked_before() -> None:
    """The table grows with the positions; in float64 by NumPy, rounded once, up to the last place."""
    grown = RotaryTable(256, 1_000_000.0, 32_768, 8.0)
    for last in (5, 2047, 2048, 2049, 9_000, 32_767):
        positions = torch.tensor([0, last // 2, last])
        angles = np.outer(positions.numpy() / 8.0, 1_000_000.0 ** -(np.arange(0, 256, 2) / 256))
        cos, sin = grown.at(positions)
        assert np.abs(cos[:, 0].numpy() - np.cos(angles)).max() < 2**-24
        assert np.abs(sin[:, 0].numpy() - np.sin(angles)).max() < 2**-24
    whole = RotaryTable(256, 1_000_000.0, 32_768, 8.0).table(torch.device("cpu"))
    assert torch.equal(grown.table(torch.device("cpu")), whole)
    assert whole.shape == (32_768, 256)


def test_rotation_in_bf16_loses_less_than_with_bf16_angles() -> None:
    """Against float64: ours rotates in fp32 and rounds once; transformers rounds cos and sin to bf16 first."""
    positions = torch.arange(8192)[::64]
    cos, sin = RotaryTable(256, 10_000.0, 8192).at(positions)
    x = torch.randn(len(positions), 2, 256).bfloat16()
    a, b = x.double().chunk(2, dim=-1)
    exact = torch.cat((a * cos.double() - b * sin.double(), b * cos.double() + a * sin.double()), dim=-1)
    wide = [torch.cat((part, part), dim=-1)[:, 0].bfloat16() for part in (cos, sin)]
    theirs, _ = apply_rotary_pos_emb(x, x, *wide)
    ours = rotate(x, cos, sin)
    assert ours.dtype == torch.bfloat16
    assert rms(ours - exact) < 0.8 * rms(theirs - exact)


def _fp16_case(*changes: tuple[str, float]) -> tuple[Any, Tensor, Tensor]:
    """(fp16 transformers model with some weights scaled up, ids, float64 logits of it)."""
    config = tiny_config(num_hidden_layers=4)
    theirs, ids = in_dtype(hf_model(config), torch.float16), random_ids(29)
    for ending, factor in changes:
        _set(theirs, ending, lambda w, factor=factor: w * factor)
    exact = reference_logits(theirs.state_dict(), config.to_dict(), ids, scale_dtype=torch.float16)
    return theirs, ids, exact


FP16_OVERFLOWS = {
    "geglu-product": [("gate_proj.weight", 400.0), ("up_proj.weight", 400.0)],
    "down-projection": [("up_proj.weight", 2000.0), ("down_proj.weight", 200.0)],
    "residual": [("post_feedforward_layernorm.weight", 3e4)],
    "scores": [("q_proj.weight", 2000.0), ("k_proj.weight", 2000.0)],
}


@pytest.mark.parametrize("where", FP16_OVERFLOWS)
def test_fp16_stays_finite_where_naive_fp16_overflows(where: str) -> None:
    """Scaled-up weights overflow fp16 inside transformers; ours stays as near to float64 as bf16 of transformers."""
    theirs, ids, exact = _fp16_case(*FP16_OVERFLOWS[where])
    naive = their_logits(theirs, ids)
    assert torch.isfinite(exact).all()
    assert not torch.isfinite(naive).all() or where == "scores"  # their cap, too, takes inf to 5
    ours = our_logits(theirs, ids)
    assert torch.isfinite(ours).all()
    yardstick = rms(their_logits(in_dtype(theirs, torch.bfloat16), ids) - exact)
    assert rms(ours - exact) < yardstick


def test_fp16_without_overflow_is_as_exact_as_ever() -> None:
    theirs, ids, exact = _fp16_case()
    assert rms(our_logits(theirs, ids) - exact) <= rms(their_logits(theirs, ids) - exact)


def test_the_activation_is_the_tanh_approximation() -> None:
    """The exact GELU differs by 5e-4 at most, which the comparison in fp32 still sees."""
    theirs, ids = hf_model(tiny_config()), random_ids(29)
    assert (our_logits(theirs, ids) - their_logits(theirs, ids)).abs().max() < FP32
    exact_gelu = hf_model(tiny_config())
    for layer in exact_gelu.model.layers:
        layer.mlp.act_fn = nn.GELU(approximate="none")
    assert (our_logits(theirs, ids) - their_logits(exact_gelu, ids)).abs().max() > 3 * FP32


def test_heads_are_as_wide_as_head_dim_says() -> None:
    """27B: d / heads is 144, head_dim is 128. o_proj maps 4096 to 4608, and q, k, v make 8192 rows of 4608."""
    with torch.device("meta"):
        model = Model(FAMILY["gemma-2-27b"])
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes["layers.0.attention.o_proj.weight"] == (4608, 4096)
    assert shapes["layers.0.attention.qkv_proj.weight"] == (8192, 4608)
    assert shapes["layers.0.mlp.gate_up_proj.weight"] == (2 * 36864, 4608)


@pytest.mark.parametrize("name", FAMILY)
def test_the_head_is_the_embedding(name: str) -> None:
    """Nothing of the vocabulary's size is held twice: parameters and bytes are those of the config."""
    config: GemmaConfig = FAMILY[name]
    with torch.device("meta"):
        model = Model(config, dtype=torch.bfloat16)
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    assert sum(t.numel() for t in tensors) == config.num_parameters()
    norms = sum(t.numel() for t in tensors if t.ndim == 1)
    assert sum(t.numel() * t.element_size() for t in tensors) == 2 * config.num_parameters() + 2 * norms
    assert [t for t in tensors if config.vocab_size in t.shape] == [model.embed.weight]
