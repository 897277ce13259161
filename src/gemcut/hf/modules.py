"""The network as transformers' tree of modules: the names, shapes and numbers of its parameters, to be read.

gemcut keeps q, k, v and gate, up in one matrix each; here each has a module of its own again, whose weight is a view
of those rows and takes no memory. Norms are stored as ``1 + w`` in fp32; here they are ``w`` in the model's dtype, as
in the checkpoint. An embedding in 8 bits is shown dequantized.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemcut.checkpoint.names import LM_HEAD
from gemcut.config import GemmaConfig
from gemcut.errors import UnsupportedError
from gemcut.gemma import Gemma
from gemcut.hf.public_names import MODEL
from gemcut.loading import export_network
from gemcut.quantization.state import to_stored
from gemcut.quantization.weights import CheckpointWeight, FourBitWeight, Int8Weight

Backbone = Callable[..., Any]


class Part(nn.Module):
    """A module that can be looked at: it has parameters and children, and calls no hooks."""

    def forward(self, *args: Any, **options: Any) -> Any:
        """Refused: a part alone is not run here."""
        raise UnsupportedError(
            f"{type(self).__name__} is not run alone: gemcut's layers are fused; call the model, with "
            "output_hidden_states=True for each layer's output"
        )

    def _no_hooks(self, *args: Any, **options: Any) -> NoReturn:
        raise UnsupportedError(f"no hook can be registered: {MODEL['register_forward_hook']}")

    register_forward_hook = register_forward_pre_hook = _no_hooks
    register_full_backward_hook = register_full_backward_pre_hook = register_backward_hook = _no_hooks

    def train(self, mode: bool = True) -> Part:
        """Refused, as for the model."""
        if mode:
            raise UnsupportedError(f"train: {MODEL['zero_grad']}")
        return self

    def load_state_dict(self, *args: Any, **options: Any) -> NoReturn:
        """Refused: the network is fixed."""
        raise UnsupportedError(f"load_state_dict: {MODEL['load_state_dict']}")


class Linear(Part, nn.Linear):
    """A whole matrix: [T, in] -> [T, out] as usual."""

    def __init__(self, weight: Tensor) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = _parameter(weight)
        self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [..., in] -> [..., out]."""
        return F.linear(input, self.weight)


class QuantizedLinear(Part):
    """A quantized matrix under bitsandbytes' names: the packed weight is the parameter, the rest is in the state."""

    def __init__(self, weight: FourBitWeight | Int8Weight) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        stored = to_stored("weight", weight)
        self.weight = _parameter(stored.pop("weight"))
        self._stored = {name.removeprefix("."): tensor for name, tensor in stored.items()}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self._stored.items():
            destination[prefix + name] = tensor


class Embedding(Part, nn.Embedding):
    """The embedding: ids to rows, times √d, which the network computes with."""

    def __init__(self, weight: nn.Parameter, scale: float, padding_idx: int | None) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.weight, self.embed_scale = weight, scale

    def forward(self, input: Tensor) -> Tensor:
        """``input`` int64 [...] -> [..., d]."""
        return F.embedding(input, self.weight) * self.embed_scale


class Norm(Part):
    """A norm's weight ``w``; it scales by ``1 + w``."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = _parameter(weight), eps

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., d], normed in fp32, in its own dtype."""
        return (F.rms_norm(x.float(), x.shape[-1:], None, self.eps) * (1.0 + self.weight.float())).to(x.dtype)


class Attention(Part):
    """q_proj, k_proj, v_proj, o_proj, and in Gemma 3 q_norm, k_norm."""


class MLP(Part):
    """gate_proj, up_proj, down_proj, act_fn."""


class DecoderLayer(Part):
    """One layer: attention, MLP and four norms."""


class Activation(Part):
    """GELU in its tanh form."""

    def forward(self, x: Tensor) -> Tensor:
        """Element by element."""
        return F.gelu(x, approximate="tanh")


class RotaryEmbedding(Part):
    """Rotary positions; nothing is stored."""


class Decoder(Part):
    """The network without its head. Calling it gives the last hidden states."""

    def __init__(self, run: Backbone) -> None:
        super().__init__()
        self._run = run

    def forward(self, *args: Any, **options: Any) -> Any:
        """A `BaseModelOutput`; arguments are those of the whole model."""
        return self._run(*args, **options)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        module: nn.Module = self.get_submodule("embed_tokens")
        return module


class CausalLM(Part):
    """The root of the tree: ``model`` and ``lm_head``."""


def module_tree(gemma: Gemma, run: Backbone) -> CausalLM:
    """The tree of a loaded model. ``run`` computes what calling ``model.model`` gives."""
    config, dtype = gemma.config, gemma.dtype
    weights: dict[str, CheckpointWeight] = dict(export_network(gemma.model))
    root, decoder = CausalLM(), Decoder(run)
    root.add_module("model", decoder)
    table = weights["model.embed_tokens.weight"]
    assert isinstance(table, Tensor)
    shared = _parameter(table)
    padding = config.pad_token_id if isinstance(config.pad_token_id, int) else None
    decoder.add_module("embed_tokens", Embedding(shared, gemma.model.embed_scale, padding))
    decoder.add_module("layers", _layers(config, weights, dtype))
    decoder.add_module("norm", _norm(config, weights, "model.norm.weight"))
    decoder.add_module("rotary_emb", RotaryEmbedding())
    head = Linear(table)
    head.weight = shared  # one parameter under two names, as in transformers
    root.add_module(LM_HEAD.removesuffix(".weight"), head)
    root.eval()
    return root


def _layers(config: GemmaConfig, weights: dict[str, CheckpointWeight], dtype: torch.dtype) -> nn.ModuleList:
    layers = nn.ModuleList()
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        layer, attention, mlp = DecoderLayer(), Attention(), MLP()
        layer.add_module("self_attn", attention)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            attention.add_module(name, _linear(weights[f"{prefix}self_attn.{name}.weight"]))
        for name in ("q_norm", "k_norm") if config.qk_norm else ():
            attention.add_module(name, _norm(config, weights, f"{prefix}self_attn.{name}.weight"))
        layer.add_module("mlp", mlp)
        for name in ("gate_proj", "up_proj", "down_proj"):
            mlp.add_module(name, _linear(weights[f"{prefix}mlp.{name}.weight"]))
        mlp.add_module("act_fn", Activation())
        norms = (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        )
        for name in norms:
            layer.add_module(name, _norm(config, weights, f"{prefix}{name}.weight"))
        layers.append(layer)
    return layers


def _linear(weight: CheckpointWeight) -> nn.Module:
    return QuantizedLinear(weight) if isinstance(weight, (FourBitWeight, Int8Weight)) else Linear(weight)


def _norm(config: GemmaConfig, weights: dict[str, CheckpointWeight], name: str) -> Norm:
    weight = weights[name]
    assert isinstance(weight, Tensor)
    return Norm(weight, config.rms_norm_eps)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
