"""The float64 reference against transformers, before anything of ours is compared with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from reference.gemma import reference_logits
from support import hf_model, tiny_config

IDS = torch.randint(0, 320, (23,), generator=torch.Generator().manual_seed(5))

CASES = {
    "gemma2": lambda: tiny_config(),
    "gemma2-other-parity": lambda: tiny_config(layer_types=["full_attention", "sliding_attention"] * 2),
    "gemma2-no-caps": lambda: tiny_config(attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma2-one-kv-head": lambda: tiny_config(num_key_value_heads=1),
    "gemma3": lambda: tiny_config("gemma3_text", num_hidden_layers=7),
    "gemma3-linear-rope": lambda: _scaled_gemma3(),
}


def _scaled_gemma3() -> Any:
    config = tiny_config("gemma3_text", num_hidden_layers=7)
    config.rope_parameters["full_attention"].update(rope_type="linear", factor=8.0)
    return config


class Float64Everywhere(TorchFunctionMode):
    """Where transformers asks for float32 in so many words (norms, softmax, rotary angles), give it float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        args, kwargs = tuple(map(wide, args)), {k: wide(v) for k, v in (kwargs or {}).items()}
        if func is torch.Tensor.float:
            return args[0].double()
        return func(*args, **kwargs)


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers_computed_in_float64_throughout(case: str) -> None:
    config = CASES[case]()
    previous = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with Float64Everywhere(), torch.no_grad():
            model = hf_model(config, dtype=torch.float64)
            theirs = model(IDS[None]).logits[0]
    finally:
        torch.set_default_dtype(previous)
    ours = reference_logits(model.state_dict(), config.to_dict(), IDS)
    assert theirs.dtype == torch.float64
    assert (ours - theirs).abs().max() < 1e-9


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers_as_it_is(case: str) -> None:
    """``model.double()`` alone: norms, softmax and angles stay float32 in transformers, hence 1e-5 and not 1e-9."""
    config = CASES[case]()
    model = hf_model(config).double()
    with torch.no_grad():
        theirs = model(IDS[None]).logits[0]
    ours = reference_logits(model.state_dict(), config.to_dict(), IDS, scale_dtype=torch.float32)
    assert (ours - theirs).abs().max() < 2e-5


def test_layer_kinds_follow_from_the_family_when_the_config_does_not_list_them() -> None:
    for model_type, layers in (("gemma2", 4), ("gemma3_text", 7)):
        config = tiny_config(model_type, num_hidden_layers=layers)
        listed = config.to_dict()
        unlisted = {key: value for key, value in listed.items() if key != "layer_types"}
        weights = hf_model(config).state_dict()
        assert torch.equal(reference_logits(weights, listed, IDS), reference_logits(weights, unlisted, IDS))
