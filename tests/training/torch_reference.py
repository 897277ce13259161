"""transformers' eager networks, and what makes them compute in float64 throughout, as gradients are compared there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import pytest
import torch

from gemcut.config import GemmaConfig
from gemcut.training.parameters import Tree, build, from_hf


@contextmanager
def all_double(model: Any) -> Iterator[None]:
    """transformers computes norms, angles and softmax in fp32 even in a float64 model; in here it does not."""
    softmax = torch.nn.functional.softmax
    rotary = model.model.rotary_emb
    config = GemmaConfig.from_dict(model.config.to_dict())
    for name, buffer in rotary.named_buffers():
        if name.endswith("inv_freq"):
            theta = config.rope_local_theta if name.startswith("sliding") else config.rope_theta
            half = torch.arange(len(buffer), dtype=torch.float64) / len(buffer)
            setattr(rotary, name, theta**-half)
    table = model.model.embed_tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "embed_scale", torch.tensor(table.scalar_embed_scale, dtype=torch.float64))
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(torch.nn.functional, "softmax", lambda x, dim=-1, dtype=None: softmax(x, dim=dim))
        yield


def tree_of(model: Any, dtype: Any = np.float32) -> tuple[GemmaConfig, Tree]:
    """(config, parameter tree) of a transformers model."""
    config = GemmaConfig.from_dict(model.config.to_dict())
    weights = model.state_dict()
    return config, from_hf(config, lambda name: weights[name].numpy(), dtype)


def gradients_of(model: Any, config: GemmaConfig) -> Tree:
    """The gradients of a transformers model's parameters as a parameter tree."""
    found = dict(model.named_parameters())

    def make(weight: Any) -> Any:
        parts = [weight.from_hf(found[name].grad.numpy()) for name in weight.hf_names()]
        return np.stack(parts) if weight.layers else parts[0]

    return build(config, make)


def relative_errors(ours: Tree, right: Tree) -> dict[str, float]:
    """Norm of the difference by norm of the right value, a leaf each."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(right)[0]:
        mine = ours
        for key in path:
            mine = mine[key.key]
        found[jax.tree_util.keystr(path)] = float(np.linalg.norm(np.asarray(mine) - leaf) / np.linalg.norm(leaf))
    return found
