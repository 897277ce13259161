"""The arithmetic a training step needs, and how much of a chip's peak a run reaches.

Model FLOPs of a token, forward and backward::

    6 · M  +  12 · heads · head_dim · (sum over layers of the keys a query sees, on average)

M counts the parameters that are multiplied: the layers' matrices and the output head. The head shares the
embedding's weights and is counted once; the embedding look-up is no product and counts nothing. A product of M weights
costs 2·M forward (multiply and add) and twice that backward. Attention has two products a layer (scores, values), so
4·heads·head_dim a key forward and three times that in all. A query at position t sees t + 1 keys in a full layer and
min(t + 1, window) in a sliding one: the masked half of the square counts nothing. What rematerialization computes again
counts nothing either, so that a slower program never looks better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gemcut.config import FULL, GemmaConfig
from gemcut.errors import ParameterError

#: Published dense bfloat16 peak of one chip, in FLOP/s (no sparsity), by the words in jax's ``device_kind``.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "A100": 312e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "B200": 2250e12,
}


def multiplied_parameters(config: GemmaConfig) -> int:
    """Parameters a token is multiplied with: every layer's seven matrices and the output head."""
    attention = config.hidden_size * (2 * config.query_size + 2 * config.key_value_size)
    feedforward = 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * (attention + feedforward) + config.vocab_size * config.hidden_size


def average_keys(length: int, window: int | None = None) -> float:
    """Keys that a query sees, averaged over a sequence of ``length`` tokens; ``window`` None means the whole past."""
    w = length if window is None else min(window, length)
    return (w * (w + 1) / 2 + (length - w) * w) / length


def flops_per_token(config: GemmaConfig, length: int, *, document_lengths: Sequence[int] | None = None) -> float:
    """Model FLOPs of one token, forward and backward, in sequences of ``length`` tokens.

    Where sequences are packed and attention stops at a document's border, ``document_lengths`` says how the tokens
    are cut: attention then counts inside documents only. Raises ParameterError for a length below 1.
    """
    lengths = [length] if document_lengths is None else list(document_lengths)
    if not lengths or min(*lengths, length) < 1:
        raise ParameterError(f"sequence length {min([*lengths, length])} is below 1; give the tokens of one sequence")
    tokens = sum(lengths)
    keys = 0.0
    for kind in (FULL, "sliding_attention"):
        layers = sum(1 for k in config.layer_types if k == kind)
        window = None if kind == FULL else config.sliding_window
        keys += layers * sum(n * average_keys(n, window) for n in lengths) / tokens
    return 6.0 * multiplied_parameters(config) + 12.0 * config.query_size * keys


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a chip named as jax names it ("TPU v5p", "NVIDIA H100 80GB HBM3"), None if unknown.

    The longest name that is in ``device_kind`` decides: "TPU v5 lite" is not "TPU v5".
    """
    known = [name for name in PEAK_FLOPS if name.lower() in device_kind.lower()]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def flops_utilization(tokens_per_second: float, token_flops: float, chips: int, peak: float) -> float:
    """Model FLOPs utilization (MFU) between 0 and 1: what the model needed over what ``chips`` could have done."""
    if chips < 1 or not (peak > 0 and math.isfinite(peak)):
        raise ParameterError(f"MFU of {chips} chips of {peak} FLOP/s: expected at least one chip and a positive peak")
    return tokens_per_second * token_flops / (chips * peak)


def days(tokens: float, token_flops: float, chips: int, peak: float, utilization: float) -> float:
    """Days that training on ``tokens`` tokens takes at the given model FLOPs utilization (0 < utilization <= 1)."""
    if not 0 < utilization <= 1:
        raise ParameterError(f"utilization is {utilization}; expected a share of the peak above 0 and at most 1")
    if chips < 1 or not (peak > 0 and math.isfinite(peak)):
        raise ParameterError(f"days on {chips} chips of {peak} FLOP/s: expected at least one chip and a positive peak")
    return tokens * token_flops / (chips * peak * utilization) / 86_400
