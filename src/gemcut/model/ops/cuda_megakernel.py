"""All layers of one sequence's decode step in one launch (gemcut.kernels.megakernel.decode_step), for a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from gemcut.config import GemmaConfig
from gemcut.kernels.gpu import gpu_at
from gemcut.kernels.linear.cuda import FewRows, Rows
from gemcut.kernels.megakernel import decode_step
from gemcut.kernels.megakernel.decode_step import DecodeStep, StepCase, StepLayer, StepShape
from gemcut.model.key_values import DecodeBatch
from gemcut.model.ops.cuda import head_norms, table_of

if TYPE_CHECKING:
    from gemcut.model.gemma import Layer, Model


def decode_megakernel(model: Model, batch: DecodeBatch, ids: Tensor, tables: tuple[Tensor, Tensor]) -> DecodeStep | str:
    """The launch; or one line that says why several are needed.

    Args:
        model: its kernels are bound.
        batch: where keys and values are, and the sequence's position.
        ids: int32 [1], the token.
        tables: the block tables int32 [1, most blocks] of full and of sliding layers.
    """
    config, layers = model.config, model.layer_list
    if model.embed.part is not None:
        return "one launch a step takes a network that is whole on its GPU"
    weights = [_weights_of(layer) for layer in layers]
    if any(matrices is None for matrices in weights):
        return "one launch a step takes packed weights or unquantized ones that their own kernels read"
    packed = [matrices for matrices in weights if matrices is not None]
    storages = {decode_step.storage_of(rows) for matrices in packed for rows in matrices}
    if len(storages) != 1:
        return "one launch a step takes layers of one format"
    case = StepCase(step_shape(config), storages.pop(), batch.block_size)
    reason = decode_step.supports(case, gpu_at(ids.device))
    if reason is not None:
        return reason
    bound = []
    for index, (layer, matrices) in enumerate(zip(layers, packed, strict=True)):
        after = layers[index + 1].input_norm if index + 1 < len(layers) else model.norm
        norms = (layer.post_attention_norm, layer.pre_feedforward_norm, layer.post_feedforward_norm, after)
        post, pre, end, following = (module.scale for module in norms)
        q_norm, k_norm = head_norms(layer.attention)
        heads = None if q_norm is None or k_norm is None else (q_norm, k_norm)
        sliding = layer.attention.spec.window is not None
        bound.append(StepLayer(matrices, (post, pre, end, following), heads, batch.storage(index), sliding))
    table, absmax = table_of(model.embed)
    ropes = model.rope_full.table(ids.device), model.rope_sliding.table(ids.device)
    return DecodeStep(
        case.shape, bound, layers[0].input_norm.scale, table, absmax, model.embed_scale,
        ids, batch.positions, tables, ropes,
    )  # fmt: skip


def _weights_of(layer: Layer) -> tuple[Rows, ...] | None:
    """What the layer's qkv, o, gate and up, down read; None where one of them has another kernel."""
    linears = layer.attention.qkv_proj, layer.attention.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj
    found = tuple(linear.kernel.rows for linear in linears if isinstance(linear.kernel, FewRows))
    return found if len(found) == len(linears) else None


def step_shape(config: GemmaConfig) -> StepShape:
    """The network's sizes as the launch takes them."""
    return StepShape(
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.attention_scale,
        config.attn_logit_softcapping,
        config.rms_norm_eps,
        config.sliding_window,
    )
