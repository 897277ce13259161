"""The network against transformers (eager) and against the float64 reference, on tiny random networks.

Tolerance of fp32: both networks round about a hundred times in fp32 (6e-8 each) on values near 10, and errors
measured here are 1e-5 at most, on logits of size 3 (Gemma 2, capped) to 10 (Gemma 3). 1e-4 leaves room for another
CPU's order of summation, and anything wrong in the mathematics moves logits by 1e-2 and more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gemcut.checkpoint.load import load_model_weights
from gemcut.checkpoint.resolve import resolve
from gemcut.model import Model
from gemcut.model.dense import DenseKeyValues, dense_logits
from model.build import in_dtype, our_logits, our_model, random_ids, rms, their_logits
from reference.gemma import reference_logits
from support import hf_model, save_checkpoint, tiny_config

FP32 = 1e-4
SLIDING, FULL = "sliding_attention", "full_attention"

CASES: dict[str, dict[str, Any]] = {
    "gemma2": {},
    "gemma2-odd-layers-slide": {"layer_types": [FULL, SLIDING, FULL, SLIDING]},
    "gemma2-all-slide": {"layer_types": [SLIDING] * 4},
    "gemma2-five-layers": {"num_hidden_layers": 5},
    "gemma2-window-1": {"sliding_window": 1},
    "gemma2-no-caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma2-tight-caps": {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.7},
    "gemma2-one-key-head": {"num_key_value_heads": 1},
    "gemma2-as-many-key-heads": {"num_key_value_heads": 4},
    "gemma2-other-eps-and-theta": {"rms_norm_eps": 1e-2, "rope_theta": 500.0},
    "gemma3": {"model_type": "gemma3_text", "num_hidden_layers": 7},
    "gemma3-linear-rope": {"model_type": "gemma3_text", "num_hidden_layers": 7, "linear_factor": 8.0},
}


def _config(case: str) -> Any:
    values = dict(CASES[case])
    factor = values.pop("linear_factor", None)
    config = tiny_config(**values)
    if factor:
        config.rope_parameters[FULL].update(rope_type="linear", factor=factor)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_fp32_logits_equal_transformers_and_the_reference(case: str) -> None:
    """29 tokens, more than seven windows of 4, three random networks each."""
    config = _config(case)
    for seed in range(3):
        theirs, ids = hf_model(config, seed=seed), random_ids(29, seed=seed)
        ours = our_logits(theirs, ids)
        exact = reference_logits(theirs.state_dict(), config.to_dict(), ids, scale_dtype=torch.float32)
        assert ours.dtype == torch.float32
        assert ours.shape == (29, 320)
        assert (ours - their_logits(theirs, ids)).abs().max() < FP32
        assert (ours - exact).abs().max() < FP32


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 9, 13])
def test_every_length_around_the_window(length: int) -> None:
    theirs, ids = hf_model(tiny_config()), random_ids(length)
    assert (our_logits(theirs, ids) - their_logits(theirs, ids)).abs().max() < FP32


@pytest.mark.parametrize("window", [4, 200, 256, 257, 600])
def test_prompts_longer_than_an_attention_tile(window: int) -> None:
    """Queries are taken 256 at a time; 600 tokens cross two borders of tiles, and windows end on and beside them."""
    config = tiny_config(sliding_window=window, max_position_embeddings=1024)
    theirs, ids = hf_model(config), random_ids(600)
    assert (our_logits(theirs, ids) - their_logits(theirs, ids)).abs().max() < FP32


def test_the_comparison_sees_a_window_that_is_off_by_one() -> None:
    """Window 3 or 5 instead of 4 moves logits by far more than the tolerance, from the first row it concerns on."""
    theirs, ids = hf_model(tiny_config()), random_ids(13)
    right = their_logits(theirs, ids)
    for wrong, first_wrong_row in ((3, 3), (5, 4)):
        difference = (our_logits(theirs, ids, sliding_window=wrong) - right).abs().amax(-1)
        assert difference[:first_wrong_row].max() < FP32
        assert difference[first_wrong_row] > 100 * FP32
        assert difference.max() > 1000 * FP32


def test_the_comparison_sees_each_peculiarity() -> None:
    """The caps bite, the query scale and the parity matter: leaving any of them out would fail the tests above."""
    theirs, ids = hf_model(tiny_config()), random_ids(13)
    right = their_logits(theirs, ids)
    for change in (
        {"attn_logit_softcapping": None},
        {"final_logit_softcapping": None},
        {"query_pre_attn_scalar": 16.0},
        {"layer_types": (FULL, SLIDING, FULL, SLIDING)},
        {"rope_theta": 20_000.0, "rope_local_theta": 20_000.0},
    ):
        assert (our_logits(theirs, ids, **change) - right).abs().max() > 100 * FP32, change


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_error_is_no_larger_than_transformers_own(model_type: str, dtype: torch.dtype) -> None:
    """Both networks hold the same rounded weights; the truth is float64 of these weights.

    Over twelve random networks of 29 tokens: the RMS of all errors together, and the mean of each network's largest
    error (a mean, since the largest of all is one draw of luck). No margin: ours must be at most theirs.
    Ours is the smaller because the residual stream stays fp32.
    """
    config = tiny_config(model_type, num_hidden_layers=7)
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    for seed in range(12):
        model, ids = in_dtype(hf_model(config, seed=seed), dtype), random_ids(29, seed=seed)
        exact = reference_logits(model.state_dict(), config.to_dict(), ids, scale_dtype=dtype)
        ours.append(our_logits(model, ids).double() - exact)
        theirs.append(their_logits(model, ids).double() - exact)
    assert 0 < rms(torch.stack(ours)) <= rms(torch.stack(theirs))
    assert _mean_peak(ours) <= _mean_peak(theirs)


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_a_folder_read_by_the_loader_gives_the_same_network(model_type: str, tmp_path: Path) -> None:
    """Through files and the streaming loader, with names mapped and q, k, v and gate, up fused by it."""
    config = tiny_config(model_type, num_hidden_layers=7)
    theirs, ids = hf_model(config), random_ids(29)
    source = resolve(save_checkpoint(tmp_path, theirs))
    with torch.device("meta"):
        model = Model(source.config(), dtype=torch.float32)
    load_model_weights(model, source.tensors(), dtype=torch.float32, device="cpu")
    assert torch.equal(dense_logits(model, ids), our_logits(theirs, ids))
    assert (dense_logits(model, ids) - their_logits(theirs, ids)).abs().max() < FP32


def test_logits_do_not_depend_on_the_positions_asked_for() -> None:
    """The head takes any rows of the hidden states, so nobody needs [T, V] to get the last row."""
    model, ids = our_model(hf_model(tiny_config())), random_ids(13)
    last_of_whole = dense_logits(model, ids)[-1]
    hidden: list[Tensor] = []
    hook = model.layers[-1].register_forward_hook(lambda module, inputs, output: hidden.append(output[0]))
    dense_logits(model, ids)
    hook.remove()
    with torch.inference_mode():
        assert (model.head(hidden[0][-1:])[0] - last_of_whole).abs().max() < 1e-5


def test_only_the_wanted_rows_are_computed_behind_the_last_attention() -> None:
    """The same rows as of the whole, in any order; the layers before know nothing of it."""
    model, ids = our_model(hf_model(tiny_config())), random_ids(13)
    seen: list[int] = []
    hook = model.layers[-1].mlp.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    positions, wanted = torch.arange(13), torch.tensor([12, 0, 7])
    with torch.inference_mode():
        whole = model(ids, positions, DenseKeyValues(13))
        some = model(ids, positions, DenseKeyValues(13), wanted)
    hook.remove()
    assert seen == [13, 3]
    assert (some - whole[wanted]).abs().max() < 1e-5


def _mean_peak(errors: list[Tensor]) -> float:
    return torch.stack([error.abs().max() for error in errors]).mean().item()
